"""`linear_logprob` in tiles of any shape, within its memory, under checkpointing and compile."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkto import eager, linear_logprob
from fastkto_kernels.tiles import tile_shape
from tests.precision import TRANSFORMS, assert_within_budget, make_inputs, run


def test_works_under_activation_checkpointing_and_compile() -> None:
    inputs = make_inputs((7, 6, 30), torch.float32, "cpu")
    leaves = (inputs["hidden"], inputs["weight"])

    def scored(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden * 2, weight, inputs["target"]).logprob.sum()

    expected = torch.autograd.grad(scored(*leaves), leaves)
    for function in (
        lambda *args: checkpoint(scored, *args, use_reentrant=False),
        torch.compile(scored, backend="eager"),
    ):
        gradients = torch.autograd.grad(function(*leaves), leaves)
        assert all(map(torch.equal, gradients, expected))


@given(
    num_rows=st.integers(0, 20_000),
    vocab_size=st.integers(1, 300_000),
    bytes_per_logit=st.integers(4, 20),
    memory_bytes=st.integers(1, 2**30),
)
def test_tile_shape_is_within_memory(
    num_rows: int, vocab_size: int, bytes_per_logit: int, memory_bytes: int
) -> None:
    rows, columns = tile_shape(
        num_rows, vocab_size, bytes_per_logit=bytes_per_logit, memory_bytes=memory_bytes
    )
    assert rows >= 1 and 1 <= columns <= vocab_size
    assert rows * columns * bytes_per_logit <= max(memory_bytes, bytes_per_logit)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 40)),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    bias=st.booleans(),
    head_memory_mib=st.sampled_from([1e-6, 0.0005, 0.002, 1.0]),
    data=st.data(),
)
def test_any_shape_and_any_tiling_equals_fp64(
    shape: tuple[int, int, int],
    transform: str,
    bias: bool,
    head_memory_mib: float,
    data: st.DataObject,
) -> None:
    inputs = make_inputs(shape, torch.float32, "cpu", bias=bias)
    choices = st.sampled_from([-100, *range(shape[2])])
    targets = data.draw(st.lists(choices, min_size=shape[0], max_size=shape[0]))
    inputs["target"] = torch.tensor(targets, dtype=torch.int64)
    options = TRANSFORMS[transform]
    truth, true_gradients = run(eager.linear_logprob, inputs, torch.float64, **options)
    ours, gradients = run(
        linear_logprob, inputs, backend="torch", head_memory_mib=head_memory_mib, **options
    )
    for value, true_value in zip(ours, truth, strict=True):
        assert_within_budget(value, true_value, true_value, floor=1e-5)
    for name, gradient in gradients.items():
        assert_within_budget(gradient, true_gradients[name], true_gradients[name], floor=1e-5)
