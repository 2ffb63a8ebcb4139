"""`kto_loss` and `sum_completions` as operators of PyTorch, see `logprob_operator`."""

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastkto.backend import choose_backend, on_its_device


@torch.library.custom_op("fastkto::kto_loss", mutates_args=())
@on_its_device
def kto_loss(
    logprob: Tensor,  # [N] fp32
    offsets: Tensor,  # [B + 1] int64
    reference_logprob: Tensor,  # [B] fp64
    is_desirable: Tensor,  # [B] bool
    kl: Tensor,  # scalar fp64
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    sft_weight: float,
    num_rows: float | None,  # None: B
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, row_loss, row logprob, log_ratio, slope): scalar and [B] fp32, then [B] fp64."""
    _check_offsets(offsets, logprob.shape[0])
    row_loss, row_logprob, log_ratio, slope = _steps(backend, logprob.device).row_losses(
        logprob.contiguous(),
        offsets.contiguous(),
        reference_logprob.contiguous(),
        is_desirable.contiguous(),
        kl,
        beta,
        desirable_weight,
        undesirable_weight,
        sft_weight,
    )
    loss = (row_loss.sum(dtype=torch.float64) / _divisor(num_rows, row_loss)).float()
    return loss, row_loss.float(), row_logprob, log_ratio, slope


@kto_loss.register_fake
def _(logprob: Tensor, offsets: Tensor, reference_logprob: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = reference_logprob.shape
    exact = (logprob.new_empty(rows, dtype=torch.float64) for _ in range(3))
    return logprob.new_empty(()), logprob.new_empty(rows), *exact


@torch.library.custom_op("fastkto::expand_rows", mutates_args=())
@on_its_device
def expand_rows(row_gradient: Tensor, offsets: Tensor, num_tokens: int, backend: str) -> Tensor:
    """Each row's value at each of its tokens, [N] fp32."""
    steps = _steps(backend, row_gradient.device)
    return steps.expand_rows(row_gradient, offsets.contiguous(), num_tokens)


@expand_rows.register_fake
def _(row_gradient: Tensor, offsets: Tensor, num_tokens: int, backend: str) -> Tensor:
    return row_gradient.new_empty(num_tokens)


@torch.library.custom_op("fastkto::sum_completions", mutates_args=())
@on_its_device
def sum_completions(logprob: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Sum of the tokens of each row, [B] fp64."""
    _check_offsets(offsets, logprob.shape[0])
    steps = _steps(backend, logprob.device)
    return steps.sum_rows(logprob.contiguous(), offsets.contiguous())


@sum_completions.register_fake
def _(logprob: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return logprob.new_empty(offsets.shape[0] - 1, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, offsets, *_, num_rows, backend = inputs
    _, *without_gradient, slope = output
    ctx.mark_non_differentiable(*without_gradient, slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(offsets, slope)
    ctx.options = (logprob.shape[0], num_rows, backend)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 11
    offsets, slope = ctx.saved_tensors
    num_tokens, num_rows, backend = ctx.options
    row_gradient = (slope * (grad_loss.double() / _divisor(num_rows, slope))).float()
    return (expand_rows(row_gradient, offsets, num_tokens, backend), *(None,) * 10)


kto_loss.register_autograd(_backward, setup_context=_setup_context)


def _divisor(num_rows: float | None, rows: Tensor) -> float:
    """Worked out here, since `torch.compile` would make a graph for each value of an argument."""
    return max(rows.shape[0], 1) if num_rows is None else num_rows


def _steps(backend: str, device: torch.device) -> ModuleType:
    """The module with the row steps of a backend; Triton is imported only when it is used."""
    return import_module(f"fastkto_kernels.row_steps_{choose_backend(backend, device).name}")


def _check_offsets(offsets: Tensor, num_tokens: int) -> None:
    is_valid = (offsets[0] == 0) & (offsets[-1] == num_tokens) & (offsets.diff() >= 0).all()
    if offsets.device.type == "cuda":
        torch._assert_async(is_valid, f"offsets do not rise from 0 to N={num_tokens}")
    elif not is_valid:
        raise ValueError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}; expected values that never "
            f"fall, from 0 to N={num_tokens}"
        )
