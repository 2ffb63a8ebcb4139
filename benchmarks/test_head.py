"""Time of the head operation, forward and backward: fastkto, PyTorch with full logits, and TRL.

    python -m pytest benchmarks --benchmark-columns=median,rounds --benchmark-group-by=group

Every contender's log-probabilities are compared with fp64 before it is timed. Shapes are small
enough for a CPU; on a GPU the same command times the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from fastkto import eager, linear_logprob

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


SHAPES = {"small": Shape(256, 256, 8_192), "wide": Shape(128, 512, 32_768)}
if DEVICE.type == "cuda":
    SHAPES["qwen2.5-0.5b"] = Shape(8_192, 896, 151_936)


class Inputs(NamedTuple):
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]


def make_inputs(shape: Shape, frozen: bool) -> Inputs:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    return Inputs(
        hidden=normal(shape.tokens, shape.hidden).requires_grad_(),
        weight=(normal(shape.vocabulary, shape.hidden) * 0.05).requires_grad_(not frozen),
        target=torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=DEVICE),
    )


def fastkto_logprob(inputs: Inputs) -> Tensor:
    return linear_logprob(*inputs).logprob


def full_logits_logprob(inputs: Inputs) -> Tensor:
    logits = (inputs.hidden @ inputs.weight.T).float()
    return logits.log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]


def trl_logprob(inputs: Inputs) -> Tensor:
    arguments = (None, inputs.target, 1.0, 4096, None, 1.0, ("log_probs",))
    return ChunkedLogProbFunction.apply(inputs.hidden, inputs.weight, *arguments)[0]


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "fastkto": fastkto_logprob,
    "full logits": full_logits_logprob,
    "trl 1.16": trl_logprob,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("head", ["frozen head", "trained head"])
@pytest.mark.parametrize("contender", CONTENDERS)
def test_head(benchmark: Callable, contender: str, head: str, shape: str) -> None:
    inputs = make_inputs(SHAPES[shape], frozen=head == "frozen head")
    score = CONTENDERS[contender]
    exact = eager.linear_logprob(
        inputs.hidden.detach().double(), inputs.weight.detach().double(), inputs.target
    ).logprob
    torch.testing.assert_close(score(inputs).double(), exact, rtol=0, atol=1e-3)
    benchmark.group = f"{shape}, {head}"

    def step() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        score(inputs).sum().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
