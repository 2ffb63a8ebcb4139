"""checkpoint_passes="auto" turns gradient checkpointing off where the run fits without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastkto import KTOConfig, KTOTrainer, checkpoint_passes
from fastkto.checkpoint_passes import (
    MARGIN,
    device_memory,
    forward_equivalents,
    without_checkpointing,
)
from fastkto.memory import MemoryEstimator, model_bytes
from tests.memory_truth import LENGTH, trainer_of
from tests.models import tiny_model

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


def auto(folder: Path, **fields: Any) -> KTOTrainer:
    values = {"gradient_checkpointing": True, "checkpoint_passes": "auto"}
    return trainer_of(folder, **(values | fields))


def checkpoints(trainer: KTOTrainer) -> list[bool]:
    """Whether each layer recomputes."""
    return [layer.gradient_checkpointing for layer in trainer.model.model.layers]


def estimator_of(trainer: KTOTrainer) -> MemoryEstimator:
    return MemoryEstimator(trainer.model, trainer.args, reference=trainer.reference.model)


@pytest.mark.parametrize("lora", [False, True])
def test_the_decision_follows_the_memory(tmp_path: Path, lora: bool) -> None:
    estimator = estimator_of(trainer_of(tmp_path, gradient_checkpointing=True, lora=lora))
    kept = estimator.run(LENGTH, LENGTH, checkpointing=False).total
    assert kept > 1.1 * estimator.run(LENGTH, LENGTH).total  # as args say, with checkpointing
    for memory, fits in ((int((1 + MARGIN) * kept) + 1, True), (int(1.14 * kept), False)):
        decision = without_checkpointing(estimator, LENGTH, LENGTH, memory)
        assert decision == (kept, memory) and decision.fits == fits
    # the longest sequence alone, where passes have no number of tokens yet
    assert without_checkpointing(estimator, LENGTH, None, 1).total == kept


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_checkpoints_only_if_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fits: bool
) -> None:
    memory = 2**40 if fits else 2**20
    monkeypatch.setattr(checkpoint_passes, "device_memory", lambda *_: memory)
    trainer = auto(tmp_path, model=SMALL, desirable_weight=2.0)
    (line,) = [r.message for r in caplog.records if r.message.startswith("Gradient checkpointing")]
    if fits:
        assert "is turned off: without it the run needs 0.0" in line
        assert line.endswith("This saves 1 of about 7 forwards' work of an optimizer step.")
    else:
        assert "stays on: without it the run needs 0.0" in line and "0.00" in line
    trainer.train()
    assert checkpoints(trainer) == [not fits] * 2
    fields = {"gradient_checkpointing": not fits, "desirable_weight": 2.0}
    given = trainer_of(tmp_path, model=SMALL, **fields)
    given.train()
    for name in ("loss", "grad_norm"):
        pairs = zip(trainer.state.log_history, given.state.log_history, strict=True)
        assert all(ours.get(name) == expected.get(name) for ours, expected in pairs)
    assert trainer.args.gradient_checkpointing is True  # the caller's object is left alone
    if fits:
        trainer.train()  # which turns it on again first
        assert not any(checkpoints(trainer))


def test_an_adapter_learns_the_same_without_checkpointing(tmp_path: Path) -> None:
    # equal rows of both classes with one weight have no gradient
    fields: dict[str, Any] = {"lora": True, "model": SMALL, "desirable_weight": 2.0}
    trainer = auto(tmp_path, **fields)
    trainer.train()
    assert not any(m.gradient_checkpointing for m in trainer.model.base_model.model.model.layers)
    given = trainer_of(tmp_path, **fields)
    given.train()
    weights = given.model.state_dict()
    assert all(torch.equal(weights[n], w) for n, w in trainer.model.state_dict().items())
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())


def test_memory_of_a_cpu_is_what_is_free_and_what_the_models_hold() -> None:
    model = tiny_model("llama", vocab_size=30_000, hidden_size=512)
    free = psutil.virtual_memory().available
    memory = device_memory(torch.device("cpu"), [model, None])
    assert memory - model_bytes(model) == pytest.approx(free, rel=0.2)


def test_the_work_of_a_step_is_counted_as_documented(tmp_path: Path) -> None:
    full = tiny_model("llama")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear"))
    for loss_type, without_gradient in (("kto", 3), ("apo_zero_unpaired", 1)):
        args = KTOConfig(str(tmp_path), use_cpu=True, loss_type=loss_type)
        assert forward_equivalents(lora, args) == without_gradient + 3
        assert forward_equivalents(full, args) == without_gradient + 4
    args = KTOConfig(str(tmp_path), use_cpu=True, precompute_ref_log_probs=True)
    assert forward_equivalents(lora, args) == 4 and forward_equivalents(full, args) == 5


def test_an_unknown_length_keeps_checkpointing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = auto(tmp_path)
    trainer.args.max_length = None
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    assert checkpoint_passes.needs_checkpointing(trainer)
    assert "stays on: without max_length no length is known" in caplog.text


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    trainer = auto(tmp_path)
    trainer.model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(ValueError, match="the memory of a quantised model cannot be estimated"):
        checkpoint_passes.needs_checkpointing(trainer)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    def config(**fields: Any) -> KTOConfig:
        return KTOConfig(str(tmp_path), use_cpu=True, **fields)

    with pytest.raises(ValueError, match="checkpoint_passes is 'never'; choose 'auto', or leave"):
        config(checkpoint_passes="never")
    with pytest.raises(ValueError, match="and gradient_checkpointing is off; leave one of them"):
        config(checkpoint_passes="auto", gradient_checkpointing=False)
