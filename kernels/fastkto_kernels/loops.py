"""The loops over tiles: all logits folded into a state per row, and the gradients from tiles again.

Every tile is recomputed in the backward pass by the same matmul, and one recomputation serves all
gradients. Rows of tokens are the outer loop, so that with a frozen weight the only fp32 total is
that of R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import (
    GRADIENT_UNIT,
    FoldStep,
    GradientStep,
    Operands,
    RowState,
    Scratch,
    ieee_products,
    multiply,
    multiply_add,
    spans,
    tile_shape,
)


def scan_logits(
    operands: Operands, fold: FoldStep, *, stats: bool, bytes_per_logit: int, memory_bytes: int
) -> RowState:
    """The state of all N rows after all V logits: one matmul's worth of work."""
    num_rows, vocab_size = operands.hidden.shape[0], operands.weight.shape[0]
    device = operands.hidden.device
    state = RowState.empty(num_rows, device, stats=stats)
    tile_rows, tile_columns = tile_shape(
        num_rows, vocab_size, bytes_per_logit=bytes_per_logit, memory_bytes=memory_bytes
    )
    scratch = Scratch(tile_rows * tile_columns, torch.float32, device)
    with ieee_products(operands):
        for start, end in spans(num_rows, tile_rows):
            hidden = operands.hidden_rows(start, end)
            for vocab_start, vocab_end in spans(vocab_size, tile_columns):
                tile = scratch.tile(end - start, vocab_end - vocab_start)
                multiply(hidden, operands.weight_rows(vocab_start, vocab_end).t(), tile)
                fold(
                    tile,
                    operands.bias_rows(vocab_start, vocab_end),
                    operands.target[start:end],
                    state.rows(start, end),
                    vocab_start=vocab_start,
                    transform=operands.transform,
                )
    return state


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to; None where not asked for."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


class _Totals:
    """fp32 totals of the gradients over the tiles, and their conversion at the end.

    The tiles hold gradients without the factor that a row has in common (`row_gradient`): it is
    applied to the total of `hidden` row by row, and to the tiles for `weight` and `bias` as a share
    of the largest one, so that a 16-bit tile neither rounds it nor lets it underflow.
    """

    def __init__(self, operands: Operands, row_gradient: Tensor, needs: tuple[bool, ...]) -> None:
        self.operands = operands
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        device = row_gradient.device
        largest = row_gradient.abs().amax() if row_gradient.numel() else row_gradient.sum()
        self.unit = torch.where(largest == 0, 1.0, largest)
        self.row_gradient = row_gradient
        self.row_scale = row_gradient / self.unit
        weight = operands.weight
        self.weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=device)
            if self.needs_weight
            else None
        )
        self.bias = (
            torch.zeros(weight.shape[0], dtype=torch.float32, device=device)
            if self.needs_bias
            else None
        )
        self.hidden = torch.empty_like(operands.hidden) if self.needs_hidden else None

    @property
    def needs_scaled(self) -> bool:
        return self.needs_weight or self.needs_bias

    def add_parameters(self, scaled: Tensor, hidden: Tensor, start: int, end: int) -> None:
        """Add what one tile gives to vocabulary rows start to end of weight and bias."""
        if self.weight is not None:
            multiply_add(self.weight[start:end], scaled.t(), hidden)
        if self.bias is not None:
            self.bias[start:end] += scaled.sum(0, dtype=torch.float32)

    def finish_hidden(self, total: Tensor, start: int, end: int) -> None:
        """Write token rows start to end of the hidden gradient."""
        assert self.hidden is not None
        factor = self.row_gradient[start:end] / GRADIENT_UNIT
        self.hidden[start:end] = total.mul_(factor[:, None])

    def finish(self) -> Gradients:
        """All gradients, rounded once to the dtype of their tensors."""
        factor = self.unit / GRADIENT_UNIT
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight = weight.mul_(factor).to(self.operands.weight.dtype)
        if bias is not None:
            assert self.operands.bias is not None
            bias = bias.mul_(factor).to(self.operands.bias.dtype)
        return Gradients(self.hidden, weight, bias)


def logits_gradients(
    operands: Operands,
    gradient: GradientStep,
    state: RowState,
    row_gradient: Tensor,
    *,
    needs: tuple[bool, bool, bool],
    bytes_per_logit: int,
    memory_bytes: int,
) -> Gradients:
    """Gradients of sum(upstream * logprob) for (hidden, weight, bias), those that `needs` asks for.

    row_gradient: [N] fp32, upstream * (1 - p) * scale / temperature, zero at ignored rows.
    bytes_per_logit: of the backend's own tile; the low-precision tiles are added to it here.
    """
    totals = _Totals(operands, row_gradient, needs)
    num_rows, vocab_size = operands.hidden.shape[0], operands.weight.shape[0]
    device, dtype = operands.hidden.device, operands.matmul_dtype
    num_outputs = int(totals.needs_hidden) + int(totals.needs_scaled)
    tile_rows, tile_columns = tile_shape(
        num_rows,
        vocab_size,
        bytes_per_logit=bytes_per_logit + num_outputs * dtype.itemsize,
        memory_bytes=memory_bytes,
    )
    size = tile_rows * tile_columns
    tile_scratch = Scratch(size, torch.float32, device)
    direction_scratch = Scratch(size, dtype, device) if totals.needs_hidden else None
    scaled_scratch = Scratch(size, dtype, device) if totals.needs_scaled else None

    with ieee_products(operands):
        for start, end in spans(num_rows, tile_rows):
            hidden = operands.hidden_rows(start, end)
            total = torch.zeros(hidden.shape, dtype=torch.float32, device=device)
            for vocab_start, vocab_end in spans(vocab_size, tile_columns):
                weight = operands.weight_rows(vocab_start, vocab_end)
                shape = end - start, vocab_end - vocab_start
                tile = tile_scratch.tile(*shape)
                multiply(hidden, weight.t(), tile)
                direction = direction_scratch.tile(*shape) if direction_scratch else None
                scaled = scaled_scratch.tile(*shape) if scaled_scratch else None
                gradient(
                    tile,
                    operands.bias_rows(vocab_start, vocab_end),
                    operands.target[start:end],
                    state.rows(start, end),
                    vocab_start=vocab_start,
                    transform=operands.transform,
                    row_scale=totals.row_scale[start:end],
                    direction=direction,
                    scaled=scaled,
                )
                if direction is not None:
                    multiply_add(total, direction, weight)
                if scaled is not None:
                    totals.add_parameters(scaled, hidden, vocab_start, vocab_end)
            if totals.needs_hidden:
                totals.finish_hidden(total, start, end)
    return totals.finish()
