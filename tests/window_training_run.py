"""One optimizer step over eight rows, split in some way, for tests/test_window_training.py.

    python tests/window_training_run.py OUTPUT_DIR 8x1 4x2 ...
    torchrun --nproc-per-node 2 tests/window_training_run.py OUTPUT_DIR 4x1 2x2 ...

A split is BATCH_SIZE x ACCUMULATION_STEPS. Rank 0 writes the gradients and the log of each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from fastkto import KTOConfig, KTOTrainer
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer

NUM_ROWS = 8


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, before they are clipped."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def rows() -> Dataset:
    """Two rows of each prompt, of different lengths, both classes unevenly spread."""
    return Dataset.from_list(
        [
            {
                "prompt": "the order " * (1 + index // 2),
                "completion": " rain" * (2 + 5 * index % 7),
                "label": index % 3 != 0,
            }
            for index in range(NUM_ROWS)
        ]
    )


def step(directory: Path, batch_size: int, steps: int, **config: Any) -> dict[str, Any]:
    """Gradients, and what was logged."""
    gradients = Gradients()
    trainer = KTOTrainer(
        model=tiny_model("llama", seed=2),
        ref_model=tiny_model("llama", seed=1),
        args=KTOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            max_tokens_per_pass=60,
            gradient_checkpointing=False,
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **{"kl_scope": "window", **config},
        ),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return {"gradients": gradients.values, "log": trainer.state.log_history[0]}


def main(directory: Path, splits: list[str]) -> None:
    """Run each split, with each pairing."""
    for split in splits:
        batch_size, steps = map(int, split.split("x"))
        for pairing in ("rotate", "distinct"):
            result = step(directory, batch_size, steps, kl_pairing=pairing)
            if PartialState().is_main_process:
                torch.save(result, directory / f"{split}-{pairing}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    finish()
