"""The files in `examples/`, run as they are with a tiny model."""

import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("name", "kind", "group"),
    [
        ("ddp", "MULTI_GPU", {}),
        ("fsdp2", "FSDP", {"fsdp_version": "2", "fsdp_state_dict_type": "FULL_STATE_DICT"}),
        ("zero2", "DEEPSPEED", {"deepspeed_config_file": "examples/zero2.json"}),
        ("zero3", "DEEPSPEED", {"zero3_init_flag": "True"}),
    ],
)
def test_accelerate_takes_the_configurations(name: str, kind: str, group: dict[str, str]) -> None:
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8
    given = {**config.fsdp_config, **config.deepspeed_config}
    options = [f"--{name}={value}" for name, value in given.items()]
    args = launch_command_parser().parse_args([*options, "script.py"])  # it knows all of them
    assert {name: getattr(args, name) for name in group} == group


def launch_lines() -> list[list[str]]:
    """The words of each `accelerate launch` of the docs, on the first machine."""
    text = (EXAMPLES.parent / "docs" / "devices.md").read_text().replace("\\\n", "")
    lines = [line.strip() for line in text.splitlines() if "    accelerate launch" in line]
    return [shlex.split(line.replace("$RANK", "0").replace("$HOST", "localhost")) for line in lines]


def test_the_docs_launch_every_wrapping_on_one_machine_and_on_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    launched = []
    for words in launch_lines():
        args = launch_command_parser().parse_args(words[2:])
        args, *_ = _validate_launch_command(args)  # reads the configuration
        assert args.module and [args.training_script, *args.training_script_args[:1]] == [
            "fastkto",
            "train",
        ]
        assert args.num_processes == 8 * args.num_machines
        if args.use_deepspeed:
            assert Path(args.deepspeed_config_file).is_file()
            assert args.deepspeed_multinode_launcher == "standard"  # starts no other machines
        kinds = {"ddp": args.multi_gpu, "fsdp": args.use_fsdp, "zero": args.use_deepspeed}
        launched += [(kind, args.num_machines) for kind, is_it in kinds.items() if is_it]
    wrappings = ("ddp", "fsdp", "zero")
    assert sorted(launched) == [(kind, machines) for kind in wrappings for machines in (1, 2)]


@pytest.mark.slow
def test_the_launch_line_for_two_machines_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both machines are this one, with a CPU process each."""
    monkeypatch.chdir(EXAMPLES.parent)
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    (words,) = [w for w in launch_lines() if "examples/ddp.yaml" in w and "--num_machines" in w]
    changed = {"16": "2", "29500": port, "train.yaml": "examples/train.yaml"}
    words = [changed.get(word, word) for word in words]
    words += ["--model", save_model(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    words += ["--max_steps=2", "--logging_steps=1", "--use_cpu", "--gradient_checkpointing=false"]
    rank = words.index("--machine_rank") + 1
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
    machines = []
    for number in "01":
        words[rank] = number
        machines.append(subprocess.Popen([*command, *words[1:]], stderr=subprocess.PIPE, text=True))
    for machine in machines:
        _, said = machine.communicate(timeout=200)
        assert machine.returncode == 0, said[-4000:]
    logs = [log for log in read_logs(tmp_path / "out") if "loss" in log]
    assert len(logs) == 2 and logs[-1]["epoch"] == pytest.approx(2 / 8, abs=0.01)
