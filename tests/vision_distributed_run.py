"""Small runs with images for tests/test_vision_distributed.py, there or in two processes.

torchrun --nproc-per-node 2 tests/vision_distributed_run.py OUTPUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import concatenate_datasets

from fastkto import KTOConfig, KTOTrainer
from tests.launch import finish
from tests.vision_models import image_rows, tiny_processor, tiny_vision_model

RANK_BATCH = 4
WORLD_SIZE = 2
STEPS = 3
# How many micro-batches an optimizer step has, and whether activations are recomputed.
CASES = {"one": (1, False), "accumulated": (2, True)}
# Which rows of a rank's micro-batch have no image: of both ranks in turn, over and over.
ALL = tuple(range(RANK_BATCH))
WITHOUT = [(1,), ALL, ALL, ALL, (0, 3), (2,), ALL, ALL]


def run(case: str, directory: Path) -> None:
    """The pairs are those of the whole step, so that they do not depend on the processes."""
    processes = PartialState(cpu=True).num_processes
    steps, checkpointing = CASES[case]
    count = STEPS * WORLD_SIZE * steps
    parts = [
        image_rows(RANK_BATCH, seed=number, sizes=True, without=WITHOUT[number % len(WITHOUT)])
        for number in range(count)
    ]
    trainer = KTOTrainer(
        model=tiny_vision_model("qwen2_vl", seed=1),
        ref_model=tiny_vision_model("qwen2_vl", seed=2),
        args=KTOConfig(
            str(directory),
            per_device_train_batch_size=RANK_BATCH * WORLD_SIZE // processes,
            gradient_accumulation_steps=steps,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_tokens_per_pass=60,
            kl_scope="window",
            learning_rate=0.02,
            optim="sgd",
            lr_scheduler_type="constant",
            max_steps=STEPS,
            logging_steps=1,
            max_length=None,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=concatenate_datasets(parts),
        processing_class=tiny_processor("qwen2_vl"),
    )
    trainer.train()
    directory.mkdir(parents=True, exist_ok=True)
    rank = trainer.accelerator.process_index
    torch.save(trainer.model.state_dict(), directory / f"weights{rank}.pt")
    torch.save(trainer.state.log_history, directory / f"logs{rank}.pt")


if __name__ == "__main__":
    for name in CASES:
        run(name, Path(sys.argv[1]) / name)
    finish()
