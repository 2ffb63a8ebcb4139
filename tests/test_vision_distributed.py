"""Images on two processes, which a rank's rows or last pass may lack: weights are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import launch
from tests.vision_distributed_run import CASES, WORLD_SIZE, run
from tests.vision_models import tiny_vision_model

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "vision_distributed_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case: of `one` process and of `two`."""
    directory = tmp_path_factory.mktemp("runs")
    for case in CASES:
        run(case, directory / "one" / case)
    launch(SCRIPT, directory / "two", processes=WORLD_SIZE)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, runs: Path) -> None:
    one, two = runs / "one" / case, runs / "two" / case
    start = tiny_vision_model("qwen2_vl", seed=1).state_dict()
    weights = torch.load(one / "weights0.pt")
    assert all(not weights[name].equal(start[name]) for name in weights if "visual" in name)
    for rank in range(WORLD_SIZE):
        for name, weight in torch.load(two / f"weights{rank}.pt").items():
            torch.testing.assert_close(
                weight, weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
    logs = zip(torch.load(one / "logs0.pt"), torch.load(two / "logs0.pt"), strict=True)
    for expected, actual in logs:
        for name in {"loss", "kl", "grad_norm", "rewards/margins"} & expected.keys():
            assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
