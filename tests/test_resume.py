"""A run that is killed and resumed logs what an uninterrupted one logs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastkto.checkpoints import is_whole
from fastkto.cli import main
from tests.cli_files import read_logs, save_model, write_rows

STEPS = 12
TIMES = ("runtime", "per_second")  # in the names of what may differ


def training_logs(output_dir: Path) -> list[dict[str, float]]:
    logs = [log for log in read_logs(output_dir) if "loss" in log]
    return [{k: v for k, v in log.items() if not k.endswith(TIMES)} for log in logs]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--use_peft", "--lora_r=4", "--lora_dropout=0.5"],
    ],
    ids=["full", "LoRA"],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    model = save_model(tmp_path / "model")
    argv = ["train", "--model", model, "--data", write_rows(tmp_path / "rows.jsonl")]
    argv += ["--train_sampling_strategy=random", "--per_device_train_batch_size=4"]
    argv += [f"--max_steps={STEPS}", "--logging_steps=1", "--save_steps=3", "--learning_rate=1e-3"]
    argv += ["--gradient_accumulation_steps=2", "--disable_dropout=false", *flags]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*argv, f"--output_dir={whole}"]) == 0

    kill_after_a_checkpoint([*argv, f"--output_dir={killed}"], killed)
    assert not (killed / "training.png").exists()
    first = killed / "checkpoint-3" / "trainer_state.json"
    written_at_ns = first.stat().st_mtime_ns
    assert main([*argv, f"--output_dir={killed}", "--resume_from_checkpoint"]) == 0
    assert f"from {killed / 'checkpoint-'}" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == written_at_ns  # the steps before it did not run again

    expected, logs = training_logs(whole), training_logs(killed)
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    for log, expected_log in zip(logs, expected, strict=True):
        assert log == pytest.approx(expected_log, rel=1e-6, abs=1e-9)
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    for key, weight in load_file(whole / name).items():
        assert weight.numpy() == pytest.approx(load_file(killed / name)[key].numpy(), rel=1e-6)


def kill_after_a_checkpoint(argv: list[str], output_dir: Path) -> None:
    """Start a run and end it with SIGKILL as soon as it has saved a checkpoint."""
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-m", "fastkto", *argv],
        env=os.environ | path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not is_whole(output_dir / "checkpoint-3"):
            assert process.poll() is None, "the run ended before its first checkpoint"
            assert time.monotonic() < deadline, "the run saved no checkpoint"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
