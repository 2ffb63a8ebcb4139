"""Checkpoints of models that are saved under other names than their own: experts, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkto import KTOConfig, KTOTrainer
from fastkto.stored_weights import load_renamed
from tests.models import tiny_model, tiny_tokenizer
from tests.short_run import SHORT_RUN
from tests.trl_runs import text_rows

EXPERTS = ("mixtral", "qwen3_moe")
IMAGES = ("qwen2_vl", "llava", "gemma3")


def parts(family: str) -> tuple[Any, dict[str, Any]]:
    """A model, and the data and tokenizer or processor of its trainer."""
    if family not in IMAGES:
        data = {"train_dataset": text_rows(16), "eval_dataset": text_rows(4, seed=2)}
        return tiny_model(family, seed=1), {**data, "processing_class": tiny_tokenizer()}
    pytest.importorskip(
        "transformers.models.clip.image_processing_pil_clip", reason="needs newer transformers"
    )
    from tests.vision_models import image_rows, tiny_processor, tiny_vision_model

    data = {"train_dataset": image_rows(16), "eval_dataset": image_rows(4, seed=2)}
    return tiny_vision_model(family, seed=1), {**data, "processing_class": tiny_processor(family)}


def trainer(folder: Path, family: str, **fields: Any) -> KTOTrainer:
    start, data = parts(family)
    start.save_pretrained(folder / "start")  # some names are known to models that were loaded only
    return KTOTrainer(
        model=type(start).from_pretrained(folder / "start"),
        args=KTOConfig(
            str(folder),
            **{**SHORT_RUN, "max_steps": 4, "save_steps": 2, "save_strategy": "steps", **fields},
            max_length=None,
        ),
        **data,
    )


def assert_equal_weights(actual: KTOTrainer, expected: dict[str, torch.Tensor]) -> None:
    for name, weight in actual.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", [*EXPERTS, *IMAGES])
def test_a_run_goes_on_with_the_weights_it_had(family: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path, family)
    whole.train()
    stored = set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert stored - set(whole.model.state_dict()), "saved under its own names"
    resumed = trainer(tmp_path, family, save_strategy="no")
    resumed.train(str(tmp_path / "checkpoint-2"))
    expected = [log for log in whole.state.log_history if log["step"] > 2 and "loss" in log]
    actual = [log for log in resumed.state.log_history if log["step"] > 2 and "loss" in log]
    for one, other in zip(expected, actual, strict=True):
        for name in {"loss", "grad_norm", "rewards/margins", "logps/chosen"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-5), name
    assert_equal_weights(resumed, whole.model.state_dict())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_vl"])
def test_the_best_model_is_loaded_at_the_end(family: str, tmp_path: Path) -> None:
    class Worse(KTOTrainer):
        """Finds every evaluation worse than the one before."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    run = trainer(
        tmp_path, family, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    run.__class__ = Worse
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    stopped = trainer(
        tmp_path / "other", family, max_steps=2, save_strategy="no", lr_scheduler_type="constant"
    )
    stopped.train()
    assert_equal_weights(run, stopped.model.state_dict())


def test_other_models_are_left_to_trainer(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=1)
    model.save_pretrained(tmp_path)
    assert not load_renamed(model, tmp_path) and not load_renamed(model, tmp_path / "nowhere")


def test_parts_beside_the_class_are_loaded_and_missing_ones_are_an_error(tmp_path: Path) -> None:
    model = tiny_model("mixtral", seed=1)
    model.value = torch.nn.Linear(2, 2)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert load_renamed(model, tmp_path)
    for name, weight in model.state_dict().items():
        assert weight.equal(expected[name]), name
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.0.input_layernorm.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no model.layers.0.input_layernorm.weight; resume"):
        load_renamed(model, tmp_path)


def test_weights_of_two_dtypes_are_not_rounded(tmp_path: Path) -> None:
    model = tiny_model("mixtral", seed=1).to(torch.bfloat16)
    model.model.norm.weight.data = torch.full_like(model.model.norm.weight, 1 / 3).float() / 3
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 2
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert load_renamed(model, tmp_path)
    for name, weight in model.state_dict().items():
        assert weight.dtype == expected[name].dtype and weight.equal(expected[name]), name
