"""The model card: written with checkpoints, and by what TRL's scripts call at their end."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl.trainer.base_trainer import _BaseTrainer

from tests.test_reference_sync import trainer


def test_checkpoints_bring_a_card(tmp_path: Path) -> None:
    run = trainer(tmp_path / "my-model", save_strategy="steps", save_steps=2)
    run.train()
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert {"fastkto", "kto"} <= set(card.data.tags)
    assert card.data.library_name == "transformers" and card.data.model_name == "my-model"
    for text in ("# my-model", "| beta | 0.1 |", "desirable", "arXiv:2402.01306", "| steps | 4 |"):
        assert text in card.text, text
    assert str(tmp_path) not in card.content


def test_push_to_hub_takes_what_trls_scripts_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the upload itself is left out."""
    run = trainer(tmp_path, peft_config=LoraConfig(r=4))
    run.hub_model_id = "someone/a-model"
    uploads: list[dict[str, Any]] = []

    class Hub:
        def upload_folder(self, **kwargs: Any) -> str:
            uploads.append(kwargs)
            return "url"

    import transformers.trainer

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub, raising=False)
    monkeypatch.setattr(transformers.trainer, "upload_folder", Hub().upload_folder, raising=False)
    run.push_to_hub(dataset_name="someone/rows", tags="mine")
    assert uploads[0]["repo_id"] == "someone/a-model"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == "someone/rows" and "mine" in card.data.tags
    assert card.data.library_name == "peft"
    assert 'model="someone/a-model"' in card.text and "datasets/someone/rows" in card.text


def test_the_arguments_are_trls(tmp_path: Path) -> None:
    theirs = list(inspect.signature(_BaseTrainer.create_model_card).parameters)
    ours = list(inspect.signature(trainer(tmp_path).create_model_card).parameters)
    assert ["self", *ours[:-1]] == theirs
    trainer(tmp_path).create_model_card(license="mit", model_name="x")  # Trainer's
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
