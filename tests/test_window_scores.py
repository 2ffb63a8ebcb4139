"""Scores without gradient: prompts read once, the first KL estimate, and how full passes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from fastkto import KTOConfig, KTOTrainer, window_scores
from fastkto.data.batch import KTOCollator, TokenSequence
from fastkto.plan_passes import Layout
from tests.models import tiny_model, tiny_tokenizer

# Sliding windows, scales of their own, learned positions and experts are among them.
SOME_FAMILIES = ["gemma2", "gemma3", "granite", "gpt2", "mistral", "qwen3_moe"]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def rows_of(lengths: list[tuple[int, int]], equal_prompts: bool = False) -> list[dict[str, Any]]:
    """Rows of random tokens; with `equal_prompts` those of one length are equal."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, 100, (count,), generator=generator).tolist()

    prompts = {prompt: tokens(prompt) for prompt, _ in lengths}
    return [
        {
            "prompt_ids": prompts[prompt] if equal_prompts else tokens(prompt),
            "completion_ids": tokens(completion),
            "label": index % 2 == 0,
            "row": index,
        }
        for index, (prompt, completion) in enumerate(lengths)
    ]


def new_trainer(
    directory: Path, rows: list[dict[str, Any]], family: str = "llama", **fields: Any
) -> KTOTrainer:
    """A new adapter on a model, or without `peft_config` a model and a reference like it."""
    model_fields = fields.pop("model", {})
    peft_config = fields.pop("peft_config", None)
    model = tiny_model(family, seed=1, **model_fields)
    return KTOTrainer(
        model=model,
        ref_model=None if peft_config else tiny_model(family, seed=1, **model_fields),
        args=KTOConfig(
            output_dir=str(directory),
            per_device_train_batch_size=len(rows),
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            **fields,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def step(
    trainer: KTOTrainer, rows: list[dict[str, Any]], layouts: tuple[Layout, Layout] | None = None
) -> tuple[dict[str, float], Tensor]:
    """(metrics, reference log-probabilities) of the rows as one batch."""
    batch = KTOCollator(None)(rows)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._get_ready([batch])
    if layouts is not None:
        settings = trainer.step_settings
        settings.policy_layout, settings.reference_layout = layouts
    (loss,) = trainer._score([batch])
    trainer.training_step(trainer.model, {**batch, "batch_loss": loss})
    metrics, _ = trainer._train_metrics.collect(lambda table: table)
    return metrics, loss.reference_logprob


LONG = [(150, 9), (140, 20), (150, 5), (160, 12)]
SHORT = [(9, 20), (4, 30), (12, 18), (9, 25)]


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("peft_config", [LORA, None], ids=["adapter", "model"])
def test_the_first_kl_is_zero_where_policy_and_reference_have_one_plan(
    peft_config: Any, layout: Layout, tmp_path: Path
) -> None:
    rows = rows_of(SHORT)
    trainer = new_trainer(tmp_path, rows, peft_config=peft_config, max_tokens_per_pass=40)
    metrics, _ = step(trainer, rows, (layout, layout))
    assert metrics["kl_raw"] == metrics["kl"] == 0.0


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_the_first_kl_is_near_zero_where_prompts_are_read_once(family: str, tmp_path: Path) -> None:
    """The bound of docs/step.md, in nats for completions of up to 20 tokens."""
    rows = rows_of(LONG)
    trainer = new_trainer(tmp_path, rows, family, peft_config=LORA, router_aux_loss_coef=None)
    metrics, _ = step(trainer, rows)
    # the reference reads 600 tokens of prompts once, the policy's two sets 600 each
    completions = sum(completion for _, completion in LONG)
    computed = 600 + 2 * completions + 2 * (600 + completions)
    assert metrics["pass_efficiency"] == 4 * (600 + completions) / computed
    assert abs(metrics["kl_raw"]) < 2e-5


@pytest.mark.parametrize("layouts", [(Layout.PADDED, Layout.PACKED), (Layout.PACKED, Layout.ALONE)])
def test_layouts_of_policy_and_reference_may_differ(
    layouts: tuple[Layout, Layout], tmp_path: Path
) -> None:
    for lengths in (SHORT, LONG):
        rows = rows_of(lengths)
        trainer = new_trainer(tmp_path, rows)
        metrics, scores = step(trainer, rows, layouts)
        assert abs(metrics["kl_raw"]) < 2e-5
        assert abs(metrics["rewards/chosen"]) < 1e-5
        _, expected = step(trainer, rows, (Layout.ALONE, Layout.ALONE))
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "default") for family in SOME_FAMILIES), ("gemma3", "eager")],
)
def test_prompts_read_once_give_the_scores_of_separate_ones(
    family: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {} if attention == "default" else {"attn_implementation": attention}
    if family in ("mistral", "mixtral"):
        fields["sliding_window"] = 8
    rows = rows_of([(20, 6), (30, 3), (20, 9)], equal_prompts=True)
    trainer = new_trainer(tmp_path, rows, family, model=fields, router_aux_loss_coef=0.0)
    apart, expected = step(trainer, rows)
    assert apart["pass_efficiency"] < 1.2  # only the gradient passes share prompts
    monkeypatch.setattr(window_scores, "_LONG_PROMPT", 8)
    trainer.model.zero_grad()
    metrics, scores = step(trainer, rows)
    # four sets of 70 + 18 tokens; the reference reads 50 tokens of prompts, and the policy too
    assert metrics["pass_efficiency"] == 4 * 88 / (50 + 2 * 18 + 2 * (50 + 18))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=2e-5)


def test_prompts_are_read_once_only_where_that_saves_enough(tmp_path: Path) -> None:
    rows = rows_of(LONG)
    settings = new_trainer(tmp_path, rows, max_tokens_per_pass=1000).step_settings
    settings.reference_layout = Layout.PACKED

    def shares(prompts: list[int], completion: int, equal: bool = True) -> bool:
        sequences = [
            TokenSequence(
                torch.zeros(prompt, dtype=torch.int64),
                torch.zeros(completion, dtype=torch.int64),
                0 if equal else index,
            )
            for index, prompt in enumerate(prompts)
        ]
        return window_scores._saves_tokens(settings, sequences)

    assert shares([128, 128], 5)
    assert not shares([127, 127], 5)  # too few tokens for another path
    assert shares([64, 64, 64], 5)  # read once instead of three times
    assert not shares([128, 128], 600)  # less than a tenth of all
    assert shares([1900, 1900], 100)  # more than a pass of 2000 holds, and hardly than one alone
    assert not shares([1500, 1500], 600)  # far more than either alone
    assert not shares([200, 200], 5, equal=False)
    assert not shares([], 5)
    settings.reference_layout = Layout.PADDED
    assert not shares([200, 200], 5)


@pytest.mark.parametrize(
    ("layout", "computed"),
    [
        # 4 sets of completions 20, 30, 18, 25 behind prompts 9, 4, 12, 9: the matched lengths are
        # 29, 34, 30, 34; the mismatched ones 34, 24, 42, 27. Nothing is padded in a packed pass.
        (Layout.PACKED, 2 * 127 + 2 * 127),
        # Of the matched, 34, 34 make a pass of 2 x 34, and 30, 29 one of 2 x 30; the gradient's
        # budget of 70 and that without gradient, 140, give the same plan. All mismatched differ
        # by more than a tenth.
        (Layout.PADDED, 2 * (2 * 34 + 2 * 30) + 2 * 127),
        (Layout.ALONE, 4 * 127),
    ],
)
def test_pass_efficiency_is_real_tokens_over_computed_ones(
    layout: Layout, computed: int, tmp_path: Path
) -> None:
    rows = rows_of(SHORT)
    trainer = new_trainer(tmp_path, rows, max_tokens_per_pass=70)
    metrics, _ = step(trainer, rows, (layout, layout))
    assert metrics["pass_efficiency"] == 4 * 127 / computed


def test_rows_paired_within_a_prompt_and_lone_rows_are_logged(tmp_path: Path) -> None:
    rows = rows_of([(5, 4), (5, 6), (7, 3)], equal_prompts=True)
    trainer = new_trainer(tmp_path, rows)
    metrics, _ = step(trainer, rows)
    assert metrics["kl_same_prompt_rows"] == 1.0  # row 1 with row 0
    assert "kl_lone_rows" not in metrics
    metrics, _ = step(trainer, rows[:1])
    assert metrics["kl_lone_rows"] == 1.0 and metrics["kl"] == 0.0
    assert "kl_same_prompt_rows" not in metrics
