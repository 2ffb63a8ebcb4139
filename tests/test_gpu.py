"""What only a GPU can show of the operations: real sizes, synchronisation, CUDA graphs.

All memory that nobody wrote is NaN here (`poisoned_memory`), and truth is fp64, a few tokens or a
few rows of the weight at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkto import eager, kto_loss, linear_logprob
from fastkto.loss import sum_completions
from fastkto_kernels import scan_table
from fastkto_kernels.memory import HeadCall, HeadMemory, head_memory
from fastkto_kernels.scan_table import Blocks
from fastkto_kernels.search_scan import candidates_for
from fastkto_kernels.tiles import tile_shape
from tests.conftest import CUDA, HAS_TRITON
from tests.precision import rounding_ratios

pytestmark = [
    pytest.mark.skipif(not CUDA, reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

N, D, V = 4096, 4096, 128_256  # the head of Llama 3.1 8B
TOKENS_AT_ONCE = 256  # of the truth: its logits take V * 8 bytes each
HALF_DTYPES = [torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
# Configurations of the fused kernel for this GPU.
FUSED = candidates_for(torch.cuda.get_device_capability()) if CUDA and HAS_TRITON else []
MIB = 2**20
UseBlocks = Callable[[Blocks | None], list[Blocks]]


@pytest.fixture
def use_blocks(monkeypatch: pytest.MonkeyPatch) -> UseBlocks:
    """Chooses what runs without gradient, in place of the tables; returns the fused scans to come.

    None: tiles.
    """
    from fastkto_kernels import fused_scan

    scans: list[Blocks] = []
    scan = fused_scan.scan_fused

    def record(operands: Any, blocks: Blocks, **options: Any) -> Any:
        scans.append(blocks)
        return scan(operands, blocks, **options)

    def use(blocks: Blocks | None) -> list[Blocks]:
        monkeypatch.setattr(scan_table, "find_blocks", lambda *_: blocks)
        return scans

    monkeypatch.setattr(fused_scan, "scan_fused", record)
    return use


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


def make_extra(num_tokens: int, rank: int) -> dict[str, Tensor]:
    """A low-rank addition to the logits of standard deviation 1; nothing of rank 0."""
    if not rank:
        return {}
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = {"extra_hidden": (num_tokens, rank), "extra_weight": (V, rank)}
    return {
        name: torch.randn(size, generator=generator, device="cuda")
        .mul_(rank**-0.25)
        .bfloat16()
        .requires_grad_()
        for name, size in sizes.items()
    }


def make_bias(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1, 1, V, device="cuda").to(dtype)


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


def expected_memory(**fields: Any) -> HeadMemory:
    """Of the whole head in tiles."""
    from fastkto_kernels.tile_steps_triton import BYTES_PER_LOGIT

    dtypes = dict.fromkeys(("hidden_dtype", "weight_dtype", "compute_dtype"), torch.bfloat16)
    sizes = {"num_tokens": N, "hidden_size": D, "vocab_size": V, "memory_bytes": 96 * MIB}
    return head_memory(HeadCall(bytes_per_logit=BYTES_PER_LOGIT, **sizes, **dtypes, **fields))


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that `work` had allocated at any time, without what was there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


@NEEDS_TRITON
@pytest.mark.parametrize("rank", [0, 64], ids=["", "low-rank addition"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_peaks_are_those_of_the_formula(use_blocks: UseBlocks, trainable: bool, rank: int) -> None:
    use_blocks(None)
    hidden, weight, target = make_head(torch.bfloat16)
    extra = make_extra(N, rank)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trainable), *extra.values()]
    score = partial(linear_logprob, hidden, weight, target, backend="triton", **extra)
    score().logprob.sum().backward()  # workspaces
    for leaf in leaves:
        leaf.grad = None
    expected = expected_memory(trainable=trainable, rank=rank)

    losses: list[Tensor] = []
    forward = peak_of(lambda: losses.append(score().logprob.sum()))
    assert forward == pytest.approx(expected.forward, rel=0.05)
    backward = peak_of(losses.pop().backward)
    backward -= sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    assert backward == pytest.approx(expected.backward, rel=0.05, abs=2**24)


@NEEDS_TRITON
def test_the_peak_without_gradient_is_that_of_the_formula(use_blocks: UseBlocks) -> None:
    use_blocks(None)
    score = partial(linear_logprob, *make_head(torch.bfloat16), backend="triton")
    score()  # workspaces
    expected = expected_memory(trainable=False, hidden_needs_gradient=False)
    assert peak_of(score) == pytest.approx(expected.forward, rel=0.05)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("blocks", FUSED, ids=str)
def test_the_fused_kernel_equals_fp64(
    use_blocks: UseBlocks, blocks: Blocks, dtype: torch.dtype
) -> None:
    scans = use_blocks(blocks)
    hidden, weight, target = make_head(dtype)
    exact_weight = weight.double()
    forms: list[dict[str, Any]] = [{}, {"softcap": 30.0, "bias": make_bias(dtype)}]
    for options in forms:
        exact = options | {name: options[name].double() for name in options if name == "bias"}
        ours = linear_logprob(hidden, weight, target, stats=True, backend="triton", **options)
        for start in range(0, N, TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            truth = eager.linear_logprob(
                hidden[rows].double(), exact_weight, target[rows], stats=True, **exact
            )
            for value, true_value in zip(ours, truth, strict=True):
                assert value is not None and true_value is not None
                assert (value[rows] - true_value).abs().max() < 1e-4  # NaN fails
    assert scans == [blocks, blocks]


@NEEDS_TRITON
@pytest.mark.parametrize("blocks", FUSED, ids=str)
def test_the_fused_kernel_repeats_itself_to_the_bit_and_never_waits_for_the_device(
    use_blocks: UseBlocks, blocks: Blocks
) -> None:
    scans = use_blocks(blocks)
    head = make_head(torch.bfloat16)
    options: dict[str, Any] = {"softcap": 30.0, "bias": make_bias(torch.bfloat16)}
    score = partial(linear_logprob, *head, stats=True, backend="triton", **options)
    first = score()
    with no_synchronisation():
        second = score()
    for value, other in zip(first, second, strict=True):
        assert value is not None and other is not None and value.equal(other)
    assert scans == [blocks, blocks]


@NEEDS_TRITON
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
@pytest.mark.parametrize("blocks", FUSED, ids=str)
def test_the_fused_kernels_memory_is_bounded(
    use_blocks: UseBlocks, blocks: Blocks, stats: bool
) -> None:
    """Of fp32 hidden states, which are rounded some rows at a time."""
    scans, memory_mib = use_blocks(blocks), 8
    hidden, weight, target = make_head(torch.bfloat16)
    options = {"stats": stats, "backend": "triton", "head_memory_mib": memory_mib}
    score = partial(linear_logprob, hidden.float(), weight, target, **options)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        score()
        peak = peak_of(score)
    # The allocator rounds up, large pieces by at most 1 MiB.
    assert peak < memory_mib * MIB + 4 * V + 36 * N + 2 * MIB
    assert scans == [blocks, blocks]


FORMS = (
    "frozen head",
    "trainable head",
    "low-rank addition",
    "low-rank addition and factor",
    "frozen head, softcap and bias",
    "trainable head, softcap and bias",
)


class Step:
    """Forward and backward of both operations on a few tokens, with tensors that stay in place."""

    def __init__(self, form: str, backend: str) -> None:
        self.hidden, self.weight, self.target = make_head(torch.bfloat16, num_tokens=512)
        self.leaves = [self.hidden] + [self.weight] * form.startswith("trainable")
        self.options: dict[str, Any] = {"backend": backend, "stats": True}
        if form.startswith("low-rank addition"):
            extra = make_extra(512, rank=16)
            if form.endswith("factor"):
                extra["factor"] = torch.linspace(0.5, 1.5, V, device="cuda")
            self.options |= extra
            self.leaves += extra.values()
        if form.endswith("bias"):
            self.options |= {"softcap": 30.0, "bias": make_bias(torch.bfloat16)}
        if form == "trainable head, softcap and bias":
            self.leaves.append(self.options["bias"])
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.offsets = torch.tensor([0, 200, 512], device="cuda")
        self.reference = torch.tensor([-900.0, -1500.0], device="cuda")
        self.is_desirable = torch.tensor([True, False], device="cuda")
        self.kl = torch.tensor(0.1, device="cuda")

    def run(self) -> list[Tensor]:
        """[loss, sums, gradients]."""
        backend = self.options["backend"]
        scores = linear_logprob(self.hidden, self.weight, self.target, **self.options)
        sums = sum_completions(scores.logprob.detach(), self.offsets, backend=backend)
        loss = kto_loss(
            scores.logprob,
            self.offsets,
            self.reference,
            self.is_desirable,
            kl=self.kl,
            beta=1e-3,  # log-ratios are large here, and the gradient is not to vanish
            backend=backend,
        ).loss
        return [loss.detach(), sums, *torch.autograd.grad(loss, self.leaves)]


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
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward_never_wait_for_the_device(form: str, backend: str) -> None:
    step = Step(form, backend)
    step.run()  # kernels are compiled and libraries are initialised
    with no_synchronisation():
        step.run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_cuda_graph_repeats_the_step_on_new_data(form: str, backend: str) -> None:
    step = Step(form, backend)
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
    assert all(gradient.any() for gradient in captured[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_and_loss_of_100_000_tokens_equal_fp64(backend: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logprob = torch.rand(100_000, generator=generator, device="cuda").mul_(-8)
    positions = [0, 1, 1, 70_000, 70_500, 100_000]
    offsets = torch.tensor(positions, device="cuda")
    rows = zip(positions[:-1], positions[1:], strict=True)
    true_sums = torch.stack([logprob[start:end].double().sum() for start, end in rows])
    sums = sum_completions(logprob, offsets, backend=backend)
    torch.testing.assert_close(sums, true_sums, rtol=1e-11, atol=0)

    reference = true_sums + torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], device="cuda")
    is_desirable = torch.tensor([True, False, True, False, True], device="cuda")
    rest: dict[str, Any] = {"kl": torch.tensor(0.5, device="cuda"), "sft_weight": 0.1}
    leaf, exact = logprob.clone().requires_grad_(), logprob.double().requires_grad_()
    ours = kto_loss(leaf, offsets, reference, is_desirable, backend=backend, **rest)
    truth = eager.kto_loss(exact, offsets, reference, is_desirable, **rest)
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    torch.testing.assert_close(ours.log_ratio, truth.log_ratio, rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(ours.loss, leaf)
    (true_gradient,) = torch.autograd.grad(truth.loss, exact)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-6, atol=0)


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


@NEEDS_TRITON
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


def make_large_head() -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target: 300,000 x 8,192 numbers are over 2^31; targets are the last."""
    vocab_size, hidden_size, num_tokens = 300_000, 8192, 64
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.empty(vocab_size, hidden_size, device="cuda", dtype=torch.bfloat16)
    weight.normal_(std=3 / hidden_size**0.5, generator=generator)
    assert weight.numel() > 2**31
    hidden = torch.randn(num_tokens, hidden_size, generator=generator, device="cuda").bfloat16()
    return hidden, weight, vocab_size - 1 - torch.arange(num_tokens, device="cuda")


def direct_scores(
    hidden: Tensor, weight: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, mean logit, gradient of hidden, that of the weight's last N rows), in fp64.

    Gradients of the sum of all log-probabilities.
    """
    hidden, blocks = hidden.detach().double(), weight.detach().split(2**14)
    logits = torch.cat([hidden @ block.double().T for block in blocks], dim=1)
    logprob = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    slope = -logits.softmax(1)
    slope.scatter_add_(1, target[:, None], torch.ones_like(slope[:, :1]))
    gradient = torch.zeros_like(hidden)
    for part, block in zip(slope.split(2**14, dim=1), blocks, strict=True):
        gradient += part @ block.double()
    return logprob, logits.mean(1), gradient, slope[:, -len(hidden) :].T @ hidden


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_a_weight_of_more_than_2_to_the_31_numbers_is_addressed_right(
    trainable: bool, backend: str
) -> None:
    hidden, weight, target = make_large_head()
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    logprob, mean_logit, of_hidden, of_last_rows = direct_scores(hidden, weight, target)
    scores = linear_logprob(hidden, weight, target, stats=True, backend=backend)
    scores.logprob.sum().backward()
    assert hidden.grad is not None and scores.mean_logit is not None
    assert (scores.logprob - logprob).abs().max() < 1e-4
    assert (scores.mean_logit - mean_logit).abs().max() < 1e-4
    assert rounding_ratios(hidden.grad, of_hidden, torch.bfloat16).square().mean().sqrt() < 1.5
    if trainable:
        assert weight.grad is not None
        last_rows = weight.grad[-len(hidden) :]
        whole = (last_rows.flatten()[None], of_last_rows.flatten()[None])
        assert rounding_ratios(*whole, torch.bfloat16).item() < 1.75


@NEEDS_TRITON
@pytest.mark.parametrize("blocks", FUSED, ids=str)
def test_the_fused_kernel_addresses_more_than_2_to_the_31_numbers_right(
    use_blocks: UseBlocks, blocks: Blocks
) -> None:
    scans = use_blocks(blocks)
    head = make_large_head()
    logprob, mean_logit, *_ = direct_scores(*head)
    scores = linear_logprob(*head, stats=True, backend="triton")
    assert scores.mean_logit is not None
    assert (scores.logprob - logprob).abs().max() < 1e-4
    assert (scores.mean_logit - mean_logit).abs().max() < 1e-4
    assert scans == [blocks]
