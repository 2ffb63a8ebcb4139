"""What a run begins with, said once: the data, and which weights are the reference."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer


class StartLine(TrainerCallback):
    """Says it on the main process's standard error. The command line, which says more, drops it."""

    def __init__(self, trainer: KTOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        for name, report in self.trainer.row_reports.items():
            sys.stderr.write(f"{name} data: {report.classes}; {report.losses}\n")
        sys.stderr.write(f"reference: {self.trainer.reference.description}\n")
