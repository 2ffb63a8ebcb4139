"""One command for all that needs a GPU: correctness, sizes that only a GPU holds, benchmarks.

    python -m benchmarks.gpu_check --output benchmarks/results [--only correctness,gpu]

Every part is a process of its own, so that a crash does not hide the others, and one that is not
done after --limit seconds keeps what it has measured by then. The last lines are a table, which
`gpu_check.txt` holds too, and `gpu_check.json` with device and versions, together with what earlier
calls on that machine found. Both are written after each part. Logs and JUnit files are in
`gpu_check_logs.tar`: of the output folder a lent machine brings back a few files only. Exit status:
0 if every part passed or was skipped, for a reason that is shown; 1 if one failed or was not done;
2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets")
PACKAGES += ("liger-kernel", "cut-cross-entropy")
TARGET_MODELS = ("qwen2.5-0.5b", "llama-3.1-8b")
OTHER_MODELS = ("qwen3-8b", "gemma-2-2b")
INTERRUPTED_S = 60.0  # to write down what there is


@dataclass(frozen=True)
class Part:
    """One process of pytest, or a program of this folder."""

    name: str
    group: str  # what --only selects
    arguments: tuple[str, ...]  # files
    needs: tuple[str, ...] = ()  # modules to import, without which it is skipped
    select: str = ""  # pytest's -k
    keeps_times: bool = False  # in a file of pytest-benchmark
    is_program: bool = False  # it writes a page into the output folder


def _head_parts(group: str, suffix: str, select: str, models: tuple[str, ...]) -> tuple[Part, ...]:
    """The head benchmark model by model: all of it takes longer than one command may."""
    return tuple(
        Part(
            f"head_{model}_{suffix}",
            group,
            ("benchmarks/test_head.py",),
            needs=("matplotlib", "cpuinfo"),
            select=f"{model} and {select}",
            keeps_times=True,
        )
        for model in models
    )


PARTS = (
    *(
        Part(name, "correctness", (f"tests/{name}.py",), needs)
        for name, needs in (
            ("test_linear_logprob", ()),
            ("test_ops_precision", ()),
            ("test_ops_tiles", ("hypothesis",)),
            ("test_fused_scan", ("triton",)),
            ("test_operators", ()),
            ("test_kto_loss", ("hypothesis",)),
        )
    ),
    Part("test_gpu", "gpu", ("tests/test_gpu.py",)),
    Part("test_accuracy", "accuracy", ("benchmarks/test_accuracy.py",), needs=("cpuinfo",)),
    Part(
        "accuracy",
        "accuracy",
        ("benchmarks/accuracy.py",),
        needs=("cpuinfo",),
        is_program=True,
    ),
    # What the targets are about, N = 8192 with D = 896 and 4096, before the rest
    *_head_parts("targets", "n8192", "n8192", TARGET_MODELS),
    *_head_parts("benchmarks", "n8192", "n8192", OTHER_MODELS),
    *_head_parts("benchmarks", "more", "not n8192", TARGET_MODELS + OTHER_MODELS),
    *(
        Part(name, "benchmarks", (f"benchmarks/{name}.py",), needs=needs, keeps_times=True)
        for name, needs in (
            ("test_step", ("trl", "peft", "datasets", "matplotlib", "cpuinfo")),
            ("test_context", ("trl", "peft", "datasets", "cpuinfo")),
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
    report, times = output / f"{part.name}.xml", output / f"{part.name}.json"
    report.unlink(missing_ok=True)
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    start = time.monotonic()
    with (output / f"{part.name}.log").open("w") as file:
        process = subprocess.Popen(
            command_of(part, output),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a job may ignore it
        )
        status = wait(process, limit_s)
    if part.keeps_times and times.exists() and not times.stat().st_size:
        times.unlink()  # pytest-benchmark makes it at its start
    seconds = time.monotonic() - start
    if part.is_program:
        return outcome_of_program(part.name, status, seconds, limit_s)
    return read_outcome(part.name, status, seconds, report, limit_s)


def command_of(part: Part, output: Path) -> list[str]:
    if part.is_program:
        (path,) = part.arguments
        module = path.removesuffix(".py").replace("/", ".")
        return [sys.executable, "-m", module, "--output", str(output)]
    command = [sys.executable, "-m", "pytest", "-v", f"--junitxml={output / part.name}.xml"]
    command += ["-k", part.select] if part.select else []
    command += [f"--benchmark-json={output / part.name}.json"] if part.keeps_times else []
    return [*command, *part.arguments]


def wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit status; None where the process had to be stopped after the limit."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest writes its files then
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPTED_S)
    # Its workers too: they hold the device's memory.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def outcome_of_program(name: str, status: int | None, seconds: float, limit_s: float) -> Outcome:
    """Of a part that is one thing to do."""
    if status == 0:
        return Outcome(name, "passed", seconds, passed=1)
    reason = _late(limit_s) if status is None else f"exit status {status}: see {name}.log"
    return Outcome(name, "failed", seconds, failed=1, reasons={reason: 1})


def _late(limit_s: float) -> str:
    return f"not done after the limit of {limit_s:.0f} s"


def read_outcome(
    name: str, status: int | None, seconds: float, report: Path, limit_s: float
) -> Outcome:
    """From the exit status, None after the time limit, and the JUnit file, which may be missing."""
    outcome = Outcome(name, "passed", seconds)
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        if case.get("name") is None:  # it was interrupted
            continue
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
        reasons[_late(limit_s)] += 1
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
    """Write `gpu_check.json` and `gpu_check.txt`; the table, which is the latter.

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
    table = "\n".join(lines)
    (output / "gpu_check.txt").write_text(table + "\n")
    return table


def run_parts(
    parts: Sequence[Part], machine: dict[str, Any], output: Path, limit_s: float
) -> list[Outcome]:
    """All of them, one after the other; what is known is written after each."""
    outcomes = []
    for part in parts:
        outcomes.append(run_part(part, output, limit_s))
        _write(outcomes[-1].row())
        pack_logs(part.name, output)
        write_report(outcomes, machine, output)
    return outcomes


def pack_logs(name: str, output: Path) -> None:
    """Move a part's log and JUnit file to the archive; of two with one name the last counts."""
    with tarfile.open(output / "gpu_check_logs.tar", "a") as archive:
        for path in (output / f"{name}.log", output / f"{name}.xml"):
            if path.exists():
                archive.add(path, path.name)
                path.unlink()


def main(arguments: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    groups = list(dict.fromkeys(part.group for part in PARTS))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for all that it writes")
    everything = ",".join(groups)
    parser.add_argument("--only", default=everything, help="of the groups %(default)s, or parts")
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
    output, machine = options.output.resolve(), describe_machine()
    outcomes = run_parts(parts, machine, output, options.limit)
    _write(write_report(outcomes, machine, output))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
