"""Runs with a moving reference and checkpoints, for tests/test_reference_sync.py.

    python tests/sync_resume_run.py OUTPUT_DIR RESUMED_DIR
    torchrun --nproc-per-node 2 tests/sync_resume_run.py OUTPUT_DIR OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/sync_resume_run.py OUTPUT_DIR OUTPUT_DIR fsdp

Of each case a whole run, and one that goes on from a checkpoint of the same case in RESUMED_DIR.
Writes the logs and final weights of both to OUTPUT_DIR, each rank its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from fastkto import KTOConfig, KTOTrainer
from tests.distributed_run import RANK_BATCH, WORLD_SIZE, rows, whole
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer

STEPS, SYNC_STEPS = 6, 2
LORA = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)
# The step of the checkpoint. At one that is no multiple of SYNC_STEPS the reference is neither the
# initial policy nor the policy of that step.
CASES = {"model": 3, "right behind a move": 4, "adapter": 3}
FSDP_CASES = ("model", "sharded model", "adapter", "sharded adapter")


def build(case: str, directory: Path, **fields: Any) -> KTOTrainer:
    """A trainer whose model and adapter are the same each time."""
    torch.manual_seed(0)
    model: Any = tiny_model("llama", seed=2)
    with_adapter = case.endswith("adapter")
    if with_adapter:
        model = get_peft_model(model, LORA)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return KTOTrainer(
        model=model,
        ref_model=None if with_adapter else tiny_model("llama", seed=1),
        args=KTOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=RANK_BATCH * (WORLD_SIZE if alone else 1),
            kl_scope="window",  # pairs are those of one process
            max_tokens_per_pass=70,
            max_steps=STEPS,
            save_steps=CASES.get(case, 3),
            logging_steps=1,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            sync_ref_model=True,
            ref_model_sync_steps=SYNC_STEPS,
            ref_model_mixup_alpha=1.0 if with_adapter else 0.6,
            **fields,
        ),
        train_dataset=rows(48),
        processing_class=tiny_tokenizer(),
    )


def result(trainer: KTOTrainer) -> dict[str, Any]:
    """What a run logged, and the weights that it and its reference end with; a collective call."""
    models = {"policy": trainer.model, "reference": trainer.reference.model}
    return {
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": {
            f"{name}.{key}": whole(parameter)
            for name, model in models.items()
            if model is not None
            for key, parameter in model.named_parameters()
        },
    }


def main(directory: Path, resumed: Path, *, fsdp: bool) -> None:
    for case in FSDP_CASES if fsdp else CASES:
        # SGD has no state, which PyTorch cannot load for divided models.
        fields = {**FSDP2, "optim": "adamw_torch"} if fsdp else {"optim": "sgd"}
        if case.startswith("sharded"):
            fields["fsdp_config"] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        complete = build(case, directory / case, **fields)
        complete.train()
        runs = {"complete": result(complete)}
        other = build(case, directory / f"{case} resumed", save_strategy="no", **fields)
        other.train(str(resumed / case / f"checkpoint-{complete.args.save_steps}"))
        runs["resumed"] = result(other)
        torch.save(runs, directory / f"{case} {other.args.process_index}.pt")


if __name__ == "__main__":
    fsdp = sys.argv[3:4] == ["fsdp"]
    if fsdp:
        allow_fsdp_on_cpu()
    main(Path(sys.argv[1]), Path(sys.argv[2]), fsdp=fsdp)
    finish()
