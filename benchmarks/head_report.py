"""Tables and figures of runs of `benchmarks/test_head.py`; `benchmarks.report` calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.head_cases import MATMULS
from benchmarks.head_figures import draw_bars, draw_curves

Run = dict[str, Any]
Info = dict[str, Any]  # the extra_info of a case
OURS, TRL, FULL = "fastkto", "TRL", "full logits"
_ABOUT = (
    "Every contender is given the same hidden states, weight and targets, and returns one "
    "log-probability a token; none computes an entropy. With a frozen head the hidden states get "
    "a gradient, with a trainable head the weight too; the gradient that comes in differs from "
    "token to token. KTO loss is the policy with a frozen head, a reference without gradient, and "
    "the loss of both; its error stands in the column of log-probabilities. A half prompt has no "
    "targets in the first half of each sequence: each contender does with them what its own "
    "callers do (on a CPU TRL scores them; PyTorch with full logits always does).\n\n"
    "Time is the median of the calls. Memory is the peak above weight, inputs and the gradients "
    "that are returned. The matmul share is the time of 1 (no gradient), 2 (frozen head) or 3 "
    "(trainable head, KTO loss) products of hidden states and weight in the inputs' dtype, "
    "measured in the same run, over the contender's time; tokens without a target do not count. "
    "Errors are those against fp64: the largest of a log-probability, in nats, and of the "
    "gradients' norms, relative; found before anything is timed. A contender **disagrees** where "
    "an error is larger than rounding its logits once to the inputs' dtype explains."
)


def read_head_cases(run: Run) -> list[Info]:
    """What a pytest-benchmark file says of the head's cases, in its order."""
    infos = (entry["extra_info"] for entry in run["benchmarks"])
    return [info for info in infos if "contenders" in info]


def write_head_report(runs: dict[Path, Run], output: Path) -> None:
    """Write `head_results.md` and its figures: a section for each machine."""
    page = ["# Measured: the head operation", _ABOUT]
    for number, (machine, sources) in enumerate(_by_machine(runs).items()):
        cases = [info for source in sources for info in read_head_cases(runs[source])]
        prefix = "head_" + runs[sources[0]]["machine_info"]["device"] + f"_{number}" * bool(number)
        page += [f"## {machine}", _origin({source: runs[source] for source in sources})]
        page += [_summary(cases), *_draw(cases, output, prefix), *_tables(cases)]
    (output / "head_results.md").write_text("\n\n".join(page) + "\n")


def _by_machine(runs: dict[Path, Run]) -> dict[str, list[Path]]:
    """Files of one device, thread count and set of versions."""
    found: dict[str, list[Path]] = {}
    for source, run in runs.items():
        info = run["machine_info"]
        versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
        title = f"{info['device_name']}, {info['threads']} threads; {versions}"
        found.setdefault(title, []).append(source)
    return found


def _origin(runs: dict[Path, Run]) -> str:
    return "\n".join(
        f"- `{run['machine_info']['command']}`, {run['datetime'][:10]} "
        f"(raw values in `{source.name}`)"
        for source, run in runs.items()
    )


def _title(case: Info) -> str:
    """Of all numbers of tokens."""
    return f"{case['model']}, {case['mode']}" + ", half prompt" * case["half_prompt"]


def _describe(case: Info) -> str:
    softcap = f", softcap {case['softcap']:g}" if case["softcap"] else ""
    return f"D = {case['hidden']:,}, V = {case['vocabulary']:,}, {case['dtype']}{softcap}."


def _summary(cases: Sequence[Info]) -> str:
    lines = [
        "| fastkto in | N | ms | of TRL's | of full logits' | of the fastest other's | MiB "
        "| of TRL's | matmul share |",
        "|---|" + "---:|" * 8,
    ]
    for info in cases:
        found = info["contenders"]
        ours = found[OURS]
        times = [value["median_seconds"] for name, value in found.items() if name != OURS]
        cells = [
            _title(info["case"]),
            f"{info['case']['tokens']:,}",
            _ms(ours),
            _ratio(info, OURS, TRL, "median_seconds", bold=True),
            _ratio(info, OURS, FULL, "median_seconds", bold=True),
            f"{ours['median_seconds'] / min(times):.2f}" if times else "-",
            f"{ours['peak_mib']:,.0f}",
            _ratio(info, OURS, TRL, "peak_mib", bold=True),
            f"{ours['matmul_fraction']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tables(cases: Sequence[Info]) -> Iterable[str]:
    for title, group in groupby(sorted(cases, key=_order), key=lambda info: _title(info["case"])):
        infos = list(group)
        yield f"### {title}"
        yield _describe(infos[0]["case"])
        yield _table(infos)


def _order(info: Info) -> tuple[str, bool, int, int]:
    """By title, then tokens; modes in the order of what they compute."""
    case = info["case"]
    return case["model"], case["half_prompt"], list(MATMULS).index(case["mode"]), case["tokens"]


def _table(infos: Sequence[Info]) -> str:
    lines = [
        "| N | | ms | of TRL's | of full logits' | matmul share | MiB | of TRL's "
        "| log-probability error | hidden error | weight error | |",
        "|---:|---|" + "---:|" * 9 + "---|",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for info in infos:
        tokens = f"{info['case']['tokens']:,}"
        lines += [f"| {tokens} | {_row(info, name)} |" for name in info["contenders"]]
        for skipped in info["skipped"].items():
            reasons.setdefault(skipped, []).append(tokens)
    notes = [
        f"{name} (N = {', '.join(tokens)}): {reason}" for (name, reason), tokens in reasons.items()
    ]
    return "\n".join(lines) + ("\n\nNot run: " + "; ".join(notes) + "." if notes else "")


def _row(info: Info, name: str) -> str:
    found = info["contenders"][name]
    errors = found["errors"].values()
    return " | ".join(
        [
            name,
            _ms(found),
            _ratio(info, name, TRL, "median_seconds"),
            _ratio(info, name, FULL, "median_seconds"),
            f"{found['matmul_fraction']:.0%}",
            f"{found['peak_mib']:,.0f}",
            _ratio(info, name, TRL, "peak_mib"),
            *("" if error is None else f"{error:.1e}" for error in errors),
            "" if found["agrees"] else "**disagrees**",
        ]
    )


def _ms(found: Info) -> str:
    return f"{1000 * found['median_seconds']:,.1f}"


def _ratio(info: Info, name: str, other: str, field: str, *, bold: bool = False) -> str:
    if other not in info["contenders"]:
        return "-"
    value = info["contenders"][name][field] / info["contenders"][other][field]
    return f"**{value:.2f}**" if bold else f"{value:.2f}"


def _draw(cases: Sequence[Info], output: Path, prefix: str) -> list[str]:
    """Curves against N for each model that has several, else bars for each case."""
    links = []
    for model in dict.fromkeys(info["case"]["model"] for info in cases):
        infos = [info for info in cases if info["case"]["model"] == model]
        whole = [info for info in infos if not info["case"]["half_prompt"]]
        draw = draw_curves if len({info["case"]["tokens"] for info in whole}) > 1 else draw_bars
        path = output / f"{prefix}_{model}.svg"
        draw(whole if draw is draw_curves else infos, path)
        links.append(f"![Time and memory of {model}]({path.name})")
    return links
