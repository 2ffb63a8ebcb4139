"""`kl_scope="window"`: loss and gradients depend on a step's rows, not on how they are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch
from tests.window_training_run import NUM_ROWS, main, step

SCRIPT = Path(__file__).parent / "window_training_run.py"
ONE_RANK, TWO_RANKS = ("8x1", "4x2", "2x4", "1x8"), ("4x1", "2x2", "1x4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("splits")
    for name, splits, processes in (("one", ONE_RANK, 1), ("two", TWO_RANKS, 2)):
        (directory / name).mkdir()
        if processes == 1:
            main(directory / name, list(splits))
        else:
            launch(SCRIPT, directory / name, *splits, processes=processes)
    return directory


def load(runs: Path, ranks: str, split: str, pairing: str) -> dict[str, Any]:
    return torch.load(runs / ranks / f"{split}-{pairing}.pt", weights_only=False)


@pytest.mark.parametrize("pairing", ["rotate", "distinct"])
@pytest.mark.parametrize(
    ("ranks", "split"), [("one", s) for s in ONE_RANK[1:]] + [("two", s) for s in TWO_RANKS]
)
def test_a_split_does_not_change_the_step(ranks: str, split: str, pairing: str, runs: Path) -> None:
    whole, parts = load(runs, "one", "8x1", pairing), load(runs, ranks, split, pairing)
    assert whole["log"]["kl"] > 0.01, "a KL estimate of zero would prove nothing"
    for name in ("loss", "kl", "kl_raw"):
        assert parts["log"][name] == pytest.approx(whole["log"][name], rel=1e-5), name
    scale = max(float(gradient.abs().max()) for gradient in whole["gradients"].values())
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(
            parts["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name
        )


def test_distinct_pairs_have_no_common_prompt(runs: Path) -> None:
    """The rows come in pairs with one prompt, and rotation pairs every second with its twin."""
    rotated, distinct = (load(runs, "one", "1x8", name)["log"] for name in ("rotate", "distinct"))
    assert rotated["kl_same_prompt_rows"] == NUM_ROWS / 2
    assert "kl_same_prompt_rows" not in distinct
    assert rotated["kl"] != pytest.approx(distinct["kl"], rel=1e-3)


def test_a_batch_estimates_its_own_kl_by_default(tmp_path: Path) -> None:
    window = step(tmp_path, 4, 2)["log"]
    batch = step(tmp_path, 4, 2, kl_scope="batch")["log"]
    assert batch["kl"] != pytest.approx(window["kl"], rel=1e-3)
