"""Who computes log-probabilities of targets from hidden states: fastkto and its peers.

A contender takes `Inputs` and returns [N] log-probabilities, 0 where the target is -100. Each does
what its own callers do with tokens that have no target. None computes an entropy. Packages are
imported by the contender that needs them alone: some change others as they load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.head_cases import DEVICE, Inputs, Shape
from fastkto import linear_logprob

Score = Callable[[Inputs], Tensor]
Maker = Callable[[Shape], Score]


class UnavailableError(Exception):
    """The contender cannot run such a head here; the message says why."""


def require(package: str, *, cuda: bool = False) -> None:
    if find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")
    if cuda and DEVICE.type != "cuda":
        raise UnavailableError("its kernels need a CUDA device")


def _refuse_scale(shape: Shape) -> None:
    if shape.logit_scale != 1:
        raise UnavailableError("it has no scale of the logits")


def make_fastkto(shape: Shape) -> Score:
    def score(inputs: Inputs) -> Tensor:
        options = {"softcap": shape.softcap, "logit_scale": shape.logit_scale}
        return linear_logprob(*inputs[:3], **options).logprob

    return score


def full_logits(inputs: Inputs) -> Tensor:
    """As a model's forward and a trainer do: logits in the compute dtype, log-softmax in fp32."""
    logits, shape = inputs.hidden @ inputs.weight.T, inputs.shape
    if shape.logit_scale != 1:
        logits = logits * shape.logit_scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    index = inputs.target.clamp_min(0)
    logprob = logits.float().log_softmax(-1).gather(1, index[:, None])[:, 0]
    return torch.where(inputs.target >= 0, logprob, 0.0)


def make_full_logits(shape: Shape) -> Score:
    return full_logits


def make_compiled(shape: Shape) -> Score:
    if shape.vocabulary < 1000:
        raise UnavailableError("compiling takes longer than so small a head is worth")
    torch.compiler.reset()  # too many shapes in one process, and it would silently run uncompiled
    return torch.compile(full_logits, dynamic=False)


def make_torch_fused(shape: Shape) -> Score:
    """PyTorch's own, in chunks; its caller gives it every position."""
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError("this PyTorch has no linear_cross_entropy; 2.13 has")
    if shape.softcap is not None:
        raise UnavailableError("it has no softcap")
    _refuse_scale(shape)
    # Of a few tokens if it chooses them itself, which on a CPU takes several times as long.
    chunk = None if DEVICE.type == "cuda" else 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def score(inputs: Inputs) -> Tensor:
        hidden, weight, target = inputs[:3]
        return -functional.linear_cross_entropy(
            hidden, weight, target, reduction="none", options=options
        ).float()

    return score


def make_trl(shape: Shape) -> Score:
    """As `trl.trainer.utils.add_fused_lm_head` calls it."""
    require("trl")
    require("datasets")  # which TRL may lack, and imports
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def score(inputs: Inputs) -> Tensor:
        hidden, weight, target = inputs[:3]
        mask = target != -100
        # Only where it has Triton are positions without a target left out.
        compact = _use_triton(hidden.device)
        logprob = ChunkedLogProbFunction.apply(
            hidden[mask] if compact else hidden,
            weight,
            None,
            target[mask] if compact else target.clamp(min=0),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            shape.softcap,
            shape.logit_scale,
            ("log_probs",),
        )[0]
        if compact:
            return logprob.new_zeros(mask.shape).masked_scatter(mask, logprob)
        return logprob.masked_fill(~mask, 0)

    return score


def make_liger(shape: Shape) -> Score:
    require("liger_kernel", cuda=True)
    _refuse_scale(shape)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def score(inputs: Inputs) -> Tensor:
        hidden, weight, target = inputs[:3]
        return -liger_fused_linear_cross_entropy(
            hidden, weight, target, reduction="none", softcap=shape.softcap
        ).float()

    return score


def make_cut_cross_entropy(shape: Shape) -> Score:
    require("cut_cross_entropy", cuda=True)
    _refuse_scale(shape)
    from cut_cross_entropy import linear_cross_entropy

    def score(inputs: Inputs) -> Tensor:
        hidden, weight, target = inputs[:3]
        return -linear_cross_entropy(
            hidden, weight, target, softcap=shape.softcap, reduction="none"
        ).float()

    return score


MAKERS: dict[str, Maker] = {
    "fastkto": make_fastkto,
    "TRL": make_trl,
    "full logits": make_full_logits,
    "compiled full logits": make_compiled,
    "torch linear_cross_entropy": make_torch_fused,
    "Liger": make_liger,
    "Cut Cross-Entropy": make_cut_cross_entropy,
}


def make_contenders(
    shape: Shape, makers: Mapping[str, Maker] = MAKERS
) -> tuple[dict[str, Score], dict[str, str]]:
    """(those that can run such a head here, why the others cannot)."""
    scores, skipped = {}, {}
    for name, make in makers.items():
        try:
            scores[name] = make(shape)
        except UnavailableError as reason:
            skipped[name] = str(reason)
    return scores, skipped
