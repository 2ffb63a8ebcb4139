"""Markdown tables and figures of runs of `benchmarks/test_head.py` and `benchmarks/test_step.py`.

    python -m benchmarks.report RESULTS.json [MORE.json ...] --output docs

writes `head_results.md` and `head_*.svg` of the head's cases that the files hold, and
`step_results.md` and `step_*.svg` of the step's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.head_report import read_head_cases, write_head_report
from benchmarks.step_report import read_cases, write_step_report


def write_report(sources: Sequence[Path], output: Path) -> None:
    """Write the pages and their figures into `output`; ValueError for a file without a case."""
    runs = {source: json.loads(source.read_text()) for source in sources}
    head = {source: run for source, run in runs.items() if read_head_cases(run)}
    step = {source: run for source, run in runs.items() if read_cases(run)}
    for source in runs:
        if source not in head and source not in step:
            raise ValueError(
                f"{source} holds no case of benchmarks/test_head.py or test_step.py; pass what "
                "they wrote with --benchmark-json"
            )
    output.mkdir(parents=True, exist_ok=True)
    if head:
        write_head_report(head, output)
    if step:
        write_step_report(step, output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of the benchmarks.")
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON files that pytest-benchmark wrote"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder, default: docs")
    arguments = parser.parse_args()
    write_report(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
