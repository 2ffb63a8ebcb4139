"""Runs that are killed again and again, at random moments of each phase, log as whole ones do."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkto.precompute
from fastkto import KTOTrainer
from fastkto.checkpoints import last_whole_checkpoint
from fastkto.cli import main
from tests.cli_files import read_logs, save_model, write_rows
from tests.trl_runs import text_rows

STEPS, KILLS = 16, 7  # of each phase
TIMES = ("runtime", "per_second", "ref_cache")  # in the names of what may differ
# Each phase's function, and how long it takes about.
PHASES: dict[str, tuple[Any, str, float]] = {
    "precompute": (fastkto.precompute, "score_reference", 0.05),
    "step": (KTOTrainer, "training_step", 0.05),
    "save": (KTOTrainer, "_save_checkpoint", 0.05),
}


PATIENCE = 300  # seconds that anything here may take


class Run:
    """The command line in a process of its own, which says when `phase` begins for time `skip`.

    The process is a copy of one that has only loaded the libraries. A copy of this one could wait
    forever for a lock that a thread of another test held.
    """

    def __init__(self, argv: list[str], phase: str | None = None, skip: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.phase_begins, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(argv, writer, phase, skip), daemon=True)
        self.process.start()
        writer.close()

    def exit_status(self) -> int:
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"the run did not end in {PATIENCE} s"
        return self.process.exitcode


def run(argv: list[str], writer: Connection, phase: str | None, skip: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    if phase is not None:
        owner, name, _ = PHASES[phase]
        setattr(owner, name, announced(getattr(owner, name), writer, skip))
    os._exit(main(argv))


def announced(function: Callable[..., Any], writer: Connection, skip: int) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == skip:
            writer.send(None)
        calls += 1
        return function(*args, **kwargs)

    return call


def kill_in(phase: str, argv: list[str], generator: random.Random) -> None:
    """Start a run and end it with SIGKILL at a random moment of the phase."""
    killed = Run(argv, phase, skip=generator.randrange(3))
    assert killed.phase_begins.poll(PATIENCE), f"no {phase} began in {PATIENCE} s"
    try:
        killed.phase_begins.recv()
    except EOFError:
        pytest.fail(f"the run ended before it came to its {phase}")
    time.sleep(generator.uniform(0, PHASES[phase][2]))
    killed.process.kill()
    status = killed.exit_status()
    assert status == -signal.SIGKILL, f"the run ended in the {phase} before it was killed"


def training_logs(output_dir: Path) -> list[dict[str, float]]:
    logs = [log for log in read_logs(output_dir) if "loss" in log]
    return [{k: v for k, v in log.items() if not any(t in k for t in TIMES)} for log in logs]


@pytest.fixture
def modules_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of processes looks for what it preloads where this process does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in sys.path if part))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_runs_go_on(tmp_path: Path, modules_found: None) -> None:
    model = save_model(tmp_path / "model")
    argv = ["train", "--model", model]
    argv += ["--data", write_rows(tmp_path / "rows.jsonl", text_rows(STEPS * 4).to_list())]
    argv += [f"--max_steps={STEPS}", "--logging_steps=1", "--save_steps=2", "--learning_rate=1e-3"]
    argv += ["--per_device_train_batch_size=4", "--precompute_ref_log_probs", "--report_to=none"]
    argv += ["--save_total_limit=3"]

    def arguments(name: str) -> list[str]:
        return [*argv, f"--output_dir={tmp_path / name}", f"--reference_cache={tmp_path / name}c"]

    assert Run(arguments("whole")).exit_status() == 0

    generator = random.Random(0)
    killed = tmp_path / "killed"
    for phase in PHASES:
        for _ in range(KILLS):
            checkpoint = last_whole_checkpoint(killed)
            if checkpoint is not None and int(checkpoint.rpartition("-")[2]) > STEPS - 8:
                shutil.rmtree(killed)  # so that there is something left to be killed in
                checkpoint = None
            resume = [] if checkpoint is None else ["--resume_from_checkpoint"]
            kill_in(phase, [*arguments("killed"), *resume], generator)
    resume = ["--resume_from_checkpoint"] if last_whole_checkpoint(killed) else []
    assert Run([*arguments("killed"), *resume]).exit_status() == 0

    expected, logs = training_logs(tmp_path / "whole"), training_logs(killed)
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    for log, expected_log in zip(logs, expected, strict=True):
        assert log == pytest.approx(expected_log, rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_runs_share_a_cache(tmp_path: Path, modules_found: None) -> None:
    """At the same time, from the first score on."""
    argv = ["train", "--model", save_model(tmp_path / "model")]
    argv += ["--data", write_rows(tmp_path / "rows.jsonl", text_rows(32).to_list())]
    argv += ["--max_steps=8", "--logging_steps=1", "--precompute_ref_log_probs"]
    argv += ["--per_device_train_batch_size=4", f"--reference_cache={tmp_path / 'cache'}"]
    argv += ["--report_to=none", "--save_strategy=no", "--learning_rate=1e-3"]
    names = ("one", "other")
    runs = [Run([*argv, f"--output_dir={tmp_path / name}"]) for name in names]
    assert [one.exit_status() for one in runs] == [0, 0]
    first, second = (training_logs(tmp_path / name) for name in names)
    assert len(first) == 8
    for log, other in zip(first, second, strict=True):
        assert log == pytest.approx(other, rel=1e-6, abs=1e-9)


def test_resuming_passes_over_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    for step, state in ((2, True), (4, True), (6, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text("{}" if step == 2 else "{")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
