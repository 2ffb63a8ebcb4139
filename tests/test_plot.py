"""The figure of a training run."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkto import plot

pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402


def history(steps: int = 5) -> list[dict[str, Any]]:
    """What a trainer logs: training metrics, evaluations, and a summary without any of them."""
    logs: list[dict[str, Any]] = []
    for step in range(2, 2 * steps + 1, 2):
        logs.append(
            {
                "step": step,
                "loss": 0.5 - 0.01 * step,
                "rewards/chosen": 0.1 * step,
                "rewards/rejected": -0.2 * step,
                "rewards/margins": 0.3 * step,
                "kl": max(0.0, math.sin(step)),
                "kl_raw": math.sin(step),
            }
        )
    logs.append({"step": 2 * steps, "eval_loss": 0.4, "eval_rewards/margins": 2.5})
    logs.append({"step": 2 * steps, "train_runtime": 1.0, "train_loss": 0.45})
    return logs


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The labelled curves of a panel, by their names in the legend."""
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def logged(key: str) -> list[tuple[float, float]]:
    return [(log["step"], log[key]) for log in history() if key in log]


def test_each_curve_shows_the_metric_it_is_named_after() -> None:
    loss, rewards, margin, kl = map(lines, plot.draw(history()).axes)
    assert loss == {"loss": logged("loss"), "loss (evaluation)": [(10, 0.4)]}
    assert rewards == {
        "desirable": logged("rewards/chosen"),
        "undesirable": logged("rewards/rejected"),
    }
    assert margin == {"margin": logged("rewards/margins"), "margin (evaluation)": [(10, 2.5)]}
    clamped = "kl, the mean of clamped estimates"
    assert kl == {clamped: logged("kl"), "before the clamp at 0": logged("kl_raw")}


def test_every_axis_is_labelled_and_rewards_and_kl_have_units() -> None:
    figure = plot.draw(history())
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert all(axes.get_xlabel() == "optimizer step" for axes in figure.axes)
    assert labels[0] == "loss"
    assert all("nats" in label for label in labels[1:])


def test_png_is_written_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = plot.plot_training(history(), tmp_path / "new" / "training.png")
    pixels = imread(path)
    assert pixels.shape[:2] == (1008, 1440)
    assert 0.01 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5  # neither blank nor full
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("logs", [[], [{"step": 1, "train_runtime": 1.0}]])
def test_metrics_that_were_not_logged_leave_a_panel_that_says_so(
    logs: list[dict[str, Any]], tmp_path: Path
) -> None:
    figure = plot.draw(logs)
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["not logged"]
    assert plot.plot_training(logs, tmp_path / "empty.png").exists()


def test_a_single_log_is_drawn_as_a_point() -> None:
    (line,) = plot.draw(history(1)[:1]).axes[0].get_lines()
    assert line.get_marker() == "o"


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot.draw(history())
    assert dict(matplotlib.rcParams) == before
    assert (
        "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    )


def test_without_matplotlib_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.plot_training(history(), tmp_path / "training.png")
