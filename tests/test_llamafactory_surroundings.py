"""What LLaMA-Factory's trainer does around a step: optimizers, schedulers, checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments
from llamafactory.hparams.training_args import TrainingArguments
from llamafactory.train.kto.trainer import CustomKTOTrainer as Theirs
from llamafactory.train.trainer_utils import create_custom_optimizer
from transformers import Seq2SeqTrainingArguments

from fastkto.integrations.llamafactory import CustomKTOTrainer
from tests.launch import ROOT
from tests.llamafactory_runs import build, kto_rows, models
from tests.models import tiny_tokenizer


def test_a_processor_is_saved_with_checkpoints_and_at_the_end(tmp_path: Path) -> None:
    policy, reference = models("llama")
    processor = tiny_tokenizer()  # anything that can be saved is one
    processor.init_kwargs["mark"] = "the processor"
    run = {"processor": processor, "save_strategy": "steps", "save_steps": 2}
    build(CustomKTOTrainer, tmp_path, policy, reference, **run).train()
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        assert saved["mark"] == "the processor"


@pytest.mark.parametrize(
    "own",
    [
        {"use_badam": True, "badam_switch_interval": 2},
        {"use_badam": True, "badam_mode": "ratio", "badam_update_ratio": 0.3},
        {"use_galore": True, "galore_target": ["all"], "galore_rank": 4},
        {"use_galore": True, "galore_target": ["all"], "galore_layerwise": True},
        {"use_apollo": True, "apollo_target": ["all"], "apollo_layerwise": True},
        {"use_muon": True},
    ],
    ids=lambda own: " ".join(str(value) for value in list(own)[:3]),
)
def test_training_with_their_optimizers_is_the_same(tmp_path: Path, own: Any) -> None:
    """Also with those that step in each backward, and those with a callback."""

    class Ours(CustomKTOTrainer):
        options = {"max_tokens_per_pass": 40}

    policy, reference = models("llama", seeds=(2, 1))
    fields = {"optim": "adamw_torch", "learning_rate": 0.003}
    run = {"finetuning": {"finetuning_type": "full", **own}, **fields}
    trainers = [build(kind, tmp_path, policy, reference, **run) for kind in (Theirs, Ours)]
    for trainer in trainers:
        trainer.train()
    expected, actual = (
        [log["loss"] for log in one.state.log_history if "loss" in log] for one in trainers
    )
    assert actual == pytest.approx(expected, rel=1e-3)
    names = [{type(callback).__name__ for callback in one.callback_handler.callbacks}
             for one in trainers]  # fmt: skip
    assert names[0] <= names[1]


@pytest.mark.parametrize("kind", [Theirs, CustomKTOTrainer])
def test_optimizers_are_llama_factorys_own(tmp_path: Path, kind: Any) -> None:
    policy, _ = models("llama", lora=True)
    own = {"finetuning_type": "lora", "loraplus_lr_ratio": 16.0}
    fields = {"optim": "adamw_torch", "lr_scheduler_type": "warmup_stable_decay", "max_steps": 9}
    trainer = build(kind, tmp_path, policy, None, finetuning=own, **fields)
    expected = create_custom_optimizer(trainer.model, trainer.args, trainer.finetuning_args)
    trainer.train()
    assert expected is not None
    rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert rates == [group["lr"] for group in expected.param_groups]
    assert max(rates) == pytest.approx(16 * trainer.args.learning_rate)
    assert trainer.args.lr_scheduler_kwargs == {"num_stable_steps": 3, "num_decay_steps": 6}


@pytest.mark.parametrize("kind", [Theirs, CustomKTOTrainer])
def test_a_run_resumes_with_the_same_losses(tmp_path: Path, kind: Any) -> None:
    """Also one that LLaMA-Factory's trainer has begun."""
    policy, reference = models("llama")
    run = {"save_strategy": "steps", "save_steps": 2, "train_rows": kto_rows(16)}
    first = build(kind, tmp_path, policy, reference, **run)
    first.train()
    second = build(CustomKTOTrainer, tmp_path, policy, reference, **run)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one, other in zip(first.state.log_history, second.state.log_history, strict=True):
        if "loss" in one:
            rel = 1e-6 if kind is CustomKTOTrainer else 1e-4
            assert one["loss"] == pytest.approx(other["loss"], rel=rel)


def test_the_page_names_every_field() -> None:
    page = (ROOT / "docs" / "from-llama-factory.md").read_text()
    named = set(re.findall(r"`([a-z_0-9]+)`", page))
    kinds = (DataArguments, FinetuningArguments, ModelArguments, TrainingArguments)
    own = {one.name for kind in kinds for one in fields(kind)}
    own -= {one.name for one in fields(Seq2SeqTrainingArguments)}
    assert own and own <= named, sorted(own - named)
