"""FSDP2 evaluations in which one of two ranks finds its rows cached, for tests/test_precompute.py.

    torchrun --nproc-per-node 2 tests/precompute_run.py OUTPUT_DIR

Writes the metrics of each evaluation to OUTPUT_DIR.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets

from fastkto import KTOConfig, KTOTrainer
from tests.distributed_run import RANK_BATCH
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows


def batch_of(*seeds: int) -> Dataset:
    """A batch of each rank, from the rank's seed."""
    return concatenate_datasets([text_rows(RANK_BATCH, seed) for seed in seeds])


def evaluate(cache: Path, *sets: Dataset) -> list[dict[str, float]]:
    trainer = KTOTrainer(
        model=tiny_model("llama", seed=2),
        ref_model=tiny_model("llama", seed=1),
        args=KTOConfig(
            output_dir=str(cache),
            per_device_eval_batch_size=RANK_BATCH,
            max_tokens_per_pass=32,
            precompute_ref_log_probs=True,
            reference_cache=str(cache),
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **FSDP2,
        ),
        processing_class=tiny_tokenizer(),
    )
    return [trainer.evaluate(rows) for rows in sets]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    allow_fsdp_on_cpu()
    half_known = batch_of(0, 2)
    results = evaluate(directory / "cache", batch_of(0, 1), half_known, half_known)
    results += evaluate(directory / "empty", half_known)
    if PartialState().is_main_process:
        (directory / "results.json").write_text(json.dumps(results))
    finish()
