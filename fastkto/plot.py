"""A figure of a training run: loss, rewards, margin and KL over steps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Curve(NamedTuple):
    """One metric: its key in the log, its name in the legend and its colour."""

    key: str
    name: str
    colour: str


class Panel(NamedTuple):
    """One metric, or several in the same unit, over steps."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    zero_line: bool


# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, GREEN, VERMILION, GREY = "#0072B2", "#009E73", "#D55E00", "#8C8C8C"

PANELS = (
    Panel("Loss", "loss", (Curve("loss", "loss", BLUE),), False),
    Panel(
        "Rewards",
        "reward (beta x nats)",
        (
            Curve("rewards/chosen", "desirable", GREEN),
            Curve("rewards/rejected", "undesirable", VERMILION),
        ),
        True,
    ),
    Panel(
        "Reward margin",
        "desirable - undesirable (beta x nats)",
        (Curve("rewards/margins", "margin", BLUE),),
        True,
    ),
    Panel(
        "KL estimate",
        "KL (nats)",
        (
            Curve("kl_raw", "before the clamp at 0", GREY),
            Curve("kl", "kl, the mean of clamped estimates", BLUE),
        ),
        True,
    ),
)


def series(log_history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; logs without it are left out."""
    logs = [log for log in log_history if key in log and "step" in log]
    return [float(log["step"]) for log in logs], [float(log[key]) for log in logs]


def plot_training(log_history: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw loss, rewards, margin and KL over steps to the PNG file `path`; returns `path`.

    `log_history` is that of `trainer.state`, with TRL's metric names. Metrics of an evaluation
    (`eval_*`) are drawn as points. A panel whose metrics were not logged says so.

    Raises:
        ImportError: matplotlib, which is an optional dependency, is not installed.
    """
    figure = draw(log_history)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=144)
    os.replace(partial, path)
    return path


def draw(log_history: Sequence[dict[str, Any]]) -> Any:
    """The `matplotlib.figure.Figure` of `plot_training`, 2 x 2 panels."""
    try:
        # Without pyplot there is no global state, and no window is ever opened.
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("the plot needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(10, 7), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    for axes, panel in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        _draw_panel(axes, panel, log_history)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.tick_params(labelbottom=True, length=0, colors="#444444")
        axes.set_xlabel("optimizer step")
    return figure


def _draw_panel(axes: Any, panel: Panel, log_history: Sequence[dict[str, Any]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="y", useOffset=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for curve in panel.curves:
        _draw_curve(axes, curve, log_history)
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        axes.text(
            0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY
        )
        return
    if panel.zero_line:
        axes.axhline(0.0, color="#B0B0B0", linewidth=0.8, zorder=1)
    if len(handles) > 1:
        axes.legend(frameon=False, fontsize=9)


def _draw_curve(axes: Any, curve: Curve, log_history: Sequence[dict[str, Any]]) -> None:
    steps, values = series(log_history, curve.key)
    if steps:
        # A run with a single log would otherwise draw a line of no length.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, label=curve.name, color=curve.colour, linewidth=1.8, marker=marker)
    steps, values = series(log_history, f"eval_{curve.key}")
    if steps:
        name = f"{curve.name} (evaluation)"
        axes.plot(steps, values, "o", label=name, color=curve.colour, markeredgecolor="white", ms=7)
