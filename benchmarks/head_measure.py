"""What one call of a contender costs: time, and memory above what it is given and gives back."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.head_cases import DEVICE, Case, Inputs
from benchmarks.head_contenders import Score
from benchmarks.head_truth import Results
from tests.allocations import measured_peak

MIB = 2**20
# A product of more tokens is no faster, and its result need not fit.
_MOST_MATMUL_TOKENS = 8192


def call(score: Score, inputs: Inputs) -> Results:
    """One call, with the backward pass if anything needs a gradient."""
    if not inputs.leaves:
        with torch.no_grad():
            return Results(score(inputs))
    logprob = score(inputs)
    gradients = torch.autograd.grad(logprob, inputs.leaves, inputs.upstream.to(logprob.dtype))
    return Results(logprob.detach(), *gradients)


def call_and_peak(score: Score, inputs: Inputs) -> tuple[Results, float]:
    """The results, and the peak in MiB of what was allocated beside the gradients returned."""
    results: list[Results] = []

    def work() -> None:
        results.clear()
        results.append(call(score, inputs))

    if DEVICE.type == "cuda":
        call(score, inputs)  # kernels that are tuned at the first call allocate for that
        peak = _cuda_peak(work)
    else:
        peak = measured_peak(work)
    gradients = [gradient for gradient in results[0][1:] if gradient is not None]
    size = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return results[0], (peak - size) / MIB


def _cuda_peak(work: Callable[[], Any]) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds_of(work: Callable[[], Any]) -> float:
    """One call, until the device has finished it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_of(case: Case, inputs: Inputs) -> tuple[Callable[[], Any], float]:
    """The product of hidden states and weight, and how often it makes that of all scored tokens."""
    hidden = inputs.hidden.detach()[:_MOST_MATMUL_TOKENS]
    weight = inputs.weight.detach().T
    return lambda: torch.mm(hidden, weight), case.scored / len(hidden)
