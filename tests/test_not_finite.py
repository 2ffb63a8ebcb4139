"""Rows of the first batch that are not finite, beside the check of the head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from fastkto import KTOConfig, KTOTrainer
from fastkto.head_check import HeadMismatchError
from fastkto.plan_passes import Layout
from tests.launch import launch
from tests.models import tiny_model, tiny_tokenizer
from tests.not_finite_run import BAD_TOKEN, CASES, louder, rows_with_bad
from tests.short_run import SHORT_RUN

SCRIPT = Path(__file__).parent / "not_finite_run.py"
NANMEAN = {"nonfinite": "nanmean", "loss_type": "apo_zero_unpaired"}


def trainer(
    directory: Path, bad: list[int], reference: PreTrainedModel, **config: Any
) -> KTOTrainer:
    """A run with batches of four rows, the reference NaN for the rows `bad`, which are longest."""
    token = tiny_tokenizer().convert_tokens_to_ids(BAD_TOKEN)
    reference.get_input_embeddings().weight.data[token] = torch.nan
    settings = {**SHORT_RUN, "max_steps": 3, "gradient_checkpointing": False, **config}
    return KTOTrainer(
        model=tiny_model("llama", seed=1),
        ref_model=reference,
        args=KTOConfig(str(directory), **settings),
        train_dataset=Dataset.from_list(rows_with_bad(16, bad)),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("bad", [[2], [0, 2], [0, 1, 2, 3]], ids=str)
def test_the_longest_rows_of_the_first_batch_are_named(bad: list[int], tmp_path: Path) -> None:
    run = trainer(tmp_path, bad, tiny_model("llama", seed=2), loss_type="apo_zero_unpaired")
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    text = rf"not finite in step 0, of the reference: rows \[{', '.join(map(str, bad))}\]\."
    with pytest.raises(FloatingPointError, match=text):
        run.train()
    written = (tmp_path / "not_finite_step_0.jsonl").read_text().splitlines()
    assert [json.loads(row)["row"] for row in written] == bad
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.mark.parametrize("bad", [[2], [0, 2], [0, 1, 2, 3]], ids=str)
def test_nanmean_leaves_the_longest_rows_out(bad: list[int], tmp_path: Path) -> None:
    run = trainer(tmp_path, bad, tiny_model("llama", seed=2), **NANMEAN)
    run.train()
    assert run.state.global_step == 3
    assert run.model.lm_head.weight.isfinite().all()
    assert run.step_settings.policy_layout is run.step_settings.reference_layout is Layout.PACKED


@pytest.mark.parametrize(("bad", "step"), [([0, 2], 0), ([0, 1, 2, 3], 1)], ids=str)
def test_a_wrong_head_is_found_before_anything_is_trained(
    bad: list[int], step: int, tmp_path: Path
) -> None:
    """In the first batch that has a finite row; there is nothing to learn from those before it."""
    run = trainer(tmp_path, bad, louder(tiny_model("llama", seed=2)), **NANMEAN)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.raises(HeadMismatchError, match='Louder does: .*set head="logits"'):
        run.train()
    assert run.state.global_step == step
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of two ranks said in each case."""
    directory = tmp_path_factory.mktemp(request.param)
    launch(SCRIPT, directory, request.param, processes=2, timeout=120)
    return [json.loads((directory / f"said{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "said", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize("case", CASES)
def test_both_ranks_end_with_what_one_found(case: str, said: Any) -> None:
    first, second = (of_rank[case] for of_rank in said)
    assert first == second
    kind, text = CASES[case].error, CASES[case].text
    assert first["kind"] == kind and text in first["error"]
