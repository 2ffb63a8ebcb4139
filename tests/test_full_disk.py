"""A disk that fills while a run saves: what the error says, what stays whole, how it goes on."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException
from transformers import TrainerCallback

import fastkto.cli.train
from fastkto import KTOConfig, KTOTrainer
from fastkto.checkpoints import is_whole, last_whole_checkpoint, make_way
from fastkto.cli import main
from fastkto.data.load import load_rows
from fastkto.full_disk import WriteError, explaining_full_disk
from fastkto.score_store import FILE_NAME, ReferenceCacheError
from tests.cli_files import read_logs, save_model, write_rows
from tests.launch import launch
from tests.models import tiny_model, tiny_tokenizer
from tests.short_run import SHORT_RUN
from tests.trl_runs import text_rows

PAGE = 4096  # bytes; a file system in memory gives out whole ones
STEPS = 6  # of a run, which saves after every second
NOT_COMPARED = ("runtime", "per_second", "ref_cache", "pass_efficiency")  # where scores are cached


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own, of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, room: int = 0) -> None:
    """Leave `room` bytes."""
    (disk / "filler").write_bytes(bytes(max(shutil.disk_usage(disk).free - room, 0)))


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


class After(TrainerCallback):
    """Has something happen after a step."""

    def __init__(self, step: int, happen: Callable[[], Any]) -> None:
        self.step, self.happen = step, happen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.happen()


def trainer(
    output_dir: Path, *, train_dataset: datasets.Dataset | None = None, **arguments: Any
) -> KTOTrainer:
    defaults = SHORT_RUN | {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
    }
    return KTOTrainer(
        model=tiny_model("llama", seed=1),
        ref_model=tiny_model("llama", seed=2),
        args=KTOConfig(output_dir=str(output_dir), **{**defaults, **arguments}),
        processing_class=tiny_tokenizer(),
        train_dataset=text_rows(STEPS * 4) if train_dataset is None else train_dataset,
    )


def steps(
    logs: list[dict[str, Any]], left_out: tuple[str, ...] = NOT_COMPARED
) -> list[dict[str, Any]]:
    logs = [log for log in logs if "loss" in log]
    return [{k: v for k, v in log.items() if not any(t in k for t in left_out)} for log in logs]


def check_equal(logs: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    logs, expected = steps(logs), steps(expected)
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    for log, expected_log in zip(logs, expected, strict=True):
        assert log == pytest.approx(expected_log, rel=1e-6, abs=1e-9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def pages(folder: Path, *names: str) -> int:
    """Bytes that files of a checkpoint take up; without names all of them."""
    sizes = [path.stat().st_size for path in folder.iterdir() if not names or path.name in names]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


# ---- In a checkpoint ----


@pytest.mark.parametrize(
    "cut, error",
    [
        ("model.safetensors", SafetensorError),
        ("optimizer.pt", RuntimeError),
        ("scheduler.pt", RuntimeError),
        ("trainer_state.json", OSError),
    ],
)
def test_disk_that_fills_in_a_checkpoint_costs_that_checkpoint_only(
    disk: Path, tmp_path: Path, cut: str, error: type[Exception]
) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()

    out, first = disk / "out", disk / "out" / "checkpoint-2"

    def leave_too_little() -> None:
        names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
        names += ["tokenizer_config.json", "chat_template.jinja", "training_args.bin"]
        room = {
            "model.safetensors": pages(first, *names) // 2,
            "optimizer.pt": pages(first, *names, "optimizer.pt") - 10 * PAGE,
            "scheduler.pt": pages(first, *names, "optimizer.pt"),
            "trainer_state.json": pages(first) - PAGE,
        }
        fill(disk, room[cut])

    run = trainer(out, save_total_limit=1)
    run.add_callback(After(3, leave_too_little))
    with pytest.raises(WriteError) as raised:
        run.train()
    second = out / "checkpoint-4"
    assert type(raised.value.__cause__) is error
    text = f"the disk is full, which cut the saving of {second} short (0."
    assert str(raised.value).startswith(text)
    assert f"now). {first} is whole: make room and resume from it" in str(raised.value)
    assert last_whole_checkpoint(out) == str(first)
    assert (second / cut).exists() == (cut != "model.safetensors")  # it goes to another name first

    empty(disk)
    again = trainer(out, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    check_equal(again.state.log_history, whole.state.log_history)
    assert [folder.name for folder in out.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    expected = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "model.safetensors")
    for name, weight in load_file(out / f"checkpoint-{STEPS}" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_file_that_cannot_be_written_is_explained_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    argv = command(tmp_path)
    assert main([*argv, f"--output_dir={tmp_path / 'whole'}"]) == 0

    out = tmp_path / "out"
    cut, first = out / "checkpoint-4", out / "checkpoint-2"
    cut.mkdir(parents=True)
    (cut / name).symlink_to("/dev/full")
    argv += [f"--output_dir={out}"]
    assert main(argv) == 2
    error = error_line(capsys)
    assert error.startswith("error: PyTorch could not write a file, which cut the saving of ")
    assert f"of {cut} short (" in error and f"MiB are free now). {first} is whole: " in error
    assert "--resume_from_checkpoint on the command line" in error
    kept = contents(first)

    (cut / name).unlink()
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    assert contents(first) == kept
    check_equal(read_logs(out), read_logs(tmp_path / "whole"))


def command(folder: Path) -> list[str]:
    """Arguments of a run, without its output_dir."""
    rows = text_rows(STEPS * 4).to_list()
    argv = ["train", "--model", save_model(folder / "model")]
    argv += ["--data", write_rows(folder / "rows.jsonl", rows), f"--max_steps={STEPS}"]
    argv += ["--save_steps=2", "--logging_steps=1", "--learning_rate=1e-3", "--report_to=none"]
    return [*argv, "--per_device_train_batch_size=4", "--train_sampling_strategy=random"]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one thing that the command line says of an error."""
    text = capsys.readouterr().err
    assert text.count("error: ") == 1 and "Traceback" not in text
    return text[text.index("error: ") :]


def test_command_line_that_fills_a_disk_by_itself_goes_on_with_more(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(tmp_path)
    assert main([*argv, f"--output_dir={tmp_path / 'whole'}"]) == 0

    out = disk / "out"
    fill(disk, pages(tmp_path / "whole" / "checkpoint-2") * 5 // 2)
    argv += [f"--output_dir={out}"]
    assert main(argv) == 2
    error = error_line(capsys)
    assert f"error: the disk is full, which cut the saving of {out / 'checkpoint-6'}" in error
    assert f"{out / 'checkpoint-4'} is whole: make room and resume from it (" in error
    assert not is_whole(out / "checkpoint-6")
    assert main([*argv, "--resume_from_checkpoint"]) == 2  # the disk is as full as before
    assert f"{out / 'checkpoint-4'} is whole" in error_line(capsys)

    empty(disk)
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    check_equal(read_logs(out), read_logs(tmp_path / "whole"))


def test_without_a_whole_checkpoint_the_error_says_so(disk: Path) -> None:
    run = trainer(disk / "out")
    run.add_callback(After(1, lambda: fill(disk)))
    text = f"{disk / 'out'} has no whole checkpoint: make room and start from the beginning"
    with pytest.raises(WriteError, match=text):
        run.train()


def test_checkpoint_of_another_run_is_not_taken_for_the_one_that_was_cut_short(
    disk: Path,
) -> None:
    out = disk / "out"
    trainer(out, max_steps=4).train()
    other = trainer(out, learning_rate=0.01)
    other.add_callback(After(3, lambda: fill(disk, 10 * PAGE)))
    with pytest.raises(WriteError, match=f"{out / 'checkpoint-2'} is whole"):
        other.train()
    assert not is_whole(out / "checkpoint-4")


def test_leftover_of_a_full_disk_does_not_outlive_whole_checkpoints(tmp_path: Path) -> None:
    """Trainer goes by numbers where the times of folders are within a second."""
    leftover = tmp_path / "checkpoint-40"
    leftover.mkdir()
    (leftover / "model.safetensors").touch()
    run = trainer(tmp_path, max_steps=2, save_total_limit=1)
    run.train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not leftover.exists()


def test_only_what_was_cut_short_makes_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = {
        5: '{"a_field_of_another_version": 1}',
        6: "null",
        7: '{"cut',
        8: None,
        9: None,
        1: None,
        "best": None,  # not a step's
    }
    for step, state in states.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-8" / "trainer_state.json").mkdir()  # cannot be read
    start = str(tmp_path / "checkpoint-9")
    for limit in (None, 0, -1):
        make_way(tmp_path / "checkpoint-2", limit, start)
        assert len(list(tmp_path.iterdir())) == len(states)
    make_way(tmp_path / "checkpoint-2", len(states) + 1, start)  # there is room for all
    assert len(list(tmp_path.iterdir())) == len(states)
    make_way(tmp_path / "checkpoint-2", 1, start)
    left = {folder.name.removeprefix("checkpoint-") for folder in tmp_path.iterdir()}
    assert left == {"1", "5", "8", "9", "best"}
    deleted = {record.args[0].name for record in caplog.records}
    assert deleted == {"checkpoint-6", "checkpoint-7"}
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_checkpoint_of_an_earlier_run_with_more_steps_is_not_the_way_on(tmp_path: Path) -> None:
    for step in (2, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with (
        pytest.raises(WriteError, match=f"{tmp_path / 'checkpoint-2'} is whole"),
        explaining_full_disk(tmp_path / "checkpoint-4", tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_checkpoint_is_not_whole_before_every_rank_has_written(tmp_path: Path) -> None:
    cut = tmp_path / "checkpoint-4"
    cut.mkdir()
    (cut / "rng_state_1.pth").symlink_to("/dev/full")
    with pytest.raises(AssertionError):
        launch(Path(__file__).parent / "full_disk_run.py", tmp_path, processes=2)
    error = (tmp_path / "error 1").read_text()
    assert f"{cut} short (" in error and f"{tmp_path / 'checkpoint-2'} is whole: make" in error
    assert (cut / "rng_state_0.pth").exists() and not (cut / "trainer_state.json").exists()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


# ---- After training ----


def test_final_model_that_finds_no_room_is_saved_by_a_resumed_run(disk: Path) -> None:
    out = disk / "out"
    run = trainer(out)
    run.train()
    fill(disk)
    with pytest.raises(WriteError, match=f"saving of {out} short .*{out}/checkpoint-6 is whole"):
        run.save_model()
    with pytest.raises(WriteError, match=f"saving of {disk}/new short .*checkpoint-6 is whole"):
        run.save_model(str(disk / "new"))
    assert not (out / "model.safetensors").exists()

    empty(disk)
    again = trainer(out)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    saved, expected = load_file(out / "model.safetensors"), run.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in saved.items())


def test_metrics_that_find_no_room_are_written_by_a_resumed_run(
    disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = disk / "out"
    argv = [*command(tmp_path), f"--output_dir={out}"]
    with monkeypatch.context() as patched:
        patched.setattr(fastkto.cli.train, "evaluate", lambda run: fill(disk))
        assert main(argv) == 2
    error = error_line(capsys)
    assert f"cut the saving of {out} short" in error and f"{out / 'checkpoint-6'} is whole" in error

    empty(disk)
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    check_equal(read_logs(out), read_logs(out / "checkpoint-6"))
    assert (out / "training.png").stat().st_size > 0


# ---- Before training ----


def test_data_that_find_no_room_in_their_cache(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", disk / "cache")
    file = write_rows(tmp_path / "rows.jsonl", text_rows(STEPS * 4).to_list())
    way_on = "MiB are free now). Nothing else is lost: make room, or set HF_DATASETS_CACHE to a "
    fill(disk)
    with pytest.raises(WriteError, match=re.escape(way_on)) as raised:
        load_rows(file)
    text = f"the disk is full, which cut the preparation of {file} in {disk / 'cache'} short"
    assert str(raised.value).startswith(text)

    empty(disk)
    rows = load_rows(file)
    fill(disk)
    with pytest.raises(WriteError, match=re.escape(way_on)) as raised:
        trainer(tmp_path / "out", train_dataset=rows)
    text = f"the disk is full, which cut the preparation of the train data in {disk / 'cache'}/"
    assert str(raised.value).startswith(text)

    empty(disk)
    trainer(tmp_path / "out", train_dataset=rows)


def test_data_that_find_no_room_beside_their_files(disk: Path, tmp_path: Path) -> None:
    text_rows(STEPS * 4).save_to_disk(disk / "rows")
    rows = load_rows(disk / "rows")
    fill(disk)
    text = f"the disk is full, .* in {disk / 'rows'} short .* make room, or move the data to "
    with pytest.raises(WriteError, match=text):
        trainer(tmp_path / "out", train_dataset=rows)


def test_error_that_was_met_on_the_way_to_another_is_not_its_cause(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="another"), explaining_full_disk(tmp_path, tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise KeyError("another") from None


# ---- Other files of a run ----


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_rows_that_are_not_finite_are_named_though_their_file_finds_no_room(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    weight = run.model.get_input_embeddings().weight.data
    run.add_callback(After(1, lambda: weight.fill_(float("nan"))))
    (tmp_path / "not_finite_step_1.part").symlink_to("/dev/full")
    text = r"policy: rows \[4, 5, 6, 7\].*could not be written to .*_1.jsonl: .*No space left"
    with pytest.raises(FloatingPointError, match=text):
        run.train()
    assert not (tmp_path / "not_finite_step_1.jsonl").exists()


def test_reference_cache_without_room_stops_the_command_line_before_the_first_step(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*command(tmp_path), "--train_sampling_strategy=sequential"]
    assert main([*argv, f"--output_dir={tmp_path / 'whole'}"]) == 0

    out, cache = tmp_path / "out", disk / "cache"
    argv += [f"--output_dir={out}", "--precompute_ref_log_probs", f"--reference_cache={cache}"]
    fill(disk, 16 * PAGE)  # for an empty file and what SQLite keeps beside it
    assert main(argv) == 2
    error = error_line(capsys)
    assert f"error: the reference cache {cache / FILE_NAME} cannot be used: " in error
    assert "disk is full. It needs a folder" in error and "precompute_ref_log_probs=False" in error
    assert last_whole_checkpoint(out) is None

    empty(disk)
    assert main(argv) == 0
    check_equal(read_logs(out), read_logs(tmp_path / "whole"))


def test_reference_cache_without_room_stops_a_step_and_loses_no_score(
    disk: Path, tmp_path: Path
) -> None:
    """In a random order a run does not know its pairs before it comes to them."""
    settings = {"train_sampling_strategy": "random"}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()

    settings |= {"precompute_ref_log_probs": True, "reference_cache": str(disk / "cache")}
    run = trainer(tmp_path / "out", **settings)
    run.add_callback(After(3, lambda: fill(disk)))
    with pytest.raises(ReferenceCacheError, match=f"{FILE_NAME} cannot be used: .*full"):
        run.train()
    assert run.state.global_step == 3

    empty(disk)
    again = trainer(tmp_path / "out", **settings)
    again.train(resume_from_checkpoint=True)
    check_equal(again.state.log_history, whole.state.log_history)
    third, fourth = steps(again.state.log_history, left_out=())[2:4]
    assert (third["ref_cache_hits"], third["ref_cache_misses"]) == (8, 0)
    assert (fourth["ref_cache_hits"], fourth["ref_cache_misses"]) == (4, 4)


# ---- Which errors are those of a full disk ----


@pytest.mark.parametrize(
    "error, text",
    [
        (OSError(28, "No space left on device"), "the disk is full, which"),
        (OSError(122, "Disk quota exceeded"), "the disk's quota is used up, which"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "the disk is full, which",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            "PyTorch could not write a file, which",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "PyTorch could not write a file, which"),
        (
            CheckpointException("write", {0: (OSError(28, "No space left on device"), None)}),
            "the disk is full, which",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_all_writers_are_explained(
    tmp_path: Path, error: BaseException, text: str
) -> None:
    with (
        pytest.raises(WriteError, match=text),
        explaining_full_disk(tmp_path / "not/made", tmp_path),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(13, "Permission denied"),
        RuntimeError("CUDA error"),
        ValueError("row 3 has the label 'No space left on device'"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, explaining_full_disk(tmp_path, tmp_path):
        raise error
    assert raised.value is error
