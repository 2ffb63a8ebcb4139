"""Two processes: TRL's trainer and ours side by side, where batches are full on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import launch
from tests.trl_runs import assert_equal_logs

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "trl_ranks_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    launch(SCRIPT, folder, processes=2)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["one", "accumulated"])
def test_equal_on_two_processes(case: str, rank: int, runs: Path) -> None:
    expected, actual = json.loads((runs / f"{case} {rank}.json").read_text())
    assert_equal_logs(expected, actual)
    assert sum("eval_kl" in log for log in actual) == 3


def test_a_batch_that_does_not_fill_all_ranks_differs(runs: Path) -> None:
    """TRL forms its estimate without some ranks; see docs/from-trl.md."""
    expected, actual = json.loads((runs / "not dropped 0.json").read_text())
    differ = [
        index
        for index, (theirs, ours) in enumerate(zip(expected, actual, strict=True))
        for name in ("kl", "eval_kl")
        if name in theirs and ours[name] != pytest.approx(theirs[name], rel=1e-4)
    ]
    assert differ == [2, 5, 7, 8]  # evaluations, and step 6, whose only new row is the first rank's
