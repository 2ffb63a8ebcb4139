"""The fused pass without gradient against fp64, and the tables that say where it runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkto import eager, linear_logprob
from fastkto.logprob import TokenScores
from fastkto_kernels import scan_table
from fastkto_kernels.scan_table import CANDIDATES, Blocks
from fastkto_kernels.search_scan import candidates_for
from tests.conftest import CUDA, HAS_TRITON
from tests.precision import TRANSFORMS, assert_within_budget, make_inputs, max_error

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
    pytest.mark.usefixtures("poisoned_memory"),
]

DEVICE = CUDA[0] if CUDA else "cpu"
DTYPES = [torch.float16, torch.bfloat16]
FIRST = next(iter(CANDIDATES))
# The others may need more shared memory than this GPU has.
CONFIGURATIONS = candidates_for(torch.cuda.get_device_capability()) if CUDA else list(CANDIDATES)
SHAPE = (13, 48, 301)
UseTable = Callable[..., list[Blocks]]


@pytest.fixture
def use_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UseTable]:
    """Writes the user's table for one shape, and returns the list of the fused scans to come."""
    from fastkto_kernels import fused_scan

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scans: list[Blocks] = []
    scan = fused_scan.scan_fused

    def record(operands: Any, blocks: Blocks, **options: Any) -> Any:
        scans.append(blocks)
        return scan(operands, blocks, **options)

    monkeypatch.setattr(fused_scan, "scan_fused", record)

    def write(
        shape: tuple[int, int, int], dtype: torch.dtype, blocks: Blocks | None = FIRST
    ) -> list[Blocks]:
        key = scan_table.make_key(torch.device(DEVICE), *shape[1:], dtype)
        scan_table.save_entry(scan_table.users_table(), key, blocks)
        return scans

    yield write
    scan_table.load_table.cache_clear()


def score(inputs: dict[str, Any], **options: Any) -> TokenScores:
    """One call without gradient, with statistics."""
    options = {"stats": True, "backend": "triton", "bias": inputs["bias"]} | options
    with torch.no_grad():
        return linear_logprob(inputs["hidden"], inputs["weight"], inputs["target"], **options)


def assert_equals_truth(inputs: dict[str, Any], **options: Any) -> None:
    ours = score(inputs, **options)
    values = {name: inputs[name] for name in ("hidden", "weight", "bias")}
    with torch.no_grad():
        wide = {name: None if v is None else v.double() for name, v in values.items()}
        truth = eager.linear_logprob(**wide, target=inputs["target"], stats=True, **options)
        peer = eager.linear_logprob(**values, target=inputs["target"], stats=True, **options)
    for value, peer_value, true_value in zip(ours, peer, truth, strict=True):
        assert value.dtype == torch.float32
        assert_within_budget(value, peer_value, true_value)
        assert max_error(value, true_value) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_values_equal_fp64(
    use_table: UseTable, dtype: torch.dtype, transform: str, bias: bool
) -> None:
    scans = use_table(SHAPE, dtype)
    assert_equals_truth(make_inputs(SHAPE, dtype, DEVICE, bias=bias), **TRANSFORMS[transform])
    assert scans == [FIRST]


@pytest.mark.parametrize("blocks", CONFIGURATIONS, ids=str)
def test_every_configuration_equals_fp64(use_table: UseTable, blocks: Blocks) -> None:
    """More rows than a block, and shares of two blocks of which the last is short."""
    shape = (blocks.rows + 3, blocks.depth + 16, 9 * blocks.columns + 5)
    scans = use_table(shape, torch.float16, blocks)
    assert_equals_truth(make_inputs(shape, torch.float16, DEVICE, bias=True), softcap=4.0)
    assert scans == [blocks]


@pytest.mark.parametrize(
    "shape",
    [(0, 16, 5), (1, 16, 5), (3, 80, 2), (5, 16, 1), (2, 16, 128), (3, 16, 2500)],
    ids=str,
)
def test_every_shape_equals_fp64(use_table: UseTable, shape: tuple[int, int, int]) -> None:
    scans = use_table(shape, torch.bfloat16)
    assert_equals_truth(make_inputs(shape, torch.bfloat16, DEVICE, bias=True), softcap=4.0)
    assert scans == [FIRST]


@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_huge_logits_equal_fp64(use_table: UseTable, offset: float) -> None:
    use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE, bias=True)
    with torch.no_grad():
        inputs["bias"] += offset
    ours = score(inputs)
    wide = {name: inputs[name].detach().double() for name in ("hidden", "weight", "bias")}
    truth = eager.linear_logprob(**wide, target=inputs["target"], stats=True)
    for value, true_value in zip(ours, truth, strict=True):
        assert_within_budget(value, true_value, true_value, floor=400 * 2**-23)


def test_a_weight_in_fp32_is_rounded_as_it_is_read(use_table: UseTable) -> None:
    """And a hidden state beside it, some rows at a time: the memory holds one block's."""
    scans = use_table(SHAPE, torch.float16)
    inputs = make_inputs((150, *SHAPE[1:]), torch.float32, DEVICE, bias=True)
    rounded = {
        name: value if name == "target" else value.detach().half() for name, value in inputs.items()
    }
    expected = score(rounded)
    with torch.autocast(DEVICE, dtype=torch.float16):
        scores = score(inputs, head_memory_mib=0.001)
    assert scans == [FIRST, FIRST]
    for value, other in zip(scores, expected, strict=True):
        # A GPU's products of the two may add up in different orders.
        within = 1e-5 if CUDA else 0.0
        torch.testing.assert_close(value, other, rtol=within, atol=within)


def test_statistics_change_nothing(use_table: UseTable) -> None:
    use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    without = score(inputs, stats=False)
    assert without.entropy is None and without.mean_logit is None
    assert without.logprob.equal(score(inputs).logprob)


def test_a_row_is_the_same_to_the_bit_whatever_the_others_are(use_table: UseTable) -> None:
    shape = (150, 48, 301)
    use_table(shape, torch.bfloat16)
    inputs = make_inputs(shape, torch.bfloat16, DEVICE)
    inputs["target"] = inputs["target"].clamp_min(0)
    expected = score(inputs)
    other = inputs | {"hidden": inputs["hidden"].detach() * 3}
    other["hidden"][60:90] = inputs["hidden"][60:90]
    for value, all_values in zip(score(other), expected, strict=True):
        assert value[60:90].equal(all_values[60:90]) and not value.equal(all_values)
    indices = [torch.arange(100), torch.arange(1)]
    if CUDA:  # the interpreter's products depend on where in a block a row is
        indices += [torch.arange(149, -1, -1), torch.tensor([77]), torch.arange(3, 140, 2)]
    for index in indices:
        index = index.to(DEVICE)
        part = inputs | {name: inputs[name][index] for name in ("hidden", "target")}
        for value, all_values in zip(score(part), expected, strict=True):
            assert value.equal(all_values[index])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_shows_and_stays_alone(use_table: UseTable, value: float) -> None:
    use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    expected = score(inputs)
    with torch.no_grad():
        inputs["hidden"][3] = value
    others = torch.arange(SHAPE[0], device=DEVICE) != 3
    for ours, clean in zip(score(inputs), expected, strict=True):
        assert not ours[3].isfinite()
        assert ours[others].equal(clean[others])


def test_ignored_rows_are_exactly_zero(use_table: UseTable) -> None:
    use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    ignored = inputs["target"] == -100
    for value in score(inputs):
        assert (value[ignored] == 0).all() and (value[~ignored] != 0).all()
    inputs["target"] = torch.full_like(inputs["target"], -100)
    assert all((value == 0).all() for value in score(inputs))


def test_the_state_is_that_of_the_tiles(use_table: UseTable) -> None:
    """What a backward pass needs besides the scores, ignored rows included."""
    from fastkto_kernels import fused_scan
    from fastkto_kernels import tile_steps_triton as steps
    from fastkto_kernels.operands import Operands
    from fastkto_kernels.scan import scan_logits
    from fastkto_kernels.tiles import LogitTransform

    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    target = inputs["target"].clamp_min(-1)
    transform = LogitTransform(1.0, None, 1.0)
    operands = Operands(hidden, weight, None, None, None, target, torch.float16, transform)
    memory: dict[str, Any] = {"memory_bytes": 2**20, "stats": True}
    ours = fused_scan.scan_fused(operands, FIRST, **memory)
    tiles = scan_logits(operands, steps, with_direction=False, **memory).state
    for name in ("target_logit", "logit_sum"):
        assert_equal_sums(getattr(ours, name), getattr(tiles, name))
    assert_equal_sums(_log_sum(*ours[:2]), _log_sum(*tiles[:2]))
    assert ours.target_slope.isnan().all()


def assert_equal_sums(ours: Tensor, theirs: Tensor) -> None:
    """But for the order of the additions; single terms are below 100."""
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-4)


def _log_sum(reference: Tensor, other_sum: Tensor) -> Tensor:
    return reference + other_sum.log()


def test_gradients_of_a_trainable_head_follow_the_fused_scan(use_table: UseTable) -> None:
    scans = use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    target = inputs["target"]

    def gradients(function: Any, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
        logprob = function(*leaves, target, **options).logprob
        return torch.autograd.grad(logprob.sum(), leaves)

    leaves = (inputs["hidden"], inputs["weight"])
    ours = gradients(linear_logprob, *leaves, backend="triton")
    wide = (leaf.detach().double().requires_grad_() for leaf in leaves)
    for value, truth in zip(ours, gradients(eager.linear_logprob, *wide), strict=True):
        assert_within_budget(value, truth.half(), truth, floor=torch.finfo(torch.float16).eps)
    assert scans == [FIRST]


def test_the_fused_form_runs_where_the_table_says_so_and_nowhere_else(use_table: UseTable) -> None:
    inputs = make_inputs(SHAPE, torch.float16, DEVICE)
    tiles = score(inputs)
    scans = use_table((1, 48, 1000), torch.float16)  # another size of vocabulary
    score(inputs)
    use_table(SHAPE, torch.bfloat16)  # another dtype
    score(inputs)
    assert scans == []
    use_table(SHAPE, torch.float16)
    fused = score(inputs)
    assert scans == [FIRST]
    torch.testing.assert_close(fused.logprob, tiles.logprob, rtol=1e-5, atol=1e-5)
    score(inputs, backend="torch")
    hidden_alone = inputs["hidden"].detach().requires_grad_()
    linear_logprob(hidden_alone, inputs["weight"].detach(), inputs["target"], backend="triton")
    extra = {"extra_hidden": inputs["hidden"][:, :3], "extra_weight": inputs["weight"][:, :3]}
    score(inputs, **extra)
    score(inputs, factor=torch.ones(SHAPE[2], device=DEVICE))
    score(inputs | {"weight": inputs["weight"].detach().t().contiguous().t()})
    score({name: None if v is None else v[..., :40] for name, v in inputs.items()})
    assert scans == [FIRST]
    use_table(SHAPE, torch.float16, None)
    score(inputs)
    assert scans == [FIRST]


def test_hidden_states_may_lie_anyhow(use_table: UseTable) -> None:
    scans = use_table(SHAPE, torch.float16)
    inputs = make_inputs(SHAPE, torch.float16, DEVICE, bias=True)
    expected = score(inputs)
    hidden = inputs["hidden"].detach()
    shifted = torch.empty(hidden.numel() + 1, dtype=hidden.dtype, device=DEVICE)[1:]
    forms = (hidden.t().contiguous().t(), shifted.view_as(hidden).copy_(hidden))
    for form in forms:
        assert score(inputs | {"hidden": form}).logprob.equal(expected.logprob)
    wide = torch.cat([inputs["weight"].detach()] * 2, dim=1)
    assert score(inputs | {"weight": wide[:, :48]}).logprob.equal(expected.logprob)
    assert len(scans) == 4


def test_two_runs_are_equal_to_the_bit(use_table: UseTable) -> None:
    use_table(SHAPE, torch.bfloat16)
    inputs = make_inputs(SHAPE, torch.bfloat16, DEVICE, bias=True)
    first, second = score(inputs), score(inputs)
    assert all(value.equal(other) for value, other in zip(first, second, strict=True))


def test_the_search_accepts_what_agrees_with_the_tiles_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastkto_kernels import fused_scan, search_scan

    operands = search_scan.make_operands(5, 48, 300, torch.float16, torch.device(DEVICE))
    assert search_scan.disagreement(operands, FIRST) == ""
    scan = fused_scan.scan_fused

    def scan_badly(operands: Any, blocks: Blocks, *, stats: bool, **options: Any) -> Any:
        state = scan(operands, blocks, stats=stats, **options)
        if state.weighted_sum is not None:
            state.weighted_sum[2] = float("nan")
        return state

    monkeypatch.setattr(fused_scan, "scan_fused", scan_badly)
    assert "nan nats" in search_scan.disagreement(operands, FIRST)
    timings = [
        search_scan.Timing(None, 2.0, ""),
        search_scan.Timing(FIRST, float("inf"), "differs"),
        search_scan.Timing(FIRST._replace(rows=32), 1.0, ""),
    ]
    assert search_scan.choose(timings) == timings[2]
    assert search_scan.choose(timings[:2]) == timings[0]
