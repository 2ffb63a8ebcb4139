"""One command for all that needs a GPU: correctness, sizes that only a GPU holds, benchmarks.

    python -m benchmarks.gpu_check --output benchmarks/results [--only correctness,gpu]

Every part is a pytest process of its own, so that a crash does not hide the others; its log and
JUnit file stay in the output folder. The last lines are a table. `gpu_check.json` holds the same
with device and versions, together with what earlier calls on that machine found. Exit status: 0 if
every part passed or was skipped, for a reason that is shown; 1 if one failed or was not done after
--limit seconds; 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets")
PACKAGES += ("liger-kernel", "cut-cross-entropy")


@dataclass(frozen=True)
class Part:
    """One pytest process."""

    name: str
    group: str  # what --only selects
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()  # modules to import, without which it is skipped
    keeps_times: bool = False  # in a file of pytest-benchmark


PARTS = (
    *(
        Part(name, "correctness", (f"tests/{name}.py",), needs)
        for name, needs in (
            ("test_linear_logprob", ()),
            ("test_ops_precision", ()),
            ("test_ops_tiles", ("hypothesis",)),
            ("test_operators", ()),
            ("test_kto_loss", ("hypothesis",)),
        )
    ),
    Part("test_gpu", "gpu", ("tests/test_gpu.py",)),
    *(
        Part(name, "benchmarks", (f"benchmarks/{name}.py",), needs=needs, keeps_times=True)
        for name, needs in (
            ("test_head", ("trl", "peft")),
            ("test_step", ("trl", "peft", "datasets", "matplotlib")),
            ("test_context", ("trl", "peft", "datasets")),
        )
    ),
)


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str  # "passed", "failed" or "skipped"
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)  # of skips and failures -> how often

    def row(self) -> str:
        """Its line of the table."""
        counts = f"{self.passed:6} {self.failed:6} {self.skipped:7}"
        return f"{self.name:22} {self.status:8} {counts} {self.seconds:8.1f}"


def run_part(part: Part, output: Path, limit_s: float) -> Outcome:
    """Run it; what it says goes to `NAME.log`."""
    needs = ("pytest",) + (("pytest_benchmark",) if part.keeps_times else ()) + part.needs
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        return Outcome(part.name, "skipped", reasons={f"needs {', '.join(missing)}": 1})
    report, log = output / f"{part.name}.xml", output / f"{part.name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", f"--junitxml={report}", *part.arguments]
    if part.keeps_times:
        command.append(f"--benchmark-json={output / f'{part.name}.json'}")
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            # Its workers too: they hold the device's memory.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    return read_outcome(part.name, status, time.monotonic() - start, report, limit_s)


def read_outcome(
    name: str, status: int | None, seconds: float, report: Path, limit_s: float
) -> Outcome:
    """From the exit status, None after the time limit, and the JUnit file, which may be missing."""
    outcome = Outcome(name, "passed", seconds)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        bad = case.find("failure") if case.find("error") is None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            outcome.failed += 1
            reasons[f"{case.get('name')}: {(bad.get('message') or '')[:300]}"] += 1
        elif skip is not None:
            outcome.skipped += 1
            message = skip.get("message")
            # of a file that was skipped as a whole the text has the reason
            reasons[(skip.text if message == "collection skipped" else message) or "?"] += 1
        else:
            outcome.passed += 1
    # 5: pytest found no test, which is right where a whole file is skipped.
    is_good = status == 0 or (status == 5 and outcome.skipped > 0)
    if status is None:
        reasons[f"not done after the limit of {limit_s:.0f} s"] += 1
    elif not is_good and not outcome.failed:
        reasons[f"exit status {status}: see {name}.log"] += 1
    if not is_good:
        outcome.status = "failed"
    elif not outcome.passed:
        outcome.status = "skipped"
    outcome.reasons = dict(reasons)
    return outcome


def describe_machine() -> dict[str, Any]:
    """Device and versions; None for what is not installed."""
    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "memory_mib": device.total_memory // 2**20,
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": versions,
    }


def write_report(outcomes: Sequence[Outcome], machine: dict[str, Any], output: Path) -> str:
    """Write `gpu_check.json`; the table.

    Parts that an earlier call ran on the same machine stay in the file and in the table.
    """
    path, by_name = output / "gpu_check.json", {outcome.name: outcome for outcome in outcomes}
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if all(earlier.get(key) == value for key, value in machine.items()):
        kept = (Outcome(**part) for part in earlier.get("parts", ()))
        by_name = {outcome.name: outcome for outcome in kept} | by_name
    outcomes = list(by_name.values())
    content = machine | {"parts": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    header = f"{'what':22} {'status':8} passed failed skipped  seconds"
    lines = [header, *(outcome.row() for outcome in outcomes)]
    for outcome in outcomes:
        lines += [f"{outcome.name}: {reason} ({n})" for reason, n in outcome.reasons.items()]
    return "\n".join(lines)


def run_parts(parts: Sequence[Part], output: Path, limit_s: float) -> list[Outcome]:
    """All of them, one after the other."""
    outcomes = []
    for part in parts:
        outcomes.append(run_part(part, output, limit_s))
        _write(outcomes[-1].row())
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    groups = list(dict.fromkeys(part.group for part in PARTS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--only", default=",".join(groups), help="groups or names of parts")
    # By default a part fits a command of ten minutes; several calls with --only share the work.
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for each part")
    options = parser.parse_args(arguments)
    chosen = set(options.only.split(","))
    unknown = chosen - set(groups) - {part.name for part in PARTS}
    if unknown:
        names = ", ".join([*groups, *(part.name for part in PARTS)])
        parser.error(f"--only has {min(unknown)}; known: {names}")
    if not torch.cuda.is_available():
        _write("gpu_check: PyTorch sees no CUDA device on this machine; nothing was run")
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if chosen & {part.group, part.name}]
    outcomes = run_parts(parts, options.output.resolve(), options.limit)
    _write(write_report(outcomes, describe_machine(), options.output))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
