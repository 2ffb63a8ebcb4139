"""The inputs of `linear_logprob` as its loops multiply them, and the products themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import LogitTransform


class Operands(NamedTuple):
    """The inputs of the operation as the tile loops need them.

    raw logits = factor * (hidden @ weight.T + extra_hidden @ extra_weight.T) + bias
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    extra_hidden: Tensor | None  # [N, E]
    extra_weight: Tensor | None  # [V, E]
    target: Tensor  # [N] int64; a negative target is ignored
    compute_dtype: torch.dtype  # what is multiplied is rounded to it before
    transform: LogitTransform
    factor: Tensor | None = None  # [V], never rounded

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The compute dtype where a matmul takes it and returns fp32 (CUDA, ROCm), else fp32."""
        return self.compute_dtype if self.hidden.device.type == "cuda" else torch.float32

    def rounded(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is multiplied."""
        return tensor.to(self.compute_dtype).to(self.matmul_dtype)

    def hidden_rows(self, start: int, end: int) -> Tensor:
        """[R, D] rows in the dtype of the matmul."""
        return self.rounded(self.hidden[start:end])

    def weight_rows(self, start: int, end: int) -> Tensor:
        """[C, D] rows in the dtype of the matmul."""
        return self.rounded(self.weight[start:end])

    def bias_rows(self, start: int, end: int) -> Tensor | None:
        """[C] fp32, contiguous."""
        if self.bias is None:
            return None
        return self.bias[start:end].to(self.compute_dtype).float().contiguous()

    def rows(self, index: Tensor) -> "Operands":
        """The same for some of the tokens, copied."""
        extra = self.extra_hidden
        return self._replace(
            hidden=self.hidden.index_select(0, index),
            extra_hidden=None if extra is None else extra.index_select(0, index),
            target=self.target.index_select(0, index),
        )

    def raw_logits(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        hidden: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> None:
        """Write the tile of `rows` and `columns`, without the factor and without the bias."""
        multiply(hidden, weight.t(), out)
        if self.extra_hidden is not None and self.extra_weight is not None:
            extra_hidden = self.rounded(self.extra_hidden[slice(*rows)])
            multiply_add(out, extra_hidden, self.rounded(self.extra_weight[slice(*columns)]).t())

    def apply_factor(self, tile: Tensor, columns: tuple[int, int]) -> None:
        """Multiply the columns of the tile, in place; the steps add the bias to that."""
        if self.factor is not None:
            tile.mul_(self.factor[slice(*columns)].float())


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
