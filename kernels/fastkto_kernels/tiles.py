"""Tiles of the logits `hidden @ weight.T`, which are never held as a whole.

Dimensions: N tokens, D hidden size, V vocabulary; a tile holds the logits of R of the N tokens and
C of the V vocabulary entries. What happens to a tile is a step that a backend supplies
(`tile_steps_triton`, `tile_steps_torch`); the matmuls are the vendor's,
and the loops over tiles are in `scan` and `gradients`.

The target is left out of every sum and of the running maximum. Its probability p then comes from
the log-odds of the others against it, `1 - p` has no cancellation, and a token that the model is
sure of keeps a correct gradient:

    log_odds = log(sum_{v != y} exp(z_v)) - z_y,   logprob = -softplus(log_odds),
    1 - p = sigmoid(log_odds),   d logprob / d z_v = (1 - p) * ([v == y] - softmax_{v != y}(z)_v).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# exp() of it is zero in fp32, and unlike -inf it may be multiplied by zero.
EXP_FLOOR = -200.0
# Lowest finite fp32: a running maximum that starts here, and not at -inf, needs no special case.
LOWEST_LOGIT = torch.finfo(torch.float32).min
# The reference logit of a row follows the largest one only when it lags by more nats than this:
# a change rescales what was summed before. exp() of it has to fit fp16.
MAX_LAG = 8.0
# Tiles of the gradient hold values up to 1 and those of exponentials up to exp(MAX_LAG); as fp16,
# probabilities of a large vocabulary would be subnormal. Powers of two, so that nothing is rounded.
GRADIENT_UNIT = 4096.0
EXPONENTIAL_UNIT = 16.0
# The weight is read once for so many tokens, which hides its reading behind the products.
MAX_TILE_ROWS = 2048
# A tile that stays in a CPU's cache while it is folded.
MAX_CPU_TILE_ROWS = 1024
MAX_CPU_TILE_LOGITS = 2**20
TILE_MULTIPLE = 128


class LogitTransform(NamedTuple):
    """z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature."""

    scale: float
    softcap: float | None
    temperature: float

    @property
    def factors(self) -> tuple[float, float]:
        """(inner, outer): z = inner * raw, or outer * tanh(inner * raw) with a softcap."""
        if self.softcap is None:
            return self.scale / self.temperature, 1.0
        return self.scale / self.softcap, self.softcap / self.temperature


class RowState(NamedTuple):
    """What the tiles seen so far say about each row; every tensor is [N] fp32 and contiguous."""

    reference: Tensor  # at most MAX_LAG below the largest logit besides the target
    other_sum: Tensor  # sum of exp(logit - reference) over all but the target
    target_logit: Tensor
    target_slope: Tensor  # of the softcap, at the target
    weighted_sum: Tensor | None  # sum of exp(logit - reference) * (logit - reference)
    logit_sum: Tensor | None  # sum of all logits, the target's included

    @classmethod
    def empty(cls, num_rows: int, device: torch.device, *, stats: bool) -> "RowState":
        """The state before the first tile."""

        def zeros() -> Tensor:
            return torch.zeros(num_rows, dtype=torch.float32, device=device)

        return cls(
            reference=torch.full_like(zeros(), LOWEST_LOGIT),
            other_sum=zeros(),
            target_logit=zeros(),
            target_slope=zeros(),
            weighted_sum=zeros() if stats else None,
            logit_sum=zeros() if stats else None,
        )

    def rows(self, start: int, end: int) -> "RowState":
        """Views of the rows from start to end."""
        parts: Any = (None if value is None else value[start:end] for value in self)
        return RowState(*parts)


class FoldStep(Protocol):
    """Folds one tile into the rows' state, in place; may overwrite the tile.

    Where `exponentials` is given it receives unit * exp(z - reference) * tanh'(...), 0 at the
    target; it may be the tile itself. `decay` receives exp(old reference - new reference).
    """

    def __call__(
        self,
        tile: Tensor,  # [R, C] fp32, the raw logits
        bias: Tensor | None,  # [C] fp32
        target: Tensor,  # [R] int64, counted from the start of the whole vocabulary
        state: RowState,  # [R]
        *,
        vocab_start: int,
        transform: LogitTransform,
        decay: Tensor,  # [R] fp32
        exponentials: Tensor | None,  # [R, C] in the matmul's dtype
        unit: float,
    ) -> None: ...


class RescaleStep(Protocol):
    """Multiplies the rows of `total` by `decay`, in place; most factors are 1."""

    def __call__(
        self,
        total: Tensor,  # [R, D] fp32
        decay: Tensor,  # [R] fp32
    ) -> None: ...


class GradientStep(Protocol):
    """Turns one tile into gradients of the raw logits, without what a row has in common.

    direction = GRADIENT_UNIT * ([v == y] - softmax_{v != y}(z)) * tanh'(...), zero where ignored;
    it may be the tile itself.
    """

    def __call__(
        self,
        tile: Tensor,  # [R, C] fp32, the raw logits
        bias: Tensor | None,  # [C] fp32
        target: Tensor,  # [R] int64
        reference: Tensor,  # [R] fp32, of the state after all tiles
        other_sum: Tensor,  # [R] fp32
        *,
        vocab_start: int,
        transform: LogitTransform,
        direction: Tensor,  # [R, C] in the matmul's dtype
    ) -> None: ...


class Steps(Protocol):
    """What a backend's module has."""

    BYTES_PER_LOGIT: int  # of the fp32 tile and the temporaries of its size
    fold_tile: FoldStep
    rescale_rows: RescaleStep
    gradient_tile: GradientStep


def tile_shape(
    num_rows: int,
    vocab_size: int,
    *,
    bytes_per_logit: int,
    memory_bytes: int,
    device_type: str = "cuda",
    max_columns: int | None = None,
) -> tuple[int, int]:
    """(R, C) with R * C * bytes_per_logit <= memory_bytes, as far as one logit fits.

    Depends on shapes alone, never on data. Many rows come first: they are what the weight, which
    is read once for every R rows, is shared between.
    """
    max_rows, max_logits = MAX_TILE_ROWS, max(memory_bytes // bytes_per_logit, 1)
    if device_type == "cpu":
        max_rows, max_logits = MAX_CPU_TILE_ROWS, min(max_logits, MAX_CPU_TILE_LOGITS)
    rows = max(min(num_rows, max_rows, max(max_logits // TILE_MULTIPLE, 1)), 1)
    # A budget too small for wide tiles is spent on squarer ones: short rows waste the matmul.
    while rows > TILE_MULTIPLE and max_logits // rows < min(vocab_size, rows):
        rows = (rows + 1) // 2
    columns = max(max_logits // rows, 1)
    if max_columns is not None:
        columns = min(columns, max(max_columns, TILE_MULTIPLE))
    if columns > TILE_MULTIPLE:
        columns -= columns % TILE_MULTIPLE
    return rows, min(columns, max(vocab_size, 1))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive blocks of at most `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


class Scratch:
    """One buffer for the tiles of a loop; a tile is a contiguous view of its start."""

    def __init__(self, num_logits: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(num_logits, dtype=dtype, device=device)

    def tile(self, num_rows: int, num_columns: int) -> Tensor:
        """[num_rows, num_columns], contents undefined."""
        return self._buffer[: num_rows * num_columns].view(num_rows, num_columns)
