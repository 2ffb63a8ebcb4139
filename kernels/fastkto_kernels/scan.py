"""The sweep over all tiles of the logits: each row's state, and a frozen head's gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from .operands import Operands, ieee_products, multiply, multiply_add
from .tiles import EXPONENTIAL_UNIT, RowState, Scratch, Steps, spans, tile_shape


class Direction(NamedTuple):
    """d logprob / d raw hidden state over 1 - p, without the logits' scale; zero where ignored.

    It is `value * scale[:, None]`. Within a row's scale fp16 holds as much as bf16 does, with three
    bits more, so that a bf16 gradient has little more than its own rounding.
    """

    value: Tensor  # [N, D] in `direction_dtype`
    scale: Tensor  # [N] fp32, powers of two

    @staticmethod
    def empty(operands: Operands) -> "Direction":
        hidden = operands.hidden
        dtype = direction_dtype(operands.compute_dtype)
        value = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
        return Direction(value, hidden.new_empty(hidden.shape[0], dtype=torch.float32))

    def store(self, rows: tuple[int, int], total: Tensor) -> None:
        """Round `total`, [R, D] fp32, which is scaled in place."""
        largest = torch.linalg.vector_norm(total, float("inf"), dim=1)
        # The largest is below 2^15 then, and fp16 keeps all its bits down to 2^-14.
        exponent = (torch.frexp(largest).exponent - 15).clamp(-112, 113).float()
        self.scale[slice(*rows)] = exponent.exp2()
        self.value[slice(*rows)] = total.mul_((-exponent).exp2()[:, None])


def direction_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if compute_dtype == torch.bfloat16 else compute_dtype


class Scan(NamedTuple):
    """What one sweep over the vocabulary gives."""

    state: RowState  # [N]
    direction: Direction | None  # of the hidden states' gradient, if asked for


def scan_logits(
    operands: Operands, steps: Steps, *, stats: bool, with_direction: bool, memory_bytes: int
) -> Scan:
    """The state of all N rows after all V logits, and the direction of the hidden gradient.

    One matmul's worth of work, two with the direction. Both are the same to the bit in all that
    they have in common. There is no direction of logits with a factor.
    """
    assert not with_direction or operands.factor is None
    num_rows, vocab_size = operands.hidden.shape[0], operands.weight.shape[0]
    device = operands.hidden.device
    state = RowState.empty(num_rows, device, stats=stats)
    direction = Direction.empty(operands) if with_direction else None
    tiles = Tiles(operands, steps, memory_bytes)

    def scan_tile(
        rows: tuple[int, int], columns: tuple[int, int], hidden: Tensor, total: Tensor | None
    ) -> None:
        weight = operands.weight_rows(*columns)
        tile = tiles.compute(rows, columns, hidden, weight)
        operands.apply_factor(tile, columns)
        decay = torch.empty(hidden.shape[0], dtype=torch.float32, device=device)
        exponentials = None if total is None else tiles.result(tile)
        steps.fold_tile(
            tile,
            operands.bias_rows(*columns),
            operands.target[slice(*rows)],
            state.rows(*rows),
            vocab_start=columns[0],
            transform=operands.transform,
            decay=decay,
            exponentials=exponentials,
            unit=_exponential_unit(operands),
        )
        if total is None or exponentials is None:
            return
        if columns[0] == 0:
            multiply(exponentials, weight, total)
        else:
            steps.rescale_rows(total, decay)
            multiply_add(total, exponentials, weight)

    with ieee_products(operands):
        for rows in spans(num_rows, tiles.num_rows):
            hidden, total = operands.hidden_rows(*rows), None
            if direction is not None:
                total = torch.empty(hidden.shape, dtype=torch.float32, device=device)
            for columns in spans(vocab_size, tiles.num_columns):
                scan_tile(rows, columns, hidden, total)
            if direction is not None and total is not None:
                direction.store(rows, _finish_direction(operands, state, rows, total))
            del hidden, total  # before the next ones are made
    return Scan(state, direction)


def _exponential_unit(operands: Operands) -> float:
    return EXPONENTIAL_UNIT if operands.matmul_dtype == torch.float16 else 1.0


def _finish_direction(
    operands: Operands, state: RowState, rows: tuple[int, int], total: Tensor
) -> Tensor:
    """slope_y * W[y] - total / sum, [R, D] fp32, in place of the total of exp(z) * W."""
    state, target = state.rows(*rows), operands.target[slice(*rows)]
    # At least 1, its first term, except in a vocabulary of the target alone.
    other_sum = state.other_sum.clamp_min(1.0) * _exponential_unit(operands)
    total.div_(-other_sum[:, None])
    target_weight = operands.rounded(operands.weight.index_select(0, target.clamp_min(0)))
    total.addcmul_(state.target_slope[:, None], target_weight.float())
    return total.masked_fill_((target < 0)[:, None], 0.0)


class Tiles:
    """The buffers of a loop, and the shape of its tiles."""

    def __init__(
        self, operands: Operands, steps: Steps, memory_bytes: int, max_columns: int | None = None
    ) -> None:
        self._operands = operands
        dtype, device = operands.matmul_dtype, operands.hidden.device
        needs_result, needs_copy = dtype != torch.float32, operands.factor is not None
        self.num_rows, self.num_columns = tile_shape(
            operands.hidden.shape[0],
            operands.weight.shape[0],
            # counted where it is not needed too: a sweep has the same tiles with and without
            bytes_per_logit=steps.BYTES_PER_LOGIT + needs_result * dtype.itemsize + 4 * needs_copy,
            memory_bytes=memory_bytes,
            device_type=device.type,
            max_columns=max_columns,
        )
        size = self.num_rows * self.num_columns
        self._logits = Scratch(size, torch.float32, device)
        self._result = Scratch(size, dtype, device) if needs_result else None

    def compute(
        self, rows: tuple[int, int], columns: tuple[int, int], hidden: Tensor, weight: Tensor
    ) -> Tensor:
        """[R, C] fp32 raw logits without the factor and without the bias."""
        tile = self._logits.tile(hidden.shape[0], weight.shape[0])
        self._operands.raw_logits(rows, columns, hidden, weight, tile)
        return tile

    def result(self, tile: Tensor) -> Tensor:
        """[R, C] in the matmul's dtype, for what becomes of the tile: itself where it is fp32."""
        return tile if self._result is None else self._result.tile(*tile.shape)
