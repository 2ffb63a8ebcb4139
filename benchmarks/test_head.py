"""The head operation of fastkto and of its peers: time, memory and error, on the same inputs.

    python -m pytest benchmarks/test_head.py --benchmark-json RESULTS.json
    python -m benchmarks.report RESULTS.json --output docs

`-k "qwen2.5-0.5b"` selects a model; `n8192`, `no_gradient`, `frozen_head`, `trainable_head` and
`half_prompt` the rest, `KTO_loss` the loss behind the head. Before anything is timed, results are
compared with fp64: fastkto has to be within its documented bounds, and a peer that is further off
than its compute dtype explains is shown as such. On a CPU contenders take turns. `HEAD_ROUNDS`
calls of each are timed, by default 3 on a CPU and 5 on CUDA. With `--benchmark-disable` a tiny
variant of each case runs once, for the comparison alone.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.head_cases import CASES, DEVICE, LOSS_MODE, MATMULS, Case, Inputs, make_inputs
from benchmarks.head_contenders import MAKERS, Score, make_contenders
from benchmarks.head_measure import call, call_and_peak, matmul_of, seconds_of
from benchmarks.head_truth import Errors, Results, compute_exactly, find_errors
from benchmarks.loss_contenders import LOSS_MAKERS, compute_loss_exactly
from benchmarks.report import write_report

ROUNDS = int(os.environ.get("HEAD_ROUNDS", "5" if DEVICE.type == "cuda" else "3"))
Works = dict[str, Callable[[], Any]]
MATMUL = "matmul"  # timed with the contenders, as what their times are measured by
# fastkto's bounds. With 16-bit inputs a gradient is off by its rounding, 2e-3 of it.
OWN_LIMITS = {
    torch.float32: Errors(logprob=1e-4, hidden=1e-4, weight=1e-4),
    torch.bfloat16: Errors(logprob=1e-4, hidden=4e-3, weight=4e-3),
}
# What logits, and tiles of their gradient, explain that are rounded to the inputs' dtype once.
PEER_LIMITS = {
    torch.float32: Errors(logprob=1e-3, hidden=1e-3, weight=1e-3),
    torch.bfloat16: Errors(logprob=0.125, hidden=0.03, weight=0.03),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_head(benchmark: Any, case: Case) -> None:
    if benchmark.disabled:
        benchmark.pedantic(lambda: check(case.tiny, make_inputs(case.tiny)))
        return
    benchmark.group = str(case)
    compare(benchmark, case)


def compare(benchmark: Any, case: Case) -> None:
    """Check and time all contenders; everything is in the benchmark's extra_info."""
    inputs = make_inputs(case)
    scores, info = check(case, inputs)
    benchmark.extra_info |= info
    matmul, per_call = matmul_of(case, inputs)
    works = {name: partial(call, score, inputs) for name, score in scores.items()}
    seconds = measure(benchmark, {MATMUL: matmul} | works)
    one_matmul = median(seconds.pop(MATMUL)) * per_call
    benchmark.extra_info["matmul_seconds"] = one_matmul
    for name, taken in seconds.items():
        time = median(taken)
        benchmark.extra_info["contenders"][name] |= {
            "seconds": taken,
            "median_seconds": time,
            "matmul_fraction": MATMULS[case.mode] * one_matmul / time,
        }


@lru_cache(maxsize=1)  # the modes of a shape come one after the other
def find_truth(case: Case) -> Results:
    """fp64 results of `case.with_all_gradients`, on the CPU: the device is for the contenders."""
    compute = compute_loss_exactly if case.mode == LOSS_MODE else compute_exactly
    return compute(make_inputs(case))


def check(case: Case, inputs: Inputs) -> tuple[dict[str, Score], dict[str, Any]]:
    """(contenders that ran, what the results file says of them), all compared with fp64."""
    truth = find_truth(case.with_all_gradients)
    makers = LOSS_MAKERS if case.mode == LOSS_MODE else MAKERS
    scores, skipped = make_contenders(case.shape, makers)
    found: dict[str, dict[str, Any]] = {}
    for name in list(scores):
        try:
            results, peak = call_and_peak(scores[name], inputs)
        except Exception as error:  # a peer's, of any kind, is a result
            if name == "fastkto":
                raise
            del scores[name]
            skipped[name] = describe_failure(error)
            continue
        finally:
            release_memory()
        errors = find_errors(results, truth)
        agrees = errors.within((OWN_LIMITS if name == "fastkto" else PEER_LIMITS)[case.dtype])
        assert agrees or name != "fastkto", f"{case}: fastkto is off by {errors}"
        found[name] = {"errors": errors._asdict(), "agrees": agrees, "peak_mib": peak}
        del results
    return scores, {"case": case.as_dict(), "contenders": found, "skipped": skipped}


def describe_failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first_line = str(error).strip().partition("\n")[0]
    return f"it fails with {type(error).__name__}: {first_line[:200]}"


def release_memory() -> None:
    """What a contender has left behind is not in the way of the next."""
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def measure(benchmark: Any, works: Works) -> dict[str, list[float]]:
    """Seconds of ROUNDS calls of each, fastkto's through pytest-benchmark."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    others = [name for name in works if name != "fastkto"]

    def take(name: str) -> None:
        seconds[name].append(seconds_of(works[name]))

    def take_turns() -> None:
        for name in others:
            take(name)

    if DEVICE.type == "cpu":  # whose speed drifts when others use it too
        benchmark.pedantic(partial(take, "fastkto"), setup=take_turns, rounds=ROUNDS)
        return seconds
    for name in others:
        release_memory()
        works[name]()  # the allocator is warm then
        for _ in range(ROUNDS):
            take(name)
    release_memory()
    works["fastkto"]()
    benchmark.pedantic(partial(take, "fastkto"), rounds=ROUNDS)
    return seconds


def test_report_shows_a_measured_case(benchmark: Any, tmp_path: Path) -> None:
    case = Case("qwen2.5-0.5b", 48, "frozen head", is_tiny=True)
    compare(benchmark, case)
    info = benchmark.extra_info
    machine = {"versions": {"torch": "2"}, "device": DEVICE.type, "device_name": "a machine"}
    machine |= {"threads": 1, "command": "python -m pytest benchmarks/test_head.py"}
    run = {
        "benchmarks": [{"extra_info": info}],
        "machine_info": machine,
        "datetime": "2026-01-02T03:04:05",
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(run))

    write_report([results], tmp_path)

    page = (tmp_path / "head_results.md").read_text()
    for name, contender in info["contenders"].items():
        assert f"| 48 | {name} | {1000 * contender['median_seconds']:,.1f} |" in page
    for name, reason in info["skipped"].items():
        assert f"{name} (N = 48): {reason}" in page
    assert "a machine" in page and "2026-01-02" in page
    assert list(tmp_path.glob("*.svg"))
