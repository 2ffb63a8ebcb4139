"""The same run in TRL 1.16 and here: every logged number of every step agrees."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

import fastkto
import fastkto.step
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.row_data import implicit_row, make, template_row, tools_row
from tests.trl_runs import (
    assert_equal_logs,
    both,
    chat_rows,
    paired_rows,
    text_rows,
    trained,
)

APO = "apo_zero_unpaired"
UNEQUAL = {"equal_weights": False}
SMALL_PASSES = {"max_tokens_per_pass": 64}  # several passes for each batch, some of one long row


def models(family: str = "llama") -> dict[str, Any]:
    """A policy and a reference unlike it: surer of itself, so that the KL estimate is above 0."""
    policy, reference = tiny_model(family, seed=1), tiny_model(family, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * parameter.abs().mean() * noise)
        reference.get_output_embeddings().weight.mul_(1.4)
    return {"model": policy, "ref_model": reference}


def lora(family: str = "llama") -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(FAMILIES[family].lora_targets),
        init_lora_weights=False,  # B is not zero, so that the policy is not the reference
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("passes", [{}, SMALL_PASSES], ids=["one pass", "several passes"])
def test_equal_with_explicit_reference(loss_type: str, passes: dict, tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path, passes, **models(), train_dataset=text_rows(), loss_type=loss_type
    )
    assert_equal_logs(expected, actual, kl_used=loss_type == "kto")


@pytest.mark.parametrize(
    "config",
    [
        {"beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.6},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"max_length": 40},
    ],
    ids=["weights and beta", "accumulation", "checkpointing", "cut rows"],
)
def test_equal_for_settings(config: dict, tmp_path: Path) -> None:
    expected, actual = both(tmp_path, SMALL_PASSES, **models(), train_dataset=text_rows(), **config)
    assert_equal_logs(expected, actual)


@pytest.mark.parametrize("rows", [12, 20])
def test_equal_where_the_last_window_is_short(rows: int, tmp_path: Path) -> None:
    """Three or five batches for windows of two: the last of an epoch has one."""
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        **models(),
        train_dataset=text_rows(rows),
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=2,
    )
    assert_equal_logs(expected, actual)
    assert sum("loss" in log for log in actual) == 2 * -(-rows // 8)


def test_equal_with_a_stream(tmp_path: Path) -> None:
    rows = text_rows().to_iterable_dataset()
    expected, actual = both(tmp_path, SMALL_PASSES, **models(), train_dataset=rows)
    assert_equal_logs(expected, actual)


def test_equal_where_all_rows_fit_a_table_of_positions(tmp_path: Path) -> None:
    """And neither `max_length` of a stream nor the rows before a collator cuts them say so."""
    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=40)
    for positions, rows in (
        (160, {"train_dataset": text_rows().to_iterable_dataset()}),  # and pairs, of up to 79 each
        (40, {"train_dataset": text_rows(), "data_collator": collator}),
    ):
        sizes = {"n_positions": positions, "max_position_embeddings": positions}
        run = {"ref_model": tiny_model("gpt2", seed=1, **sizes), **rows, "max_length": 1024}
        run["model"] = tiny_model("gpt2", seed=2, **sizes)
        expected, actual = both(tmp_path / str(positions), SMALL_PASSES, **run)
        assert_equal_logs(expected, actual, kl_used=False)


def test_equal_with_several_evaluation_sets(tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        **models(),
        train_dataset=text_rows(),
        eval_dataset={"first": text_rows(8, seed=9), "second": text_rows(12, seed=10)},
    )
    assert_equal_logs(expected, actual)
    evaluations = [log for log in actual if "eval_kl" in log]
    assert len(evaluations) == 4
    for name, log in zip(["first", "second"] * 2, evaluations, strict=True):
        assert log[f"eval_{name}_rewards/margins"] == log["eval_rewards/margins"]
        assert "eval_loss" not in log and f"eval_{name}_loss" in log


def test_equal_where_kl_is_clamped(tmp_path: Path) -> None:
    pair = models()
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        model=pair["ref_model"],
        ref_model=pair["model"],
        train_dataset=text_rows(),
        eval_dataset=text_rows(8, seed=9),
    )
    assert_equal_logs(expected, actual, kl_used=False)
    assert all(log["kl"] == 0 > log["kl_raw"] for log in actual if "kl" in log)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "phi", "gpt2", "mixtral"])
def test_equal_for_head_family(family: str, tmp_path: Path) -> None:
    expected, actual = both(tmp_path, SMALL_PASSES, **models(family), train_dataset=text_rows())
    assert_equal_logs(expected, actual)


def test_equal_with_initial_policy_as_reference(tmp_path: Path) -> None:
    path = tmp_path / "model"
    tiny_model("qwen2", seed=3).save_pretrained(path)
    expected, actual = both(
        tmp_path, SMALL_PASSES, model=str(path), train_dataset=text_rows(), learning_rate=0.2
    )
    assert_equal_logs(expected, actual, kl_used=False)  # it starts at exactly 0
    assert actual[0]["kl"] == 0.0
    assert any(log["kl"] > 0 for log in actual[1:-1])


def test_equal_with_new_adapter(tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        model=tiny_model("llama", seed=0),
        peft_config=lora(),
        train_dataset=text_rows(),
    )
    assert_equal_logs(expected, actual)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_equal_with_a_prompt_learning_adapter(kind: Any, tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        model=tiny_model("llama", seed=0),
        peft_config=kind(task_type="CAUSAL_LM", num_virtual_tokens=3),
        train_dataset=text_rows(),
        learning_rate=0.5,
    )
    assert_equal_logs(expected, actual, kl_used=False)
    assert actual[0]["loss"] != actual[-2]["loss"]


def test_equal_with_trained_adapter(tmp_path: Path) -> None:
    torch.manual_seed(2)
    policy = get_peft_model(tiny_model("llama", seed=5), lora())
    expected, actual = both(
        tmp_path, SMALL_PASSES, model=policy, train_dataset=text_rows(), learning_rate=0.3
    )
    assert_equal_logs(expected, actual, kl_used=False)  # it starts at exactly 0
    assert actual[0]["kl"] == 0.0
    assert sum(log["kl"] > 0 for log in actual[1:-1]) >= 2


@pytest.mark.parametrize(
    "rows",
    [
        chat_rows(),
        paired_rows(),
        paired_rows().to_iterable_dataset(),
        make(tools_row, 32),
        make(template_row, 32),
        make(implicit_row, 16),
    ],
    ids=["chat", "paired", "stream of pairs", "tools", "template", "implicit prompt"],
)
def test_equal_for_data_format(rows: Dataset, tmp_path: Path) -> None:
    expected, actual = both(tmp_path, SMALL_PASSES, **models(), train_dataset=rows)
    assert_equal_logs(expected, actual)


@pytest.mark.parametrize("label", [True, False])
def test_equal_with_one_class_absent(label: bool, tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path, SMALL_PASSES, **models(), train_dataset=text_rows(label=label)
    )
    assert_equal_logs(expected, actual)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_equal_in_evaluation(family: str, tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path,
        SMALL_PASSES,
        **models(family),
        train_dataset=text_rows(),
        eval_dataset=text_rows(14, seed=9),  # the last batch is short
    )
    assert_equal_logs(expected, actual)
    assert any("eval_rewards/margins" in log for log in actual)


def test_pairs_in_evaluation_are_those_of_its_own_batches(tmp_path: Path) -> None:
    """TRL forms them in blocks of the training batch size, which is 4 in one of these and 2."""
    run = {**models(), "train_dataset": text_rows(), "eval_dataset": text_rows(8, seed=9)}
    run |= {"per_device_eval_batch_size": 2, "eval_on_start": True, "max_steps": 1}
    ours = trained(fastkto, tmp_path, **run).state.log_history[0]
    alike, others = (
        trained(trl, tmp_path, **run, per_device_train_batch_size=size).state.log_history[0]
        for size in (2, 4)
    )
    assert ours["eval_kl"] == pytest.approx(alike["eval_kl"], rel=1e-4)
    assert abs(ours["eval_kl"] - others["eval_kl"]) > 0.01


@pytest.mark.parametrize(
    "run",
    [
        {"per_device_eval_batch_size": 1},
        {"train_dataset": text_rows(13), "max_steps": 4},  # a batch of one row
        {"train_dataset": text_rows(13).to_iterable_dataset(), "max_steps": 4},
        {"precompute_ref_log_probs": True},
        {"loss_type": APO},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["evaluation", "lone row", "stream", "precomputed", "APO", "accumulation"],
)
def test_equal_with_pairs_of_the_data_set(run: dict[str, Any], tmp_path: Path) -> None:
    """Without a condition on batches: those of evaluation are smaller, the last may be one row."""
    run = {**models(), "train_dataset": text_rows(), **run}
    run = {"eval_dataset": text_rows(7, seed=9), "per_device_eval_batch_size": 3} | run
    ours = {"kl_pairing": "dataset", "reference_cache": None}
    if "precompute_ref_log_probs" in run:
        ours["reference_cache"] = str(tmp_path / "cache")
    expected, actual = both(tmp_path, SMALL_PASSES | ours, **run)
    assert_equal_logs(expected, actual, kl_used="loss_type" not in run)


@pytest.mark.parametrize("reference", ["model", "adapter"])
def test_a_run_that_trl_began_goes_on(reference: str, tmp_path: Path) -> None:
    """With the same steps, and checkpoints of its own."""
    run: dict[str, Any] = models()
    if reference == "adapter":
        run = {"model": get_peft_model(tiny_model("llama", seed=0), lora())}
    run |= {"train_dataset": text_rows(), "save_strategy": "steps", "save_steps": 2}
    expected = trained(trl, tmp_path, **run)
    checkpoint = str(tmp_path / "trl" / "checkpoint-2")
    actual = trained(fastkto, tmp_path, **run, resume_from_checkpoint=checkpoint)
    # The last one averages over the steps of one process.
    logs = expected.state.log_history[:-1], actual.state.log_history[:-1]
    assert_equal_logs(*logs, kl_used=reference == "model")
    assert (tmp_path / "fastkto" / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("max_length", "own"), [(None, None), (16, 16), (40, None), (None, 60)], ids=str
)
def test_equal_with_trls_collator(max_length: int | None, own: int | None, tmp_path: Path) -> None:
    """Which brings the pairs that the data set has, of completions that it cuts or not.

    Behind a function, too; `max_length` drops rows, and what it cuts is the collator's to say.
    """
    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=own)
    run = {"train_dataset": text_rows(), "eval_dataset": text_rows(7, seed=9)}
    run |= {"data_collator": lambda rows: collator(rows), "per_device_eval_batch_size": 2}
    run |= {"max_length": max_length}
    expected, actual = both(tmp_path, SMALL_PASSES, **models(), **run)
    assert_equal_logs(expected, actual)


@pytest.mark.parametrize("reference", ["model", "adapter"])
def test_equal_with_precomputed_reference(reference: str, tmp_path: Path) -> None:
    policy = {"model": tiny_model("llama", seed=0), "peft_config": lora()}
    expected, actual = both(
        tmp_path,
        SMALL_PASSES | {"reference_cache": str(tmp_path / "cache")},
        **(models() if reference == "model" else policy),
        train_dataset=text_rows(),
        eval_dataset=text_rows(14, seed=9),
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=4,
    )
    assert_equal_logs(expected, actual)
    assert all(log["ref_cache_misses"] == 0 for log in actual if "loss" in log)


def test_comparison_notices_beta_off_by_a_thousandth(tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path, {"beta": 0.1001}, **models(), train_dataset=text_rows(), beta=0.1, **UNEQUAL
    )
    with pytest.raises(AssertionError, match="of log"):
        assert_equal_logs(expected, actual)


def test_comparison_notices_swapped_weights(tmp_path: Path) -> None:
    expected, actual = both(
        tmp_path,
        {"desirable_weight": 0.9, "undesirable_weight": 1.1},
        **UNEQUAL,
        **models(),
        train_dataset=text_rows(),
        desirable_weight=1.1,
        undesirable_weight=0.9,
    )
    with pytest.raises(AssertionError, match="loss of log"):
        assert_equal_logs(expected, actual)


def test_comparison_notices_a_dropped_kl_term(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kto_loss = fastkto.step.kto_loss

    def without_kl(*args: Any, **kwargs: Any) -> Any:
        return kto_loss(*args, **{**kwargs, "kl": torch.zeros_like(kwargs["kl"])})

    monkeypatch.setattr(fastkto.step, "kto_loss", without_kl)
    expected, actual = both(tmp_path, **UNEQUAL, **models(), train_dataset=text_rows())
    with pytest.raises(AssertionError, match="loss of log"):
        assert_equal_logs(expected, actual)


def next_token_accuracy(prediction: Any) -> dict[str, float]:
    """Over all positions; padding has the logits of what stands before it in both libraries."""
    logits, tokens = prediction.predictions, prediction.label_ids
    real = tokens[:, 1:] > 0
    right = (logits[:, :-1].argmax(-1) == tokens[:, 1:]) & real
    return {"accuracy": right.sum() / real.sum(), "logit": (logits[:, :-1].max(-1) * real).sum()}


def test_compute_metrics_gets_the_same_logits(tmp_path: Path) -> None:
    run = {"train_dataset": text_rows(), "eval_dataset": text_rows(7, seed=3)}
    expected, actual = both(tmp_path, **models(), **run, compute_metrics=next_token_accuracy)
    assert_equal_logs(expected, actual)
    assert any("eval_logit" in log for log in actual)


def test_nanmean_leaves_a_row_without_a_reference_out(tmp_path: Path) -> None:
    """TRL's loss does the same; its gradient is NaN, and ours is that of the other rows."""
    rows = text_rows(4).to_list()
    run = {"train_dataset": Dataset.from_list(rows), "max_steps": 1, "loss_type": APO}
    run |= {"max_grad_norm": 1e9}  # nothing is clipped, and the norm is logged
    others = {**run, "train_dataset": Dataset.from_list(rows[:2] + rows[3:])}
    others |= {"per_device_train_batch_size": 3}
    rows[2]["completion"] += " ~"  # a token that no other row has
    run["train_dataset"] = Dataset.from_list(rows)
    pair = models()
    token = tiny_tokenizer().convert_tokens_to_ids("~")
    with torch.no_grad():
        pair["ref_model"].get_input_embeddings().weight[token] = float("nan")
    expected, actual = both(tmp_path, {"nonfinite": "nanmean"}, equal_weights=False, **pair, **run)
    _, without = both(tmp_path, **pair, **others)
    assert actual[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert actual[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-5)
    assert actual[0]["grad_norm"] == pytest.approx(without[0]["grad_norm"], rel=1e-5)
    assert actual[0]["rewards/chosen"] == pytest.approx(without[0]["rewards/chosen"], rel=1e-5)
    assert math.isnan(expected[0]["grad_norm"])
