"""Small KTO runs for tests/test_distributed.py, alone or as one of several processes.

    python tests/distributed_run.py OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/distributed_run.py OUTPUT_DIR

Writes the logs, final weights and each rank's numbers of passes to OUTPUT_DIR, case by case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

import fastkto.trainer
from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import KTOCollator
from fastkto.step import BatchLoss
from tests.models import tiny_model, tiny_tokenizer

RANK_BATCH = 4
WORLD_SIZE = 2
CASES: dict[str, dict[str, Any]] = {
    "kto": {},
    "apo": {"loss_type": "apo_zero_unpaired"},
    "lora": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    # The router's loss is that of a rank's batch, so one process takes the ranks' batches in turn,
    # which leaves a KL estimate over both no room.
    "mixtral": {"router_aux_loss_coef": 0.5, "loss_type": "apo_zero_unpaired"},
}


class PairsWithinRanks(KTOCollator):
    """One process's batch paired as two processes pair it: inside each rank's rows."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        parts = [
            super(PairsWithinRanks, self).__call__(rows[start : start + RANK_BATCH])
            for start in range(0, len(rows), RANK_BATCH)
        ]
        return {
            key: torch.cat([part[key] for part in parts])
            if isinstance(parts[0][key], torch.Tensor)
            else sum((part[key] for part in parts), [])
            for key in parts[0]
        }


def rows(count: int) -> Dataset:
    """The first rank's rows are short and all desirable, the second's are long and mixed."""
    data = []
    for index in range(count):
        second_rank = index // RANK_BATCH % WORLD_SIZE == 1
        data.append(
            {
                "prompt": "the order " * (3 if second_rank else 1) + str(index % 10),
                "completion": " rain" * (2 + index % 3 + (9 if second_rank else 0)),
                "label": index % 2 == 0 or not second_rank,
            }
        )
    return Dataset.from_list(data)


class CountingBatchLoss(BatchLoss):
    """Remembers how many passes each batch of this rank took."""

    passes: list[int] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes.append(len(self.plan))


def run(case: str, directory: Path) -> None:
    passes = CountingBatchLoss.passes
    passes.clear()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    config = {"gradient_checkpointing": False, **CASES[case]}
    batch = RANK_BATCH
    if alone and case == "mixtral":
        config["gradient_accumulation_steps"] = WORLD_SIZE
    elif alone:
        batch *= WORLD_SIZE
    family = case if case == "mixtral" else "llama"
    peft_config = None
    if case == "lora":
        peft_config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
    args = KTOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_tokens_per_pass=70,
        max_steps=3,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **config,
    )
    trainer = KTOTrainer(
        model=tiny_model(family, seed=1),
        ref_model=None if peft_config else tiny_model(family, seed=2),
        args=args,
        data_collator=PairsWithinRanks(None, needs_kl=args.needs_kl),
        train_dataset=rows(48),
        eval_dataset=rows(13),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    training_passes = list(passes)
    evaluation = trainer.evaluate()
    streamed = trainer.evaluate(rows(13).to_iterable_dataset())
    rank = trainer.args.process_index
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save(weights, directory / f"weights{rank}.pt")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {
        "logs": logs,
        "evaluation": evaluation,
        "streamed": streamed,
        "passes": training_passes,
    }
    (directory / f"result{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    fastkto.trainer.BatchLoss = CountingBatchLoss  # type: ignore[misc]
    for case in CASES:
        run(case, Path(sys.argv[1]) / case)
