"""LLaMA-Factory's own command with our trainer: the patch, YAML files, torchrun, what is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from llamafactory.train import tuner
from llamafactory.train.kto import trainer as their_module
from llamafactory.train.kto import workflow
from safetensors.torch import load_file

from fastkto.integrations.llamafactory import CustomKTOTrainer, patch, unpatch
from tests.launch import ROOT
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

Theirs = their_module.CustomKTOTrainer


def write_run(folder: Path, name: str, **fields: Any) -> Path:
    """A model, a data set and LLaMA-Factory's configuration of a run on them."""
    dtype = torch.bfloat16 if fields.get("bf16") else torch.float32
    tiny_model("llama", seed=1, dtype=dtype).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"instruction": row["prompt"], "output": row["completion"], "kto_tag": row["label"]}
        for row in text_rows(16)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
    info = {"rows": {"file_name": "rows.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    config = {
        "model_name_or_path": str(folder / "model"),
        "stage": "kto",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "empty",
        "cutoff_len": 64,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "report_to": "none",
        "infer_dtype": "float32",
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(command: list[str], **variables: str) -> None:
    run = start(command, **variables)
    assert run.returncode == 0, run.stdout + run.stderr


def start(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    paths = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # has torchrun
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **paths, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


def assert_equal_results(ours: Path, theirs: Path) -> None:
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)
    expected = load_file(theirs / "model.safetensors")
    actual = load_file(ours / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-6)


OURS_ALONE = {"eval_kl", "eval_model_preparation_time"}
OURS = {"fastkto": {"max_tokens_per_pass": 40}}
THEIR_COMMAND = ["-c", "from llamafactory.cli import main; main()", "train"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_trains_as_theirs(tmp_path: Path, processes: int) -> None:
    """In one process, and in two that torchrun starts; with a field on the command line."""
    theirs = write_run(tmp_path, "theirs")
    ours = write_run(tmp_path, "ours", **OURS)
    variables = {}
    if processes > 1:
        variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
    launch([*THEIR_COMMAND, str(theirs), "pref_ftx=0.5"], **variables)
    command = ["-m", "fastkto", "llamafactory", "train", str(ours), "pref_ftx=0.5"]
    launch([*command, "fastkto.head_memory_mib=8"], **variables)
    assert_equal_results(tmp_path / "ours", tmp_path / "theirs")
    args = torch.load(tmp_path / "ours" / "training_args.bin", weights_only=False)
    assert (args.max_tokens_per_pass, args.head_memory_mib) == (40, 8)
    assert args.world_size == processes


def test_logs_are_averages_over_all_ranks(tmp_path: Path, patched: Any) -> None:
    """Two processes on the same rows as one, in the same order, log the same."""
    fields = {"disable_shuffling": True, "logging_steps": 3}
    two = write_run(tmp_path, "two", **OURS, **fields)
    variables = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    launch(["-m", "fastkto", "llamafactory", "train", str(two)], **variables)
    one = write_run(tmp_path, "one", **fields, per_device_train_batch_size=4)
    tuner.run_exp(yaml.safe_load(one.read_text()))
    expected, actual = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][0]
        for name in ("one", "two")
    )
    assert expected["rewards/margins"] != 0
    for name in expected:
        if any(part in name for part in ("loss", "kl", "rewards/", "logps/", "logits/")):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    command = ["-m", "fastkto", "llamafactory", "train", str(tmp_path / "none.yaml")]
    run = start(command)
    assert run.returncode == 2
    assert "none.yaml" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr


@pytest.fixture
def patched() -> Any:
    patch(max_tokens_per_pass=40)
    yield
    unpatch()


@pytest.mark.parametrize(
    "fields",
    [
        {"finetuning_type": "lora", "lora_target": "all", "val_size": 0.3, "do_eval": True},
        {"finetuning_type": "lora", "additional_target": "lm_head", "lora_target": "q_proj"},
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        {"upcast_lmhead_output": True, "bf16": True, "finetuning_type": "lora"},
        {"disable_shuffling": True},
        {"do_train": False, "do_eval": True, "val_size": 0.3},
        {"streaming": True, "dataloader_num_workers": 1, "disable_gradient_checkpointing": True},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_configurations_give_what_they_give_without_the_patch(
    tmp_path: Path, patched: Any, fields: Any
) -> None:
    tolerance = 2e-2 if "bf16" in fields else 1e-4
    unpatch()
    theirs, ours = (yaml.safe_load(write_run(tmp_path, name, **fields).read_text())
                    for name in ("theirs", "ours"))  # fmt: skip
    tuner.run_exp(theirs)
    patch(max_tokens_per_pass=40)
    tuner.run_exp(ours)
    for name in ("train_results.json", "eval_results.json"):
        if (tmp_path / "theirs" / name).exists():
            expected, actual = (
                json.loads((tmp_path / folder / name).read_text()) for folder in ("theirs", "ours")
            )
            assert set(actual) - OURS_ALONE == set(expected) - {"kl"}
            for key in set(expected) & set(actual):
                if "loss" in key or "rewards" in key:
                    assert actual[key] == pytest.approx(expected[key], abs=tolerance), key
    if fields.get("do_train", True):
        expected, actual = losses(tmp_path / "theirs"), losses(tmp_path / "ours")
        assert actual == pytest.approx(expected, abs=tolerance)


def test_the_patch_serves_run_exp_and_comes_off(tmp_path: Path, patched: Any) -> None:
    ours = write_run(tmp_path, "ours", save_steps=2, fastkto={"head_memory_mib": 8})
    tuner.run_exp(yaml.safe_load(ours.read_text()))
    checkpoint = tmp_path / "ours" / "checkpoint-2"
    args = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert (args.max_tokens_per_pass, args.head_memory_mib) == (40, 8)
    unpatch()
    unpatch()
    assert workflow.CustomKTOTrainer is their_module.CustomKTOTrainer is Theirs
    assert tuner.read_args.__module__ == "llamafactory.hparams.parser"


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(
    tmp_path: Path, patched: Any
) -> None:
    """LLaMA-Factory resumes by itself, from the last checkpoint that it finds."""
    config = write_run(tmp_path, "ours", save_steps=1)
    tuner.run_exp(yaml.safe_load(config.read_text()))
    expected = losses(tmp_path / "ours")
    (tmp_path / "ours" / "checkpoint-3" / "trainer_state.json").unlink()
    (tmp_path / "ours" / "trainer_state.json").unlink()
    tuner.run_exp(yaml.safe_load(config.read_text()))
    assert losses(tmp_path / "ours") == pytest.approx(expected, rel=1e-6)


def test_patching_twice_is_patching_once() -> None:
    patch(head="logits")
    patch()
    assert issubclass(their_module.CustomKTOTrainer, CustomKTOTrainer)
    assert their_module.CustomKTOTrainer.options == {}
    unpatch()
    assert their_module.CustomKTOTrainer is Theirs


@pytest.mark.parametrize(
    ("config", "variables", "message"),
    [
        ({"stage": "sft", "fastkto": {"head": "auto"}}, {}, "fastkto is given with stage: sft"),
        ({"stage": "kto", "fastkto": {"hed": 1}}, {}, "fastkto has no field 'hed' here"),
        ({"stage": "kto"}, {"USE_RAY": "1"}, "USE_RAY is set, and Ray's workers would train"),
    ],
)
def test_what_cannot_be_served_is_refused(
    config: Any, variables: Any, message: str, patched: Any, monkeypatch: Any
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        tuner.run_exp(config)
