"""Tables and figures of runs of `benchmarks/test_step.py`; `benchmarks.report` calls it."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402 - after the choice of the backend

COLOURS = {"trl": "#8C8C8C", "fastkto": "#0072B2"}
NAMES = {"trl": "TRL", "fastkto": "fastkto"}
SECTIONS = {
    "Full fine-tuning with a reference model, batch 8": {"batch": 8, "reference": "model"},
    "The same with gradient checkpointing": {"batch": 8, "checkpointing": True},
    "LoRA, batch 8": {"batch": 8, "tuning": "lora"},
    "Precomputed reference scores, batch 8": {"batch": 8, "reference": "precomputed"},
}


class Result(NamedTuple):
    """Medians of one library in one case."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    tokens: int

    @classmethod
    def of(cls, steps: list[dict[str, Any]]) -> Result:
        return cls(
            seconds=median(step["seconds"] for step in steps),
            cpu_seconds=median(step["cpu_seconds"] for step in steps),
            peak_mib=max(step["peak_mib"] for step in steps),
            tokens=steps[-1]["tokens"],
        )


class Measured(NamedTuple):
    """One case with the results of each library that ran it, and why others did not."""

    case: dict[str, Any]
    real_tokens: int
    results: dict[str, Result]
    refused: dict[str, str]
    rounds: int


def read_cases(run: dict[str, Any]) -> list[Measured]:
    """The cases of a pytest-benchmark file, in its order."""
    infos = [entry["extra_info"] for entry in run["benchmarks"] if "steps" in entry["extra_info"]]
    return [
        Measured(
            case=info["case"],
            real_tokens=info["real_tokens"],
            results={name: Result.of(steps) for name, steps in info["steps"].items()},
            refused=info["refused"],
            rounds=max(map(len, info["steps"].values()), default=0),
        )
        for info in infos
    ]


def write_step_report(runs: dict[Path, dict[str, Any]], output: Path) -> None:
    """Write the page and its figures into `output`; the runs have to be of one machine."""
    cases = [case for run in runs.values() for case in read_cases(run)]
    for key in ("device_name", "threads", "versions"):
        values = [run["machine_info"][key] for run in runs.values()]
        if any(value != values[0] for value in values):
            raise ValueError(f"the results differ in {key}: {values}; report them apart")
    _draw_mixes(cases, output / "step_mixes.svg")
    _draw_batches(cases, output / "step_batches.svg")
    page = [
        "# Measured: one optimizer step",
        _conditions(runs, [case.rounds for case in cases if case.rounds]),
        "![Time and memory of each mix](step_mixes.svg)",
        *_sections(cases),
        "## Device batches",
        "A device batch of one row takes eight of them to an optimizer step, and is fastkto's with "
        '`kl_scope="window"`: one KL estimate over the eight.',
        _table(sorted(_headline(cases), key=lambda case: (case.case["mix"], case.case["batch"]))),
        "![Time and memory over the device batch](step_batches.svg)",
    ]
    (output / "step_results.md").write_text("\n\n".join(page) + "\n")


def _conditions(runs: dict[Path, dict[str, Any]], rounds: list[int]) -> str:
    machine = next(iter(runs.values()))["machine_info"]
    commands = ", ".join(
        f"`{run['machine_info']['command']}` (raw values in `{source.name}`)"
        for source, run in runs.items()
    )
    number = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    on_cpu = machine["device"] == "cpu"
    head = (
        "On a CPU TRL's head scores every position of the padded batch, on CUDA only those of "
        "completions: its ratios here are better for fastkto than on a GPU. "
        if on_cpu
        else ""
    )
    return (
        f"{machine['device_name']}, {machine['threads']} threads; {versions}. "
        f"{commands}.\n\n"
        "Both libraries run their own `train()` on the same rows in the same order, in a process "
        "each; their first losses are compared before anything is timed. A step reaches from one "
        "log to the next: data loader, passes, clipping, optimizer, metrics. Times are medians of "
        f"{number} steps{', taken in turns' if on_cpu else ''}. Memory is the highest peak above "
        "models and optimizer state, stored gradients included"
        + (" (resident memory, with what the allocator keeps). " if on_cpu else ". ")
        + head
        + "Real tokens are those of policy and reference on matched and mismatched sequences; "
        "computed tokens went through a decoder."
    )


def _sections(cases: list[Measured]) -> list[str]:
    parts = []
    for title, wanted in SECTIONS.items():
        chosen = [case for case in cases if _is_section(case.case, wanted)]
        if chosen:
            parts += [f"## {title}", _table(chosen)]
    return parts


def _is_section(case: dict[str, Any], wanted: dict[str, Any]) -> bool:
    plain = {"tuning": "full", "reference": "model", "checkpointing": False}
    return all(case[name] == value for name, value in (plain | wanted).items())


def _headline(cases: list[Measured]) -> list[Measured]:
    """Those that differ in mix and device batch only."""
    first = cases[0].case
    same = ("tuning", "reference", "checkpointing")
    return [case for case in cases if all(case.case[name] == first[name] for name in same)]


def _table(cases: list[Measured]) -> str:
    lines = [
        "| mix | batch | TRL s | fastkto s | ratio | ratio of CPU time | TRL MiB | fastkto MiB "
        "| ratio | real tokens | TRL computes | fastkto computes |",
        "|---|" + "---:|" * 11,
    ]
    for measured in cases:
        cells = [measured.case["mix"], measured.case["batch"]]
        for field, places in (("seconds", 1), ("peak_mib", 0)):
            cells += [_cell(measured, name, field, places) for name in NAMES]
            cells.append(_ratio(measured, field))
            if field == "seconds":
                cells.append(_ratio(measured, "cpu_seconds"))
        cells.append(f"{measured.real_tokens:,}")
        cells += [_cell(measured, name, "tokens", 0) for name in NAMES]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    reasons = {
        f"{NAMES[name]} refuses batch {measured.case['batch']}: {reason}"
        for measured in cases
        for name, reason in measured.refused.items()
    }
    return "\n".join(lines + [f"\n{reason}" for reason in sorted(reasons)])


def _cell(measured: Measured, name: str, field: str, places: int) -> str:
    if name in measured.refused:
        return "refused"
    if name not in measured.results:
        return "-"
    return f"{getattr(measured.results[name], field):,.{places}f}"


def _ratio(measured: Measured, field: str) -> str:
    if set(measured.results) != set(NAMES):
        return "-"
    ours, theirs = (getattr(measured.results[name], field) for name in ("fastkto", "trl"))
    return f"**{ours / theirs:.2f}**"


def _draw_mixes(cases: list[Measured], path: Path) -> None:
    chosen = [case for case in _headline(cases) if case.case["batch"] == 8] or cases
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 1.2 + 0.8 * len(chosen)), sharey=True)
    for axis, field, label in zip(
        axes, ("seconds", "peak_mib"), ("seconds per step", "peak memory, MiB"), strict=True
    ):
        for row, measured in enumerate(chosen):
            for offset, name in ((-0.2, "trl"), (0.2, "fastkto")):
                if name in measured.results:
                    value = getattr(measured.results[name], field)
                    bar = axis.barh(row + offset, value, 0.36, color=COLOURS[name])
                    axis.bar_label(bar, fmt="{:,.0f}" if value >= 100 else "{:.1f}", padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.2)
    axes[0].set_yticks(range(len(chosen)), [case.case["mix"] for case in chosen])
    axes[0].invert_yaxis()
    _finish(figure, path)


def _draw_batches(cases: list[Measured], path: Path) -> None:
    mixes = list(dict.fromkeys(case.case["mix"] for case in _headline(cases)))
    figure, axes = pyplot.subplots(
        2, len(mixes), figsize=(3.2 * len(mixes), 5), sharex=True, squeeze=False
    )
    for column, mix in enumerate(mixes):
        chosen = [case for case in _headline(cases) if case.case["mix"] == mix]
        chosen.sort(key=lambda case: case.case["batch"])
        axes[0][column].set_title(mix)
        axes[1][column].set_xlabel("rows of the device batch")
        for axis, field in zip(axes[:, column], ("seconds", "peak_mib"), strict=True):
            for name, colour in COLOURS.items():
                points = [
                    (case.case["batch"], getattr(case.results[name], field))
                    for case in chosen
                    if name in case.results
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=colour)
            axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("seconds per step")
    axes[1][0].set_ylabel("peak memory, MiB")
    _finish(figure, path)


def _finish(figure: Any, path: Path) -> None:
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, NAMES.values(), loc="upper right", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    # Without a date and random ids the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastkto"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
