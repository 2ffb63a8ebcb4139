"""The operations that are compared: each gives the log-probabilities [N] of the targets.

Zero at ignored positions. No entropy on any side. What only runs on CUDA is left out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.head_cases import DEVICE, Case, Inputs
from fastkto import linear_logprob

TRL_CHUNK = 32_768  # vocabulary entries; what its trainers pass
Contender = Callable[[Inputs, float | None], Tensor]


def fastkto(inputs: Inputs, softcap: float | None) -> Tensor:
    return linear_logprob(*inputs, softcap=softcap).logprob


def full_logits(inputs: Inputs, softcap: float | None) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return -functional.cross_entropy(logits, inputs.target, reduction="none")


@cache
def _compiled_full_logits() -> Contender:
    return torch.compile(full_logits, dynamic=False)


def compiled_full_logits(inputs: Inputs, softcap: float | None) -> Tensor:
    return _compiled_full_logits()(inputs, softcap)


def torch_linear_cross_entropy(inputs: Inputs, softcap: float | None) -> Tensor:
    assert softcap is None
    return -functional.linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, reduction="none"
    )


def trl(inputs: Inputs, softcap: float | None) -> Tensor:
    """As TRL's own head calls it: completion positions alone on CUDA, all elsewhere."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    is_scored = inputs.target != -100
    target = torch.where(is_scored, inputs.target, 0)
    hidden = inputs.hidden
    if DEVICE.type == "cuda":
        hidden, target = hidden[is_scored], target[is_scored]
    settings = (None, target, 1.0, TRL_CHUNK, softcap, 1.0, ("log_probs",))
    logprob = ChunkedLogProbFunction.apply(hidden, inputs.weight, *settings)[0]
    if DEVICE.type == "cuda":
        return torch.zeros_like(is_scored, dtype=logprob.dtype).masked_scatter(is_scored, logprob)
    return torch.where(is_scored, logprob, 0.0)


def liger(inputs: Inputs, softcap: float | None) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    settings = (None, None, -100, 0.0, 0.0, "none", softcap)
    return -LigerFusedLinearCrossEntropyFunction.apply(
        inputs.hidden, inputs.weight, inputs.target, *settings
    )[0]


def cut_cross_entropy(inputs: Inputs, softcap: float | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, softcap=softcap, reduction="none"
    )


def contenders(case: Case) -> dict[str, Contender]:
    """Those that can run `case` here."""
    on_cuda = DEVICE.type == "cuda"
    available = {
        "fastkto": (fastkto, True),
        "full logits": (full_logits, True),
        "full logits, compiled": (compiled_full_logits, True),
        "F.linear_cross_entropy": (
            torch_linear_cross_entropy,
            hasattr(functional, "linear_cross_entropy") and case.shape.softcap is None,
        ),
        "TRL": (trl, find_spec("trl") is not None),
        "Liger": (liger, on_cuda and find_spec("liger_kernel") is not None),
        "Cut Cross-Entropy": (
            cut_cross_entropy,
            on_cuda and find_spec("cut_cross_entropy") is not None,
        ),
    }
    return {name: function for name, (function, can_run) in available.items() if can_run}
