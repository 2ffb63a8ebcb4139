"""`fastkto train`: every mistake in one sentence, flags and YAML, and a run from end to end."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import TrainerState
from trl.scripts.utils import ScriptArguments

import fastkto
from fastkto import KTOTrainer
from fastkto.cli import main
from fastkto.cli.arguments import DataArguments, ModelArguments
from fastkto.cli.console import CommandError, mistakes
from fastkto.cli.parser import TrainParser
from fastkto.cli.preflight import check, resume_from
from fastkto.cli.train import peft_config
from fastkto.data.batch import split_rows
from tests.cli_files import Row, read_logs, save_model, write_rows

GOOD: Row = {"prompt": "a:", "completion": " b", "label": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return f"--output_dir={tmp_path / 'out'}"


def sentence(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one error sentence of a command that must fail with status 2."""
    capsys.readouterr()
    status = main(argv)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2, captured.err
    assert "Traceback" not in captured.err and "usage:" not in captured.out + captured.err
    errors = [line for line in lines if "error:" in line]
    assert errors == lines[-1:] and errors[0].startswith("error: ")
    return errors[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--data", "rows.jsonl"], "--model is missing; give a model's folder or its id"),
        (["--model", "some/model"], "--data is missing; give a .jsonl, .json, .csv or .parquet"),
        (["--lerning_rate", "1"], "there is no flag --lerning_rate; did you mean --learning_rate?"),
        (["--lr=1"], "there is no flag --lr; did you mean --learning_rate?"),
        (["--output-dri=x"], "there is no flag --output-dri; did you mean --output_dir?"),
        (["rows.jsonl"], "'rows.jsonl' follows no flag; every argument is given as --name value"),
        (["--lora_r"], "--lora_r: expected one argument"),
        (["--lora_r", "x"], "--lora_r: invalid int value: 'x'"),
        (["--beta", "high"], "--beta: invalid float value: 'high'"),
        (["--beta=-1"], "beta is -1.0; it must be 0 or more"),
        (["--use_peft", "perhaps"], "--use_peft: 'perhaps' is neither true nor false"),
        (["--loss_type", "dpo"], "--loss_type: 'dpo' is none of kto, apo_zero_unpaired"),
        (["--optim", "adamw_torch_fuse"], "--optim: there is no 'adamw_torch_fuse'; did you mean"),
        (["--config", "nowhere.yaml"], "--config: there is no file nowhere.yaml"),
        (["--config"], "--config: expected one argument"),
        (["--fsdp", "--fsdp_config=nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["--load_best_model_at_end"], "requires the save and eval strategy to match"),
        (["--model=m/m", "--data=d", "--report_to=comet_ml"], "report_to: "),
        (["--model=m/m", "--data=d", "--report_to=nothing"], "report_to: nothing is not supported"),
        (["--model=./m", "--data=d"], "--model: there is no folder ./m"),
        (["--model=m/m", "--data=d", "--ref_model=/n"], "--ref_model: there is no folder /n"),
        (
            ["--model=m/m", "--data=d", "--per_device_train_batch_size=1"],
            "per_device_train_batch_size is 1 and loss_type='kto' estimates its KL term",
        ),
        (["--model=m/m", "--data=d", "--load_in_4bit"], "load_in_4bit freezes the weights; add"),
        (
            ["--model=m/m", "--data=d", "--load_in_4bit", "--load_in_8bit", "--use_peft"],
            "load_in_4bit and load_in_8bit exclude each other",
        ),
    ],
)
def test_wrong_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, "train", *argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_rank: 3", "there is no field 'lora_rank'; did you mean lora_r?"),
        ("no_gradient_checkpointing: true", "there is no field 'no_gradient_checkpointing'"),
        ("lora_r: three", "lora_r: invalid int value: 'three'"),
        ("loss_type: dpo", "loss_type: 'dpo' is none of kto, apo_zero_unpaired"),
        ("a: [", "is no YAML file: while parsing a flow node"),
        ("- beta", "holds a list; write one `field: value` on each line"),
    ],
)
def test_wrong_yaml_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = sentence(capsys, "train", "--config", str(path))
    assert message.startswith(str(path)) and expected in message


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        ([GOOD, {**GOOD, "label": None}], [], "1 row has no label: row 1"),
        ([{"prompt": "a:", "completion": "b"}], [], "label"),
        ([GOOD, {**GOOD, "label": 7}], [], "1 row has a label that is no boolean: row 1 (7)"),
        ([GOOD, {**GOOD, "completion": ""}], [], "1 row has an empty completion: row 1"),
        ([{**GOOD, "prompt": "long" * 9}] * 3, ["--max_length=8"], "all 3 rows of the train data"),
        ([{"question": "a", "answer": "b"}], [], "the train data has the columns question, answer"),
        ([], [], "cannot read split 'train'"),
    ],
)
def test_wrong_rows_are_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: str,
    output: str,
    *,
    rows: list[Row],
    flags: list[str],
    expected: str,
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    argv = ["train", "--model", model, "--data", path, output, *flags]
    assert expected in sentence(capsys, *argv)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data=nowhere.jsonl"], "--data: there is no file or folder nowhere.jsonl"),
        (["--eval_data=nowhere.csv"], "--eval_data: there is no file or folder nowhere.csv"),
        (["--max_steps=0"], "max_steps is 0; give a number above 0"),
        (["--output_dir=/proc/out"], "output_dir is /proc/out, where nothing can be written (No"),
        (["--eval_strategy=epoch"], "eval_strategy is 'epoch' and a data file has no second split"),
        (["--attn_implementation=none"], 'Specified `attn_implementation="none"` is not supported'),
        (["--use_peft", "--lora_target_modules=none"], "Target modules none not found"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint: there is no checkpoint in"),
        (["--resume_from_checkpoint=/none"], "/none is no checkpoint's folder"),
        (["--router_aux_loss_coef=0.1"], "router_aux_loss_coef is 0.1, but LlamaConfig has no"),
    ],
)
def test_what_cannot_run_is_refused(
    capsys: pytest.CaptureFixture[str],
    model: str,
    data: str,
    output: str,
    *,
    flags: list[str],
    expected: str,
) -> None:
    assert expected in sentence(capsys, "train", "--model", model, "--data", data, output, *flags)


def test_a_folder_without_a_model_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str
) -> None:
    argv = ["train", "--model", str(tmp_path), "--data", data]
    assert "holds no config.json, so it is no saved model" in sentence(capsys, *argv)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an adapter without its model; merge it" in sentence(capsys, *argv)
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert f"cannot load a model from {tmp_path}: " in sentence(capsys, *argv)


def test_conversations_without_a_chat_template_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, output: str
) -> None:
    model = save_model(tmp_path / "model", chat=False)
    turn = {"prompt": "user", "completion": "assistant"}
    row = {name: [{"role": role, "content": "a"}] for name, role in turn.items()}
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "label": True}] * 2)
    argv = ["train", "--model", model, "--data", path, output]
    assert "conversations, but the tokenizer has no chat template" in sentence(capsys, *argv)


def test_several_gpus_in_one_process_are_refused() -> None:
    arguments = TrainParser().parse(["--model=m/m", "--data=d"])
    arguments.training._n_gpu = 2  # as if two were visible
    with pytest.raises(CommandError, match=r"2 GPUs .* `accelerate launch -m fastkto train ...`"):
        check(arguments)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["--verson"], "there is no flag --verson; did you mean --version?"),
        (["demo", "--sed", "1"], "there is no flag --sed; did you mean --seed?"),
        (["demo", "--seed", "x"], "--seed: invalid int value: 'x'"),
    ],
)
def test_wrong_commands_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, *argv)


def test_a_real_process_prints_one_sentence_and_exits_with_2() -> None:
    command = [sys.executable, "-m", "fastkto", "train", "--model=./none", "--data=rows.jsonl"]
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | path, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --model: there is no folder ./none\n"
    assert done.stdout == ""


def test_only_deliberate_errors_become_sentences() -> None:
    with pytest.raises(CommandError, match="it must be 0 or more"), mistakes():
        fastkto.KTOConfig("unused", beta=-1.0)
    with pytest.raises(ValueError, match="invalid literal"), mistakes():
        int("x")
    with pytest.raises(ValueError, match="argument 2 is shorter"), mistakes():
        # raised inside fastkto's code, but not by a `raise`: a defect
        split_rows({"input_ids": torch.zeros(1), "prompt_lengths": [1], "completion_lengths": []})
    with pytest.raises(CommandError, match="about it: invalid literal"):
        with mistakes(ValueError, about="about it"):
            int("x")


def test_other_ranks_print_nothing_but_their_own_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--lora_r", "x"]) == 2
    assert main([]) == 0
    assert capsys.readouterr() == ("", "")


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: some/model\n"
        "data: rows.csv\n"
        "learning_rate: 1e-4\n"  # a string in YAML 1.1
        "beta: 0.2\n"
        "max_length: null\n"
        "eval_strategy: no\n"  # false in YAML 1.1
        "output-dir: there\n"
        "gradient_checkpointing: false\n"
        "lora_target_modules: [q_proj, v_proj]\n"
        "model_init_kwargs: {device_map: cpu}\n"
    )
    model, data, training = TrainParser().parse(["--beta=0.3", "--config", str(path), "--lora-r=4"])
    assert (model.model_name_or_path, data.dataset_name) == ("some/model", "rows.csv")
    assert (training.learning_rate, training.beta, training.max_length) == (1e-4, 0.3, None)
    assert training.eval_strategy == "no" and training.output_dir == "there"
    assert training.gradient_checkpointing is False
    assert model.lora_target_modules == ["q_proj", "v_proj"] and model.lora_r == 4
    assert training.model_init_kwargs == {"device_map": "cpu"}
    assert training.desirable_weight == 1.0


def test_switches_need_no_value() -> None:
    argv = ["--use_peft", "--no_gradient_checkpointing", "--resume_from_checkpoint", "--use-dora=0"]
    model, _, training = TrainParser().parse(argv)
    assert model.use_peft is True and model.use_dora is False
    assert training.gradient_checkpointing is False
    assert training.resume_from_checkpoint == "true"


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ModelArguments, trl.ModelConfig), (DataArguments, ScriptArguments)]
)
def test_names_and_defaults_are_those_of_trl(ours: Any, theirs: Any) -> None:
    default = {field.name: field.default for field in fields(theirs)}
    own = {field.name: field.default for field in fields(ours)}
    assert set(own) - set(default) <= {"ref_model", "eval_data"}
    assert own == {name: default.get(name) for name in own}


def test_the_adapter_is_that_of_trl() -> None:
    argv = ["--use_peft", "--lora_r=4", "--lora_target_modules", "q_proj", "v_proj"]
    argv += ["--lora_alpha=3", "--lora_dropout=0", "--use_rslora", "--lora_modules_to_save=lm_head"]
    ours = TrainParser().parse(argv).model
    values = {name: value for name, value in vars(ours).items() if name != "ref_model"}
    expected, got = trl.get_peft_config(trl.ModelConfig(**values)), peft_config(ours)
    assert expected is not None and got is not None and got.to_dict() == expected.to_dict()


def test_help_is_short_and_help_all_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "--help_all"]) == 0
    everything = capsys.readouterr().out
    assert len(short.splitlines()) < 120 < len(everything.splitlines())
    for flag in ("--model, --model_name_or_path", "--max_tokens_per_pass", "--help_all"):
        assert flag in short
    for field in fields(fastkto.KTOConfig):
        assert f"--{field.name} " in everything


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastkto {fastkto.__version__}\n"


def test_a_run_leaves_a_model_metrics_and_a_plot(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, data: str
) -> None:
    output_dir = tmp_path / "out"
    argv = ["train", "--model_name_or_path", model, "--dataset_name", data, "--eval_data", data]
    argv += ["--output-dir", str(output_dir), "--max_steps=4", "--logging_steps=2"]
    argv += ["--eval_strategy=steps", "--eval_steps=2", "--learning_rate=1e-3"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert "Warning" not in captured.err and "Traceback" not in captured.err
    for text in ("train data", "eval data", "one class only", "passes", "precision", "reference"):
        assert text in captured.out
    assert f"model saved to  {output_dir}\n" in captured.out
    for name in ("model.safetensors", "tokenizer.json", "training.png", "trainer_state.json"):
        assert (output_dir / name).stat().st_size > 0
    history = read_logs(output_dir)
    evaluations = [log for log in history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [2, 4]  # the last one is not measured twice
    results = json.loads((output_dir / "eval_results.json").read_text())
    assert results["eval_rewards/margins"] == evaluations[-1]["eval_rewards/margins"]
    assert json.loads((output_dir / "train_results.json").read_text())["train_loss"] > 0
    last = [log for log in history if "loss" in log][-1]
    assert f"at step 4       loss {last['loss']:.4f}  kl {last['kl']:.4f}" in captured.out


def test_an_interrupted_run_says_how_to_go_on_and_a_finished_one_that_it_is(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
    data: str,
) -> None:
    step, out = KTOTrainer.training_step, tmp_path / "out"
    argv = ["train", "--model", model, "--data", data, f"--output_dir={out}", "--max_steps=4"]
    argv += ["--per_device_train_batch_size=4"]  # of 8 steps an epoch

    def interrupted_after(last: int) -> Any:
        def training_step(trainer: KTOTrainer, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == last:
                raise KeyboardInterrupt
            return step(trainer, *args, **kwargs)

        return training_step

    monkeypatch.setattr(KTOTrainer, "training_step", interrupted_after(1))
    assert main([*argv, "--use_peft"]) == 130
    says = "interrupted at step 1; no checkpoint was saved by then (save_steps is 500)"
    assert capsys.readouterr().err.splitlines()[-1] == says
    monkeypatch.setattr(KTOTrainer, "training_step", interrupted_after(3))
    assert main([*argv, "--use_peft", "--save_steps=2"]) == 130
    says = f"interrupted at step 3; go on with --resume_from_checkpoint {out / 'checkpoint-2'}"
    assert capsys.readouterr().err.splitlines()[-1] == says
    monkeypatch.setattr(KTOTrainer, "training_step", step)
    argv += ["--use_peft", "--save_steps=2"]
    resumed = [*argv, "--resume_from_checkpoint=true"]
    assert main(resumed) == 0
    assert f"adapter saved to  {out}\n" in capsys.readouterr().out
    assert main(resumed) == 0
    captured = capsys.readouterr()
    assert "nothing was left to train: step 4 is the end of the run" in captured.err
    assert "whole run" not in captured.out
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
    monkeypatch.setattr(KTOTrainer, "training_step", interrupted_after(1))
    assert main(argv) == 130  # the checkpoints there are not its own
    assert "interrupted at step 1; no checkpoint was saved by then" in capsys.readouterr().err


def test_the_given_reference_is_used(tmp_path: Path, model: str, data: str) -> None:
    other = save_model(tmp_path / "other", seed=1)
    argv = ["train", "--model", model, "--data", data, "--max_steps=1", "--logging_steps=1"]
    assert main([*argv, "--ref_model", other, f"--output_dir={tmp_path / 'a'}"]) == 0
    assert main([*argv, "--ref_model", model, f"--output_dir={tmp_path / 'b'}"]) == 0
    far, near = (read_logs(tmp_path / name)[0] for name in "ab")
    assert near["loss"] == pytest.approx(0.5) and abs(far["loss"] - 0.5) > 0.01


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((3, '{"global_step": 3}'), (12, '{"global_step": 12}'), (30, '{"glob')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-40").mkdir()
    args = fastkto.KTOConfig(str(tmp_path), resume_from_checkpoint="true")
    assert resume_from(args) == str(tmp_path / "checkpoint-12")


def test_demo_refuses_a_file_as_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--output-dir", str(file)]) == 2
    assert capsys.readouterr().err == f"error: output_dir {file} is a file; give a folder\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num_train_epochs=0"], "so nothing would be trained; give one of them a number above"),
        (["--beta=0"], "beta is 0, so that nothing would be learned"),
        (["--desirable_weight=0", "--undesirable_weight=0"], "desirable_weight and undesirable"),
        (["--lora_r=8"], "--lora_r is for an adapter; add --use_peft to train one"),
        (["--use_dora"], "--use_dora is for an adapter; add --use_peft to train one"),
        (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps is 0; it must be 1"),
        (["--model=nope/"], "--model: there is no folder nope/"),
    ],
)
def test_runs_that_would_surprise_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, "train", "--model=m/m", "--data=d/d", *flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beta: [0.1, 0.2]", "beta takes one value, and [0.1, 0.2] is a list"),
        ("beta: null", "beta has no value; give one, or leave beta out"),
        ("per_device_train_batch_size:", "per_device_train_batch_size has no value"),
        ("config: other.yaml", "a file cannot name another file with config"),
    ],
)
def test_yaml_values_of_the_wrong_shape_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert f"{path}: {expected}" in sentence(capsys, "train", f"--config={path}")


def test_checkpoint_of_an_adapter_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text("{}")
    TrainerState().save_to_json(str(checkpoint / "trainer_state.json"))
    argv = ["--model=m/m", "--data=d/d", f"--resume_from_checkpoint={checkpoint}"]
    assert "holds an adapter; add --use_peft" in sentence(capsys, "train", *argv)


def test_output_folder_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    argv = ["--model=m/m", "--data=d/d", f"--output_dir={file}"]
    assert f"output_dir is {file}, a file; give a folder" in sentence(capsys, "train", *argv)
