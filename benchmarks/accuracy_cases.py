"""The regimes of the accuracy table, and how far a contender is from fp64 in them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.head_cases import DEVICE, SEED, Inputs, Shape
from benchmarks.head_contenders import Score
from benchmarks.head_measure import call
from benchmarks.head_truth import Results

DTYPE = torch.bfloat16


class Size(NamedTuple):
    """Of every regime; the sums are over all tokens."""

    tokens: int
    with_gradient: int  # of them, evenly spaced: products of bf16 are slow on a CPU
    hidden: int
    vocabulary: int


FULL_SIZE = Size(10_000, 1_000, 128, 8_192)


class Regime(NamedTuple):
    """How sure the model is of the targets."""

    spread: float  # standard deviation of the logits, before they are scaled
    # Component of the hidden state along the target's weight: of the first token, of the last.
    confidence: tuple[float, float] = (0.0, 0.0)
    softcap: float | None = None
    logit_scale: float = 1.0


REGIMES = {
    "flat": Regime(0.3),
    "mixed": Regime(2.5, (0.0, 6.0)),
    "confident": Regime(2.5, (6.0, 8.5)),
    "almost certain": Regime(2.5, (8.5, 11.0)),
    "softcap 30": Regime(6.0, (0.0, 4.0), softcap=30.0),
    "scale 1/16": Regime(20.0, (0.0, 10.0), logit_scale=0.0625),
}


def make_regime(regime: Regime, size: Size) -> Inputs:
    """bf16 inputs on `DEVICE`, without gradients; the incoming gradient has both signs."""
    generator = torch.Generator().manual_seed(SEED)
    num_tokens, _, hidden_size, vocab_size = size
    weight = torch.randn(vocab_size, hidden_size, generator=generator)
    weight *= regime.spread / hidden_size**0.5
    target = torch.randint(vocab_size, (num_tokens,), generator=generator)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    direction = torch.nn.functional.normalize(weight[target], dim=1)
    confidence = torch.linspace(*regime.confidence, num_tokens)
    hidden += (confidence - (hidden * direction).sum(1))[:, None] * direction
    upstream = torch.rand(num_tokens, generator=generator) + 0.5
    upstream *= 2 * torch.randint(2, (num_tokens,), generator=generator) - 1
    return Inputs(
        hidden=hidden.to(DEVICE, DTYPE),
        weight=weight.to(DEVICE, DTYPE),
        target=target.to(DEVICE),
        upstream=(upstream / num_tokens).to(DEVICE),
        shape=Shape(hidden_size, vocab_size, regime.softcap, regime.logit_scale),
    )


class Accuracy(NamedTuple):
    """Errors against fp64: log-probabilities in nats, gradients over what rounding them costs."""

    largest: float
    rms: float
    sum: float  # of all tokens' log-probabilities, summed in fp64
    hidden_median: float  # of tokens, with a frozen head
    hidden_largest: float
    weight: float  # of the whole gradient, with a trainable head


def every(step: int, inputs: Inputs) -> Inputs:
    """Every `step`-th token."""
    return inputs._replace(
        hidden=inputs.hidden[::step],
        target=inputs.target[::step],
        upstream=inputs.upstream[::step],
    )


def measure_accuracy(
    score: Score, inputs: Inputs, truth: Results, some: Inputs, some_truth: Results
) -> Accuracy:
    """Log-probabilities of all `inputs`, gradients of `some` of them."""
    error = call(score, inputs).logprob.cpu().double() - truth.logprob
    frozen = call(score, _with_gradients(some, weight=False)).hidden
    trainable = call(score, _with_gradients(some, weight=True)).weight
    true_hidden, true_weight = some_truth.hidden, some_truth.weight
    assert frozen is not None and trainable is not None
    assert true_hidden is not None and true_weight is not None
    size = true_hidden.norm(dim=1)
    ratios = _over_rounding(frozen, true_hidden)[size > 1e-6 * size.max()]
    weight = _over_rounding(trainable.flatten()[None], true_weight.flatten()[None])
    return Accuracy(
        largest=error.abs().max().item(),
        rms=error.square().mean().sqrt().item(),
        sum=abs(error.sum().item()),
        hidden_median=ratios.median().item(),
        hidden_largest=ratios.max().item(),
        weight=weight.item(),
    )


def _with_gradients(inputs: Inputs, *, weight: bool) -> Inputs:
    return inputs._replace(
        hidden=inputs.hidden.detach().requires_grad_(),
        weight=inputs.weight.detach().requires_grad_(weight),
    )


def _over_rounding(ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Error of each row over that of the rounded truth."""
    rounding = (truth.to(DTYPE).double() - truth).norm(dim=1)
    return (ours.cpu().double() - truth).norm(dim=1) / rounding
