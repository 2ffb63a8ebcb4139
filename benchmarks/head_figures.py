"""Figures of the head benchmark: time and memory against N, or a bar for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402 - after the choice of the backend

Info = dict[str, Any]  # the extra_info of a case
COLOURS = {
    "fastkto": "#0072B2",
    "TRL": "#8C8C8C",
    "full logits": "#D55E00",
    "compiled full logits": "#E69F00",
    "torch linear_cross_entropy": "#CC79A7",
    "Liger": "#009E73",
    "Liger KTO loss": "#009E73",
    "Cut Cross-Entropy": "#56B4E9",
}
_FIELDS = {"median_seconds": ("milliseconds", 1000.0), "peak_mib": ("MiB", 1.0)}


def draw_curves(infos: Sequence[Info], path: Path) -> None:
    """Time and memory of one model against N, a column for each mode."""
    modes = list(dict.fromkeys(info["case"]["mode"] for info in infos))
    figure, axes = pyplot.subplots(
        2, len(modes), figsize=(3.4 * len(modes), 5.4), sharex=True, squeeze=False
    )
    for column, mode in enumerate(modes):
        chosen = [info for info in infos if info["case"]["mode"] == mode]
        chosen.sort(key=lambda info: info["case"]["tokens"])
        axes[0][column].set_title(mode)
        axes[1][column].set_xlabel("tokens")
        for axis, (field, (label, factor)) in zip(axes[:, column], _FIELDS.items(), strict=True):
            for name, colour in COLOURS.items():
                points = [
                    (info["case"]["tokens"], factor * info["contenders"][name][field])
                    for info in chosen
                    if name in info["contenders"]
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            if column == 0:
                axis.set_ylabel(label)
    _finish(figure, _contenders(infos), path)


def draw_bars(infos: Sequence[Info], path: Path) -> None:
    """Time and memory of each case, a bar for each contender."""
    names = _contenders(infos)
    height = 0.8 / len(names)
    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 1.5 + 0.22 * len(names) * len(infos)), sharey=True
    )
    for axis, (field, (label, factor)) in zip(axes, _FIELDS.items(), strict=True):
        for row, info in enumerate(infos):
            for place, name in enumerate(names):
                if name not in info["contenders"]:
                    continue
                value = factor * info["contenders"][name][field]
                offset = (place - (len(names) - 1) / 2) * height
                bar = axis.barh(row + offset, value, 0.9 * height, color=COLOURS[name])
                axis.bar_label(bar, fmt="{:,.0f}", padding=2, fontsize=7)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
    titles = [
        info["case"]["mode"] + "\nhalf prompt" * info["case"]["half_prompt"] for info in infos
    ]
    axes[0].set_yticks(range(len(infos)), titles)
    axes[0].invert_yaxis()
    _finish(figure, names, path)


def _contenders(infos: Sequence[Info]) -> list[str]:
    """Those that ran in any of the cases."""
    return [name for name in COLOURS if any(name in info["contenders"] for info in infos)]


def _finish(figure: Any, names: Sequence[str], path: Path) -> None:
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    figure.legend(handles, names, loc="upper center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    # Without a date and random ids the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fastkto"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
