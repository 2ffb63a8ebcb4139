"""Small KTO runs for tests/test_distributed.py, alone or as one of several processes.

    python tests/distributed_run.py OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/distributed_run.py OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/distributed_run.py OUTPUT_DIR fsdp

Writes the logs, final weights and each rank's numbers of passes to OUTPUT_DIR, case by case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import fastkto.trainer
from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import split_rows
from fastkto.sharding import gathered
from fastkto.step import BatchLoss
from fastkto.window import PairedBatch, Window, pair_window
from fastkto.window_scores import score_window
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer

RANK_BATCH = 4
WORLD_SIZE = 2
STEPS = 3
# 8 micro-batches of 4 rows, and 2 rows: accelerate adds the first 6 again, so that the last step
# has one micro-batch of each rank, the second rank's of nothing but repeated rows.
UNEVEN_ROWS, REPEATED_ROWS = 34, 6
UNEVEN = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_steps": -1}
CASES: dict[str, dict[str, Any]] = {
    "kto": {},
    "tied": {"gradient_accumulation_steps": 2},
    "window": {"kl_scope": "window", "kl_pairing": "distinct"},
    "precomputed": {"precompute_ref_log_probs": True},
    "uneven": UNEVEN,
    "uneven window": UNEVEN | {"kl_scope": "window"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "apo": {"loss_type": "apo_zero_unpaired"},
    "lora": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    # The router's loss is that of a rank's batch, so one process takes the ranks' batches in turn,
    # which leaves a KL estimate over both no room.
    "mixtral": {"router_aux_loss_coef": 0.5, "loss_type": "apo_zero_unpaired"},
}
FSDP_CASES = CASES | {
    # To reduce gradients at the last pass of the last micro-batch only.
    "deferred": {
        "gradient_accumulation_steps": 2,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}},
    },
}
ALIKE = {"deferred": "tied"}  # one process has nothing to defer


def pair_within_ranks(batches: list[dict[str, Any]], **options: Any) -> Window:
    """One process's batches paired as two processes pair them: inside each rank's rows."""
    if options["kl_scope"] == "window":
        return pair_window(batches, **options)
    paired = []
    counted = options.pop("counted") or [len(batch["rows"]) for batch in batches]
    for batch, count in zip(batches, counted, strict=True):
        tokens = [torch.cat(row) for row in split_rows(batch)]
        parts, counts = [], []
        for start in range(0, len(tokens), RANK_BATCH):
            part = {key: batch[key][start : start + RANK_BATCH] for key in batch}
            parts.append(part | {"input_ids": torch.cat(tokens[start : start + RANK_BATCH])})
            counts.append(min(max(count - start, 0), len(parts[-1]["rows"])))
        ranks = pair_window(parts, counted=counts, **options).batches
        paired.append(
            PairedBatch(
                [partner for rank in ranks for partner in rank.partners],
                sum(rank.lone_rows for rank in ranks),
                sum(rank.same_prompt_pairs for rank in ranks),
            )
        )
    return Window(paired, sum(counted))


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


def training_rows(case: str, *, alone: bool) -> Dataset:
    """One process is given the rows that accelerate repeats for two."""
    if not case.startswith("uneven"):
        return rows(48)
    data = rows(UNEVEN_ROWS)
    return concatenate_datasets([data, data.take(REPEATED_ROWS)]) if alone else data


passes: list[int] = []
reductions: list[int] = []


class CountReductions(TrainerCallback):
    """Remembers each reduction of gradients over ranks, by how many numbers it reduces."""

    trainer: KTOTrainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        model = self.trainer.model_wrapped
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, count_and_reduce)


def count_and_reduce(state, bucket):  # DistributedDataParallel looks at annotations
    reductions.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def count_fsdp_reductions() -> None:
    reduce = _fsdp_param_group.foreach_reduce

    def counted(parameters: Any, gradients: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        reductions.append(sum(gradient.numel() for gradient in gradients))
        return reduce(parameters, gradients, *args, **kwargs)

    _fsdp_param_group.foreach_reduce = counted


def score_and_count(*args: Any, **options: Any) -> list[BatchLoss]:
    """Remembers how many passes each batch of this rank takes."""
    losses = score_window(*args, **options)
    passes.extend(len(loss.plan) for loss in losses)
    return losses


def run_not_finite(directory: Path, **wrapping: Any) -> None:
    """The reference has a NaN for a token that only the second rank's rows of the second step have.

    Writes what each rank says, and the step it is at.
    """
    bad = tiny_tokenizer().encode("Z")[-1]
    data = rows(48).map(
        lambda row, index: {"completion": " Z" if 12 <= index < 16 else row["completion"]},
        with_indices=True,
    )
    reference = tiny_model("llama", seed=1)
    reference.get_input_embeddings().weight.data[bad] = torch.nan
    args = config_of(directory, RANK_BATCH, **wrapping)
    trainer = KTOTrainer(
        model=tiny_model("llama", seed=2),
        ref_model=reference,
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    directory.mkdir(parents=True, exist_ok=True)
    try:
        trainer.train()
    except FloatingPointError as error:
        said = {"error": str(error), "step": trainer.state.global_step}
        (directory / f"said{args.process_index}.json").write_text(json.dumps(said))


def config_of(directory: Path, batch: int, **fields: Any) -> KTOConfig:
    return KTOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_tokens_per_pass=70,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{"max_steps": STEPS, "gradient_checkpointing": False, **fields},
    )


def run(case: str, directory: Path, **wrapping: Any) -> None:
    """`wrapping`: fields of the config that say what divides the models."""
    passes.clear()
    reductions.clear()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    config = {**FSDP_CASES[case], **wrapping}
    if case == "precomputed":
        config["reference_cache"] = str(directory / "cache")
    batch = RANK_BATCH
    if alone and case == "mixtral":
        config["gradient_accumulation_steps"] = WORLD_SIZE
    elif alone:
        batch *= WORLD_SIZE
    family = case if case == "mixtral" else "llama"
    peft_config = None
    if case == "lora":
        peft_config = LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj", "lm_head"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
    # before the config: ZeRO-3 divides models that are made after it as they are made
    tied = case in ("tied", "deferred")
    model = tiny_model(family, seed=2, tied=tied)
    ref_model = None if peft_config else tiny_model(family, seed=1)
    args = config_of(directory, batch, **config)
    counter = CountReductions()
    trainer = KTOTrainer(
        model=model,
        ref_model=ref_model,
        args=args,
        train_dataset=training_rows(case, alone=alone),
        eval_dataset=rows(13),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=[counter],
    )
    counter.trainer = trainer
    trainer.train()
    training_passes, reduced = list(passes), sum(reductions)
    evaluation = trainer.evaluate()
    streamed = trainer.evaluate(rows(13).to_iterable_dataset())
    rank = trainer.args.process_index
    directory.mkdir(parents=True, exist_ok=True)
    weights = {n: whole(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save(weights, directory / f"weights{rank}.pt")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    result = {
        "logs": logs,
        "evaluation": evaluation,
        "streamed": streamed,
        "passes": training_passes,
        # of each trained number
        "reductions": reduced / sum(weight.numel() for weight in weights.values()),
    }
    (directory / f"result{rank}.json").write_text(json.dumps(result))


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """All of a parameter; a collective call where models are divided."""
    with gathered(parameter):
        value = parameter.detach().clone()
    return value.full_tensor() if isinstance(value, DTensor) else value


if __name__ == "__main__":
    fsdp = sys.argv[2:] == ["fsdp"]
    fastkto.trainer.score_window = score_and_count
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        fastkto.window_scores.pair_window = pair_within_ranks
    if fsdp:
        allow_fsdp_on_cpu()
        count_fsdp_reductions()
    for case in FSDP_CASES if fsdp else CASES:
        run(case, Path(sys.argv[1]) / case, **(FSDP2 if fsdp else {}))
    run_not_finite(Path(sys.argv[1]) / "not finite", **(FSDP2 if fsdp else {}))
    finish()
