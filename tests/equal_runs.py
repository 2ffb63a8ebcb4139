"""The comparison of runs of tests/distributed_run.py in one process and in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_run import WORLD_SIZE


def result(directory: Path, rank: int) -> dict[str, Any]:
    return json.loads((directory / f"result{rank}.json").read_text())


def check_equal(one: Path, two: Path, case: str, *, in_lockstep: bool) -> None:
    """Weights, logs and metrics of a case's folders: of `one` process and of `two`."""
    first, second = result(two, 0), result(two, 1)
    # In lockstep the rank with fewer passes takes part in the other's.
    assert (first["passes"] == second["passes"]) == in_lockstep
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
    if in_lockstep:  # idle passes compute a token each
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
