"""Tiles of the logits `hidden @ weight.T`, which are never held as a whole.

Dimensions: N tokens, D hidden size, V vocabulary; a tile holds the logits of R of the N tokens and
C of the V vocabulary entries. What happens to a tile is a step that a backend supplies
(`linear_logprob` in Triton, `linear_logprob_torch` in PyTorch); the matmuls are the vendor's,
and the loops are in `loops`.

The target is left out of every sum and of the running maximum. Its probability p then comes from
the log-odds of the others against it, `1 - p` has no cancellation, and a token that the model is
sure of keeps a correct gradient:

    log_odds = log(sum_{v != y} exp(z_v)) - z_y,   logprob = -softplus(log_odds),
    1 - p = sigmoid(log_odds),   d logprob / d z_v = (1 - p) * ([v == y] - softmax_{v != y}(z)_v).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# exp() of it is zero in fp32, and unlike -inf it may be multiplied by zero.
EXP_FLOOR = -200.0
# Lowest finite fp32: a running maximum that starts here, and not at -inf, needs no special case.
LOWEST_LOGIT = torch.finfo(torch.float32).min
# Tiles of the gradient hold values up to 1; as fp16, probabilities of a large vocabulary would be
# subnormal. A power of two, so that nothing is rounded.
GRADIENT_UNIT = 4096.0
MAX_TILE_ROWS = 4096
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

    other_max: Tensor  # largest logit besides the target
    other_sum: Tensor  # sum of exp(logit - other_max) over all but the target
    target_logit: Tensor
    weighted_sum: Tensor | None  # sum of exp(logit - other_max) * (logit - other_max)
    logit_sum: Tensor | None  # sum of all logits, the target's included

    @classmethod
    def empty(cls, num_rows: int, device: torch.device, *, stats: bool) -> "RowState":
        """The state before the first tile."""

        def zeros() -> Tensor:
            return torch.zeros(num_rows, dtype=torch.float32, device=device)

        return cls(
            other_max=torch.full_like(zeros(), LOWEST_LOGIT),
            other_sum=zeros(),
            target_logit=zeros(),
            weighted_sum=zeros() if stats else None,
            logit_sum=zeros() if stats else None,
        )

    def rows(self, start: int, end: int) -> "RowState":
        """Views of the rows from start to end."""
        return RowState(
            other_max=self.other_max[start:end],
            other_sum=self.other_sum[start:end],
            target_logit=self.target_logit[start:end],
            weighted_sum=None if self.weighted_sum is None else self.weighted_sum[start:end],
            logit_sum=None if self.logit_sum is None else self.logit_sum[start:end],
        )


class FoldStep(Protocol):
    """Folds one tile into the rows' state, in place; may overwrite the tile."""

    def __call__(
        self,
        tile: Tensor,  # [R, C] fp32, hidden @ weight.T
        bias: Tensor | None,  # [C] fp32
        target: Tensor,  # [R] int64, counted from the start of the whole vocabulary
        state: RowState,  # [R]
        *,
        vocab_start: int,
        transform: LogitTransform,
    ) -> None: ...


class GradientStep(Protocol):
    """Turns one tile into gradients of the raw logits, written to `direction` and `scaled`.

    direction = GRADIENT_UNIT * ([v == y] - softmax_{v != y}(z)) * tanh'(...), zero where ignored
    scaled = direction * row_scale; may overwrite the tile.
    """

    def __call__(
        self,
        tile: Tensor,  # [R, C] fp32
        bias: Tensor | None,  # [C] fp32
        target: Tensor,  # [R] int64
        state: RowState,  # [R]
        *,
        vocab_start: int,
        transform: LogitTransform,
        row_scale: Tensor,  # [R] fp32, within [-1, 1]
        direction: Tensor | None,  # [R, C] in the matmul's dtype
        scaled: Tensor | None,  # [R, C] in the matmul's dtype
    ) -> None: ...


class Operands(NamedTuple):
    """The inputs of the operation as the tile loops need them."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64; a negative target is ignored
    compute_dtype: torch.dtype  # hidden and weight are rounded to it before they are multiplied
    transform: LogitTransform

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The compute dtype where a matmul takes it and returns fp32 (CUDA, ROCm), else fp32."""
        return self.compute_dtype if self.hidden.device.type == "cuda" else torch.float32

    def hidden_rows(self, start: int, end: int) -> Tensor:
        """[R, D] rows in the dtype of the matmul."""
        return self.hidden[start:end].to(self.compute_dtype).to(self.matmul_dtype)

    def weight_rows(self, start: int, end: int) -> Tensor:
        """[C, D] rows in the dtype of the matmul."""
        return self.weight[start:end].to(self.compute_dtype).to(self.matmul_dtype)

    def bias_rows(self, start: int, end: int) -> Tensor | None:
        """[C] fp32, contiguous."""
        if self.bias is None:
            return None
        return self.bias[start:end].to(self.compute_dtype).float().contiguous()


def tile_shape(
    num_rows: int, vocab_size: int, *, bytes_per_logit: int, memory_bytes: int
) -> tuple[int, int]:
    """(R, C) with R * C * bytes_per_logit <= memory_bytes, as far as one logit fits.

    Depends on shapes alone, never on data. Many rows come first: they are what the weight, which
    is read once for every R rows, is shared between.
    """
    max_logits = max(memory_bytes // bytes_per_logit, 1)
    rows = max(min(num_rows, MAX_TILE_ROWS, max(max_logits // TILE_MULTIPLE, 1)), 1)
    # A budget too small for wide tiles is spent on squarer ones: short rows waste the matmul.
    while rows > TILE_MULTIPLE and max_logits // rows < min(vocab_size, rows):
        rows = (rows + 1) // 2
    columns = max(max_logits // rows, 1)
    if columns > TILE_MULTIPLE:
        columns -= columns % TILE_MULTIPLE
    return rows, min(columns, max(vocab_size, 1))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive blocks of at most `step`."""
    for start in range(0, length, step):
        yield start, min(start + step, length)


@contextmanager
def ieee_products(operands: Operands) -> Iterator[None]:
    """fp32 matmuls on CUDA multiply in IEEE fp32 inside, whatever the process allows elsewhere.

    TF32 keeps 11 bits of each factor, which is about what bf16 logits would lose.
    """
    if operands.matmul_dtype != torch.float32 or operands.hidden.device.type != "cuda":
        yield
        return
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, with fp32 out and fp32 accumulation."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def multiply_add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with fp32 total and fp32 accumulation."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


class Scratch:
    """One buffer for the tiles of a loop; a tile is a contiguous view of its start."""

    def __init__(self, num_logits: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = torch.empty(num_logits, dtype=dtype, device=device)

    def tile(self, num_rows: int, num_columns: int) -> Tensor:
        """[num_rows, num_columns], contents undefined."""
        return self._buffer[: num_rows * num_columns].view(num_rows, num_columns)
