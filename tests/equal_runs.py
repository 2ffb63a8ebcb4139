"""Comparisons of runs of one process and of two, and of cached scores on one rank and on none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed_run import WORLD_SIZE

TOLERANCE = {"rel": 1e-5, "abs": 1e-5}
# Where scores are cached: what differs.
NOT_COMPARED = ("runtime", "per_second", "ref_cache", "pass_efficiency")


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
    if case in ("kto", "window", "uneven", "uneven window"):
        assert any(log["kl"] > 0.01 for log in expected["logs"]), "zeros would prove nothing"
    compared = [n for n in expected["logs"][0] if n not in ("epoch", "step", "learning_rate")]
    # Idle passes compute a token each, and a repeated row may share its prompt with another.
    if in_lockstep or case.startswith("uneven"):
        for log in expected["logs"] + [expected["evaluation"]]:
            del log[next(name for name in log if name.endswith("pass_efficiency"))]
        compared.remove("pass_efficiency")
    if case == "mixtral":  # a mean of two micro-batches' metrics is not that of their rows
        compared = ["loss", "grad_norm", "aux_loss"]
    for theirs, ours in zip(expected["logs"], first["logs"], strict=True):
        for name in compared:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], **TOLERANCE), name
    assert first["evaluation"]["eval_loss"] == second["evaluation"]["eval_loss"]
    if case == "mixtral":
        return
    for name, value in expected["evaluation"].items():
        # Sequences are looked up also for rows that are repeated.
        skipped = ("runtime", "per_second", "preparation", "ref_cache_hits")
        if not any(part in name for part in skipped):
            for kind in ("evaluation", "streamed"):
                assert first[kind][name] == pytest.approx(value, **TOLERANCE), name


def check_half_known(runs: dict[str, Any], case: str, *, in_lockstep: bool) -> None:
    """A case of tests/precompute_run.py in two processes, against the run without a cache."""
    run, expected = runs[case], runs["uncached"]
    if case == "stream":  # scored as it comes: which rank has to changes from step to step
        assert run["hits"] == [[8, 0, 8], [0, 8, 0]] and not run["released"]
        assert all(log["ref_cache_misses"] == 8 for log in run["logs"])
    else:  # scored before the first step, of which one rank has more to do
        assert run["hits"] == [[8, 8, 8], [8, 8, 8]] and run["released"]
    first, second = run["forwards"]
    assert set(first) == {"reference", "policy", "gradient"}
    # In lockstep the rank with more known rows takes part in the other's passes.
    assert first == second if in_lockstep else first["reference"] < second["reference"]
    for log, expected_log in zip(run["logs"], expected["logs"], strict=True):
        for name, value in expected_log.items():
            if not any(part in name for part in NOT_COMPARED):
                assert log[name] == pytest.approx(value, **TOLERANCE), name
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(run["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)
