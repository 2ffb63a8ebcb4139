"""FSDP2 in two processes over gloo: saving, resuming, precision, and what is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fsdp_resume_run import CASES, MIDDLE, STEPS
from tests.launch import launch
from tests.models import tiny_model

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "fsdp_resume_run.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fsdp")
    launch(SCRIPT, directory, processes=2)
    return directory


def load(runs: Path, case: str) -> dict[str, Any]:
    return torch.load(runs / f"{case}.pt", weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(case: str, runs: Path) -> None:
    run = load(runs, case)
    complete, resumed = run["complete"], run["resumed"]
    assert len(complete["logs"]) == len(resumed["logs"]) == STEPS
    for expected, log in zip(complete["logs"], resumed["logs"], strict=True):
        assert log == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert complete["logs"][0]["loss"] != complete["logs"][MIDDLE]["loss"]
    for name, weight in complete["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_saved_model_is_the_trained_one(case: str, runs: Path) -> None:
    trained, folder = load(runs, case)["complete"]["weights"], runs / case / "model"
    if case in ("lora", "frozen adapter"):
        model = PeftModel.from_pretrained(tiny_model("llama", seed=2), folder)
        kept = {name: weight for name, weight in trained.items() if ".ref." not in name}
        saved = dict(model.named_parameters())
        assert any("lora" in name for name in load_file(folder / "adapter_model.safetensors"))
    else:
        kept, saved = trained, AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert set(kept) <= set(saved)
    for name, weight in kept.items():
        torch.testing.assert_close(saved[name].float(), weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_models_are_divided_and_scores_are_not_rounded(case: str, runs: Path) -> None:
    facts = load(runs, case)["facts"]
    assert facts["divided"] == {"policy", "reference"}
    assert facts["reference_was_released"] or case in ("lora", "frozen adapter")
    assert facts["layouts"] == {"packed"}
    assert facts["score_dtypes"] == {torch.float32}
    assert facts["fractional_bits"], "log-probabilities should not be bf16 values"


@pytest.mark.parametrize("case", ["read by rank 0", "frozen adapter"])
def test_the_reference_is_the_initial_policy_on_every_rank(case: str, runs: Path) -> None:
    first = load(runs, case)["complete"]["logs"][0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["rewards/chosen"] == first["kl_raw"] == 0.0
