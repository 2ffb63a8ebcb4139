"""Two processes (DistributedDataParallel over gloo) do what one process does on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_run import CASES, WORLD_SIZE
from tests.launch import launch

SCRIPT = Path(__file__).parent / "distributed_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case as run by `one` process and by `two`."""
    directory = tmp_path_factory.mktemp("runs")
    launch(SCRIPT, directory / "one")
    launch(SCRIPT, directory / "two", processes=WORLD_SIZE)
    return directory


def result(directory: Path, rank: int) -> dict[str, Any]:
    return json.loads((directory / f"result{rank}.json").read_text())


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_processes_equal_one(case: str, runs: Path) -> None:
    one, two = runs / "one" / case, runs / "two" / case
    first, second = result(two, 0), result(two, 1)
    assert first["passes"] != second["passes"], "the ranks should differ in their passes"
    assert min(first["passes"] + second["passes"]) >= 1 and max(second["passes"]) >= 3

    weights = torch.load(one / "weights0.pt")
    for rank in range(WORLD_SIZE):
        for name, weight in torch.load(two / f"weights{rank}.pt").items():
            torch.testing.assert_close(
                weight, weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )

    expected = result(one, 0)
    compared = [n for n in expected["logs"][0] if n not in ("epoch", "step", "learning_rate")]
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
        if not any(part in name for part in ("runtime", "per_second", "preparation")):
            for kind in ("evaluation", "streamed"):
                assert first[kind][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
