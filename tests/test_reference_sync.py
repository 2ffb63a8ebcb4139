"""A reference that follows the policy: as TRL moves it, and where TRL cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastkto import KTOConfig, KTOTrainer
from tests.distributed_run import WORLD_SIZE
from tests.equal_runs import TOLERANCE
from tests.launch import launch
from tests.models import tiny_model, tiny_tokenizer
from tests.sync_resume_run import CASES, FSDP_CASES, STEPS
from tests.trl_runs import assert_equal_logs, both, text_rows

SCRIPT = Path(__file__).parent / "sync_resume_run.py"
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2}


def test_a_run_says_that_its_reference_moves(tmp_path: Path) -> None:
    description = trainer(tmp_path, **SYNC).reference.description
    assert description.endswith(", moved towards the policy every 2 steps")


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_full_fine_tuning_equals_trl(tmp_path: Path, alpha: float) -> None:
    run = {
        "model": tiny_model("llama", seed=1),
        "ref_model": tiny_model("llama", seed=1),
        "train_dataset": text_rows(),
        "ref_model_mixup_alpha": alpha,
        "max_steps": 6,
        "learning_rate": 0.1,
    }
    expected, actual = both(tmp_path, **run, **SYNC)
    assert_equal_logs(expected, actual, kl_used=False)
    unmoved, _ = both(tmp_path, **run)
    assert unmoved[3]["rewards/chosen"] != pytest.approx(actual[3]["rewards/chosen"], rel=1e-2)


def trainer(folder: Path, **arguments: Any) -> KTOTrainer:
    given = {k: arguments.pop(k) for k in ("peft_config", "ref_model") if k in arguments}
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    }
    return KTOTrainer(
        model=tiny_model("llama", seed=1),
        args=KTOConfig(str(folder), **(fields | arguments)),
        train_dataset=text_rows(),
        processing_class=tiny_tokenizer(),
        **given,
    )


def test_an_adapter_is_copied(tmp_path: Path) -> None:
    """TRL refuses it. Right behind a move the policy is its own reference."""
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    moved = trainer(tmp_path / "moved", ref_model_mixup_alpha=1.0, **SYNC, **lora)
    fixed = trainer(tmp_path / "fixed", **lora)
    for run in (moved, fixed):
        run.train()
    logs, unmoved = moved.state.log_history, fixed.state.log_history
    for log, other in zip(logs[:2], unmoved[:2], strict=True):  # nothing has been moved yet
        assert log["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert logs[2]["loss"] == pytest.approx(0.5, abs=1e-7) and logs[2]["rewards/chosen"] == 0
    assert unmoved[2]["loss"] != pytest.approx(0.5, abs=1e-3)


def test_a_resumed_run_has_the_moved_reference(tmp_path: Path) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=3, **SYNC)
    whole.train()
    resumed = trainer(tmp_path, save_strategy="no", **SYNC)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    last, again = (run.state.log_history[-2] for run in (whole, resumed))
    assert again["step"] == 4 and again["loss"] == pytest.approx(last["loss"], abs=1e-7)
    assert again["rewards/chosen"] == pytest.approx(last["rewards/chosen"], rel=1e-6)
    pairs = zip(
        whole.reference.model.parameters(), resumed.reference.model.parameters(), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_a_checkpoint_without_the_reference_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    run = trainer(tmp_path, **SYNC)
    with pytest.raises(ValueError, match="checkpoint-3 has no folder 'reference'"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ref_model_mixup_alpha=0.6 and the policy is an adapter"):
        trainer(tmp_path, peft_config=LoraConfig(r=4), **SYNC)
    with pytest.raises(ValueError, match="ref_model is a model without it; leave ref_model out"):
        trainer(
            tmp_path,
            peft_config=LoraConfig(r=4),
            ref_model=tiny_model("llama"),
            ref_model_mixup_alpha=1.0,
            **SYNC,
        )


@pytest.fixture(scope="module")
def ddp_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ddp")
    launch(SCRIPT, directory, directory, processes=WORLD_SIZE)
    return directory


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory: pytest.TempPathFactory, ddp_runs: Path) -> Path:
    """The same in one process, which goes on from the two processes' checkpoints."""
    directory = tmp_path_factory.mktemp("alone")
    launch(SCRIPT, directory, ddp_runs)
    return directory


@pytest.fixture(scope="module")
def fsdp_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fsdp")
    launch(SCRIPT, directory, directory, "fsdp", processes=WORLD_SIZE)
    return directory


def runs_of(directory: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(directory / f"{case} {rank}.pt")


def assert_same_run(expected: dict[str, Any], actual: dict[str, Any]) -> None:
    assert len(expected["logs"]) == len(actual["logs"]) == STEPS
    for log, other in zip(expected["logs"], actual["logs"], strict=True):
        compared = {key: value for key, value in log.items() if key != "pass_efficiency"}
        for key, value in compared.items():
            assert other[key] == pytest.approx(value, **TOLERANCE), (log["step"], key)
    assert expected["weights"].keys() == actual["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(actual["weights"][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_resume_with_the_moved_reference(case: str, ddp_runs: Path) -> None:
    for rank in range(WORLD_SIZE):
        runs = runs_of(ddp_runs, case, rank)
        assert_same_run(runs["complete"], runs["resumed"])
        assert_same_run(runs_of(ddp_runs, case)["complete"], runs["complete"])


@pytest.mark.slow
@pytest.mark.parametrize("case", FSDP_CASES)
def test_a_divided_reference_is_resumed(case: str, fsdp_runs: Path) -> None:
    runs = runs_of(fsdp_runs, case)
    assert_same_run(runs["complete"], runs["resumed"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_move_it_as_one_and_one_resumes_theirs(
    case: str, ddp_runs: Path, runs_alone: Path
) -> None:
    two, one = runs_of(ddp_runs, case), runs_of(runs_alone, case)
    assert any(log["kl"] > 0.01 for log in two["complete"]["logs"]), "zeros would prove nothing"
    assert_same_run(one["complete"], two["complete"])
    assert_same_run(two["complete"], one["resumed"])


@pytest.mark.slow
def test_the_first_rank_saves_what_all_have(ddp_runs: Path) -> None:
    """So that a copy of the first machine's checkpoint is enough for the others."""
    folder = ddp_runs / "model" / "checkpoint-3" / "reference"
    assert {f.name for f in folder.iterdir() if f.stat().st_size} == {".metadata", "__0_0.distcp"}
