"""Two processes over gloo, DistributedDataParallel or FSDP2, do what one does on the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed_run import ALIKE, CASES, FSDP_CASES, STEPS, WORLD_SIZE
from tests.equal_runs import check_equal, result
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


@pytest.mark.parametrize(
    ("wrapping", "case"),
    [("ddp", case) for case in CASES] + [("fsdp", case) for case in FSDP_CASES],
)
def test_two_processes_equal_one(wrapping: str, case: str, runs: Path) -> None:
    one, two = runs / "one" / ALIKE.get(case, case), runs / wrapping / case
    check_equal(one, two, case, in_lockstep=wrapping == "fsdp")


@pytest.mark.parametrize("case", FSDP_CASES)
def test_gradients_are_reduced_once_a_step_or_at_every_pass(case: str, runs: Path) -> None:
    if case in CASES:
        assert result(runs / "ddp" / case, 0)["reductions"] == STEPS
    fsdp = result(runs / "fsdp" / case, 0)
    assert sum(fsdp["passes"]) > STEPS
    assert fsdp["reductions"] == (STEPS if case == "deferred" else sum(fsdp["passes"]))


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp"])
def test_a_score_that_is_not_finite_on_one_rank_stops_all(wrapping: str, runs: Path) -> None:
    folder = runs / wrapping / "not finite"
    first, second = (json.loads((folder / f"said{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["step"] == 1
    assert "not finite in step 1, of the reference: rows [12, 13, 14, 15]" in first["error"]
    rows = (folder / "not_finite_step_1.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"] for row in rows] == [12, 13, 14, 15]
