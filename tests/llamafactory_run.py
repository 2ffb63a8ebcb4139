"""Runs of LLaMA-Factory's trainer and of ours in several processes; main process writes their logs.

python -m torch.distributed.run --nproc-per-node 2 tests/llamafactory_run.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from llamafactory.train.kto.trainer import CustomKTOTrainer as Theirs

from fastkto.integrations.llamafactory import CustomKTOTrainer
from tests.llamafactory_runs import build, kto_rows, models


class InPasses(CustomKTOTrainer):
    """Several passes a batch, so that all but the last leave gradients to this process."""

    options = {"max_tokens_per_pass": 40}


class Obeyed(CustomKTOTrainer):
    """The same loss by LLaMA-Factory's methods."""

    def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
        return super().get_batch_loss_metrics(model, batch)


KINDS = {"theirs": Theirs, "ours": InPasses, "obeyed": Obeyed}


def main(folder: Path) -> None:
    for lora in (False, True):
        policy, reference = models("llama", lora=lora, seeds=(2, 1))
        for name, kind in KINDS.items():
            run = {"eval_rows": kto_rows(16, seed=5), "finetuning": {"pref_ftx": 0.5}}
            fields = {"gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}
            trainer = build(kind, folder, policy, reference, **run, **fields, max_steps=2)
            trainer.train()
            if PartialState().is_main_process:
                weights = [p.detach().norm().item() for p in trainer.model.parameters()]
                result = {"log": trainer.state.log_history, "weights": weights}
                path = folder / f"{name}-{'lora' if lora else 'full'}.json"
                path.write_text(json.dumps(result))
            AcceleratorState._reset_state()
            GradientState._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
