"""The same small run with images in TRL's KTOTrainer and in ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.short_run import SHORT_RUN

STEPS = 3
ARGUMENTS = (
    "ref_model train_dataset eval_dataset processing_class peft_config data_collator "
    "compute_metrics"
).split()


def train(library: Any, directory: Path, *, model: Any, **run: Any) -> Any:
    """A trainer of `library` (trl or fastkto) after `STEPS` steps of SGD on a copy of the model.

    Other arguments are the trainer's, if it has them, and else its config's.
    """
    arguments = {name: run.pop(name) for name in ARGUMENTS if name in run}
    settings = {
        **SHORT_RUN,
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "bf16": False,
        **run,
    }
    for name in ("ref_model", "peft_config"):
        if name in arguments:
            arguments[name] = copy.deepcopy(arguments[name])
    trainer = library.KTOTrainer(
        model=copy.deepcopy(model),
        args=library.KTOConfig(output_dir=str(directory / library.__name__), **settings),
        **arguments,
    )
    # Some transformers divide gradients by the accumulation steps twice; fastkto prevents it.
    trainer.accelerator.gradient_accumulation_steps = 1
    trainer.train()
    return trainer


def trained_weights(trainer: Any) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {name: weight.detach() for name, weight in named if weight.requires_grad}


def assert_equal_runs(expected: Any, actual: Any, *, tolerance: float = 1e-4) -> None:
    """Logged losses and metrics, and the trained weights; the images' part has moved, too."""
    pairs = zip(expected.state.log_history, actual.state.log_history, strict=True)
    for step, (theirs, ours) in enumerate(pairs):
        for name in ("loss", "kl", "grad_norm", "num_tokens", *theirs):
            if name in theirs and (name in ("loss", "kl", "grad_norm") or "/" in name):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=tolerance), (
                    f"{name} of log {step}"
                )
    weights, ours = trained_weights(expected), trained_weights(actual)
    assert weights.keys() == ours.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            ours[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
