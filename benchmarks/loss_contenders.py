"""Who computes KTO's loss from hidden states of policy and reference.

A contender takes `Inputs` and returns the loss, a scalar: the mean over sequences of equal length,
every other one desirable, with a given KL estimate.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.head_cases import DEVICE, Inputs, Shape
from benchmarks.head_contenders import (
    MAKERS,
    Maker,
    Score,
    UnavailableError,
    make_fastkto,
    require,
)
from benchmarks.head_truth import Results, compute_exactly
from fastkto import eager, kto_loss

BETA, KL = 0.1, 0.05


def rows_of(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets [B + 1], is_desirable [B], KL estimate)."""
    length, device = inputs.sequence_length, inputs.hidden.device
    offsets = torch.arange(0, len(inputs.target) + 1, length, device=device)
    is_desirable = torch.arange(len(offsets) - 1, device=device) % 2 == 0
    return offsets, is_desirable, torch.tensor(KL, device=device)


def _score_reference(score: Score, inputs: Inputs) -> Tensor:
    """Sums over sequences, [B] fp64."""
    assert inputs.reference is not None
    with torch.no_grad():
        logprob = score(inputs._replace(hidden=inputs.reference))
    return logprob.double().view(-1, inputs.sequence_length).sum(1)


def make_fastkto_loss(shape: Shape) -> Score:
    score = make_fastkto(shape)

    def loss(inputs: Inputs) -> Tensor:
        offsets, is_desirable, kl = rows_of(inputs)
        reference = _score_reference(score, inputs)
        return kto_loss(score(inputs), offsets, reference, is_desirable, kl=kl, beta=BETA).loss

    return loss


def make_plain_loss(make: Maker, shape: Shape) -> Score:
    """The loss in PyTorch, on a peer's log-probabilities."""
    score = make(shape)

    def loss(inputs: Inputs) -> Tensor:
        _, is_desirable, kl = rows_of(inputs)
        logprob = score(inputs).view(-1, inputs.sequence_length).sum(1)
        log_ratio = logprob - _score_reference(score, inputs).float()
        sign = torch.where(is_desirable, 1.0, -1.0)
        return (1 - torch.sigmoid(BETA * sign * (log_ratio - kl))).mean()

    return loss


def make_liger_loss(shape: Shape) -> Score:
    """Its fused loss, which scores the reference's hidden states too."""
    require("liger_kernel", cuda=True)
    if shape.softcap is not None or shape.logit_scale != 1:
        raise UnavailableError("it has neither softcap nor scale")
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    fused = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True, compiled=DEVICE.type == "cuda")

    def loss(inputs: Inputs) -> Tensor:
        _, is_desirable, kl = rows_of(inputs)
        assert inputs.reference is not None
        shape = (len(is_desirable), inputs.sequence_length, -1)
        return fused(
            inputs.hidden.view(shape),
            inputs.weight,
            inputs.target.view(shape[:2]),
            preference_labels=is_desirable,
            ref_input=inputs.reference.view(shape),
            ref_weight=inputs.weight.detach(),
            kl=kl,
        )[0]

    return loss


LOSS_MAKERS: dict[str, Maker] = {
    "fastkto": make_fastkto_loss,
    "TRL": partial(make_plain_loss, MAKERS["TRL"]),
    "full logits": partial(make_plain_loss, MAKERS["full logits"]),
    "Liger KTO loss": make_liger_loss,
}


def compute_loss_exactly(inputs: Inputs) -> Results:
    """fp64 loss in place of the log-probabilities, and the gradients."""
    assert inputs.reference is not None
    no_upstream = torch.zeros_like(inputs.target, dtype=torch.float64)
    policy = inputs._replace(upstream=no_upstream)
    logprob = compute_exactly(policy).logprob.requires_grad_()
    reference = compute_exactly(policy._replace(hidden=inputs.reference)).logprob
    offsets, is_desirable, kl = (tensor.cpu() for tensor in rows_of(inputs))
    reference = reference.view(-1, inputs.sequence_length).sum(1)
    loss = eager.kto_loss(logprob, offsets, reference, is_desirable, kl=kl, beta=BETA).loss
    (upstream,) = torch.autograd.grad(loss, logprob)
    exact = compute_exactly(inputs._replace(upstream=upstream.to(inputs.hidden.device)))
    return exact._replace(logprob=loss.detach())
