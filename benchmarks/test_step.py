"""An optimizer step of fastkto and of TRL 1.16: time, memory and tokens, on the same rows.

    python -m pytest benchmarks/test_step.py --benchmark-json RESULTS.json
    python -m benchmarks.report RESULTS.json --output docs

`-k "batch8 and full and model and not checkpointing"` are the three headline cases, a mix each.
The first step's losses are compared before anything is timed. Each library runs in a process of its
own; on a CPU they take turns, TRL first. `STEP_ROUNDS=1` takes one step of each, the default is
three. With `--benchmark-disable` a tiny variant of every case runs once, for the comparison alone.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import write_report
from benchmarks.step_cases import CASES, Case
from benchmarks.step_models import DEVICE
from benchmarks.step_run import LIBRARIES, Step, run_steps
from benchmarks.step_worker import RefusedError, Worker

ROUNDS = int(os.environ.get("STEP_ROUNDS", "3"))
# Absolute, of losses between 0 and 1. The 8B model is bf16, which rounds log-ratios of hundreds of
# tokens by tenths of a nat; its exact comparison is the tiny variant's, in fp32.
LOSS_TOLERANCE = {"tiny": 1e-4, "30m": 1e-4, "8b": 0.05}
# Relative: gradients agree too, as far as their norm tells.
GRAD_NORM_TOLERANCE = {"tiny": 1e-3, "30m": 1e-3, "8b": 0.1}


def assert_same_loss(case: Case, steps: dict[str, Step]) -> None:
    """And the same gradient norm, with a KL estimate that is not just clamped to zero."""
    for (name, first), (other, second) in itertools.combinations(steps.items(), 2):
        message = f"{case}: {name} has {first}, {other} has {second}"
        tolerance = LOSS_TOLERANCE[case.size]
        assert second.loss == pytest.approx(first.loss, rel=0, abs=tolerance), message
        tolerance = GRAD_NORM_TOLERANCE[case.size]
        assert second.grad_norm == pytest.approx(first.grad_norm, rel=tolerance), message
        # A random adapter has no preference and few rows prove little: either sign is possible.
        assert first.kl > 0 or case.tuning == "lora" or case.batch < 8, message


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(benchmark: Any, case: Case) -> None:
    if benchmark.disabled:
        if case.batch != 8 and case.mix != "chat":
            pytest.skip("without timing one mix shows the other batch sizes")
        benchmark.pedantic(lambda: check_losses(case.tiny))
        return
    benchmark.group = str(case)
    # GPU times do not drift as those of a shared CPU do, and two 8B runs need not fit side by side.
    measure = measure_in_turns if DEVICE.type == "cpu" else measure_one_by_one
    measure(benchmark, case)


def describe(case: Case) -> dict[str, Any]:
    """What the results file says of a case, before it is measured."""
    return {
        "case": case.as_dict(),
        "lengths": case.lengths(),
        "real_tokens": case.real_tokens,
        "steps": {},
        "refused": {},
    }


def measure_in_turns(benchmark: Any, case: Case) -> None:
    """A step of each library, then the next of each."""
    info = benchmark.extra_info
    info |= describe(case)
    with ExitStack() as stack:
        workers, first = {}, {}
        for name in LIBRARIES:
            worker = stack.enter_context(Worker(case, name))
            try:
                first[name] = worker.step()  # not timed: fastkto checks the head in it
                workers[name] = worker
            except RefusedError as refusal:
                info["refused"][name] = str(refusal)
        assert_same_loss(case, first)
        steps: dict[str, list[Step]] = {name: [] for name in workers}

        def step(name: str) -> None:
            steps[name].append(workers[name].step())

        *others, last = workers or [None]
        if last is None:
            benchmark.pedantic(lambda: None)
            return

        def take_turns() -> None:
            for name in others:
                step(name)

        benchmark.pedantic(partial(step, last), setup=take_turns, rounds=ROUNDS)
    info["steps"] = as_dicts(steps)


def measure_one_by_one(benchmark: Any, case: Case) -> None:
    """All steps of one library, then all of the next, which has the device to itself."""
    info, first = benchmark.extra_info, {}
    info |= describe(case)
    steps: dict[str, list[Step]] = {}

    def measure(name: str) -> None:
        with Worker(case, name) as worker:
            try:
                first[name] = worker.step()
                worker.step()  # once more: kernels are compiled and the allocator is warm
                steps[name] = [worker.step() for _ in range(ROUNDS)]
            except RefusedError as refusal:
                info["refused"][name] = str(refusal)

    def measure_all() -> None:
        for name in LIBRARIES:
            measure(name)

    benchmark.pedantic(measure_all)
    assert_same_loss(case, first)
    info["steps"] = as_dicts(steps)


def as_dicts(steps: dict[str, list[Step]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(step) for step in taken] for name, taken in steps.items()}


def check_losses(case: Case) -> None:
    """One step of each library in this process; the losses agree."""
    gc.freeze()  # each trainer collects garbage, which imported modules make slow
    first: dict[str, Step] = {}
    for name in LIBRARIES:
        try:
            run_steps(case, name, go_on=once(), report=partial(first.__setitem__, name))
        except ValueError:
            assert case.batch == 1, f"{name} refuses {case}"
    assert_same_loss(case, first)


def test_report_shows_a_measured_case_and_a_refusal(benchmark: Any, tmp_path: Path) -> None:
    case, info = Case("chat", "tiny"), benchmark.extra_info
    with Worker(replace(case, batch=1), "trl") as refusing:
        measure_in_turns(benchmark, case)
        with pytest.raises(RefusedError, match="batch size must be > 1") as refusal:
            refusing.step()
    refused = describe(replace(case, batch=1)) | {"refused": {"trl": str(refusal.value)}}
    machine = {"versions": {}, "device": "cpu", "device_name": "CPU", "threads": 1, "command": ""}
    run = {"benchmarks": [{"extra_info": info}, {"extra_info": refused}], "machine_info": machine}
    results = tmp_path / "results.json"
    results.write_text(json.dumps(run))

    write_report([results], tmp_path)

    page = (tmp_path / "step_results.md").read_text()
    assert f"| chat | 8 | {info['steps']['trl'][0]['seconds']:.1f} |" in page
    assert "| chat | 1 | refused | - |" in page
    assert {path.name for path in tmp_path.glob("*.svg")} == {"step_mixes.svg", "step_batches.svg"}


def once() -> Callable[[], bool]:
    answers: Iterator[bool] = itertools.chain([True], itertools.repeat(False))
    return partial(next, answers)
