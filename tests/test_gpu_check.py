"""The command that checks everything on a GPU: what it reports, from real pytest processes."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Part, run_part, run_parts, write_report

BODIES = {
    "passing": "def test_one(): pass\ndef test_two(): pass\n",
    "failing": "def test_one(): pass\ndef test_two(): raise ValueError('seven')\n",
    "skipping": "import pytest\n@pytest.mark.skip(reason='no eight')\ndef test_one(): pass\n",
    "missing module": "import pytest\npytest.importorskip('no_such_module')\n",
    "crashing": "import os\ndef test_one(): os._exit(7)\ndef test_two(): pass\n",
    "endless": "import time\ndef test_one(): time.sleep(600)\n",
    "not importable": "import no_such_module\n",
}


def run_body(folder: Path, name: str, limit_s: float = 120.0) -> Outcome:
    path = folder / "test_body.py"
    path.write_text(BODIES[name])
    return run_part(Part("body", "group", (str(path),)), folder, limit_s)


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


def test_a_part_that_cannot_run_is_skipped_with_the_reason_and_the_rest_runs(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_body.py").write_text(BODIES["passing"])
    arguments = (str(tmp_path / "test_body.py"),)
    parts = [
        Part("first", "group", arguments, needs=("no_such_module",)),
        Part("second", "group", arguments),
    ]
    outcomes = run_parts(parts, tmp_path, limit_s=120.0)
    table = write_report(outcomes, {"device": "none"}, tmp_path)
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
    assert (tmp_path / "results" / "body.xml").exists()


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
    assert "--only has speed; known: correctness, gpu, benchmarks" in capsys.readouterr().err


def test_every_part_names_a_file() -> None:
    for part in gpu_check.PARTS:
        assert all((gpu_check.ROOT / path).is_file() for path in part.arguments)
