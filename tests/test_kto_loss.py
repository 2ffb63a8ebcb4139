"""`kto_loss` and `sum_completions` against fp64, on every backend of this machine."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkto import eager, kto_loss
from fastkto.loss import LOSS_TYPES, KTOLoss, sum_completions
from tests.precision import max_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Place = tuple[str, str]


def make_inputs(lengths: list[int], device: str = "cpu", *, seed: int = 0) -> dict[str, Any]:
    """logprob, offsets, reference_logprob, is_desirable and kl; log-ratios of a few nats."""
    generator = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(sum(lengths), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sums = torch.stack([row.double().sum() for row in logprob.split(lengths)]) if lengths else []
    noise = 5 * torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return {
        "logprob": logprob.to(device).requires_grad_(),
        "offsets": offsets.to(device),
        "reference_logprob": (sums + noise if lengths else noise).to(device),
        "is_desirable": (torch.arange(len(lengths)) % 2 == 0).to(device),
        "kl": torch.tensor(1.7, device=device),
    }


def run(function: Any, inputs: dict[str, Any], **options: Any) -> tuple[KTOLoss, Tensor]:
    """The result and the gradient of 3 times the loss."""
    logprob = inputs["logprob"].detach().requires_grad_()
    result = function(**(inputs | {"logprob": logprob}), **options)
    (3 * result.loss).backward()
    assert logprob.grad is not None
    return result, logprob.grad


def assert_equals_truth(inputs: dict[str, Any], backend: str, **options: Any) -> None:
    exact = inputs | {"logprob": inputs["logprob"].detach().double()}
    truth, true_gradient = run(eager.kto_loss, exact, **options)
    ours, gradient = run(kto_loss, inputs, backend=backend, **options)
    assert ours.loss.dtype == ours.row_loss.dtype == torch.float32
    assert ours.logprob.dtype == ours.log_ratio.dtype == torch.float64
    assert ours.loss.shape == ()
    for value, true_value in zip(ours[:2], truth[:2], strict=True):
        assert value.shape == true_value.shape
        assert max_error(value, true_value) <= 2e-7 * (1 + max_error(true_value, 0 * true_value))
    for value, true_value in zip(ours[2:], truth[2:], strict=True):
        assert value.shape == true_value.shape
        assert max_error(value, true_value) <= 1e-10
    largest = max_error(true_gradient, 0 * true_gradient)
    # 1 - sigmoid, as the truth is written, is itself known to 1e-16.
    assert max_error(gradient, true_gradient) <= 5e-7 * largest + 1e-16
    assert not any(value.requires_grad for value in ours[1:])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0},
        {"beta": 2.5},
        {"desirable_weight": 1.3, "undesirable_weight": 0.4},
        {"sft_weight": 0.7},
        {"num_rows": 11, "sft_weight": 0.1},
        {"undesirable_weight": 0.0},
    ],
    ids=str,
)
def test_values_and_gradient_equal_fp64(
    place: Place, loss_type: str, options: dict[str, Any]
) -> None:
    inputs = make_inputs([3, 1, 0, 1025, 0, 40], place[0])
    assert_equals_truth(inputs, place[1], loss_type=loss_type, **options)


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0, 0], [1024], [2048, 1]], ids=str)
def test_every_shape_equals_fp64(place: Place, lengths: list[int]) -> None:
    assert_equals_truth(make_inputs(lengths, place[0]), place[1], sft_weight=0.5)


@pytest.mark.parametrize("present", [True, False], ids=["desirable", "undesirable"])
def test_one_class_alone_is_legal(place: Place, present: bool) -> None:
    inputs = make_inputs([4, 9, 2], place[0])
    inputs["is_desirable"] = torch.full((3,), present, device=place[0])
    assert_equals_truth(inputs, place[1], sft_weight=0.5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("distance", [-1e5, -300.0, 300.0, 1e5])
def test_huge_log_ratios_saturate(place: Place, loss_type: str, distance: float) -> None:
    inputs = make_inputs([5, 5], place[0])
    inputs["reference_logprob"] += distance
    assert_equals_truth(inputs, place[1], loss_type=loss_type)
    result, gradient = run(kto_loss, inputs, backend=place[1], loss_type=loss_type, beta=1.0)
    assert gradient.isfinite().all()
    wrong = 0 if distance > 0 else 1  # the row that its label is against
    assert result.row_loss[wrong] == 1 and result.row_loss[1 - wrong] < 1e-30


def test_small_losses_keep_their_digits(place: Place) -> None:
    """1 - sigmoid(x) is 0 in fp32 from x = 17; the loss is exp(-x) there, and so is its slope."""
    inputs = make_inputs([1], place[0])
    inputs["reference_logprob"] = inputs["logprob"].detach().double() - 40
    inputs["kl"] = torch.zeros((), device=place[0])
    result, gradient = run(kto_loss, inputs, backend=place[1], beta=1.0)
    expected = torch.tensor(-40.0, dtype=torch.float64).exp().item()
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.item() == pytest.approx(-3 * expected, rel=1e-6)


def test_the_gradient_belongs_to_the_tokens_alone(place: Place) -> None:
    inputs = make_inputs([4, 9, 2], place[0])
    inputs["reference_logprob"].requires_grad_()
    inputs["kl"].requires_grad_()
    kto_loss(**inputs, backend=place[1]).loss.backward()
    assert inputs["logprob"].grad is not None
    assert inputs["reference_logprob"].grad is None and inputs["kl"].grad is None


def test_apo_zero_unpaired_has_no_use_for_kl(place: Place) -> None:
    inputs = make_inputs([4, 9, 2], place[0])
    with_kl, _ = run(kto_loss, inputs, backend=place[1], loss_type="apo_zero_unpaired")
    inputs["kl"] = None
    without, _ = run(kto_loss, inputs, backend=place[1], loss_type="apo_zero_unpaired")
    assert with_kl.row_loss.equal(without.row_loss)


def test_parts_of_a_batch_add_up_to_the_whole(place: Place) -> None:
    lengths = [7, 1500, 3, 20]
    inputs = make_inputs(lengths, place[0])
    whole, gradient = run(kto_loss, inputs, backend=place[1], sft_weight=0.3)
    losses, gradients, row_losses = [], [], []
    for start, end in ((0, 1), (1, 3), (3, 4)):
        first, last = inputs["offsets"][start], inputs["offsets"][end]
        part = {
            "logprob": inputs["logprob"].detach()[first:last],
            "offsets": inputs["offsets"][start : end + 1] - first,
            "reference_logprob": inputs["reference_logprob"][start:end],
            "is_desirable": inputs["is_desirable"][start:end],
            "kl": inputs["kl"],
        }
        result, part_gradient = run(
            kto_loss, part, backend=place[1], sft_weight=0.3, num_rows=len(lengths)
        )
        losses.append(result.loss)
        row_losses.append(result.row_loss)
        gradients.append(part_gradient)
    torch.testing.assert_close(torch.stack(losses).sum(), whole.loss, rtol=1e-6, atol=0)
    assert torch.cat(row_losses).equal(whole.row_loss)
    assert torch.cat(gradients).equal(gradient)


def test_a_row_has_the_same_sum_to_the_bit_wherever_it_stands(place: Place) -> None:
    length = 2500
    inputs = make_inputs([length], place[0])
    # Of many sizes: fp64 would hold the sum of numbers of one size exactly in any order.
    exponents = torch.randint(-30, 31, (length,), generator=torch.Generator().manual_seed(0))
    row = torch.ldexp(inputs["logprob"].detach(), exponents.to(place[0]))
    assert row.double().sum() != row.double().flip(0).cumsum(0)[-1]
    inputs["logprob"] = row.clone().requires_grad_()
    alone = sum_completions(row, inputs["offsets"], backend=place[1])
    assert alone.dtype == torch.float64
    torch.testing.assert_close(alone, row.double().sum()[None], rtol=1e-12, atol=0)
    other = torch.rand(37, device=place[0])
    offsets = torch.tensor([0, 37, 37 + length, 74 + length], device=place[0])
    among = sum_completions(torch.cat([other, row, other]), offsets, backend=place[1])
    assert among[1] == alone[0] and among[0] == among[2]
    result, _ = run(kto_loss, inputs, backend=place[1])
    assert result.logprob[0] == alone[0]


def test_non_contiguous_inputs_equal_contiguous_ones(place: Place) -> None:
    inputs = make_inputs([4, 9, 2], place[0])
    expected, expected_gradient = run(kto_loss, inputs, backend=place[1])
    strided = {
        name: value if name == "kl" else value.detach().repeat_interleave(2)[::2]
        for name, value in inputs.items()
    }
    assert not strided["logprob"].is_contiguous()
    result, gradient = run(kto_loss, strided, backend=place[1])
    assert result.loss.equal(expected.loss) and gradient.equal(expected_gradient)


def test_a_nan_token_shows_in_its_row_alone(place: Place) -> None:
    inputs = make_inputs([4, 9, 2], place[0])
    with torch.no_grad():
        inputs["logprob"][5] = float("nan")
    result = kto_loss(**inputs, backend=place[1])
    assert result.loss.isnan()
    assert result.row_loss.isnan().tolist() == [False, True, False]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    loss_type=st.sampled_from(LOSS_TYPES),
    beta=st.floats(0, 3),
    weights=st.tuples(st.floats(0, 2), st.floats(0, 2), st.floats(0, 2)),
    seed=st.integers(0, 100),
)
def test_any_rows_equal_fp64(
    lengths: list[int],
    loss_type: str,
    beta: float,
    weights: tuple[float, float, float],
    seed: int,
) -> None:
    assert_equals_truth(
        make_inputs(lengths, seed=seed),
        "torch",
        loss_type=loss_type,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        sft_weight=weights[2],
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logprob": torch.zeros(3, 5)}, ValueError, r"logprob has shape \(3, 5\)"),
        ({"logprob": torch.zeros(15).half()}, TypeError, "logprob has dtype torch.float16"),
        ({"offsets": torch.zeros(0).long()}, ValueError, r"offsets has shape \(0,\)"),
        ({"offsets": torch.zeros(2, 2).long()}, ValueError, r"offsets has shape \(2, 2\)"),
        ({"offsets": torch.zeros(4).int()}, TypeError, "offsets has dtype torch.int32"),
        ({"offsets": torch.tensor([0, 4, 13, 14])}, ValueError, "from 0 to 14; .*to N=15"),
        ({"offsets": torch.tensor([1, 4, 13, 15])}, ValueError, "from 1 to 15; .*from 0"),
        ({"offsets": torch.tensor([0, 13, 4, 15])}, ValueError, "never fall"),
        ({"offsets": torch.zeros(4).long().to("meta")}, ValueError, "offsets on meta"),
        ({"reference_logprob": torch.zeros(4)}, ValueError, r"reference_logprob has shape \(4,\)"),
        ({"reference_logprob": torch.zeros(3).half()}, TypeError, "do not fit 16 bits"),
        ({"reference_logprob": torch.zeros(3).to("meta")}, ValueError, "logprob on meta"),
        ({"is_desirable": torch.ones(2).bool()}, ValueError, r"is_desirable has shape \(2,\)"),
        ({"is_desirable": torch.ones(3)}, TypeError, "is_desirable has dtype torch.float32"),
        ({"kl": None}, ValueError, 'kl is None; loss_type="kto" needs'),
        ({"kl": 0.0}, TypeError, "kl is a float; pass a tensor"),
        ({"kl": torch.zeros(1)}, ValueError, r"kl has shape \(1,\)"),
        ({"kl": torch.zeros((), dtype=torch.int64)}, ValueError, "kl has .*dtype torch.int64"),
        ({"kl": torch.zeros((), device="meta")}, ValueError, "kl on meta"),
        ({"beta": -0.1}, ValueError, "beta is -0.1; expected a finite number, zero or more"),
        ({"beta": float("nan")}, ValueError, "beta is nan"),
        ({"desirable_weight": -1.0}, ValueError, "desirable_weight is -1.0"),
        ({"undesirable_weight": float("inf")}, ValueError, "undesirable_weight is inf"),
        ({"sft_weight": -1.0}, ValueError, "sft_weight is -1.0"),
        ({"num_rows": 0}, ValueError, "num_rows is 0; expected a positive"),
        ({"loss_type": "dpo"}, ValueError, "loss_type is 'dpo'; expected one of kto, apo_zero"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; expected one of auto, triton, torch"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = make_inputs([4, 9, 2])
    with pytest.raises(error, match=message):
        kto_loss(**(inputs | changed))


def test_sum_completions_refuses_bad_arguments() -> None:
    with pytest.raises(TypeError, match="logprob has dtype torch.float64"):
        sum_completions(torch.zeros(3).double(), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="to N=3"):
        sum_completions(torch.zeros(3), torch.tensor([0, 2]))
