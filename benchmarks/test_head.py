"""The head operation of fastkto and of others: time, memory and error, on the same inputs.

    python -m pytest benchmarks/test_head.py --benchmark-json RESULTS.json
    python -m benchmarks.head_report RESULTS.json --output docs

`-k "Qwen2.5-0.5B and not half_prompt"` are the headline cases of a CPU. Before anything is timed,
log-probabilities and hidden gradients are compared with fp64; one that disagrees is shown as such.
Contenders take turns, HEAD_ROUNDS times (default 3; 10 on CUDA). With `--benchmark-disable` a tiny
variant of every case runs once, for the comparison alone.
"""

from __future__ import annotations

import gc
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.head_cases import CASES, DEVICE, Case, Inputs, make_inputs
from benchmarks.head_contenders import Contender, contenders
from benchmarks.head_report import write_report
from fastkto import eager
from tests.allocations import measured_peak

ROUNDS = int(os.environ.get("HEAD_ROUNDS", "10" if DEVICE.type == "cuda" else "3"))
CHECKED = 512  # tokens that are compared with fp64
# Log-probabilities in nats, gradients relative: more than rounding in the dtype explains.
TOLERANCE = {"float32": (1e-3, 1e-3), "bfloat16": (1e-1, 1e-1)}
MIB = 2**20


class Error(NamedTuple):
    """The largest of the checked tokens, against fp64."""

    logprob: float  # nats
    gradient: float  # of a token's hidden gradient, over its norm

    def agrees(self, case: Case) -> bool:
        return all(error <= most for error, most in zip(self, TOLERANCE[case.dtype], strict=True))


def step(contender: Contender, inputs: Inputs, case: Case) -> Tensor:
    """One call, with its backward pass where something needs a gradient."""
    inputs.hidden.grad = inputs.weight.grad = None
    logprob = contender(inputs, case.shape.softcap)
    if logprob.requires_grad:
        logprob.backward(torch.linspace(-1e-3, 1e-3, case.tokens, device=DEVICE))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return logprob.detach()


def exact(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """(index, log-probabilities, hidden gradients) of the checked tokens in fp64."""
    index = torch.arange(0, case.tokens, -(-case.tokens // CHECKED), device=DEVICE)
    weight = inputs.weight.detach().double()
    upstream = torch.linspace(-1e-3, 1e-3, case.tokens, device=DEVICE).double()
    logprobs, gradients = [], []
    for some in index.split(128):
        hidden = inputs.hidden.detach()[some].double()
        hidden.requires_grad_(case.mode != "no gradient")
        target, softcap = inputs.target[some], case.shape.softcap
        logprob = eager.linear_logprob(hidden, weight, target, softcap=softcap).logprob
        logprobs.append(logprob.detach())
        if hidden.requires_grad:
            gradients += torch.autograd.grad(logprob, hidden, upstream[some])
    return index, torch.cat(logprobs), torch.cat(gradients) if gradients else None


def error_of(contender: Contender, inputs: Inputs, case: Case, truth: tuple[Any, ...]) -> Error:
    index, logprob, gradient = truth
    difference = step(contender, inputs, case)[index].double() - logprob
    error = difference.abs().max().item()
    if gradient is None:
        return Error(error, 0.0)
    assert inputs.hidden.grad is not None
    distance = (inputs.hidden.grad[index].double() - gradient).norm(dim=1)
    size = gradient.norm(dim=1)
    # Upstream gradients near zero are left out, and ignored tokens, whose gradient is zero.
    kept = size > 1e-3 * size.max()
    return Error(error, (distance[kept] / size[kept]).max().item())


def peak_mib(contender: Contender, inputs: Inputs, case: Case) -> float:
    """Peak beside weight, inputs and the gradients themselves."""
    inputs.hidden.grad = inputs.weight.grad = None
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(contender, inputs, case)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = measured_peak(lambda: step(contender, inputs, case))
    gradients = (leaf.grad for leaf in inputs[:2])
    return (peak - sum(one.nbytes for one in gradients if one is not None)) / MIB


def matmul_rate(inputs: Inputs) -> float:
    """FLOP/s of hidden @ weight.T, for some of the vocabulary, as the vendor's matmul does it."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()[:16_384]
    out = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=DEVICE)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(hidden, weight.T, out=out)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * out.numel() * hidden.shape[1] / median(seconds)


def check(case: Case) -> tuple[Inputs, dict[str, Contender], dict[str, Any]]:
    """Inputs, contenders, and how near each comes to fp64; AssertionError if fastkto does not."""
    inputs, found = make_inputs(case), contenders(case)
    truth = exact(inputs, case)
    errors = {name: error_of(found[name], inputs, case, truth) for name in found}
    assert errors["fastkto"].agrees(case), errors
    results = {
        name: {"error": error._asdict(), "agrees": error.agrees(case), "seconds": []}
        for name, error in errors.items()
    }
    return inputs, found, results


def measure(benchmark: Any, case: Case) -> None:
    """Memory of each contender once, then its time in turns with the others."""
    inputs, found, results = check(case)
    for name, contender in found.items():
        results[name]["peak_mib"] = peak_mib(contender, inputs, case)
    benchmark.group = str(case)
    benchmark.extra_info |= {
        "head_case": case.as_dict(),
        "results": results,
        "flops": 2 * case.tokens * case.shape.hidden_size * case.shape.vocab_size,
        "flops_per_second": matmul_rate(inputs),
    }

    def run(name: str) -> None:
        start = time.perf_counter()
        step(found[name], inputs, case)
        results[name]["seconds"].append(time.perf_counter() - start)

    def take_turns() -> None:
        for name in found:
            if name != "fastkto":
                run(name)

    benchmark.pedantic(partial(run, "fastkto"), setup=take_turns, rounds=ROUNDS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_head(benchmark: Any, case: Case) -> None:
    if benchmark.disabled:
        benchmark.pedantic(partial(check, case.tiny))
    else:
        measure(benchmark, case)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_report_shows_what_was_measured(benchmark: Any, tmp_path: Path, device: str) -> None:
    case = Case("tiny", "frozen head", 24, "float32")
    measure(benchmark, case)
    machine = {"versions": {}, "device": device, "device_name": "?", "threads": 1, "command": ""}
    run = {
        "benchmarks": [{"extra_info": benchmark.extra_info}],
        "machine_info": machine,
        "datetime": "2026-01-01T00:00",
    }
    results = tmp_path / "results.json"
    results.write_text(json.dumps(run))

    write_report([results], tmp_path)

    page = (tmp_path / "head_results.md").read_text()
    seconds = median(benchmark.extra_info["results"]["fastkto"]["seconds"])
    assert f"| fastkto | {1000 * seconds:,.0f} |" in page
    assert "**Frozen head**, 24 tokens, float32" in page
    assert (tmp_path / "head_tiny.svg").stat().st_size > 1000
