"""KTO runs under DeepSpeed in two processes, for tests/test_deepspeed.py.

    torchrun --nproc-per-node 2 tests/deepspeed_run.py OUTPUT_DIR

First those of tests/distributed_run.py, a folder for each stage of ZeRO; then, of each case with
checkpoints, the whole run's weights and those of one that goes on from its middle; then those of
tests/precompute_run.py under ZeRO-2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import fastkto.trainer
from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import TokenSequence
from fastkto.modes import evaluating
from fastkto.passes import build_pass, run_pass
from fastkto.plan_passes import Layout
from fastkto.sharding import is_divided_by_zero, release_gathered
from tests import distributed_run, precompute_run
from tests.deepspeed_on_cpu import allow_deepspeed_on_cpu
from tests.distributed_run import rows, whole
from tests.fsdp_resume_run import LORA, MIDDLE, STEPS, result
from tests.launch import ROOT, finish
from tests.models import tiny_model, tiny_tokenizer

CASES = {
    "zero1": ("kto", "uneven", "lora"),
    "zero2": ("window", "tied", "uneven window", "lora", "precomputed"),
    "zero3": ("window", "tied", "uneven", "lora", "mixtral"),
}
RESUMED: dict[str, int] = {  # and the stage
    "full": 2,
    "bf16": 2,
    "path": 3,
    "frozen adapter": 3,
    "frozen adapter, bf16": 3,
}


def configuration(stage: int) -> dict[str, Any]:
    """For `KTOConfig(deepspeed=...)`: that of the examples, and stage 3 divides every parameter."""
    name = "zero3.json" if stage == 3 else "zero2.json"
    config = json.loads((ROOT / "examples" / name).read_text())
    config["zero_optimization"]["stage"] = stage
    if stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def count_reductions() -> None:
    """Have `distributed_run.reductions` remember how many numbers DeepSpeed reduces."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def count(optimizer: Any, method: str, size: Callable[[Any], int]) -> None:
        reduce = getattr(optimizer, method)

        def counted(self: Any, reduced: Any, *args: Any) -> Any:
            distributed_run.reductions.append(size(reduced))
            return reduce(self, reduced, *args)

        setattr(optimizer, method, counted)

    count(DeepSpeedZeroOptimizer, "average_tensor", lambda bucket: bucket.numel())
    count(
        DeepSpeedZeroOptimizer_Stage3,
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
        lambda weights: sum(weight.grad.numel() for weight in weights),
    )


def build(case: str, directory: Path, initial: Path) -> KTOTrainer:
    """A trainer whose model and adapter are the same each time; "path" reads them in parts."""
    unset_hf_deepspeed_config()
    torch.manual_seed(0)
    model: Any = str(initial) if case == "path" else tiny_model("llama", seed=2)
    if case.startswith("frozen adapter"):
        model = get_peft_model(model, LORA)
    ref_model = tiny_model("llama", seed=1) if case in ("full", "bf16") else None
    return KTOTrainer(
        model=model,
        ref_model=ref_model,
        args=configure(directory, RESUMED[case], bf16=case.endswith("bf16")),
        train_dataset=rows(48),
        processing_class=tiny_tokenizer(),
    )


def configure(directory: Path, stage: int, **config: Any) -> KTOConfig:
    return KTOConfig(
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
        deepspeed=configuration(stage),
        **config,
    )


def facts(trainer: KTOTrainer) -> dict[str, Any]:
    """How models and scores are kept; a collective call."""
    settings = trainer.step_settings
    models: dict[str, Any] = {
        "policy": trainer.model,
        "reference": trainer.reference.model or trainer.model,
    }
    release_gathered(settings.policy)
    divided = {
        name
        for name, model in models.items()
        if all(is_divided_by_zero(weight) and not len(weight) for weight in model.parameters())
    }
    tokens = torch.arange(10, 14)
    with evaluating(settings.policy):
        sequences = [TokenSequence(tokens, tokens, 0)]
        scores = run_pass(settings.policy, build_pass(sequences, [[0]], Layout.PACKED)).logprob
    release_gathered(settings.policy)
    return {
        "divided": divided,
        "reference": [whole(weight) for weight in models["reference"].parameters()],
        "layouts": {settings.policy_layout.value, settings.reference_layout.value},
        "score_dtypes": {scores.dtype},
        "fractional_bits": bool((scores != scores.bfloat16()).any()),
    }


def refusals(initial: Path, directory: Path) -> list[str]:
    """What is said of a policy that was changed after ZeRO-3 had divided it, and of training one
    that was prepared for an evaluation."""
    args = configure(directory, 3)
    model = AutoModelForCausalLM.from_pretrained(initial)
    with torch.no_grad():
        model.model.norm.weight.ds_tensor.add_(1.0)
    data = {"train_dataset": rows(48), "eval_dataset": rows(13)}
    messages = []
    for ref_model in (None, AutoModelForCausalLM.from_pretrained(initial)):
        try:
            trainer = KTOTrainer(
                model=model,
                ref_model=ref_model,
                args=args,
                processing_class=tiny_tokenizer(),
                **data,
            )
            trainer.evaluate()
            trainer.train()
        except ValueError as error:
            messages.append(str(error))
    return messages


def main(directory: Path) -> None:
    rank = int(PartialState(cpu=True).process_index)
    tiny_model("llama", seed=2).save_pretrained(directory / f"initial{rank}")
    torch.distributed.barrier()
    initial = directory / "initial0"
    for stage, cases in CASES.items():
        for case in cases:
            unset_hf_deepspeed_config()
            deepspeed = configuration(int(stage[-1]))
            distributed_run.run(case, directory / stage / case, deepspeed=deepspeed)
    for case in RESUMED:
        trainer = build(case, directory / case, initial)
        trainer.train()
        trainer.save_model(str(directory / case / "model"))
        complete = result(trainer)
        resumed = build(case, directory / case, initial)
        resumed.train(resume_from_checkpoint=str(directory / case / f"checkpoint-{MIDDLE}"))
        run = {"complete": complete, "resumed": result(resumed), "facts": facts(resumed)}
        if trainer.is_world_process_zero():
            torch.save(run, directory / f"{case}.pt")
    unset_hf_deepspeed_config()
    fastkto.trainer.score_window = precompute_run.score_and_count
    runs = precompute_run.trainings(directory / "half known", deepspeed=configuration(2))
    if rank == 0:
        torch.save(runs, directory / "half_known.pt")
    messages = refusals(initial, directory)
    (directory / f"refusals{rank}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    fastkto.trainer.score_window = distributed_run.score_and_count
    allow_deepspeed_on_cpu()
    count_reductions()
    main(Path(sys.argv[1]))
    finish()
