"""The files in `examples/`, run as they are with a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from transformers import LlamaConfig

from fastkto.cli import main
from fastkto.data.load import load_rows
from tests.cli_files import read_logs, save_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_yaml_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)  # its paths are relative to the repository
    model = save_model(tmp_path / "model")
    argv = ["train", "--config", "examples/train.yaml", "--model", model]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_steps=3", "--logging_steps=1"]
    assert main(argv) == 0
    logs = [log for log in read_logs(tmp_path / "out") if "loss" in log]
    assert len(logs) == 3 and all("rewards/chosen" in log for log in logs)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_yaml_fits_the_data() -> None:
    config = yaml.safe_load((EXAMPLES / "train.yaml").read_text())
    labels = load_rows(EXAMPLES / "kto_rows.jsonl")["label"]
    assert len(labels) >= 200 and 0.4 < sum(labels) / len(labels) < 0.6
    assert config["dataset_name"] == "examples/kto_rows.jsonl"


def test_the_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = EXAMPLES / "train.py"
    assert len(script.read_text().splitlines()) <= 25
    model = save_model(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", [str(script), model, str(tmp_path / "out")])
    variables = runpy.run_path(str(script))
    assert variables["trainer"].state.global_step == 31
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "most_lines"), [("accelerate_loop.py", 45), ("trainer_subclass.py", 30)]
)
def test_loops_of_ones_own_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most_lines: int
) -> None:
    script = EXAMPLES / name
    code = script.read_text().split('"""\n', 1)[1]
    assert len(code.strip().splitlines()) <= most_lines
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = save_model(tmp_path / "model")
    before = load_file(tmp_path / "model" / "model.safetensors")
    monkeypatch.setattr(sys, "argv", [str(script), model, str(tmp_path / "out")])
    variables = runpy.run_path(str(script))
    trained = variables.get("policy", variables.get("model")).state_dict()
    assert any(not trained[key].equal(weight) for key, weight in before.items())


@pytest.mark.parametrize("gigabytes", [16, 24, 80])
def test_the_cards_configurations_fit_by_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gigabytes: int
) -> None:
    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    ).save_pretrained(tmp_path)
    config = str(EXAMPLES / f"{gigabytes}gb.yaml")
    memory = f"--memory={gigabytes}GB"
    assert main(["plan", "--config", config, "--model", str(tmp_path), memory]) == 0
    out = capsys.readouterr().out
    assert "It fits." in out and "8,072,204,288 parameters" in out


def test_accelerate_takes_the_fsdp_configuration() -> None:
    path = str(EXAMPLES / "fsdp2.yaml")
    config = load_config_from_file(path)
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    options = [f"--{name}={value}" for name, value in config.fsdp_config.items()]
    args = launch_command_parser().parse_args([*options, "script.py"])  # it knows all of them
    assert args.fsdp_version == "2" and args.fsdp_state_dict_type == "FULL_STATE_DICT"
