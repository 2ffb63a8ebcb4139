"""Two processes train as LLaMA-Factory's own trainer does in two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from tests.launch import launch

SCRIPT = Path(__file__).parent / "llamafactory_run.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    launch(SCRIPT, directory, processes=2)
    return directory


def read(folder: Path, name: str, kind: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}-{kind}.json").read_text())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["ours", "obeyed"])
def test_losses_and_weights_are_theirs(folder: Path, name: str, kind: str) -> None:
    theirs, ours = read(folder, "theirs", kind), read(folder, name, kind)
    for expected, actual in zip(theirs["log"], ours["log"], strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(expected):
            assert actual[key] == pytest.approx(expected[key], rel=1e-4), key
        if "loss" in expected:  # over two micro-batches, which LLaMA-Factory adds up
            assert actual["kl"] == pytest.approx(expected["kl"] / 2, rel=1e-4)
    assert ours["weights"] == pytest.approx(theirs["weights"], rel=1e-5)
    assert any(log.get("kl", 0) > 0 for log in ours["log"])


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_both_ways_log_the_same_averages(folder: Path, kind: str) -> None:
    ours, obeyed = read(folder, "ours", kind)["log"], read(folder, "obeyed", kind)["log"]
    for expected, actual in zip(ours, obeyed, strict=True):
        names = [name for name in expected if any(p in name for p in ("rewards", "log", "kl"))]
        assert set(names) <= set(actual)
        for name in names:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
