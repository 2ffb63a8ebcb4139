"""Runs with checkpoints under FSDP2, for tests/test_fsdp.py.

    torchrun --nproc-per-node 2 tests/fsdp_resume_run.py OUTPUT_DIR

Of each case the whole run's weights, and those of one that goes on from its middle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import TokenSequence
from fastkto.modes import evaluating
from fastkto.passes import build_pass, run_pass
from fastkto.plan_passes import Layout
from fastkto.sharding import release_gathered
from tests.distributed_run import rows, whole
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "sharded checkpoint": {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    "bf16": {"bf16": True},
    "lora": {},
    "frozen adapter": {},
    "read by rank 0": {"fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
}
OWN_REFERENCE = ("full", "sharded checkpoint", "bf16")
STEPS, MIDDLE = 4, 2
LORA = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)


def build(case: str, directory: Path, **config: Any) -> KTOTrainer:
    """A trainer whose model and adapter are the same each time."""
    torch.manual_seed(0)
    model: Any = tiny_model("llama", seed=2)
    if case == "read by rank 0":
        # As `accelerate launch` sets it; the last run has turned it off.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
        model.save_pretrained(directory / f"initial{torch.distributed.get_rank()}")
        torch.distributed.barrier()
        model = str(directory / "initial0")
    if case == "frozen adapter":
        model = get_peft_model(model, LORA)
    return KTOTrainer(
        model=model,
        ref_model=tiny_model("llama", seed=1) if case in OWN_REFERENCE else None,
        args=KTOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=4,
            max_tokens_per_pass=70,
            max_steps=STEPS,
            save_steps=MIDDLE,
            logging_steps=1,
            learning_rate=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            **(FSDP2 | {"bf16": False} | CASES[case] | config),
        ),
        train_dataset=rows(48),
        eval_dataset=rows(13),
        processing_class=tiny_tokenizer(),
        peft_config=LORA if case == "lora" else None,
    )


def result(trainer: KTOTrainer) -> dict[str, Any]:
    """What a run logged and trained; a collective call."""
    policy = trainer.model
    weights: dict[str, Tensor] = {n: whole(p) for n, p in policy.named_parameters()}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"logs": logs, "weights": weights, "is_peft": isinstance(policy, PeftModel)}


def facts(trainer: KTOTrainer) -> dict[str, Any]:
    """How models and scores are kept; a collective call."""
    settings = trainer.step_settings
    models: dict[str, Any] = {
        "policy": trainer.model,
        "reference": trainer.reference.model or trainer.model,
    }
    tokens = torch.arange(10, 14)
    with evaluating(settings.policy):
        sequences = [TokenSequence(tokens, tokens, 0)]
        scores = run_pass(settings.policy, build_pass(sequences, [[0]], Layout.PACKED)).logprob
    released = isinstance(models["reference"].get_output_embeddings().weight, DTensor)
    for model in models.values():
        release_gathered(model)
    return {
        "reference_was_released": released,
        "divided": {
            name
            for name, model in models.items()
            if all(isinstance(parameter, DTensor) for parameter in model.parameters())
        },
        "layouts": {settings.policy_layout.value, settings.reference_layout.value},
        "score_dtypes": {scores.dtype},
        "fractional_bits": bool((scores != scores.bfloat16()).any()),
    }


def main(directory: Path) -> None:
    for case in CASES:
        trainer = build(case, directory / case)
        trainer.train()
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(directory / case / "model"))
        complete = result(trainer)
        resumed = build(case, directory / case)
        if case in ("full", "lora"):
            resumed.evaluate()
        resumed.train(resume_from_checkpoint=str(directory / case / f"checkpoint-{MIDDLE}"))
        after, observed = result(resumed), facts(resumed)
        if trainer.is_world_process_zero():
            run = {"complete": complete, "resumed": after, "facts": observed}
            torch.save(run, directory / f"{case}.pt")


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    main(Path(sys.argv[1]))
    finish()
