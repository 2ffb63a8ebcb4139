"""The longest context that trains on one CUDA device: fastkto and TRL, each in fresh processes.

    python -m pytest benchmarks/test_context.py --benchmark-json RESULTS.json

An 8B model with LoRA and gradient checkpointing, two rows to a batch, the least that TRL takes; TRL
with and without its activation offloading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.step_cases import Case
from benchmarks.step_worker import OutOfMemoryError, Worker

CONTENDERS = {
    "trl": ("trl", False),
    "trl with offloading": ("trl", True),
    "fastkto": ("fastkto", False),
}
SHORTEST, UNIT = 4096, 1024  # tokens


def longest_that_trains(trains: Callable[[int], bool]) -> int:
    """The most answer tokens for which `trains` is true, to a sixteenth and a multiple of `UNIT`.

    0 if not even `SHORTEST` does. A length that does not train is taken to rule out longer ones.
    """
    good, bad = 0, SHORTEST
    while trains(bad):
        good, bad = bad, 2 * bad
    while good and bad - good > max(UNIT, good // 16):
        middle = (good + bad) // 2 // UNIT * UNIT
        good, bad = (middle, bad) if trains(middle) else (good, middle)
    return good


@pytest.mark.parametrize("limit", [0, 4095, 4096, 5000, 70_000])
def test_bisection_finds_the_longest_length(limit: int) -> None:
    found = longest_that_trains(lambda length: length <= limit)
    assert found <= limit
    assert found == 0 if limit < SHORTEST else limit - found < max(UNIT, found // 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("contender", CONTENDERS)
def test_longest_context(benchmark: Any, contender: str) -> None:
    library, offloading = CONTENDERS[contender]

    def trains(length: int) -> bool:
        case = Case(
            "long answers",
            "8b",
            batch=2,
            tuning="lora",
            checkpointing=True,
            offloading=offloading,
            answer_length=length,
        )
        try:
            with Worker(case, library) as worker:
                worker.step()
        except OutOfMemoryError:
            return False
        return True

    benchmark.extra_info |= {"contender": contender, "unit": "answer tokens"}
    benchmark.extra_info["longest"] = benchmark.pedantic(longest_that_trains, args=(trains,))
    assert benchmark.extra_info["longest"], f"{contender} does not train {SHORTEST} tokens"
