"""Inputs for the tests of `linear_logprob`, the error budget of both operations, GPU rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkto.logprob import TokenScores
from fastkto_kernels import gradients, operands, scan
from fastkto_kernels.operands import Operands

# IEEE fp32 products and sums of a few thousand terms; the tests' values are of order 1 to 100.
FP32_FLOOR = 2e-6


def assert_within_budget(
    ours: Tensor, peer: Tensor, truth: Tensor, *, floor: float = FP32_FLOOR
) -> None:
    """Our largest error is at most twice that of PyTorch in the same dtype, plus a floor.

    truth is fp64; floor is relative to the largest true value.
    """
    assert truth.dtype == torch.float64
    assert ours.shape == peer.shape == truth.shape
    error, peer_error = max_error(ours, truth), max_error(peer, truth)
    budget = 2 * peer_error + floor * max(max_error(truth, torch.zeros_like(truth)), 1.0)
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e} (PyTorch: {peer_error:.2e})"


def max_error(ours: Tensor, truth: Tensor) -> float:
    """Largest absolute error, 0 for empty tensors; inf where ours is NaN, which a max may hide."""
    difference = (ours.double() - truth).abs().nan_to_num(nan=float("inf"))
    return max(difference.flatten().tolist(), default=0.0)


def rounding_ratios(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of each row of ours over the error of the rounded truth, [N]."""
    rounded = (truth.to(dtype).double() - truth).norm(dim=1)
    return (ours.double() - truth).norm(dim=1) / rounded


TRANSFORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"logit_scale": 1.5, "softcap": 5.0, "temperature": 0.7},
}


def make_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, *, bias: bool = False
) -> dict[str, Any]:
    """Inputs for (N, D, V): first target 0, last V - 1, every 5th ignored, the rest random."""
    num_rows, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(num_rows + 7 * hidden_size + 31 * vocab_size)

    def normal(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator).to(device, dtype)
        return value.requires_grad_()

    target = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    target[2::5] = -100
    target[:1] = 0
    target[1:][-1:] = vocab_size - 1
    return {
        "hidden": normal(num_rows, hidden_size),
        "weight": normal(vocab_size, hidden_size),
        "bias": normal(vocab_size) if bias else None,
        "target": target.to(device),
    }


def run(
    function: Any, inputs: dict[str, Any], dtype: torch.dtype | None = None, **options: Any
) -> tuple[TokenScores, dict[str, Tensor]]:
    """The scores and the gradients of a weighted sum of log-probabilities, on copies in `dtype`."""
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
        for name, value in inputs.items()
        if value is not None and name != "target"
    }
    scores = function(
        leaves["hidden"],
        leaves["weight"],
        inputs["target"],
        **{name: leaves.get(name) for name in ("bias", "extra_hidden", "extra_weight", "factor")},
        stats=True,
        **options,
    )
    upstream = torch.linspace(-2, 1, scores.logprob.numel(), device=scores.logprob.device)
    scores.logprob.backward(upstream.to(scores.logprob.dtype))
    return scores, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@contextmanager
def tiles_of_16_bits() -> Iterator[None]:
    """The 16-bit tiles of a GPU, with products formed here: shows what rounding costs."""

    def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
        assert left.dtype == right.dtype != torch.float32
        torch.mm(left.float(), right.float(), out=out)

    def multiply_add(total: Tensor, left: Tensor, right: Tensor) -> None:
        assert left.dtype == right.dtype != torch.float32
        total.addmm_(left.float(), right.float())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operands, "matmul_dtype", property(lambda self: self.compute_dtype))
        for module in (operands, scan, gradients):
            patch.setattr(module, "multiply", multiply, raising=False)
            patch.setattr(module, "multiply_add", multiply_add)
        yield
