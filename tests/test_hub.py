"""Runs that push to the hub: what is uploaded, by real saves, to a hub that is a folder."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import tiny_model
from tests.test_reference_sync import trainer


class FolderHub:
    """The two calls that transformers makes, into a folder in place of the network."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploads: list[str] = []

    def create_repo(self, name: str, **kwargs: Any) -> SimpleNamespace:
        (self.root / name).mkdir(parents=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        path_in_repo: str = "",
        commit_message: str,
        run_as_future: bool = False,
        ignore_patterns: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        folder, target = Path(folder_path), self.root / repo_id / path_in_repo
        files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target / name)
        self.uploads.append(commit_message)
        done: Future[str] = Future()
        done.set_result(repo_id)
        return done if run_as_future else repo_id


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub, raising=False)
    for name in ("create_repo", "upload_folder"):  # of older transformers
        monkeypatch.setattr(transformers.trainer, name, getattr(hub, name), raising=False)
    return hub


PUSH = {"push_to_hub": True, "hub_model_id": "me/it", "save_strategy": "steps", "save_steps": 2}
IN_PROGRESS = ["Training in progress, step 2", "Training in progress, step 4"]


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [
        ("end", []),
        ("every_save", []),
        ("checkpoint", ["last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_each_strategy_uploads_its_part(
    strategy: str, checkpoints: list[str], hub: FolderHub, tmp_path: Path
) -> None:
    run = trainer(tmp_path / "out", **PUSH, hub_strategy=strategy)
    run.train()
    saves = [message for message in hub.uploads if not message.endswith(", checkpoint")]
    # Transformers uploads the model with each save; at the end TRL's scripts do.
    assert saves == ([] if strategy == "end" else IN_PROGRESS)
    run.push_to_hub(dataset_name="someone/rows")
    assert hub.uploads[-1] == "End of training"
    pushed = hub.root / "me/it"
    assert sorted(path.name for path in pushed.iterdir() if path.is_dir()) == checkpoints
    weights = AutoModelForCausalLM.from_pretrained(pushed).state_dict()
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, msg=name)
    assert AutoTokenizer.from_pretrained(pushed).eos_token == run.processing_class.eos_token
    card = ModelCard.load(pushed / "README.md")
    assert {"fastkto", "kto"} <= set(card.data.tags) and card.data.datasets == "someone/rows"
    assert str(tmp_path) not in card.content


def test_a_pushed_adapter_loads(hub: FolderHub, tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", peft_config=LoraConfig(r=4), **PUSH)
    run.train()
    assert hub.uploads == IN_PROGRESS
    loaded = PeftModel.from_pretrained(tiny_model("llama", seed=1), hub.root / "me/it")
    trained = dict(run.model.named_parameters())
    for name, weight in loaded.named_parameters():
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=0, msg=name)


def test_another_machine_resumes_what_was_pushed(hub: FolderHub, tmp_path: Path) -> None:
    run = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    whole = trainer(tmp_path / "whole", max_steps=4, **run)
    whole.train()
    trainer(tmp_path / "out", **PUSH, hub_strategy="checkpoint", max_steps=2, **run).train()
    resumed = trainer(tmp_path / "elsewhere", max_steps=4, **run)
    resumed.train(str(hub.root / "me/it/last-checkpoint"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, msg=name)
