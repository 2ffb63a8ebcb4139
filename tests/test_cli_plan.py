"""`fastkto plan`: every mistake in one sentence, and tables whose rows add up."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fastkto.cli import main
from fastkto.cli.plan import PlanParser, parse_memory
from fastkto.cli.plan_model import plan_estimator
from fastkto.cli.plan_options import smaller_settings
from fastkto.cli.train import build_trainer
from fastkto.memory import MemoryEstimator
from fastkto.reference import ReleasedReference
from tests.cli_files import save_model, write_rows
from tests.memory_truth import trainer_of
from tests.models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a config and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    config = AutoConfig.for_model("qwen3", vocab_size=30_000, **sizes)
    config.save_pretrained(folder)
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["plan", *argv]) == 0
    captured = capsys.readouterr()
    assert "error" not in captured.err and "Warning" not in captured.err
    return captured.out


def rows(output: str) -> dict[str, float]:
    """The numbers of all tables, by the names of their rows."""
    found = re.findall(r"^  (\S.*?)  +(\d+\.\d\d)(?: .*)?$", output, re.MULTILINE)
    return {name: float(number) for name, number in found}


@pytest.mark.slow
def test_the_rows_add_up_to_the_total(capsys: pytest.CaptureFixture[str], model: str) -> None:
    output = planned(capsys, "--model", model, "--memory=24GB", "--max_length=65536")
    numbers = rows(output.partition("one pass of")[0])
    total = numbers.pop("total")
    numbers.pop("memory", None)
    assert total == pytest.approx(sum(numbers.values()), abs=0.05)
    assert {"weights", "gradients", "optimizer state", "reference model"} < set(numbers)
    assert numbers["caches (none on the device)"] == 0
    assert all(len(line) <= 100 for line in output.splitlines())
    assert "Not counted: the CUDA context" in output


ADAPTER = ["--use_peft", "--lora_target_modules=all-linear"]


@pytest.mark.parametrize(
    "flags",
    [[], ADAPTER, ["--dtype=bfloat16", "--bf16"], [*ADAPTER, "--ref_model=MODEL", "--bf16"]],
)
def test_the_plan_is_that_of_the_trainer_which_loads_the_model(
    tmp_path: Path, flags: list[str]
) -> None:
    folder = save_model(tmp_path / "model")
    flags = [flag.replace("MODEL", folder) for flag in flags]
    flags += [f"--output_dir={tmp_path}", "--use_cpu", "--report_to=none", "--memory=1GB"]
    data = ["--data", write_rows(tmp_path / "rows.jsonl")]
    arguments = PlanParser().parse_plan(["--model", folder, *data, *flags])[0]
    planned = plan_estimator(arguments, 1)
    trainer = build_trainer(arguments)
    loaded = MemoryEstimator(
        trainer.model, trainer.step_settings.args, reference=trainer.reference.model
    )
    assert planned.run(256, 512) == loaded.run(256, 512)


@pytest.mark.slow
def test_gradients_of_a_tied_head_have_a_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny_model("llama", tied=True, vocab_size=500_000).config.save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--memory=8g", "--max_length=256", "--use_cpu"]
    numbers = rows(planned(capsys, *flags).partition("one pass of")[0])
    row = "gradients of head and embedding, not added up yet"
    assert numbers[row] == pytest.approx(3 * numbers["gradients"], rel=0.1)
    assert row not in rows(planned(capsys, *flags, *ADAPTER))


RELEASED = [
    ({}, True),
    ({"train_sampling_strategy": "random"}, False),
    ({"train_sampling_strategy": "random", "loss_type": "apo_zero_unpaired"}, True),
    ({"auto_find_batch_size": True}, False),
    ({"precompute_ref_log_probs": False}, False),
]


@pytest.mark.parametrize(("fields", "released"), RELEASED)
def test_the_reference_is_released_where_the_run_releases_it(
    tmp_path: Path, fields: dict[str, Any], released: bool
) -> None:
    fields = {"precompute_ref_log_probs": True, **fields}
    if fields["precompute_ref_log_probs"]:
        fields["reference_cache"] = str(tmp_path / "cache")
    trainer = trainer_of(tmp_path, model={"hidden_size": 32, "num_hidden_layers": 1}, **fields)
    args = trainer.args
    assert (args.precompute_ref_log_probs and args.scores_are_known) is released
    trainer.train()
    assert isinstance(trainer.reference.model, ReleasedReference) is released


@pytest.mark.slow
def test_a_precomputed_reference_is_no_row_and_an_option(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--memory=1GB", "--max_length=256", "--max_tokens_per_pass=256"]
    arguments, _ = PlanParser().parse_plan(flags)
    before = plan_estimator(arguments, 1).run(256, 256)
    settings = {
        setting.flags: setting for setting in smaller_settings(arguments, 1, 10**9, before.total)
    }
    output = planned(capsys, *flags[:2], "--memory=24GB", *flags[3:], "--precompute_ref_log_probs")
    assert "reference model" not in output
    total = settings["--precompute_ref_log_probs"].total
    assert total == before.total - before.reference
    assert rows(output)["total"] == pytest.approx(total / 2**30, abs=0.01)


@pytest.mark.slow
def test_the_scores_of_a_reference_may_need_the_most(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--memory=8g", "--max_length=256", *ADAPTER, "--ref_model", model]
    output = planned(capsys, *flags, "--precompute_ref_log_probs").partition("one pass of")[0]
    numbers = rows(output)
    total = numbers.pop("total")
    assert numbers["reference model"] == pytest.approx(numbers["weights"], rel=0.1)
    assert "peak on top, while the reference's scores are computed" in numbers
    assert "optimizer state" not in numbers
    assert total == pytest.approx(sum(numbers.values()) - numbers.pop("memory", 0), abs=0.03)


def test_an_adapter_needs_no_reference_and_says_what_it_trains(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--memory=8g", "--use_peft", "--lora_target_modules=all-linear"]
    output = planned(capsys, *flags)
    assert "trainable (" in output and "reference model" not in output
    assert "It fits. The largest context that fits has " in output


def test_a_yaml_file_and_flags_are_those_of_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {model}\ndata: rows.jsonl\nmax_length: 512\noptim: sgd\ndtype: bfloat16\n"
    )
    output = planned(capsys, "--config", str(path), "--memory", "8GB", "--max-length=2048")
    assert "optimizer  sgd" in output and "bfloat16 weights" in output
    assert "4,096 tokens, gradient checkpointing" in output  # of four sequences


@pytest.mark.slow
def test_the_largest_context_fits_and_a_longer_one_does_not(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--dtype=bfloat16", "--max_tokens_per_pass=1", "--memory=2GiB"]
    found = re.search(r"that fits has ([\d,]+) tokens", planned(capsys, *flags))
    assert found is not None
    context = int(found[1].replace(",", ""))
    assert "It fits." in planned(capsys, *flags, f"--max_length={context}")
    output = planned(capsys, *flags, f"--max_length={int(1.03 * context)}")
    assert "It does not fit: 0.0" in output and f"that fits has {context:,} tokens" in output


@pytest.mark.slow
def test_what_would_make_it_fit_is_said(capsys: pytest.CaptureFixture[str], model: str) -> None:
    flags = ["--model", model, "--max_length=16384", "--no_gradient_checkpointing"]
    output = planned(capsys, *flags, "--memory=5GiB")
    settings = output.partition("what would change it")[2]
    assert "It does not fit: " in output
    lines = {line.split("  ")[1]: line for line in settings.splitlines() if line.startswith("  --")}
    assert "--gradient_checkpointing" in lines and "--dtype bfloat16" in lines
    assert lines["--gradient_checkpointing"].endswith("   fits")
    total = rows(output)["total"]
    assert all(number < total for number in rows(settings).values())


@pytest.mark.slow
def test_several_processes_copy_gradients_unless_they_shard(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--memory=24GB", "--num_processes=4"]
    copied = planned(capsys, *flags)
    sharded = planned(capsys, *flags, "--fsdp")
    assert "on each of 4 devices (DistributedDataParallel)" in copied
    assert "on each of 4 devices (FSDP)" in sharded
    copies = "gradient buckets of DistributedDataParallel"
    assert rows(copied)[copies] == rows(copied)["gradients"] and copies not in rows(sharded)
    assert rows(sharded)["optimizer state"] == pytest.approx(
        rows(copied)["optimizer state"] / 4, abs=0.01
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("24g", 24 * 2**30),
        (" 1.5 tb", 15 * 10**11),
        ("512MiB", 2**29),
    ],
)
def test_units_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


def sentence(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "Warning" not in line]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--memory=80"], "--memory: '80' is no size; give a number with a unit, such as 80GB"),
        (["--memory=80XB"], "--memory: '80XB' is no size"),
        (["--memory=0GB"], "--memory: '0GB' is nothing"),
        (["--memory=8g", "--num_processes=0"], "--num_processes is 0; it must be 1 or more"),
        (["--memory=8g", "--deepspeed=z.json"], "--deepspeed is 'z.json', and what ZeRO divides"),
        (["--memory=8g"], "--model is missing; give a model's folder or its id on the hub"),
        (["--memry=8g"], "there is no flag --memry; did you mean --memory? (fastkto plan --help"),
        (["--memory=8g", "--model=./none"], "--model: there is no folder ./none"),
        (["--memory=8g", "--model=.", "--lora_r=8"], "--lora_r is for an adapter; add --use_peft"),
        (["--memory=8g", "--model=m/m", "--load_in_4bit"], "load_in_4bit freezes the weights"),
    ],
)
def test_wrong_flags_are_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in sentence(capsys, *flags)


def test_what_cannot_be_planned_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str
) -> None:
    assert "holds no config.json" in sentence(capsys, "--model", str(tmp_path), "--memory=8g")
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    expected = f"cannot read the config of {tmp_path}: "
    assert expected in sentence(capsys, "--model", str(tmp_path), "--memory=8g")
    flags = ["--model", model, "--memory=8g"]
    assert "Target modules none not found" in sentence(
        capsys, *flags, "--use_peft", "--lora_target_modules=none"
    )
    (tmp_path / "run.yaml").write_text("max_length: null")
    path = str(tmp_path / "run.yaml")
    assert "max_length is empty; give the longest" in sentence(capsys, *flags, f"--config={path}")


@pytest.mark.slow
def test_a_device_too_small_for_any_setting_is_one_sentence(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    text = sentence(capsys, "--model", model, "--memory=30MiB")
    assert "0.03 GiB are too little with any of these settings: the least is " in text
    assert "and the weights alone, as asked for, are 0." in text


def test_memory_must_be_given_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text = sentence(capsys, "--model", model)
    assert text == "--memory is missing; give the device's, for example --memory 80GB"


def test_without_a_gpu_the_plan_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["--model=m/m", "--memory=8g"]
    assert PlanParser().parse_plan(flags)[0].training.bf16 is True
    assert PlanParser().parse_plan([*flags, "--use_cpu"])[0].training.bf16 is False
    assert PlanParser().parse_plan([*flags, "--bf16=false"])[0].training.bf16 is False


def test_help_names_the_device_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        text.index("--memory SIZE") < text.index("--use_peft") and "fastkto plan --help_all" in text
    )


def test_a_saved_model_is_not_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    output = planned(capsys, "--model", folder, "--memory=1GiB")
    size = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert f"{size:,} parameters, all trainable" in output


@pytest.mark.slow
def test_auto_plans_the_largest_pass_that_fits(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--max_tokens_per_pass=auto", "--per_device_train_batch_size=16"]
    output = planned(capsys, *flags, "--memory=80GB", "--max_length=2048")
    assert "32,768 tokens, the largest that fits, gradient checkpointing" in output


@pytest.mark.slow
def test_what_fits_without_checkpointing_is_said(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    flags = ["--model", model, "--max_length=2048", "--max_tokens_per_pass=2048", "--memory=24GB"]
    flags += ["--use_peft", "--lora_target_modules=all-linear"]
    output = " ".join(planned(capsys, *flags).split())
    found = re.search(r"Without gradient checkpointing the run needs ([\d.]+) GiB", output)
    assert found is not None and "which saves 1 of about 6 forwards' work of an" in output
    output = planned(capsys, *flags, "--checkpoint_passes=auto")
    assert "no gradient checkpointing" in output and "is turned off, which saves 1" in output
    assert f"{rows(output)['total']:.2f}" == found[1]
