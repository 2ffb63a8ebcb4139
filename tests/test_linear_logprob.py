"""`linear_logprob` against fp64: values and every gradient, on every backend of this machine."""

from typing import Any

import pytest
import torch

from fastkto import eager, linear_logprob
from tests.precision import (
    FP32_FLOOR,
    TRANSFORMS,
    assert_within_budget,
    make_inputs,
    max_error,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Place = tuple[str, str]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Small enough for several tiles in both directions in all tests below.
SMALL_MIB = 0.008


def assert_equals_truth(inputs: dict[str, Any], place: Place, **options: Any) -> None:
    """Values, statistics and all gradients of one call are within the error budget."""
    truth, true_gradients = run(eager.linear_logprob, inputs, torch.float64, **options)
    peer, peer_gradients = run(eager.linear_logprob, inputs, **options)
    ours, gradients = run(
        linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB, **options
    )
    for value, peer_value, true_value in zip(ours, peer, truth, strict=True):
        assert value.dtype == torch.float32
        assert_within_budget(value, peer_value, true_value)
        assert max_error(value, true_value) < 1e-4
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        assert_within_budget(gradient, peer_gradients[name], true_gradients[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_and_gradients_equal_fp64(
    place: Place, dtype: torch.dtype, transform: str, bias: bool
) -> None:
    inputs = make_inputs((13, 24, 301), dtype, place[0], bias=bias)
    assert_equals_truth(inputs, place, **TRANSFORMS[transform])


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 5), (1, 4, 5), (3, 1, 2), (5, 3, 1), (2, 8, 2049), (3, 8, 4500), (40, 4, 129)],
    ids=str,
)
def test_every_shape_equals_fp64(place: Place, shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(shape, torch.float32, place[0], bias=True)
    assert_equals_truth(inputs, place, softcap=4.0)


@pytest.mark.parametrize("softcap", [1e4, 1e8])
def test_a_softcap_far_above_the_logits_changes_nothing(place: Place, softcap: float) -> None:
    """tanh() of almost zero keeps all digits."""
    inputs = make_inputs((13, 24, 301), torch.float32, place[0], bias=True)
    assert_equals_truth(inputs, place, softcap=softcap)


def test_a_tile_wider_than_a_block_equals_fp64(place: Place) -> None:
    inputs = make_inputs((3, 8, 4500), torch.float32, place[0], bias=True)
    truth, true_gradients = run(eager.linear_logprob, inputs, torch.float64)
    ours, gradients = run(linear_logprob, inputs, backend=place[1])
    for value, true_value in zip(ours, truth, strict=True):
        assert_within_budget(value, true_value, true_value)
    for name, gradient in gradients.items():
        assert_within_budget(gradient, true_gradients[name], true_gradients[name])


def test_ignored_rows_are_exactly_zero(place: Place) -> None:
    inputs = make_inputs((12, 8, 50), torch.float32, place[0])
    scores, gradients = run(linear_logprob, inputs, backend=place[1])
    ignored = inputs["target"] == -100
    assert ignored.any() and not ignored.all()
    for value in scores:
        assert (value[ignored] == 0).all()
        assert (value[~ignored] != 0).all()
    assert (gradients["hidden"][ignored] == 0).all()
    inputs["target"] = torch.full_like(inputs["target"], -100)
    scores, gradients = run(linear_logprob, inputs, backend=place[1])
    for value in (*scores, *gradients.values()):
        assert (value == 0).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trainable head"])
def test_nothing_that_stands_in_an_ignored_row_matters(place: Place, trained: bool) -> None:
    inputs = make_inputs((12, 8, 50), torch.float32, place[0])
    ignored = inputs["target"] == -100
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    factor = torch.linspace(0.5, 1.5, 50, device=place[0])
    gradients = []
    for filling in (0.0, float("nan")):
        leaves = [hidden.masked_fill(ignored[:, None], filling).requires_grad_()]
        if trained:
            leaves += [weight.clone().requires_grad_(), factor.clone().requires_grad_()]
        scored = linear_logprob(
            leaves[0],
            leaves[1] if trained else weight,
            inputs["target"],
            factor=leaves[2] if trained else None,
            backend=place[1],
        )
        upstream = torch.ones_like(scored.logprob).masked_fill(ignored, filling)
        gradients.append(torch.autograd.grad(scored.logprob, leaves, upstream))
        assert (scored.logprob[ignored] == 0).all() and (gradients[-1][0][ignored] == 0).all()
    for gradient, other in zip(*gradients, strict=True):
        assert gradient.equal(other) and gradient.isfinite().all()


def test_ignore_index_may_be_any_number(place: Place) -> None:
    inputs = make_inputs((12, 8, 50), torch.float32, place[0])
    expected, _ = run(linear_logprob, inputs, backend=place[1])
    for ignore_index in (-1, 7_000):
        other = inputs["target"].masked_fill(inputs["target"] == -100, ignore_index)
        changed = inputs | {"target": other}
        scores, _ = run(linear_logprob, changed, backend=place[1], ignore_index=ignore_index)
        assert scores.logprob.equal(expected.logprob)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
@pytest.mark.parametrize("offset", [-400.0, 0.0, 400.0], ids="offset{}".format)
def test_huge_logits_equal_fp64(place: Place, offset: float, temperature: float) -> None:
    """All logits far below zero, or far above, and differences of hundreds of nats."""
    inputs = make_inputs((9, 16, 70), torch.float32, place[0], bias=True)
    with torch.no_grad():
        inputs["bias"] += offset
    truth, true_gradients = run(
        eager.linear_logprob, inputs, torch.float64, temperature=temperature
    )
    peer, peer_gradients = run(eager.linear_logprob, inputs, temperature=temperature)
    ours, gradients = run(
        linear_logprob,
        inputs,
        backend=place[1],
        head_memory_mib=SMALL_MIB,
        temperature=temperature,
    )
    # A logit of 40,000 has a spacing of 4e-3 in fp32: nothing can be nearer than that.
    largest = max((abs(offset) + 20) / temperature, 1.0)
    for value, peer_value, true_value in zip(ours, peer, truth, strict=True):
        assert_within_budget(value, peer_value, true_value, floor=largest * 2**-23)
    for name, gradient in gradients.items():
        assert_within_budget(gradient, peer_gradients[name], true_gradients[name], floor=1e-2)


@pytest.mark.parametrize("margin", [8.0, 12.0, 16.0, 30.0, 60.0])
def test_confident_tokens_keep_their_gradient(place: Place, margin: float) -> None:
    """At p -> 1 the gradient is proportional to 1 - p, which fp32 rounds to 0 from 17 nats."""
    inputs = make_inputs((6, 8, 40), torch.float32, place[0], bias=True)
    target = inputs["target"] = torch.full((6,), 7, device=place[0])
    with torch.no_grad():
        inputs["hidden"] *= 0.1
        inputs["bias"].mul_(0.1)[target[0]] = margin
    truth, true_gradients = run(eager.linear_logprob, inputs, torch.float64)
    ours, gradients = run(linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB)
    # In fp64 1 - p has 16 digits only as long as p is not close to 1 to all of them.
    tolerance = 1e-5 + 2**-52 * torch.tensor(margin).exp().item()
    if tolerance > 1e-2:
        assert all((gradient != 0).any() for gradient in gradients.values())
        return
    torch.testing.assert_close(
        ours.logprob.double(), truth.logprob, rtol=tolerance, atol=0, check_dtype=False
    )
    for name, gradient in gradients.items():
        scale = true_gradients[name].abs().max().item()
        assert max_error(gradient, true_gradients[name]) < 2 * tolerance * scale


def test_non_contiguous_inputs_equal_contiguous_ones(place: Place) -> None:
    inputs = make_inputs((10, 6, 90), torch.float32, place[0], bias=True)
    expected, expected_gradients = run(linear_logprob, inputs, backend=place[1])
    strided = {
        "hidden": inputs["hidden"].detach().t().contiguous().t(),
        "weight": inputs["weight"].detach().repeat_interleave(2, 1)[:, ::2],
        "bias": inputs["bias"].detach().repeat_interleave(3)[::3],
        "target": inputs["target"].repeat_interleave(2)[::2],
    }
    assert not any(value.is_contiguous() for value in strided.values())
    leaves = [strided[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    scores = linear_logprob(
        leaves[0], leaves[1], strided["target"], bias=leaves[2], stats=True, backend=place[1]
    )
    for value, expected_value in zip(scores, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=1e-6)
    # An expanded upstream gradient has stride 0.
    gradients = torch.autograd.grad(scores.logprob.sum(), leaves, retain_graph=True)
    upstream = torch.ones_like(scores.logprob)
    for gradient, other in zip(
        gradients, torch.autograd.grad(scores.logprob, leaves, upstream), strict=True
    ):
        assert gradient.equal(other)
    upstream = torch.linspace(-2, 1, 10, device=place[0])
    scores = linear_logprob(
        leaves[0], leaves[1], strided["target"], bias=leaves[2], backend=place[1]
    )
    gradients = torch.autograd.grad(scores.logprob, leaves, upstream)
    for gradient, expected_gradient in zip(gradients, expected_gradients.values(), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["hidden", "weight", "bias"])
def test_a_gradient_alone_equals_the_one_among_all(place: Place, asked: str) -> None:
    inputs = make_inputs((10, 6, 90), torch.float32, place[0], bias=True)
    _, expected = run(linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB)
    for name in ("hidden", "weight", "bias"):
        inputs[name].requires_grad_(name == asked)
    _, gradients = run(linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB)
    assert gradients.keys() == {asked}
    torch.testing.assert_close(gradients[asked], expected[asked], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_rank_addition_equals_fp64(
    place: Place, dtype: torch.dtype, asked: tuple[bool, bool]
) -> None:
    """Values and gradients of all inputs, and with a frozen weight of the addition alone."""
    inputs = make_inputs((13, 24, 301), dtype, place[0], bias=True)
    generator = torch.Generator().manual_seed(0)
    for name, num_rows in (("extra_hidden", 13), ("extra_weight", 301)):
        value = torch.randn(num_rows, 3, generator=generator).to(place[0], dtype)
        inputs[name] = value.requires_grad_()
    inputs["hidden"].requires_grad_(asked[0])
    for name in ("weight", "bias"):
        inputs[name].requires_grad_(asked[1])
    assert_equals_truth(inputs, place, softcap=4.0)


def with_factor(inputs: dict[str, Any]) -> dict[str, Any]:
    """And a low-rank addition; the factors are fp32, some negative, one zero, and one large."""
    weight = inputs["weight"]
    generator = torch.Generator().manual_seed(0)
    for name, num_rows in (("extra_hidden", len(inputs["hidden"])), ("extra_weight", len(weight))):
        value = torch.randn(num_rows, 3, generator=generator).to(weight.device, weight.dtype)
        inputs[name] = value.requires_grad_()
    factor = torch.randn(len(weight), generator=generator)
    factor[3], factor[7] = 0.0, 20.0
    return inputs | {"factor": factor.to(weight.device).requires_grad_()}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_each_entry_equals_fp64(
    place: Place, dtype: torch.dtype, transform: str
) -> None:
    """Which multiplies both products and not the bias: values and gradients of all inputs."""
    inputs = with_factor(make_inputs((13, 24, 301), dtype, place[0], bias=True))
    assert_equals_truth(inputs, place, **TRANSFORMS[transform])


@pytest.mark.parametrize(
    "asked",
    [
        ("hidden",),
        ("factor",),
        ("weight", "factor"),
        ("extra_hidden",),
        ("hidden", "extra_hidden", "extra_weight", "factor"),  # DoRA
    ],
    ids=str,
)
def test_some_gradients_with_a_factor_equal_fp64(place: Place, asked: tuple[str, ...]) -> None:
    """With a low-rank addition where one of it is asked for, else without."""
    inputs = with_factor(make_inputs((13, 24, 301), torch.float32, place[0]))
    if "extra_hidden" not in asked:
        inputs["extra_hidden"] = inputs["extra_weight"] = None
    for name, value in inputs.items():
        if name != "target" and value is not None:
            value.requires_grad_(name in asked)
    assert_equals_truth(inputs, place, softcap=4.0)


@pytest.mark.parametrize("low", ["hidden", "weight", "bias"])
def test_inputs_of_different_dtypes_are_multiplied_in_fp32(place: Place, low: str) -> None:
    inputs = make_inputs((13, 24, 301), torch.float32, place[0], bias=True)
    inputs[low] = inputs[low].detach().bfloat16().requires_grad_()
    truth, true_gradients = run(eager.linear_logprob, inputs, torch.float64)
    ours, gradients = run(linear_logprob, inputs, backend=place[1])
    for value, true_value in zip(ours, truth, strict=True):
        assert_within_budget(value, true_value, true_value)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype
        floor = torch.finfo(torch.bfloat16).eps if name == low else FP32_FLOOR
        assert_within_budget(gradient, true_gradients[name], true_gradients[name], floor=floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_fp32(
    place: Place, dtype: torch.dtype
) -> None:
    device, backend = place
    inputs = make_inputs((12, 16, 120), torch.float32, device, bias=True)
    rounded = {
        name: value if name == "target" else value.detach().to(dtype).requires_grad_()
        for name, value in inputs.items()
    }
    truth, true_gradients = run(eager.linear_logprob, rounded, torch.float64)
    with torch.autocast(device, dtype=dtype):
        ours, gradients = run(linear_logprob, inputs, backend=backend)
    for value, true_value in zip(ours, truth, strict=True):
        assert_within_budget(value, true_value, true_value)
    # Tiles of the gradient are fp32 on a CPU and 16-bit on a GPU.
    floor = FP32_FLOOR if device == "cpu" else torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert_within_budget(gradient, true_gradients[name], true_gradients[name], floor=floor)


def test_statistics_carry_no_gradient_and_are_absent_by_default(place: Place) -> None:
    inputs = make_inputs((4, 6, 30), torch.float32, place[0])
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]
    scores = linear_logprob(hidden, weight, target, stats=True, backend=place[1])
    assert scores.logprob.requires_grad
    assert scores.entropy is not None and not scores.entropy.requires_grad
    assert scores.mean_logit is not None and not scores.mean_logit.requires_grad
    scores = linear_logprob(hidden, weight, target, backend=place[1])
    assert scores.entropy is None and scores.mean_logit is None
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, target, backend=place[1]).logprob.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_shows_and_stays_alone(place: Place, value: float) -> None:
    inputs = make_inputs((6, 4, 40), torch.float32, place[0])
    expected, _ = run(linear_logprob, inputs, backend=place[1])
    with torch.no_grad():
        inputs["hidden"][3] = value
    scores, _ = run(linear_logprob, inputs, backend=place[1])
    others = torch.arange(6, device=place[0]) != 3
    assert not scores.logprob[3].isfinite()
    assert scores.logprob[others].equal(expected.logprob[others])


def test_two_runs_are_equal_to_the_bit(place: Place) -> None:
    inputs = make_inputs((13, 24, 301), torch.bfloat16, place[0], bias=True)
    first, first_gradients = run(linear_logprob, inputs, backend=place[1])
    second, second_gradients = run(linear_logprob, inputs, backend=place[1])
    assert first.logprob.equal(second.logprob)
    assert all(first_gradients[name].equal(second_gradients[name]) for name in first_gradients)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("memory_mib", [SMALL_MIB, 96])
def test_a_row_scores_alike_whatever_the_other_rows_are(
    place: Place, frozen: bool, memory_mib: float
) -> None:
    """To the bit among as many rows; among fewer tiles have another shape.

    So have products, and their sums another order.
    """
    memory = {"backend": place[1], "head_memory_mib": memory_mib}
    inputs = make_inputs((50, 64, 301), torch.float32, place[0])
    inputs["target"] = inputs["target"].clamp_min(0)
    inputs["weight"].requires_grad_(not frozen)
    whole, _ = run(linear_logprob, inputs, **memory)
    others = torch.randn(25, 64, generator=torch.Generator().manual_seed(1)).to(place[0])
    hidden = torch.cat([inputs["hidden"].detach()[:25], others]).requires_grad_()
    changed, _ = run(linear_logprob, inputs | {"hidden": hidden}, **memory)
    assert changed.logprob[:25].equal(whole.logprob[:25])
    for num_rows in (1, 3, 25):
        few = inputs | {name: inputs[name][:num_rows] for name in ("hidden", "target")}
        few["hidden"] = few["hidden"].detach().requires_grad_()
        scores, _ = run(linear_logprob, few, **memory)
        torch.testing.assert_close(scores.logprob, whole.logprob[:num_rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_factor", [False, True], ids=["", "factor"])
def test_scores_are_the_same_to_the_bit_with_and_without_gradients(
    place: Place, has_factor: bool
) -> None:
    inputs = make_inputs((40, 24, 301), torch.float32, place[0], bias=True)
    if has_factor:
        inputs["factor"] = torch.linspace(0.5, 1.5, 301, device=place[0]).requires_grad_()
    trained, _ = run(linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB)
    for name in inputs.keys() - {"hidden", "target"}:
        inputs[name].requires_grad_(False)
    frozen, _ = run(linear_logprob, inputs, backend=place[1], head_memory_mib=SMALL_MIB)
    with torch.no_grad():
        scored = linear_logprob(
            inputs["hidden"],
            inputs["weight"],
            inputs["target"],
            bias=inputs["bias"],
            factor=inputs.get("factor"),
            backend=place[1],
            head_memory_mib=SMALL_MIB,
            stats=True,
        )
    for one, other, third in zip(trained, frozen, scored, strict=True):
        assert one.equal(other) and one.equal(third)
