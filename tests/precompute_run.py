"""Runs in which one of two ranks finds its rows cached, for tests/test_precompute.py.

    torchrun --nproc-per-node 2 tests/precompute_run.py OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/precompute_run.py OUTPUT_DIR fsdp

Writes the metrics of evaluations, and the logs, weights, hits and forwards of trainings.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, concatenate_datasets

import fastkto.trainer
from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import KTOCollator
from fastkto.precompute import ReleasedReference
from fastkto.step import BatchLoss
from fastkto.window_scores import score_window
from tests.distributed_run import RANK_BATCH, whole
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

# A seed for each batch, the first rank's and the second's in turn: of rows that are cached first,
# and of those trained on, of which the first, the second and the first rank know their own.
CACHED = (0, 10, 1, 11, 2, 12)
TRAINED = (0, 20, 21, 1, 2, 22)
hits: list[float] = []


def batches_of(*seeds: int) -> Dataset:
    return concatenate_datasets([text_rows(RANK_BATCH, seed) for seed in seeds])


def build(
    folder: Path,
    *,
    cached: bool,
    data: Dataset | IterableDataset | None = None,
    data_collator: Any = None,
    **wrapping: Any,
) -> KTOTrainer:
    return KTOTrainer(
        model=tiny_model("llama", seed=2),
        ref_model=tiny_model("llama", seed=1),
        args=KTOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=RANK_BATCH,
            per_device_eval_batch_size=RANK_BATCH,
            max_tokens_per_pass=32,
            max_steps=len(TRAINED) // 2,
            logging_steps=1,
            learning_rate=0.02,
            optim="sgd",
            lr_scheduler_type="constant",
            precompute_ref_log_probs=cached,
            reference_cache=str(folder) if cached else None,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            **wrapping,
        ),
        train_dataset=data,
        data_collator=data_collator,
        processing_class=tiny_tokenizer(),
    )


def short_on_the_second_rank(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator whose batches are of different sizes on the ranks."""
    return KTOCollator(1024)(rows[: RANK_BATCH - torch.distributed.get_rank()])


def evaluate(folder: Path, *sets: Dataset, **wrapping: Any) -> list[dict[str, float]]:
    trainer = build(folder, cached=True, **wrapping)
    return [trainer.evaluate(rows) for rows in sets]


def train(folder: Path, data: Dataset | IterableDataset, **settings: Any) -> dict[str, Any]:
    """`hits` and `forwards` are those of each rank: of its steps, and of each kind of pass."""
    trainer = build(folder, data=data, **settings)
    forwards: Counter[str] = Counter()

    def count(kind: str) -> None:
        if trainer._models_are_checked:
            forwards[kind] += 1

    models: dict[str, Any] = {"policy": trainer.model, "reference": trainer.reference.model}
    for name, model in models.items():
        model.register_forward_hook(
            lambda *_, name=name: count("gradient" if torch.is_grad_enabled() else name)
        )
    hits.clear()
    trainer.train()
    return {
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": {name: whole(weight) for name, weight in trainer.model.named_parameters()},
        "hits": gather_object([list(hits)]),
        "forwards": gather_object([dict(forwards)]),
        "released": isinstance(trainer.reference.model, ReleasedReference),
    }


def score_and_count(*args: Any, **options: Any) -> list[BatchLoss]:
    """Remembers how many sequences of each step this rank's cache has."""
    losses = score_window(*args, **options)
    hits.append(losses[0].sums["ref_cache_hits"])
    return losses


def evaluations(directory: Path, **wrapping: Any) -> list[dict[str, float]]:
    half_known = batches_of(0, 2)
    metrics = evaluate(
        directory / "evaluated", batches_of(0, 1), half_known, half_known, **wrapping
    )
    return metrics + evaluate(directory / "empty", half_known, **wrapping)


def trainings(directory: Path, **wrapping: Any) -> dict[str, dict[str, Any]]:
    """Without a cache, and with one that has half of the rows: of a stream, and ahead of steps."""
    data = batches_of(*TRAINED)
    runs = {"uncached": train(directory / "uncached", data, cached=False, **wrapping)}
    for name in ("stream", "ahead"):
        train(directory / name, batches_of(*CACHED), cached=True, **wrapping)
        rows = data.to_iterable_dataset() if name == "stream" else data
        runs[name] = train(directory / name, rows, cached=True, **wrapping)
    uneven = {"data_collator": short_on_the_second_rank, **wrapping}
    runs["uneven uncached"] = train(directory / "uneven", data, cached=False, **uneven)
    # So many rows are two batches of the first rank's, and three of the second's.
    uneven |= {"precompute_ref_batch_size": 2 * RANK_BATCH}
    runs["uneven"] = train(directory / "uneven", data, cached=True, **uneven)
    return runs


if __name__ == "__main__":
    directory, fsdp = Path(sys.argv[1]), sys.argv[2:] == ["fsdp"]
    fastkto.trainer.score_window = score_and_count
    if fsdp:
        allow_fsdp_on_cpu()
    wrapping = FSDP2 if fsdp else {}
    runs = {"evaluations": evaluations(directory, **wrapping), **trainings(directory, **wrapping)}
    if torch.distributed.get_rank() == 0:
        torch.save(runs, directory / "runs.pt")
    finish()
