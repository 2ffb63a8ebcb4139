"""Two processes over gloo, DistributedDataParallel or FSDP2, do what one does on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_run import ALIKE, CASES, FSDP_CASES, STEPS, WORLD_SIZE
from tests.launch import launch

SCRIPT = Path(__file__).parent / "distributed_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case: `one` process, and two with `ddp` and with `fsdp`."""
    directory = tmp_path_factory.mktemp("runs")
    launch(SCRIPT, directory / "one")
    launch(SCRIPT, directory / "ddp", processes=WORLD_SIZE)
    launch(SCRIPT, directory / "fsdp", "fsdp", processes=WORLD_SIZE)
    return directory


def result(directory: Path, rank: int) -> dict[str, Any]:
    return json.loads((directory / f"result{rank}.json").read_text())


@pytest.mark.parametrize(
    ("wrapping", "case"),
    [("ddp", case) for case in CASES] + [("fsdp", case) for case in FSDP_CASES],
)
def test_two_processes_equal_one(wrapping: str, case: str, runs: Path) -> None:
    one, two = runs / "one" / ALIKE.get(case, case), runs / wrapping / case
    first, second = result(two, 0), result(two, 1)
    # FSDP2 has the rank with fewer passes take part in the other's.
    assert (first["passes"] == second["passes"]) == (wrapping == "fsdp")
    assert min(first["passes"] + second["passes"]) >= 1 and max(second["passes"]) >= 3

    weights = torch.load(one / "weights0.pt")
    for rank in range(WORLD_SIZE):
        for name, weight in torch.load(two / f"weights{rank}.pt").items():
            torch.testing.assert_close(
                weight, weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )

    expected = result(one, 0)
    if case in ("kto", "window"):
        assert any(log["kl"] > 0.01 for log in expected["logs"]), "zeros would prove nothing"
    compared = [n for n in expected["logs"][0] if n not in ("epoch", "step", "learning_rate")]
    if wrapping == "fsdp":  # idle passes compute a token each
        for log in expected["logs"] + [expected["evaluation"]]:
            del log[next(name for name in log if name.endswith("pass_efficiency"))]
        compared.remove("pass_efficiency")
    if case == "mixtral":  # a mean of two micro-batches' metrics is not that of their rows
        compared = ["loss", "grad_norm", "aux_loss"]
    for theirs, ours in zip(expected["logs"], first["logs"], strict=True):
        for name in compared:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert first["evaluation"]["eval_loss"] == second["evaluation"]["eval_loss"]
    if case == "mixtral":
        return
    for name, value in expected["evaluation"].items():
        # Sequences are looked up also for rows that are repeated.
        skipped = ("runtime", "per_second", "preparation", "ref_cache_hits")
        if not any(part in name for part in skipped):
            for kind in ("evaluation", "streamed"):
                assert first[kind][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", FSDP_CASES)
def test_gradients_are_reduced_once_a_step_or_at_every_pass(case: str, runs: Path) -> None:
    if case in CASES:
        assert result(runs / "ddp" / case, 0)["reductions"] == STEPS
    fsdp = result(runs / "fsdp" / case, 0)
    times = STEPS if case == "deferred" else sum(fsdp["passes"])
    assert times >= STEPS and fsdp["reductions"] == times * fsdp["groups"]
