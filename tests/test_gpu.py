"""What only a GPU can show of the operations: real sizes, synchronisation, CUDA graphs.

All memory that nobody wrote is NaN here (`poisoned_memory`), and truth is fp64, a few tokens at a
time.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastkto import eager, kto_loss, linear_logprob
from fastkto.loss import sum_completions
from fastkto_kernels.memory import HeadCall, head_memory
from fastkto_kernels.tiles import tile_shape
from tests.conftest import HAS_TRITON
from tests.precision import rounding_ratios

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

N, D, V = 4096, 4096, 128_256  # the head of Llama 3.1 8B
TOKENS_AT_ONCE = 256  # of the truth: its logits take V * 8 bytes each
HALF_DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]


def make_head(dtype: torch.dtype, num_tokens: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target; every 5th ignored, half of the rest the likeliest tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_tokens, D, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(V, D, generator=generator, device="cuda").mul_(3 / D**0.5).to(dtype)
    target = torch.randint(V, (num_tokens,), generator=generator, device="cuda")
    for start in range(0, num_tokens // 2, TOKENS_AT_ONCE):
        rows = slice(start, min(start + TOKENS_AT_ONCE, num_tokens // 2))
        target[rows] = (hidden[rows] @ weight.T).argmax(1)
    target[2::5] = -100
    return hidden, weight, target


def upstream_of(target: Tensor) -> Tensor:
    return torch.linspace(-1e-3, 1e-3, target.shape[0], device="cuda")


def true_scores(
    hidden: Tensor, weight: Tensor, target: Tensor, *, trainable: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprob, gradient of hidden, gradient of weight) in fp64."""
    exact_weight = weight.double().requires_grad_(trainable)
    logprobs, gradients = [], []
    upstream = upstream_of(target).double()
    for start in range(0, target.shape[0], TOKENS_AT_ONCE):
        rows = slice(start, start + TOKENS_AT_ONCE)
        leaf = hidden[rows].double().requires_grad_()
        logprob = eager.linear_logprob(leaf, exact_weight, target[rows]).logprob
        logprob.backward(upstream[rows])
        assert leaf.grad is not None
        logprobs.append(logprob.detach())
        gradients.append(leaf.grad)
    return torch.cat(logprobs), torch.cat(gradients), exact_weight.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_real_head_equals_fp64(dtype: torch.dtype, trainable: bool, backend: str) -> None:
    hidden, weight, target = make_head(dtype)
    truth, true_hidden, true_weight = true_scores(hidden, weight, target, trainable=trainable)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable)]
    scores = linear_logprob(*leaves, target, stats=True, backend=backend)
    scores.logprob.backward(upstream_of(target))

    ignored = target == -100
    assert (scores.logprob - truth).abs().max() < 1e-4
    assert scores.entropy is not None and scores.entropy.isfinite().all()
    assert (scores.logprob[ignored] == 0).all() and (scores.entropy[ignored] == 0).all()
    assert hidden.grad is not None and (hidden.grad[ignored] == 0).all()
    # NaN fails the comparison. Tokens with next to no gradient are left out, as in the small tests.
    kept = true_hidden.norm(dim=1) > 1e-6 * true_hidden.norm(dim=1).max()
    ratios = rounding_ratios(hidden.grad, true_hidden, dtype)[kept]
    assert ratios.square().mean().sqrt() < 1.5
    if dtype == torch.bfloat16 and not trainable:  # rounded once, see `Direction`
        assert ratios.square().mean().sqrt() < 1.15
    if true_weight is not None:
        assert weight.grad is not None
        whole = (weight.grad.flatten()[None], true_weight.flatten()[None])
        assert rounding_ratios(*whole, dtype).item() < 1.75


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_two_runs_of_a_real_head_are_equal_to_the_bit(trainable: bool, backend: str) -> None:
    hidden, weight, target = make_head(torch.bfloat16)
    leaves = [hidden.requires_grad_()] + [weight.requires_grad_()] * trainable
    first, second = (
        (logprob, *torch.autograd.grad(logprob, leaves, upstream_of(target)))
        for logprob in (
            linear_logprob(hidden, weight, target, backend=backend).logprob for _ in range(2)
        )
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_peaks_are_those_of_the_formula(trainable: bool) -> None:
    from fastkto_kernels.linear_logprob import BYTES_PER_LOGIT

    hidden, weight, target = make_head(torch.bfloat16)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable)]
    linear_logprob(*leaves, target, backend="triton").logprob.sum().backward()  # workspaces
    hidden.grad = weight.grad = None
    dtypes = dict.fromkeys(("hidden_dtype", "weight_dtype", "compute_dtype"), torch.bfloat16)
    sizes = {"num_tokens": N, "hidden_size": D, "vocab_size": V, "memory_bytes": 96 * 2**20}
    call = HeadCall(trainable=trainable, bytes_per_logit=BYTES_PER_LOGIT, **sizes, **dtypes)
    expected = head_memory(call)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_logprob(*leaves, target, backend="triton").logprob.sum()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected.forward, rel=0.05)
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    backward = torch.cuda.max_memory_allocated() - kept - gradients
    assert backward == pytest.approx(expected.backward, rel=0.05, abs=2**24)


class Step:
    """Forward and backward of both operations on a few tokens, with tensors that stay in place."""

    def __init__(self, *, trainable: bool, backend: str) -> None:
        self.hidden, self.weight, self.target = make_head(torch.bfloat16, num_tokens=512)
        self.hidden.requires_grad_()
        self.weight.requires_grad_(trainable)
        self.offsets = torch.tensor([0, 200, 512], device="cuda")
        self.reference = torch.tensor([-900.0, -1500.0], device="cuda")
        self.is_desirable = torch.tensor([True, False], device="cuda")
        self.kl = torch.tensor(0.1, device="cuda")
        self.backend = backend

    def run(self) -> list[Tensor]:
        """[loss, sums, gradients]."""
        scores = linear_logprob(
            self.hidden, self.weight, self.target, stats=True, backend=self.backend
        )
        sums = sum_completions(scores.logprob.detach(), self.offsets, backend=self.backend)
        loss = kto_loss(
            scores.logprob,
            self.offsets,
            self.reference,
            self.is_desirable,
            kl=self.kl,
            backend=self.backend,
        ).loss
        leaves = [leaf for leaf in (self.hidden, self.weight) if leaf.requires_grad]
        return [loss.detach(), sums, *torch.autograd.grad(loss, leaves)]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """A call that makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_for_the_device_is_noticed() -> None:
    value = torch.ones((), device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_forward_and_backward_never_wait_for_the_device(trainable: bool, backend: str) -> None:
    step = Step(trainable=trainable, backend=backend)
    step.run()  # kernels are compiled and libraries are initialised
    with no_synchronisation():
        step.run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_a_cuda_graph_repeats_the_step_on_new_data(trainable: bool, backend: str) -> None:
    step = Step(trainable=trainable, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    with torch.no_grad():
        step.hidden.copy_(step.hidden.flip(0))
        step.target.copy_(step.target.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step.run()))


def test_hidden_states_of_more_than_2_to_the_31_numbers_are_addressed_right() -> None:
    num_tokens, hidden_size, vocab_size = 2**20 + 3, 2048, 512
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.empty(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
    hidden.normal_(generator=generator)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device="cuda")
    weight = (weight / hidden_size**0.5).bfloat16()
    target = torch.arange(num_tokens, device="cuda") % vocab_size
    last = hidden[-64:].clone().requires_grad_()
    logprob = linear_logprob(hidden.requires_grad_(), weight, target).logprob
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    expected = linear_logprob(last, weight, target[-64:]).logprob
    (expected_gradient,) = torch.autograd.grad(expected.sum(), last)
    torch.testing.assert_close(logprob[-64:], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient[-64:], expected_gradient, rtol=2e-2, atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_a_tile_of_more_than_2_to_the_31_logits_is_addressed_right(trainable: bool) -> None:
    num_tokens, vocab_size, head_memory_mib = 2048, 2**20 + 128, 14_000
    rows, columns = tile_shape(
        num_tokens, vocab_size, bytes_per_logit=6, memory_bytes=head_memory_mib * 2**20
    )
    assert rows * columns > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocab_size, 16, generator=generator, device="cuda").bfloat16()
    hidden = torch.randn(num_tokens, 16, generator=generator, device="cuda").bfloat16()
    target = vocab_size - 1 - torch.arange(num_tokens, device="cuda")
    weight.requires_grad_(trainable)
    results = []
    for start, memory_mib in ((0, head_memory_mib), (num_tokens - 2, 96)):
        leaf = hidden[start:].clone().requires_grad_()
        scores = linear_logprob(
            leaf, weight, target[start:], backend="triton", head_memory_mib=memory_mib
        )
        (gradient,) = torch.autograd.grad(scores.logprob[-2:].sum(), leaf)
        results.append((scores.logprob[-2:], gradient[-2:]))
    (logprob, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-2, atol=1e-2)
