"""What a run begins with, said once: the data, and which weights are the reference."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer


class StartLine(TrainerCallback):
    """Says it on the main process's standard error. The command line, which says more, drops it."""

    def __init__(self, trainer: KTOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        reports = self.trainer.row_reports.items()
        lines = [f"{name} data: {report.classes}; {report.losses}" for name, report in reports]
        lines.append(f"reference: {self.trainer.reference.description}")
        tqdm.write("\n".join(lines), file=sys.stderr)  # above the progress bar, if there is one
