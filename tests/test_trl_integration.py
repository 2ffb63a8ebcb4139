"""fastkto inside TRL: patched scripts and `fastkto trl kto` train as TRL does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.kto_trainer
from safetensors.torch import load_file

import fastkto
from fastkto.cli import main
from fastkto.integrations.trl import patch, unpatch
from tests.cli_files import save_model, write_rows

ALLOW_FSDP = """
import os

if "WORLD_SIZE" in os.environ:
    from tests.fsdp_on_cpu import allow_fsdp_on_cpu

    allow_fsdp_on_cpu()
"""
COMPARED = ("loss", "grad_norm", "kl", "rewards/margins", "logps/chosen", "num_tokens")


def test_names_are_fastktos_until_they_are_given_back() -> None:
    theirs, config = trl.KTOTrainer, trl.KTOConfig
    patch()
    patch()
    try:
        from trl import KTOTrainer
        from trl.trainer import KTOConfig

        assert KTOTrainer is fastkto.KTOTrainer and KTOConfig is fastkto.KTOConfig
        assert trl.trainer.kto_trainer.KTOTrainer is fastkto.KTOTrainer
    finally:
        unpatch()
    assert trl.KTOTrainer is theirs and trl.KTOConfig is config
    assert trl.trainer.kto_trainer.KTOTrainer is theirs


def test_other_commands_are_trls_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trl"]) == 0
    assert "vllm-serve" in capsys.readouterr().out
    assert trl.KTOTrainer is not fastkto.KTOTrainer


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Arguments of a short run on files."""
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "rows" / f"{split}.jsonl")
    return [
        *("--model_name_or_path", save_model(tmp_path / "model")),
        *("--dataset_name", str(tmp_path / "rows")),
        *("--per_device_train_batch_size", "4", "--max_steps", "3", "--logging_steps", "1"),
        *("--learning_rate", "0.05", "--optim", "sgd", "--use_cpu", "--bf16", "false"),
        *("--report_to", "none", "--save_steps", "3", "--eval_strategy", "steps"),
        *("--eval_steps", "3", "--max_length", "64"),
    ]


def run(command: list[str], output_dir: Path, *paths: Path) -> str:
    """What a command printed; `paths` come first in its processes' PYTHONPATH."""
    path = {"PYTHONPATH": os.pathsep.join([*map(str, paths), *(p for p in sys.path if p)])}
    done = subprocess.run(
        [sys.executable, *command, "--output_dir", str(output_dir)],
        env=os.environ | path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def logs(output_dir: Path) -> list[dict[str, Any]]:
    return json.loads((output_dir / "checkpoint-3" / "trainer_state.json").read_text())[
        "log_history"
    ]


@pytest.mark.slow
def test_the_command_line_trains_as_trls(tmp_path: Path, files: list[str]) -> None:
    """A YAML file, a field of fastkto's own, and what TRL's script does at its end."""
    config = tmp_path / "config.yaml"
    config.write_text("max_tokens_per_pass: 64\nbeta: 0.2\n")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    run(["-m", "trl.scripts.kto", *files, "--beta", "0.2"], theirs)
    run(["-m", "fastkto", "trl", "kto", *files, "--config", str(config)], ours)
    for one, other in zip(logs(theirs), logs(ours), strict=True):
        keys = [key for key in one if key.removeprefix("eval_") in COMPARED]
        for key in keys:
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    assert "pass_efficiency" in logs(ours)[0] and "pass_efficiency" not in logs(theirs)[0]
    assert (ours / "model.safetensors").exists() and (ours / "README.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["multi_gpu", "fsdp2"])
def test_the_command_line_starts_several_processes(
    kind: str, tmp_path: Path, files: list[str]
) -> None:
    """Through accelerate, told as TRL documents it: two equal one on as many rows a step."""
    files += ["--kl_scope", "window"]
    # What every process of Python does first.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(ALLOW_FSDP)
    batches = ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "16"]
    run(["-m", "fastkto.integrations.scripts.trl_kto", *files, *batches], tmp_path / "one")
    launcher = ["--accelerate_config", kind, "--num_processes", "2"]
    launcher += ["--mixed_precision", "no", "--main_process_port", "0"]  # any free port
    command = ["-m", "fastkto", "trl", "kto", *files, *launcher]
    said = run(command, tmp_path / "two", tmp_path / "first")
    assert said.count("Model saved to") == 1 and (tmp_path / "two" / "model.safetensors").exists()
    assert (tmp_path / "two" / "checkpoint-3" / "rng_state_1.pth").exists()  # the second rank's
    is_divided = (tmp_path / "two" / "checkpoint-3" / "pytorch_model_fsdp.bin").exists()
    assert is_divided == (kind == "fsdp2")
    expected, actual = logs(tmp_path / "one"), logs(tmp_path / "two")
    assert "pass_efficiency" in actual[0] and expected[-1]["eval_kl"] > 0.01
    for one, two in zip(expected, actual, strict=True):
        for key in (key for key in one if key.removeprefix("eval_") in COMPARED):
            assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
    weights = load_file(tmp_path / "one" / "model.safetensors")
    for name, weight in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_script_needs_two_lines(tmp_path: Path, files: list[str]) -> None:
    """TRL's own script, as it is, behind them."""
    script = tmp_path / "script.py"
    text = Path(trl.trainer.kto_trainer.__file__).parents[1].joinpath("scripts/kto.py").read_text()
    script.write_text(f"from fastkto.integrations.trl import patch\npatch()\n{text}")
    run([str(script), *files, "--max_tokens_per_pass", "64"], tmp_path / "out")
    assert "pass_efficiency" in logs(tmp_path / "out")[0]
