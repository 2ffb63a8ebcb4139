"""What two ranks make of rows and heads that are wrong on one, for tests/test_not_finite.py.

    torchrun --nproc-per-node 2 tests/not_finite_run.py OUTPUT_DIR ddp|fsdp

Writes how each rank's run ended to OUTPUT_DIR, case by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from fastkto import KTOConfig, KTOTrainer
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.models import tiny_model, tiny_tokenizer
from tests.short_run import SHORT_RUN
from tests.trl_runs import text_rows

BAD_TOKEN = "~"  # which no other row has


class Case(NamedTuple):
    """Rows that are not finite, or a rank whose model is not what fastkto scores."""

    error: str
    text: str
    bad: list[int] = []
    louder_rank: int | None = None
    precomputed: bool = False


# The second rank has rows 4 to 7 of the first batch.
CASES = {
    "a row": Case("FloatingPointError", "in step 0, of the reference: rows [5].", bad=[5]),
    "a rank": Case(
        "FloatingPointError", "in step 0, of the reference: rows [4, 5, 6, 7].", bad=[4, 5, 6, 7]
    ),
    "all rows": Case(
        "FloatingPointError", "of the reference: rows [0, 1, 2, 3, 4, 5, 6, 7].", bad=list(range(8))
    ),
    "a row, precomputed": Case(
        "FloatingPointError", "log-probabilities of rows [5] of the data", bad=[5], precomputed=True
    ),
    "a head": Case("HeadMismatchError", "fastkto does not score as", louder_rank=1),
}


def rows_with_bad(count: int, bad: list[int]) -> list[dict[str, Any]]:
    """Rows of which those in `bad` have the bad token and are the longest."""
    rows = text_rows(count, seed=3).to_list()
    for index in bad:
        rows[index]["prompt"] = "the other rain in an order ran thin " * 4 + ":"
        rows[index]["completion"] += f" {BAD_TOKEN}"
    return rows


def louder(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, with logits that are not those of its head."""

    class Louder(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 1.3 * outputs.logits
            return outputs

    model.__class__ = Louder
    return model


def run(case: Case, directory: Path, **wrapping: Any) -> dict[str, Any]:
    """How this rank's run ended."""
    settings = {**SHORT_RUN, "max_steps": 2, "gradient_checkpointing": False, **wrapping}
    if case.precomputed:
        settings |= {"precompute_ref_log_probs": True, "reference_cache": str(directory / "cache")}
    args = KTOConfig(str(directory), loss_type="apo_zero_unpaired", ddp_timeout=60, **settings)
    policy, reference = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    token = tiny_tokenizer().convert_tokens_to_ids(BAD_TOKEN)
    reference.get_input_embeddings().weight.data[token] = torch.nan
    trainer = KTOTrainer(
        model=louder(policy) if case.louder_rank == args.process_index else policy,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows_with_bad(16, case.bad)),
        processing_class=tiny_tokenizer(),
    )
    try:
        trainer.train()
    except (FloatingPointError, ValueError) as error:
        return {"kind": type(error).__name__, "error": str(error)}
    raise AssertionError("the run went on")


if __name__ == "__main__":
    output, wrapping = Path(sys.argv[1]), {}
    if sys.argv[2] == "fsdp":
        allow_fsdp_on_cpu()
        wrapping = FSDP2
    ended = {name: run(case, output / name, **wrapping) for name, case in CASES.items()}
    output.mkdir(parents=True, exist_ok=True)
    rank = torch.distributed.get_rank()
    (output / f"said{rank}.json").write_text(json.dumps(ended))
    finish()
