"""The head's results in fp64, on the inputs as the contenders get them, and errors against them.

The logits exist for a few tokens at a time, so a case of any size has a truth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.head_cases import Inputs
from fastkto import eager
from fastkto_kernels.tiles import spans

_LOGITS_AT_ONCE = 2**25


class Results(NamedTuple):
    """Of one call; gradients of sum(upstream * logprob)."""

    logprob: Tensor  # [N], or the loss
    hidden: Tensor | None = None  # [N, D], gradient
    weight: Tensor | None = None  # [V, D], gradient


def compute_exactly(inputs: Inputs) -> Results:
    """fp64 results with both gradients, on the CPU."""
    options = {"softcap": inputs.shape.softcap, "logit_scale": inputs.shape.logit_scale}
    weight = inputs.weight.detach().double().requires_grad_()
    logprobs, gradients = [], []
    for start, end in spans(len(inputs.target), max(_LOGITS_AT_ONCE // len(weight), 1)):
        hidden = inputs.hidden[start:end].detach().double().requires_grad_()
        scores = eager.linear_logprob(hidden, weight, inputs.target[start:end], **options)
        scores.logprob.backward(inputs.upstream[start:end].double())
        logprobs.append(scores.logprob.detach().cpu())
        gradients.append(hidden.grad.cpu())
    return Results(torch.cat(logprobs), torch.cat(gradients), weight.grad.cpu())


class Errors(NamedTuple):
    """Of one call against the truth."""

    logprob: float  # largest, nats; or of the loss
    hidden: float | None  # norm of the error over the norm of the gradient
    weight: float | None

    def within(self, limits: Errors) -> bool:
        """NaN is not."""
        pairs = zip(self, limits, strict=True)
        return all(error <= limit for error, limit in pairs if error is not None)


def find_errors(results: Results, truth: Results) -> Errors:
    difference = (results.logprob.detach().cpu().double() - truth.logprob).abs()
    return Errors(
        logprob=difference.nan_to_num(nan=float("inf")).max().item(),
        hidden=_relative_error(results.hidden, truth.hidden),
        weight=_relative_error(results.weight, truth.weight),
    )


def _relative_error(ours: Tensor | None, truth: Tensor) -> float | None:
    if ours is None:
        return None
    error = 0.0
    for start, end in spans(len(truth), 4096):
        error += (ours[start:end].cpu().double() - truth[start:end]).square().sum().item()
    return (error / truth.square().sum().item()) ** 0.5
