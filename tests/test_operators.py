"""The operations as operators: `torch.library.opcheck`, `torch.compile` and recompilation."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastkto import kto_loss, linear_logprob, logprob_operator, loss_operator
from fastkto.loss import sum_completions
from tests.precision import make_inputs

Place = tuple[str, str]
DTYPES = [torch.float32, torch.bfloat16]


def scored(leaves: dict[str, Tensor], target: Tensor, offsets: Tensor, *, backend: str) -> Tensor:
    """The KTO loss of a batch."""
    options: dict[str, Any] = {"backend": backend, "head_memory_mib": 0.01, "stats": True}
    scores = linear_logprob(leaves["hidden"], leaves["weight"], target, **options)
    result = kto_loss(
        scores.logprob,
        offsets,
        sum_completions(scores.logprob, offsets, backend=backend) + 0.1,
        offsets[1:] % 2 == 0,
        kl=torch.tensor(0.05, device=target.device),
        backend=backend,
    )
    assert scores.entropy is not None
    return result.loss + 0 * scores.entropy.sum()


def assert_compiled_is_eager(
    compiled: Callable[..., Tensor],
    num_tokens: int,
    place: Place,
    *,
    trainable: bool,
    within: float,
) -> None:
    """Loss and gradients; backward is called outside of what is compiled."""
    device, backend = place
    num_rows = num_tokens // 3  # another for each number of tokens
    offsets = torch.linspace(0, num_tokens, num_rows + 1).long().to(device)
    inputs = make_inputs((num_tokens, 6, 30), torch.float32, device)
    leaves = {name: inputs[name] for name in ("hidden", "weight")}
    leaves["weight"].requires_grad_(trainable)
    needed = [leaf for leaf in leaves.values() if leaf.requires_grad]
    expected = scored(leaves, inputs["target"], offsets, backend=backend)
    loss = compiled(leaves, inputs["target"], offsets, backend=backend)
    ours = (loss.detach(), *torch.autograd.grad(loss, needed))
    theirs = (expected.detach(), *torch.autograd.grad(expected, needed))
    for value, true_value in zip(ours, theirs, strict=True):
        size = true_value.abs().max().item()
        torch.testing.assert_close(value, true_value, rtol=0, atol=within * size)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_compiled_loss_equals_eager_and_does_not_recompile(
    place: Place, compiler: str, trainable: bool
) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        scored,
        fullgraph=True,
        dynamic=True,
        backend=counter if compiler == "eager" else compiler,
    )
    # What stands between the operators is compiled, and a GPU's exp() is then another.
    within = 1e-5 if compiler == "inductor" and place[0] == "cuda" else 0.0
    for num_tokens in (7, 12, 31):
        assert_compiled_is_eager(compiled, num_tokens, place, trainable=trainable, within=within)
    if compiler == "eager":
        assert counter.frame_count == 1


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
def test_many_numbers_of_tokens_are_compiled_twice_at_most(place: Place, trainable: bool) -> None:
    """Without a word on what is dynamic: for the first, then for all."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(scored, fullgraph=True, backend=counter)
    for num_tokens in (7, 12, 31, 8, 20):
        assert_compiled_is_eager(compiled, num_tokens, place, trainable=trainable, within=0.0)
    assert counter.frame_count <= 2


def make_operands(dtype: torch.dtype, device: str) -> list[Tensor]:
    """hidden, weight, bias, a low-rank addition, a factor, all with gradients; the target."""
    inputs = make_inputs((7, 6, 30), dtype, device, bias=True)
    extra = (torch.randn(n, 2, dtype=dtype, device=device, requires_grad=True) for n in (7, 30))
    factor = torch.linspace(0.5, 1.5, 30, device=device).requires_grad_()
    named = (inputs[name] for name in ("hidden", "weight", "bias"))
    return [*named, *extra, factor, inputs["target"]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("stats", "with_direction"), product([False, True], [False, True]), ids=str
)
def test_the_scoring_operator_keeps_pytorchs_rules(
    place: Place, stats: bool, with_direction: bool, dtype: torch.dtype
) -> None:
    device, backend = place
    hidden, weight, bias, *extra, target = make_operands(dtype, device)
    inputs: tuple[Tensor | None, ...] = (hidden, weight, bias, *extra)
    if with_direction:
        inputs = (hidden, weight.detach(), bias.detach(), None, None, None)
    transform = (1.5, 4.0, 0.7)
    rest = (dtype, stats, with_direction, backend, 10_000)
    arguments = (*inputs, target, -100, *transform, *rest)
    torch.library.opcheck(logprob_operator.linear_logprob, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "needs",
    [
        [True] * 6,
        [False, True, False, False, False, False],
        [True, False, False, True, True, False],
        [False, False, False, False, False, True],
    ],
    ids=["all", "weight", "low rank", "factor"],
)
def test_the_operator_of_the_gradients_keeps_pytorchs_rules(
    place: Place, needs: list[bool], dtype: torch.dtype
) -> None:
    device, backend = place
    *inputs, target = (tensor.detach() for tensor in make_operands(dtype, device))
    transform = (-100, 1.5, 4.0, 0.7)
    scores = logprob_operator.linear_logprob(
        *inputs, target, *transform, dtype, False, False, backend, 10_000
    )
    reference, other_sum = scores[4:6]
    upstream = torch.linspace(-1, 1, 7, device=device).where(target >= 0, 0.0)
    arguments = (upstream, *inputs, target, reference, other_sum, *transform)
    torch.library.opcheck(
        logprob_operator.linear_logprob_backward, (*arguments, dtype, needs, backend, 10_000)
    )


def test_the_other_operators_keep_pytorchs_rules(place: Place) -> None:
    device, backend = place
    offsets = torch.tensor([0, 3, 7], device=device)
    logprob = torch.randn(7, device=device, requires_grad=True)
    reference = torch.zeros(2, device=device).double()
    is_desirable = torch.tensor([True, False], device=device)
    kl = torch.tensor(0.1, device=device).double()
    loss = (logprob, offsets, reference, is_desirable, kl, 0.1, 1.0, 1.0, 0.5, 2.0, backend)
    torch.library.opcheck(loss_operator.kto_loss, loss)
    values = torch.ones(2, device=device)
    torch.library.opcheck(loss_operator.expand_rows, (values, offsets, 7, backend))
    torch.library.opcheck(loss_operator.sum_completions, (logprob.detach(), offsets, backend))
    direction = torch.randn(7, 6, device=device).bfloat16()
    rows = (direction, torch.randn(7, device=device), torch.float32)
    torch.library.opcheck(logprob_operator.scale_rows, rows)
