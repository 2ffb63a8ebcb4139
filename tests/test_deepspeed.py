"""DeepSpeed in two processes over gloo: equal to one process, saving, resuming, what is divided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

pytest.importorskip("deepspeed", reason="deepspeed is not installed, which is optional")

from tests import distributed_run, equal_runs  # noqa: E402
from tests.deepspeed_run import CASES, RESUMED  # noqa: E402
from tests.fsdp_resume_run import MIDDLE, STEPS  # noqa: E402
from tests.launch import launch  # noqa: E402
from tests.models import tiny_model  # noqa: E402

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed")
    launch(TESTS / "distributed_run.py", directory / "one")
    launch(TESTS / "deepspeed_run.py", directory, processes=2)
    return directory


def load(runs: Path, case: str) -> dict[str, Any]:
    return torch.load(runs / f"{case}.pt", weights_only=False)


@pytest.mark.parametrize(
    ("stage", "case"), [(stage, case) for stage, cases in CASES.items() for case in cases]
)
def test_two_processes_equal_one(stage: str, case: str, runs: Path) -> None:
    equal_runs.check_equal(runs / "one" / case, runs / stage / case, case, in_lockstep=True)


@pytest.mark.parametrize(
    ("stage", "case"), [(stage, case) for stage, cases in CASES.items() for case in cases]
)
def test_gradients_are_reduced_once_a_step_or_at_every_pass(
    stage: str, case: str, runs: Path
) -> None:
    for rank in range(2):
        run = equal_runs.result(runs / stage / case, rank)
        steps, passes = distributed_run.STEPS, sum(run["passes"])
        assert passes > steps
        assert run["reductions"] == (steps if stage == "zero1" else passes)


@pytest.mark.parametrize("case", ["stream", "ahead"])
def test_only_one_rank_finds_its_rows_in_the_reference_cache(case: str, runs: Path) -> None:
    equal_runs.check_half_known(torch.load(runs / "half_known.pt"), case, in_lockstep=True)


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(case: str, runs: Path) -> None:
    run = load(runs, case)
    complete, resumed = run["complete"], run["resumed"]
    assert len(complete["logs"]) == len(resumed["logs"]) == STEPS
    for expected, log in zip(complete["logs"], resumed["logs"], strict=True):
        assert log == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert complete["logs"][0]["loss"] != complete["logs"][MIDDLE]["loss"]
    for name, weight in complete["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", RESUMED)
def test_the_saved_model_is_the_trained_one(case: str, runs: Path) -> None:
    trained, folder = load(runs, case)["complete"]["weights"], runs / case / "model"
    if case.startswith("frozen adapter"):
        model = PeftModel.from_pretrained(tiny_model("llama", seed=2), folder)
        saved = dict(model.named_parameters())
        saved = {name: weight for name, weight in saved.items() if "lora_" in name}
        trained = {name: trained[name].float() for name in saved}
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert set(trained) <= set(saved)
    for name, weight in trained.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", RESUMED)
def test_zero3_divides_both_models_and_scores_are_not_rounded(case: str, runs: Path) -> None:
    facts = load(runs, case)["facts"]
    assert facts["divided"] == ({"policy", "reference"} if RESUMED[case] == 3 else set())
    assert facts["layouts"] == {"packed"}
    assert facts["score_dtypes"] == {torch.float32}
    assert facts["fractional_bits"], "log-probabilities should not be bf16 values"


def test_the_reference_of_a_path_is_the_initial_policy(runs: Path) -> None:
    run = load(runs, "path")
    for weight, initial in zip(
        run["facts"]["reference"], tiny_model("llama", seed=2).parameters(), strict=True
    ):
        torch.testing.assert_close(weight, initial.detach(), rtol=0, atol=0)
    first = run["complete"]["logs"][0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["rewards/chosen"] == first["kl_raw"] == 0.0


def test_what_zero3_cannot_do_is_refused(runs: Path) -> None:
    for rank in range(2):
        changed, evaluated = json.loads((runs / f"refusals{rank}.json").read_text())
        assert "cannot be copied: ZeRO-3 has divided it; pass ref_model" in changed
        assert "evaluate() has prepared the model without an optimizer" in evaluated
