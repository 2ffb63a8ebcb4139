"""The same small run in TRL's KTOTrainer and in ours, and the comparison of their logs."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

import fastkto
from tests.models import tiny_tokenizer
from tests.short_run import SHORT_RUN

STEPS = 4
WORDS = ["the", "other", "rain", "in", "an", "order", "ran", "thin", "a", "tern", "ore", "thane"]


def words(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def text_rows(count: int = 32, seed: int = 0, label: bool | None = None) -> Dataset:
    """Rows of very different lengths; `label` gives all of them one class."""
    generator = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt": words(generator, 1, 12) + ":",
                "completion": " " + words(generator, 1, 14),
                "label": generator.random() < 0.5 if label is None else label,
            }
            for _ in range(count)
        ]
    )


def chat_rows(count: int = 32, seed: int = 0) -> Dataset:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = text_rows(count, seed).to_list()
    for row in rows:
        row["prompt"] = turn("user", row["prompt"])
        row["completion"] = turn("assistant", row["completion"])
    return Dataset.from_list(rows)


def paired_rows(count: int = 16, seed: int = 0) -> Dataset:
    """Interleaved with TRL's blocks: all chosen answers come before all rejected ones."""
    generator = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "prompt": words(generator, 1, 12) + ":",
                "chosen": " " + words(generator, 1, 14),
                "rejected": " " + words(generator, 1, 14),
            }
            for _ in range(count)
        ]
    )


def trained(
    library: Any,
    directory: Path,
    *,
    model: Any,
    ref_model: Any = None,
    train_dataset: Dataset,
    eval_dataset: Any = None,
    peft_config: Any = None,
    compute_metrics: Any = None,
    data_collator: Any = None,
    resume_from_checkpoint: str | None = None,
    **config: Any,
) -> Any:
    """Train `STEPS` steps with `library` (trl or fastkto) on copies of the models: its trainer."""
    settings = {
        **SHORT_RUN,
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "bf16": False,
        "eval_strategy": "no" if eval_dataset is None else "steps",
        "eval_steps": 2,
        **config,
    }
    trainer = library.KTOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(ref_model),
        args=library.KTOConfig(output_dir=str(directory / library.__name__), **settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        peft_config=copy.deepcopy(peft_config),
        compute_metrics=compute_metrics,
        data_collator=data_collator,
    )
    # Some transformers divide gradients by the accumulation steps twice; fastkto prevents it.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def both(
    directory: Path, ours: dict[str, Any] | None = None, *, equal_weights: bool = True, **run: Any
) -> tuple[list, list]:
    """The logs of TRL and of fastkto, whose weights are equal at the end.

    `ours` holds settings for fastkto alone.
    """
    expected = trained(trl, directory, **run)
    actual = trained(fastkto, directory, **{**run, **(ours or {})})
    if equal_weights:
        weights = actual.model.state_dict()
        for name, weight in expected.model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5, msg=name)
    return expected.state.log_history, actual.state.log_history


NOT_COMPARED = ("runtime", "per_second", "total_flos", "epoch", "step", "learning_rate")


def assert_equal_logs(
    expected: list[dict[str, float]], actual: list[dict[str, float]], *, kl_used: bool = True
) -> None:
    """Every metric of every step: 1e-4 relative; differences of log-probabilities 1e-6 of those.

    With `kl_used`, a run in which the KL estimate is mostly clamped to 0 proves nothing and fails.
    """
    assert len(actual) == len(expected)
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        names = [n for n in theirs if not any(part in n for part in NOT_COMPARED)]
        assert set(names) <= set(ours), f"log {step} lacks {set(names) - set(ours)}"
        logps = max((abs(v) for n, v in theirs.items() if "logps/" in n), default=0.0)
        for name in names:
            difference = any(part in name for part in ("kl", "rewards/"))
            tolerance = {"rel": 0.0, "abs": 1e-6 * logps} if difference else {"rel": 1e-4}
            assert ours[name] == pytest.approx(theirs[name], **tolerance), f"{name} of log {step}"
    if kl_used:
        kls = [log["kl"] for log in expected if "kl" in log]
        assert sum(kl > 0 for kl in kls) > len(kls) / 2, f"the KL estimate is mostly 0: {kls}"
