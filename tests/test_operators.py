"""The operations as operators: `torch.library.opcheck`, `torch.compile` and recompilation."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastkto import kto_loss, linear_logprob, logprob_operator, loss_operator
from fastkto.loss import sum_completions
from tests.precision import make_inputs


def scored(leaves: dict[str, Tensor], target: Tensor, **options: Any) -> Tensor:
    """The KTO loss of two sequences."""
    scores = linear_logprob(
        leaves["hidden"], leaves["weight"], target, head_memory_mib=0.01, stats=True, **options
    )
    offsets = torch.tensor([0, 2, 0]) + torch.tensor([0, 0, 1]) * target.shape[0]
    result = kto_loss(
        scores.logprob,
        offsets,
        sum_completions(scores.logprob, offsets) + 0.1,
        torch.tensor([True, False]),
        kl=torch.tensor(0.05),
    )
    assert scores.entropy is not None
    return result.loss + 0 * scores.entropy.sum()


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_loss_equals_eager_and_does_not_recompile(backend: str, trainable: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    if backend == "eager":
        compiled = torch.compile(scored, fullgraph=True, dynamic=True, backend=counter)
    else:
        compiled = torch.compile(scored, fullgraph=True, dynamic=True)
    for num_tokens in (7, 12, 31):
        inputs = make_inputs((num_tokens, 6, 30), torch.float32, "cpu")
        leaves = {name: inputs[name] for name in ("hidden", "weight")}
        leaves["weight"].requires_grad_(trainable)
        needed = [leaf for leaf in leaves.values() if leaf.requires_grad]
        expected_loss = scored(leaves, inputs["target"])
        expected = torch.autograd.grad(expected_loss, needed)
        loss = compiled(leaves, inputs["target"])
        assert loss.equal(expected_loss)
        assert all(map(torch.equal, torch.autograd.grad(loss, needed), expected))
    if backend == "eager":
        assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("stats", "with_direction"), product([False, True], [False, True]), ids=str
)
def test_the_scoring_operator_keeps_pytorchs_rules(
    stats: bool, with_direction: bool, dtype: torch.dtype
) -> None:
    inputs = make_inputs((7, 6, 30), dtype, "cpu", bias=True)
    if with_direction:
        inputs["weight"].requires_grad_(False)
        inputs["bias"].requires_grad_(False)
    extra: tuple[Tensor | None, ...] = (None, None)
    if not with_direction:
        extra = tuple(torch.randn(n, 2, dtype=dtype, requires_grad=True) for n in (7, 30))
    arguments = (
        *(inputs[name] for name in ("hidden", "weight", "bias")),
        *extra,
        inputs["target"],
        -100,
        1.5,
        4.0,
        0.7,
        dtype,
        stats,
        with_direction,
        "torch",
        10_000,
    )
    torch.library.opcheck(logprob_operator.linear_logprob, arguments)


def test_the_other_operators_keep_pytorchs_rules() -> None:
    offsets, logprob = torch.tensor([0, 3, 7]), torch.randn(7, requires_grad=True)
    reference, is_desirable = torch.zeros(2).double(), torch.tensor([True, False])
    kl = torch.tensor(0.1).double()
    loss = (logprob, offsets, reference, is_desirable, kl, 0.1, 1.0, 1.0, 0.5, 2.0, "torch")
    torch.library.opcheck(loss_operator.kto_loss, loss)
    torch.library.opcheck(loss_operator.expand_rows, (torch.ones(2), offsets, 7, "torch"))
    torch.library.opcheck(loss_operator.sum_completions, (logprob.detach(), offsets, "torch"))
    rows = (torch.randn(7, 6).bfloat16(), torch.randn(7), torch.float32)
    torch.library.opcheck(logprob_operator.scale_rows, rows)
