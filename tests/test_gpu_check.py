"""The command that checks everything on a GPU: what it reports, from real pytest processes."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Part, run_part, run_parts, write_report
from benchmarks.head_cases import CUDA_CASES, REAL_MODELS

BODIES = {
    "passing": "def test_one(): pass\ndef test_two(): pass\n",
    "failing": "def test_one(): pass\ndef test_two(): raise ValueError('seven')\n",
    "skipping": "import pytest\n@pytest.mark.skip(reason='no eight')\ndef test_one(): pass\n",
    "missing module": "import pytest\npytest.importorskip('no_such_module')\n",
    "crashing": "import os\ndef test_one(): os._exit(7)\ndef test_two(): pass\n",
    "endless": "import time\ndef test_one(): time.sleep(600)\n",
    "not importable": "import no_such_module\n",
    "timed and endless": (
        "import time\n"
        "def test_one(benchmark): benchmark.pedantic(lambda: None)\n"
        "def test_two(): time.sleep(600)\n"
    ),
    "deaf": (
        "import signal, time\n"
        "def test_one():\n"
        "    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    time.sleep(600)\n"
    ),
}


@pytest.fixture(autouse=True)
def not_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark measures nothing in a worker of pytest-xdist, nor in what one starts."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def run_body(folder: Path, name: str, limit_s: float = 120.0, **fields: Any) -> Outcome:
    path = folder / "test_body.py"
    path.write_text(BODIES[name])
    return run_part(Part("body", "group", (str(path),), **fields), folder, limit_s)


@pytest.mark.parametrize(
    ("name", "status", "counts", "reason"),
    [
        ("passing", "passed", (2, 0, 0), None),
        ("failing", "failed", (1, 1, 0), "seven"),
        ("skipping", "skipped", (0, 0, 1), "no eight"),
        ("missing module", "skipped", (0, 0, 1), "no_such_module"),
        ("crashing", "failed", (0, 0, 0), "exit status 7: see body.log"),
        ("not importable", "failed", (0, 1, 0), "test_body"),
    ],
)
def test_outcome_is_what_the_process_did(
    tmp_path: Path, name: str, status: str, counts: tuple[int, int, int], reason: str | None
) -> None:
    outcome = run_body(tmp_path, name)
    assert (outcome.status, outcome.passed, outcome.failed, outcome.skipped) == (status, *counts)
    assert reason is None or any(reason in text for text in outcome.reasons), outcome.reasons
    assert (tmp_path / "body.log").read_text()


def test_a_part_without_end_fails_at_the_limit(tmp_path: Path) -> None:
    outcome = run_body(tmp_path, "endless", limit_s=3.0)
    assert outcome.status == "failed" and outcome.seconds < 60
    assert list(outcome.reasons) == ["not done after the limit of 3 s"]


def test_what_was_measured_before_the_limit_is_kept(tmp_path: Path) -> None:
    outcome = run_body(tmp_path, "timed and endless", limit_s=8.0, keeps_times=True)
    assert (outcome.status, outcome.passed) == ("failed", 1)
    assert list(outcome.reasons) == ["not done after the limit of 8 s"]
    (kept,) = json.loads((tmp_path / "body.json").read_text())["benchmarks"]
    assert kept["name"] == "test_one"


def test_a_part_that_ignores_the_interrupt_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "INTERRUPTED_S", 1.0)
    outcome = run_body(tmp_path, "deaf", limit_s=6.0, keeps_times=True)
    assert (outcome.status, outcome.passed) == ("failed", 0) and outcome.seconds < 60
    assert not (tmp_path / "body.json").exists()


def test_a_part_selects_by_an_expression(tmp_path: Path) -> None:
    outcome = run_body(tmp_path, "failing", select="one and not two")
    assert (outcome.status, outcome.passed, outcome.failed) == ("passed", 1, 0)


@pytest.mark.parametrize(("status", "counts"), [(0, (1, 0)), (7, (0, 1))])
def test_a_program_is_given_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, counts: tuple[int, int]
) -> None:
    (tmp_path / "program.py").write_text(f"import sys; print(sys.argv); sys.exit({status})")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    part = Part("page", "group", ("program.py",), is_program=True)
    outcome = run_part(part, tmp_path, 60.0)
    assert (outcome.passed, outcome.failed) == counts
    assert outcome.status == ("failed" if status else "passed")
    assert f"'--output', '{tmp_path}'" in (tmp_path / "page.log").read_text()


def test_a_part_that_cannot_run_is_skipped_with_the_reason_and_the_rest_runs(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_body.py").write_text(BODIES["passing"])
    arguments = (str(tmp_path / "test_body.py"),)
    parts = [
        Part("first", "group", arguments, needs=("no_such_module",)),
        Part("second", "group", arguments),
    ]
    outcomes = run_parts(parts, {"device": "none"}, tmp_path, limit_s=120.0)
    table = (tmp_path / "gpu_check.txt").read_text()
    assert [outcome.status for outcome in outcomes] == ["skipped", "passed"]
    assert "first: needs no_such_module (1)" in table
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["device"] == "none"
    assert [part["name"] for part in content["parts"]] == ["first", "second"]
    assert content["parts"][1]["passed"] == 2


def test_the_report_keeps_what_an_earlier_call_on_the_machine_found(tmp_path: Path) -> None:
    old, new, again = Outcome("a", "failed"), Outcome("b", "passed"), Outcome("a", "passed")
    write_report([old], {"device": "one"}, tmp_path)
    write_report([new], {"device": "one"}, tmp_path)
    table = write_report([again], {"device": "one"}, tmp_path)
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [
        ["a", "passed"],
        ["b", "passed"],
    ]
    table = write_report([new], {"device": "another"}, tmp_path)
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["b"]


@pytest.mark.parametrize(("name", "status"), [("passing", 0), ("skipping", 0), ("failing", 1)])
def test_exit_status_says_whether_something_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    (tmp_path / "test_body.py").write_text(BODIES[name])
    part = Part("body", "group", (str(tmp_path / "test_body.py"),))
    monkeypatch.setattr(gpu_check, "PARTS", (part,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "describe_machine", dict)
    assert gpu_check.main(["--output", str(tmp_path / "results")]) == status
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"gpu_check.json", "gpu_check.txt", "gpu_check_logs.tar"}
    with tarfile.open(tmp_path / "results" / "gpu_check_logs.tar") as archive:
        assert archive.getnames() == ["body.log", "body.xml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_nothing_runs_and_the_status_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--output", str(tmp_path / "results")]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_an_unknown_part_is_an_error_that_lists_the_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path), "--only", "gpu,speed"])
    known = "correctness, gpu, accuracy, targets, benchmarks"
    assert f"--only has speed; known: {known}" in capsys.readouterr().err


def test_every_part_names_a_file() -> None:
    for part in gpu_check.PARTS:
        assert all((gpu_check.ROOT / path).is_file() for path in part.arguments)


def test_the_parts_of_the_head_benchmark_are_all_its_cases_and_the_targets_come_first() -> None:
    """As pytest selects: by parts of the names."""
    parts = [part for part in gpu_check.PARTS if part.arguments == ("benchmarks/test_head.py",)]
    for case in CUDA_CASES:
        words = (part.select.split(" and ") for part in parts)
        fitting = [
            part.group
            for part, (model, tokens) in zip(parts, words, strict=True)
            if model in str(case) and ("n8192" in str(case)) == (tokens == "n8192")
        ]
        has_target = case.tokens == 8192 and case.model in gpu_check.TARGET_MODELS
        assert fitting == ["targets" if has_target else "benchmarks"]
    assert len(parts) == 2 * len(REAL_MODELS)
    assert [part.group for part in parts] == sorted((part.group for part in parts), reverse=True)


def test_what_is_measured_for_the_targets_fits_what_a_lent_machine_brings_back() -> None:
    """Eight files: the three of the command itself, the page of the accuracy, times."""
    chosen = [part for part in gpu_check.PARTS if part.group in ("accuracy", "targets")]
    assert 3 + sum(part.keeps_times or part.is_program for part in chosen) <= 8
