"""Gradients of `linear_logprob` from tiles computed again, once for all gradients asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import Operands, ieee_products, multiply_add
from .scan import Tiles
from .tiles import GRADIENT_UNIT, Steps, spans


class Gradients(NamedTuple):
    """Gradients in the dtype of what they belong to; None where not asked for."""

    hidden: Tensor | None  # [N, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    extra_hidden: Tensor | None  # [N, E]
    extra_weight: Tensor | None  # [V, E]
    factor: Tensor | None  # [V]


class _Total:
    """fp32 sums over tiles for the rows of a gradient at hand; an fp32 gradient is its own sum."""

    def __init__(self, gradient_of: Tensor, factor: Tensor) -> None:
        self.gradient = torch.zeros_like(gradient_of, memory_format=torch.contiguous_format)
        self._factor = factor.expand(self.gradient.shape)  # what is left to multiply a sum by

    def open(self, start: int, end: int) -> None:
        """Begin the sums of these rows."""
        self._start, self._end = start, end
        rows = self.gradient[start:end]
        self._sum = (
            rows if rows.dtype == torch.float32 else torch.zeros_like(rows, dtype=torch.float32)
        )

    def at(self, start: int, end: int) -> Tensor:
        """The sums of some of the open rows, to add to."""
        return self._sum[start - self._start : end - self._start]

    def close(self) -> None:
        """Round the sums to the gradient."""
        rows = slice(self._start, self._end)
        total = self._sum.mul_(self._factor[rows])
        if total.dtype != self.gradient.dtype:
            self.gradient[rows] = total
        del self._sum


class _Totals:
    """The sums of all gradients asked for.

    The tiles hold gradients without the factor that a row has in common (`row_gradient`). The sums
    for tokens get it at their end. In those for the vocabulary it is a factor of the hidden states,
    as a share of the largest one, so that no 16-bit number underflows.

    The vocabulary's factor (`operands.factor`) is common to all terms of a sum for the vocabulary,
    which gets it at its end. For the sums of the tokens it multiplies the tile, as a share of the
    largest one, so that no 16-bit number overflows.
    """

    def __init__(self, operands: Operands, row_gradient: Tensor, needs: tuple[bool, ...]) -> None:
        largest = row_gradient.abs().amax() if row_gradient.numel() else row_gradient.sum()
        unit = torch.where(largest == 0, 1.0, largest)
        self._operands = operands
        self._rows: tuple[int, int] | None = None
        self._scaled_hidden: Tensor | None = None
        self._row_scale = (row_gradient / unit)[:, None]
        of_token, of_entry = row_gradient[:, None] / GRADIENT_UNIT, unit / GRADIENT_UNIT
        of_product = of_entry
        self._tile_factor: Tensor | None = None
        if operands.factor is not None:
            factor = operands.factor.float()
            factor_unit = factor.abs().amax().clamp_min(1.0)
            self._tile_factor = factor / factor_unit
            of_token, of_product = of_token * factor_unit, of_entry * factor[:, None]
        parts = (
            (operands.hidden, of_token),
            (operands.weight, of_product),
            (operands.bias, of_entry),
            (operands.extra_hidden, of_token),
            (operands.extra_weight, of_product),
            (operands.factor, of_entry),
        )
        self._all = tuple(
            _Total(part, factor) if needed and part is not None else None
            for (part, factor), needed in zip(parts, needs, strict=True)
        )
        hidden, weight, bias, extra_hidden, extra_weight, of_factor = self._all
        self.of_tokens = [total for total in (hidden, extra_hidden) if total]
        self.of_vocabulary = [t for t in (weight, bias, extra_weight, of_factor) if t]

    @property
    def vocabulary_outside(self) -> bool:
        """Is it less memory to keep fp32 sums of all tokens than of the whole vocabulary?"""
        return _bytes_of_sums(self.of_tokens) < _bytes_of_sums(self.of_vocabulary)

    def max_columns(self, memory_bytes: int) -> int | None:
        """How many entries' sums fit, where they are kept for a tile's columns at a time."""
        if not self.vocabulary_outside:
            return None
        return memory_bytes * self._operands.weight.shape[0] // _bytes_of_sums(self.of_vocabulary)

    def products(self, tile: Tensor, rows: tuple[int, int]) -> Tensor | None:
        """A copy of a tile without its factor, where the gradient of that is asked for.

        Whatever stands in an ignored row becomes zero.
        """
        if self._all[-1] is None:
            return None
        return torch.where(self._row_scale[slice(*rows)] == 0, 0.0, tile)

    def add(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        direction: Tensor,  # overwritten
        hidden: Tensor,
        weight: Tensor,
        products: Tensor | None,  # overwritten
    ) -> None:
        """Add what one tile gives."""
        operands = self._operands
        of_hidden, of_weight, of_bias, of_extra_hidden, of_extra_weight, of_factor = self._all
        if of_factor and products is not None:
            row_scale = self._row_scale[slice(*rows), 0]
            of_factor.at(*columns).addmv_(products.mul_(direction).t(), row_scale)
        if of_weight:
            if self._rows != rows:  # the same for all tiles of these tokens
                self._rows, self._scaled_hidden = rows, None
                self._scaled_hidden = self._scaled(hidden, rows)
            assert self._scaled_hidden is not None
            multiply_add(of_weight.at(*columns), direction.t(), self._scaled_hidden)
        if of_bias:
            ones = torch.ones_like(direction[:, :1])
            multiply_add(of_bias.at(*columns)[:, None], direction.t(), self._scaled(ones, rows))
        if of_extra_weight and operands.extra_hidden is not None:
            extra_hidden = operands.rounded(operands.extra_hidden[slice(*rows)])
            part = of_extra_weight.at(*columns)
            multiply_add(part, direction.t(), self._scaled(extra_hidden, rows))
        if self._tile_factor is not None and self.of_tokens:
            direction.mul_(self._tile_factor[slice(*columns)])
        if of_hidden:
            multiply_add(of_hidden.at(*rows), direction, weight)
        if of_extra_hidden and operands.extra_weight is not None:
            extra_weight = operands.rounded(operands.extra_weight[slice(*columns)])
            multiply_add(of_extra_hidden.at(*rows), direction, extra_weight)

    def _scaled(self, value: Tensor, rows: tuple[int, int]) -> Tensor:
        """[R, ...] times the row's factor; whatever stands in an ignored row becomes zero."""
        row_scale = self._row_scale[slice(*rows)]
        # Into a tensor of its dtype: there is no fp32 product to be rounded in a second step.
        scaled = torch.mul(value, row_scale, out=torch.empty_like(value))
        return scaled.masked_fill_(row_scale == 0, 0.0)

    def finish(self) -> Gradients:
        """What was summed."""
        return Gradients(*(None if total is None else total.gradient for total in self._all))


def _bytes_of_sums(totals: list[_Total]) -> int:
    """Of all rows, beside the gradients themselves."""
    gradients = (total.gradient for total in totals)
    return sum(4 * g.numel() for g in gradients if g.dtype != torch.float32)


def logits_gradients(
    operands: Operands,
    steps: Steps,
    reference: Tensor,
    other_sum: Tensor,
    row_gradient: Tensor,
    *,
    needs: tuple[bool, bool, bool, bool, bool, bool],
    memory_bytes: int,
) -> Gradients:
    """Gradients of sum(upstream * logprob), of the inputs that `needs` asks for.

    row_gradient: [N] fp32, upstream * (1 - p) * scale / temperature, zero at ignored rows.
    needs: hidden, weight, bias, extra_hidden, extra_weight, factor.
    """
    totals = _Totals(operands, row_gradient, needs)
    num_tokens, vocab_size = operands.hidden.shape[0], operands.weight.shape[0]
    tiles = Tiles(operands, steps, memory_bytes, totals.max_columns(memory_bytes))
    row_spans = list(spans(num_tokens, tiles.num_rows))
    column_spans = list(spans(vocab_size, tiles.num_columns))

    def add_tile(
        rows: tuple[int, int], columns: tuple[int, int], hidden: Tensor, weight: Tensor
    ) -> None:
        tile = tiles.compute(rows, columns, hidden, weight)
        products = totals.products(tile, rows)
        operands.apply_factor(tile, columns)
        direction = tiles.result(tile)
        steps.gradient_tile(
            tile,
            operands.bias_rows(*columns),
            operands.target[slice(*rows)],
            reference[slice(*rows)],
            other_sum[slice(*rows)],
            vocab_start=columns[0],
            transform=operands.transform,
            direction=direction,
        )
        totals.add(rows, columns, direction, hidden, weight, products)

    with ieee_products(operands):
        if totals.vocabulary_outside:
            with _open(totals.of_tokens, (0, num_tokens)):
                for columns in column_spans:
                    weight = operands.weight_rows(*columns)
                    with _open(totals.of_vocabulary, columns):
                        for rows in row_spans:
                            add_tile(rows, columns, operands.hidden_rows(*rows), weight)
                    del weight  # before the next one is made
        else:
            with _open(totals.of_vocabulary, (0, vocab_size)):
                for rows in row_spans:
                    hidden = operands.hidden_rows(*rows)
                    with _open(totals.of_tokens, rows):
                        for columns in column_spans:
                            add_tile(rows, columns, hidden, operands.weight_rows(*columns))
                    del hidden
    return totals.finish()


@contextmanager
def _open(totals: list[_Total], span: tuple[int, int]) -> Iterator[None]:
    for total in totals:
        total.open(*span)
    yield
    for total in totals:
        total.close()
