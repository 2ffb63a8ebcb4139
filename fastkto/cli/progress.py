"""What `fastkto train` prints while it trains and when it is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fastkto.checkpoints import last_whole_checkpoint
from fastkto.trainer import KTOTrainer

# Metrics of a log line: the key in the log, its name on the line, its format.
SHOWN = (
    ("loss", "loss", ".4f"),
    ("kl", "kl", ".4f"),
    ("rewards/chosen", "reward chosen", "+.4f"),
    ("rewards/rejected", "rejected", "+.4f"),
    ("rewards/margins", "margin", "+.4f"),
    ("grad_norm", "grad norm", ".3g"),
    ("learning_rate", "lr", ".2e"),
)


def describe_end(
    trainer: KTOTrainer, metrics: dict[str, float], evaluation: dict[str, float] | None
) -> list[tuple[str, str]]:
    """Where everything is, and the last metrics."""
    folder, history = Path(str(trainer.args.output_dir)), trainer.state.log_history
    now = {"step": trainer.state.global_step, **metrics}  # of a run that is too short to log
    last: dict[str, float] = next((log for log in reversed(history) if "loss" in log), now)
    saved = "adapter" if isinstance(trainer.model, PeftModel) else "model"
    rows = [
        (f"{saved} saved to", str(folder)),
        (f"at step {last['step']}", describe_metrics(last)),
    ]
    if metrics.get("train_loss"):  # nothing was left to train for a resumed run, else
        rows.append(("whole run", f"loss {metrics['train_loss']:.4f}"))
    if evaluation is not None:
        rows.append(("evaluation", describe_metrics(evaluation, "eval_")))
    rows.append(("metrics", f"{folder / 'trainer_state.json'}"))
    rows.append(("plot", draw_plot(history, folder / "training.png")))
    return rows


def describe_interruption(trainer: KTOTrainer) -> str:
    """Where a run was when it was interrupted, and how to go on with it."""
    args, step = trainer.args, trainer.state.global_step
    # A later one is of an earlier run in the same folder.
    last = last_whole_checkpoint(str(args.output_dir), Path(f"checkpoint-{step + 1}"))
    if last is not None:
        return f"interrupted at step {step}; go on with --resume_from_checkpoint {last}"
    when = f"save_strategy is {args.save_strategy.value!r}"
    if args.save_strategy == SaveStrategy.STEPS:
        when = f"save_steps is {args.save_steps:g}"
    return f"interrupted at step {step}; no checkpoint was saved by then ({when})"


def draw_plot(history: list[dict[str, float]], path: Path) -> str:
    """Draw the log history; returns where the plot is, or why there is none."""
    if find_spec("matplotlib") is None:
        return "none, since matplotlib is not installed (pip install matplotlib)"
    from fastkto.plot import plot_training

    plot_training(history, path)
    return str(path)


def describe_metrics(logs: dict[str, Any], prefix: str = "") -> str:
    """The main metrics of a log on one line; `prefix` is "eval_" for those of an evaluation."""
    parts = [
        f"{name} {float(logs[prefix + key]):{form}}"
        for key, name, form in SHOWN
        if prefix + key in logs
    ]
    return "  ".join(parts)


@contextmanager
def closing_the_bar(trainer: KTOTrainer) -> Iterator[None]:
    """What comes after an error begins on a line of its own."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TrainingProgress) and callback.training_bar is not None:
                callback.training_bar.close()


class TrainingProgress(ProgressCallback):
    """`Trainer`'s progress bars, with a short line for each log in place of its whole dict.

    Everything that is logged is in `trainer_state.json`.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        line = describe_metrics(logs, prefix)
        if line and "train_runtime" not in logs:
            step = f"{state.global_step:>{len(str(state.max_steps))}}"
            self.training_bar.write(f"step {step}  {'evaluation  ' if prefix else ''}{line}")
