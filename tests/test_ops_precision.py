"""How near `linear_logprob` comes to fp64 token by token, from flat distributions to p -> 1."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastkto import eager, linear_logprob
from tests.precision import rounding_ratios, tiles_of_16_bits

Place = tuple[str, str]
HALF_DTYPES = [torch.bfloat16, torch.float16]


class Regime(NamedTuple):
    """How sure the model is, and of what size its logits are."""

    spread: float  # standard deviation of the logits, roughly
    options: dict[str, Any]
    offset: float = 0.0  # length of a component of all hidden states against one of all weights


REGIMES = {
    "flat": Regime(0.3, {}),
    "mixed": Regime(2.5, {}),
    "confident": Regime(8.0, {}),
    "softcap": Regime(6.0, {"softcap": 30.0}),
    "scale": Regime(20.0, {"logit_scale": 0.0625}),
    "huge": Regime(60.0, {}),
    "negative offset": Regime(2.5, {}, offset=-500.0),
    "positive offset": Regime(2.5, {}, offset=500.0),
}
SHAPE = (48, 128, 1000)


def make_regime(regime: Regime, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target; the first half of the targets are the likeliest tokens."""
    generator = torch.Generator().manual_seed(0)
    num_rows, hidden_size, vocab_size = SHAPE
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * 0.05
    hidden = torch.randn(num_rows, hidden_size, generator=generator)
    hidden *= regime.spread / 0.05 / hidden_size**0.5
    if regime.offset:
        direction = torch.nn.functional.normalize(torch.ones(hidden_size), dim=0)
        weight += 0.4 * direction
        hidden += regime.offset * direction
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    target = torch.randint(0, vocab_size, (num_rows,), generator=generator).to(device)
    half = num_rows // 2
    target[:half] = (hidden[:half].float() @ weight.float().T).argmax(1)
    return hidden.requires_grad_(), weight.requires_grad_(), target


class Measured(NamedTuple):
    """Errors of one call against fp64."""

    logprob: float  # largest, nats
    tolerance: float  # 1e-4 nats, or what fp32 logits of this size allow
    hidden_ratios: Tensor  # of each token's gradient to its rounding
    weight_ratio: float  # of the whole gradient to its rounding


def measure(
    regime: Regime,
    dtype: torch.dtype,
    place: Place,
    *,
    trainable: bool = True,
    factor: Tensor | None = None,
) -> Measured:
    """Errors of log-probabilities and gradients; with a frozen head the weight's error is 0.

    The ratios leave out tokens whose gradient is 1e-6 of the largest one and less.
    """
    hidden, weight, target = make_regime(regime, dtype, place[0])
    weight.requires_grad_(trainable)
    upstream = torch.linspace(-1e-3, 1e-3, SHAPE[0], device=place[0])
    options = regime.options | {"factor": factor}
    scores = linear_logprob(
        hidden, weight, target, backend=place[1], head_memory_mib=0.2, **options
    )
    leaves = (hidden, weight) if trainable else (hidden,)
    gradients = torch.autograd.grad(scores.logprob, leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    truth = eager.linear_logprob(*exact, target, **options)
    true_gradients = torch.autograd.grad(truth.logprob, exact, upstream.double())

    size = true_gradients[0].norm(dim=1)
    kept = size > 1e-6 * size.max()
    assert kept.sum() > SHAPE[0] // 3
    ratios = rounding_ratios(gradients[0], true_gradients[0], dtype)[kept]
    weight_ratio = torch.zeros(())
    if trainable:
        flat = (gradients[1].flatten()[None], true_gradients[1].flatten()[None])
        weight_ratio = rounding_ratios(*flat, dtype)
    logits = exact[0] @ exact[1].T
    largest_logit = (logits if factor is None else logits * factor).abs().max().item()
    return Measured(
        logprob=(scores.logprob - truth.logprob).abs().max().item(),
        tolerance=max(1e-4, largest_logit * 2**-20),
        hidden_ratios=ratios,
        weight_ratio=weight_ratio.item(),
    )


def assert_error_is_that_of_rounding(measured: Measured) -> None:
    """1.5 times the rounding for tokens; the weight's tile is rounded once before it is summed."""
    assert measured.logprob < measured.tolerance
    assert measured.hidden_ratios.square().mean().sqrt() < 1.5
    assert measured.weight_ratio < 1.75


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_error_is_that_of_rounding_the_result(place: Place, name: str, dtype: torch.dtype) -> None:
    measured = measure(REGIMES[name], dtype, place)
    assert_error_is_that_of_rounding(measured)
    if place[0] == "cpu":
        assert measured.hidden_ratios.max() < 1.5


@pytest.mark.parametrize("name", REGIMES)
def test_fp32_error_is_that_of_fp32_logits(place: Place, name: str) -> None:
    measured = measure(REGIMES[name], torch.float32, place)
    assert measured.logprob < measured.tolerance
    # The rounding of fp32 is 2^-25: the error is above it, and that of the logits themselves.
    assert measured.hidden_ratios.max() * 2**-25 < measured.tolerance
    assert measured.weight_ratio * 2**-25 < measured.tolerance


@pytest.mark.parametrize("name", REGIMES)
def test_a_frozen_heads_bf16_gradient_is_rounded_once(place: Place, name: str) -> None:
    """Token by token: what is kept until backward has three bits more than bf16."""
    measured = measure(REGIMES[name], torch.bfloat16, place, trainable=False)
    assert measured.hidden_ratios.square().mean().sqrt() < 1.15
    assert measured.hidden_ratios.max() < (1.5 if place[0] == "cpu" else 1.75)  # 16-bit tiles


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_frozen_heads_direction_has_the_range_of_bf16(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=generator).mul(size).bfloat16()
    hidden = torch.randn(8, 32, generator=generator).div(size).bfloat16().requires_grad_()
    target = torch.randint(50, (8,), generator=generator)
    (gradient,) = torch.autograd.grad(linear_logprob(hidden, weight, target).logprob.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    truth = eager.linear_logprob(exact, weight.double(), target).logprob.sum()
    (true_gradient,) = torch.autograd.grad(truth, exact)
    assert rounding_ratios(gradient, true_gradient, torch.bfloat16).max() < 1.5


@pytest.fixture
def gpu_tiles() -> Iterator[None]:
    with tiles_of_16_bits():
        yield


@pytest.mark.usefixtures("gpu_tiles")
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_error_with_16_bit_tiles_is_that_of_rounding(name: str, dtype: torch.dtype) -> None:
    assert_error_is_that_of_rounding(measure(REGIMES[name], dtype, ("cpu", "torch")))


@pytest.mark.usefixtures("gpu_tiles")
@pytest.mark.parametrize("largest", [1.5, 30.0])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in REGIMES if "offset" not in name])
def test_a_factor_rounds_16_bit_tiles_once_more(
    name: str, dtype: torch.dtype, largest: float
) -> None:
    """The target's own entry too, which is exact without. A large factor does not overflow."""
    factor = torch.linspace(0.5, 1.5, SHAPE[2])
    factor[::7] = largest
    measured = measure(REGIMES[name], dtype, ("cpu", "torch"), factor=factor)
    assert measured.logprob < measured.tolerance
    assert measured.hidden_ratios.square().mean().sqrt() < 1.75
    assert measured.hidden_ratios.max() < 4
    assert measured.weight_ratio < 1.75


@pytest.mark.usefixtures("gpu_tiles")
@pytest.mark.parametrize("name", REGIMES)
def test_16_bit_tiles_add_little_to_a_frozen_heads_gradient(name: str) -> None:
    """Most where a few tokens have all of the probability, so that roundings do not average out."""
    measured = measure(REGIMES[name], torch.bfloat16, ("cpu", "torch"), trainable=False)
    assert measured.hidden_ratios.square().mean().sqrt() < 1.15
    assert measured.hidden_ratios.max() < 1.75


@pytest.mark.usefixtures("gpu_tiles")
def test_probabilities_of_a_large_vocabulary_do_not_underflow_in_fp16() -> None:
    """1 / V is subnormal in fp16 here, and every entry of a flat tile would be wrong alike."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(150_000, 4, generator=generator).half()
    hidden = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    logprob = linear_logprob(hidden, weight, torch.tensor([5])).logprob
    (gradient,) = torch.autograd.grad(logprob, hidden)
    truth = weight[5].double() - weight.double().mean(0)
    assert (gradient[0] - truth).norm() < 1e-3 * truth.norm()
