"""What `linear_logprob` allocates is what its formula says, whatever N is."""

from typing import Any

import pytest
import torch

from fastkto import linear_logprob
from fastkto.logprob_operator import ROWS_AT_ONCE
from fastkto_kernels import tile_steps_torch
from fastkto_kernels.memory import HeadCall, head_memory
from tests.allocations import measured_peak

WITHIN = 0.05
DTYPES = [torch.float32, torch.bfloat16]


def measured(call: HeadCall, **options: Any) -> tuple[int, int]:
    """(peak of the forward pass, peak of the backward pass without the gradients), in bytes."""
    num_tokens = call.num_tokens + call.ignored_tokens
    hidden = torch.randn(num_tokens, call.hidden_size).to(call.hidden_dtype)
    hidden.requires_grad_(call.hidden_needs_gradient)
    weight = torch.randn(call.vocab_size, call.hidden_size).mul_(0.05).to(call.weight_dtype)
    weight.requires_grad_(call.trainable)
    extra: dict[str, torch.Tensor] = {}
    if call.rank:
        like = {"extra_hidden": hidden, "extra_weight": weight}
        for name, one in like.items():
            values = torch.randn(len(one), call.rank).mul_(0.05).to(one.dtype)
            extra[name] = values.requires_grad_()
    if call.has_factor:
        extra["factor"] = torch.linspace(0.5, 1.5, call.vocab_size).requires_grad_()
    target = torch.randint(call.vocab_size, (num_tokens,))
    target[: call.ignored_tokens] = -100
    memory_mib = call.memory_bytes / 2**20
    scored: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast(
            "cpu", call.compute_dtype, enabled=call.compute_dtype != call.weight_dtype
        ):
            scores = linear_logprob(
                hidden, weight, target, head_memory_mib=memory_mib, **extra, **options
            )
        scored.append(scores.logprob)

    forward_peak = measured_peak(forward)
    loss = scored.pop().sum()
    if not loss.requires_grad:
        return forward_peak, 0
    backward_peak = measured_peak(loss.backward)
    leaves = (hidden, weight, *extra.values())
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return forward_peak, backward_peak - sum(one.nbytes for one in gradients)


def call_of(num_tokens: int, dtype: torch.dtype, trainable: bool, temporaries: int = 0) -> HeadCall:
    return HeadCall(
        num_tokens=num_tokens,
        hidden_size=256,
        vocab_size=5000,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        compute_dtype=dtype,
        trainable=trainable,
        memory_bytes=96 * 2**20,
        bytes_per_logit=tile_steps_torch.BYTES_PER_LOGIT,
        temporaries=temporaries,
        device_type="cpu",
    )


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_peaks_are_those_of_the_formula(
    num_tokens: int, dtype: torch.dtype, trainable: bool
) -> None:
    call = call_of(num_tokens, dtype, trainable)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    if trainable:
        assert backward == pytest.approx(expected.backward, rel=WITHIN)
    else:
        # 16-bit gradients are scaled in fp32, some rows at a time: a factor and a product.
        rows = 2 * ROWS_AT_ONCE if dtype == torch.bfloat16 else 0
        assert backward < 2**17 + 4 * rows * call.hidden_size


def test_sums_of_a_tiles_columns_are_within_the_budget() -> None:
    """Few tokens would make tiles as wide as the vocabulary, and their fp32 sums with them."""
    call = call_of(100, torch.bfloat16, trainable=True)
    call = call._replace(hidden_size=2048, memory_bytes=2**21)
    expected, (_, backward) = head_memory(call), measured(call)
    assert backward == pytest.approx(expected.backward, rel=WITHIN)
    large = call._replace(hidden_size=4096, vocab_size=128_256, memory_bytes=96 * 2**20)
    large = large._replace(device_type="cuda", bytes_per_logit=4)
    peaks = [head_memory(large._replace(num_tokens=n)).backward for n in (64, 512, 2048, 8192)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_the_peak_without_gradient_is_that_of_the_formula(
    num_tokens: int, dtype: torch.dtype
) -> None:
    call = call_of(num_tokens, dtype, trainable=False)._replace(hidden_needs_gradient=False)
    forward, _ = measured(call)
    assert forward == pytest.approx(head_memory(call).forward, rel=WITHIN)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_peaks_under_autocast_are_those_of_the_formula(num_tokens: int, trainable: bool) -> None:
    """Of fp32 tensors: the weight is rounded tile by tile."""
    call = call_of(num_tokens, torch.float32, trainable)._replace(compute_dtype=torch.bfloat16)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    assert backward == pytest.approx(expected.backward, rel=WITHIN, abs=2**24)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaks_with_ignored_tokens_are_those_of_the_formula(
    dtype: torch.dtype, trainable: bool
) -> None:
    call = call_of(3000, dtype, trainable)._replace(ignored_tokens=3000)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    if trainable:
        assert backward == pytest.approx(expected.backward, rel=WITHIN)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_peaks_with_a_low_rank_addition_are_those_of_the_formula(
    num_tokens: int, dtype: torch.dtype, trainable: bool
) -> None:
    """As large as the hidden size, so that its terms show."""
    call = call_of(num_tokens, dtype, trainable)._replace(rank=256)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    assert backward == pytest.approx(expected.backward, rel=WITHIN)


@pytest.mark.parametrize("rank", [0, 256])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [100, 3000])
def test_peaks_with_a_factor_are_those_of_the_formula(
    num_tokens: int, dtype: torch.dtype, trainable: bool, rank: int
) -> None:
    call = call_of(num_tokens, dtype, trainable)._replace(rank=rank, has_factor=True)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    assert backward == pytest.approx(expected.backward, rel=WITHIN)


def test_the_copy_for_a_factor_is_counted_in_the_budget() -> None:
    call = call_of(3000, torch.float32, trainable=False)
    call = call._replace(hidden_size=4, memory_bytes=2**22, has_factor=True)
    expected, (forward, backward) = head_memory(call), measured(call)
    assert forward == pytest.approx(expected.forward, rel=WITHIN)
    assert backward == pytest.approx(expected.backward, rel=WITHIN)


@pytest.mark.parametrize("memory_bytes", [2**16, 2**20])
def test_the_tiles_stay_within_the_budget(memory_bytes: int) -> None:
    call = call_of(3000, torch.float32, trainable=False)
    call = call._replace(hidden_size=4, memory_bytes=memory_bytes)
    forward, _ = measured(call)
    beside = 36 * call.num_tokens + 20 * call.num_tokens * call.hidden_size
    assert forward - beside < memory_bytes


def test_peak_with_a_softcap_and_statistics_is_that_of_the_formula() -> None:
    call = call_of(3000, torch.float32, trainable=False, temporaries=2)
    forward, _ = measured(call, softcap=30.0, stats=True)
    assert forward == pytest.approx(head_memory(call).forward, rel=WITHIN)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_nothing_but_the_stored_gradient_grows_with_n(trainable: bool) -> None:
    short, long = (call_of(n, torch.float32, trainable) for n in (2048, 6000))
    grown = measured(long)[0] - measured(short)[0]
    kept = head_memory(long).kept - head_memory(short).kept
    assert grown - kept < 64 * (6000 - 2048)  # a few numbers for each token
