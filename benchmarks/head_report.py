"""Markdown tables and figures of runs of `benchmarks/test_head.py`.

    python -m benchmarks.head_report RESULTS.json [MORE.json ...] --output docs

writes `docs/head_results.md` and figures: bars of time and memory for a CPU, lines over the number
of tokens for CUDA. The runs have to be of one machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

from benchmarks.head_cases import MODES

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402 - after the choice of the backend

COLOURS = {"fastkto": "#0072B2", "TRL": "#8C8C8C"}
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Result(NamedTuple):
    """One contender in one case."""

    seconds: float  # median
    peak_mib: float
    logprob_error: float
    gradient_error: float
    agrees: bool
    rounds: int


class Measured(NamedTuple):
    """One case."""

    case: dict[str, Any]
    results: dict[str, Result]
    flops: float
    flops_per_second: float


def read_cases(run: dict[str, Any]) -> list[Measured]:
    """The cases of a pytest-benchmark file, in its order."""
    infos = [
        entry["extra_info"] for entry in run["benchmarks"] if "head_case" in entry["extra_info"]
    ]
    return [
        Measured(
            info["head_case"],
            {
                name: Result(
                    median(result["seconds"]),
                    result["peak_mib"],
                    result["error"]["logprob"],
                    result["error"]["gradient"],
                    result["agrees"],
                    len(result["seconds"]),
                )
                for name, result in info["results"].items()
            },
            info["flops"],
            info["flops_per_second"],
        )
        for info in infos
        if "head_case" in info
    ]


def write_report(sources: Sequence[Path], output: Path) -> None:
    """Write the page and its figures into `output`."""
    runs = {source: json.loads(source.read_text()) for source in sources}
    cases = [case for run in runs.values() for case in read_cases(run)]
    if not cases:
        raise ValueError(
            f"{sources[0]} holds no case of benchmarks/test_head.py; pass its JSON file"
        )
    machines = [run["machine_info"] for run in runs.values()]
    for key in ("device_name", "threads", "versions"):
        if any(machine[key] != machines[0][key] for machine in machines):
            raise ValueError(f"the results differ in {key}; report them apart")
    output.mkdir(parents=True, exist_ok=True)
    page = ["# Measured: the head operation", _conditions(runs, cases)]
    for model in dict.fromkeys(case.case["model"] for case in cases):
        chosen = [case for case in cases if case.case["model"] == model]
        figure = output / f"head_{model.lower()}.svg"
        if machines[0]["device"] == "cpu":
            _draw_bars(chosen, figure)
        else:
            _draw_lines(chosen, figure)
        shape = chosen[0].case
        page += [
            f"## {model}: hidden size {shape['hidden_size']:,}, vocabulary {shape['vocab_size']:,}",
            f"![Time and memory, {model}]({figure.name})",
            *(_table(case) for case in chosen),
        ]
    (output / "head_results.md").write_text("\n\n".join(page) + "\n")


def _conditions(runs: dict[Path, dict[str, Any]], cases: list[Measured]) -> str:
    machine, date = next((run["machine_info"], run["datetime"][:10]) for run in runs.values())
    commands = ", ".join(
        f"`{run['machine_info']['command']}` (raw values in `{source.name}`)"
        for source, run in runs.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rounds = min(result.rounds for case in cases for result in case.results.values())
    page = (
        f"{machine['device_name']}, {machine['threads']} threads, {date}; {versions}. "
        f"{commands}.\n\n"
        "Log-probabilities of the targets alone, no entropy on any side, with the backward pass "
        f"where something needs a gradient. Times are medians of {rounds} rounds in which all take "
        "turns. Memory is the peak beside weight, inputs and the gradients themselves. Matmuls are "
        "the time over that of one matmul of the hidden states with the whole weight, at the rate "
        "of the vendor's matmul in the same run. Errors are the largest of some tokens against "
        "fp64: log-probabilities in nats, hidden gradients over their norm."
    )
    if machine["device"] == "cpu":
        page += (
            " On a CPU TRL's head scores every position, on CUDA only those of completions, as its "
            "callers pass them: with half of the positions prompt, its ratios on a GPU are worse "
            "for fastkto than here. Liger and Cut Cross-Entropy need a GPU."
        )
    return page


def _table(measured: Measured) -> str:
    case = measured.case
    prompt = ", half of them prompt" if case["half_prompt"] else ""
    lines = [
        f"**{case['mode'].capitalize()}**, {case['tokens']:,} tokens{prompt}, {case['dtype']}:\n",
        "| | ms | matmuls | time over TRL's | MiB | memory over TRL's | log-probability error "
        "| gradient error |",
        "|---|" + "---:|" * 7,
    ]
    for name, result in sorted(measured.results.items(), key=lambda item: item[1].seconds):
        cells = [
            name if result.agrees else f"{name} (disagrees)",
            f"{1000 * result.seconds:,.0f}",
            f"{result.seconds * measured.flops_per_second / measured.flops:.2f}",
            _ratio(measured, name, "seconds"),
            f"{result.peak_mib:,.0f}",
            _ratio(measured, name, "peak_mib"),
            f"{result.logprob_error:.0e}",
            f"{result.gradient_error:.0e}" if case["mode"] != "no gradient" else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(measured: Measured, name: str, field: str) -> str:
    if "TRL" not in measured.results:
        return "-"
    value = getattr(measured.results[name], field) / getattr(measured.results["TRL"], field)
    return f"**{value:.2f}**" if name == "fastkto" else f"{value:.2f}"


def _colours(cases: list[Measured]) -> dict[str, str]:
    names = dict.fromkeys(name for case in cases for name in case.results)
    others = iter(OTHERS)
    return {name: COLOURS.get(name) or next(others) for name in names}


def _draw_bars(cases: list[Measured], path: Path) -> None:
    colours = _colours(cases)
    height = 0.9 + 0.28 * sum(len(case.results) + 1 for case in cases)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, height), sharey=True)
    for axis, field, label in zip(
        axes, ("seconds", "peak_mib"), ("seconds", "peak memory, MiB"), strict=True
    ):
        row, ticks = 0, {}
        for measured in cases:
            prompt = ",\nhalf prompt" if measured.case["half_prompt"] else ""
            ticks[row + len(measured.results) / 2 - 0.5] = measured.case["mode"] + prompt
            for name, result in measured.results.items():
                value = getattr(result, field)
                bar = axis.barh(row, value, 0.8, color=colours[name])
                axis.bar_label(bar, fmt="{:,.0f}" if value >= 100 else "{:.2g}", padding=2)
                row += 1
            row += 1
        axis.set_xlabel(label)
        axis.margins(x=0.15, y=0.02)
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    axes[0].invert_yaxis()
    _finish(figure, colours, path)


def _draw_lines(cases: list[Measured], path: Path) -> None:
    colours = _colours(cases)
    figure, axes = pyplot.subplots(2, len(MODES), figsize=(11, 6), sharex=True, squeeze=False)
    for column, mode in enumerate(MODES):
        chosen = sorted(
            (case for case in cases if case.case["mode"] == mode),
            key=lambda case: case.case["tokens"],
        )
        axes[0][column].set_title(mode)
        axes[1][column].set_xlabel("tokens")
        for axis, field in zip(axes[:, column], ("seconds", "peak_mib"), strict=True):
            for name, colour in colours.items():
                points = [
                    (case.case["tokens"], getattr(case.results[name], field))
                    for case in chosen
                    if name in case.results
                ]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", color=colour)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak memory, MiB")
    _finish(figure, colours, path)


def _finish(figure: Any, colours: dict[str, str], path: Path) -> None:
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    height = figure.get_figheight()
    figure.legend(handles, colours, loc="upper center", ncols=len(colours), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / height))
    # Without a date and random ids the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastkto"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of the head benchmark.")
    parser.add_argument(
        "results", type=Path, nargs="+", help="JSON files that pytest-benchmark wrote"
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder, default: docs")
    arguments = parser.parse_args()
    write_report(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
