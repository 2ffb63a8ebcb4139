"""Equal losses, step by step, with LLaMA-Factory's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from llamafactory.train.kto.trainer import CustomKTOTrainer as Theirs

from fastkto.integrations.llamafactory import CustomKTOTrainer
from tests.llamafactory_runs import build, kto_rows, models

NOT_COMPARED = ("runtime", "per_second", "total_flos", "epoch", "step", "learning_rate")


def both(
    folder: Path, *, family: str = "llama", lora: bool = False, seeds: Any = (1, 2), **run: Any
) -> tuple[Any, Any]:
    """LLaMA-Factory's trainer and ours after the same training; ours in several passes a batch."""
    config = {"attn_implementation": "eager"} if family == "gemma2" else {}
    policy, reference = models(family, lora=lora, seeds=seeds, **config)

    class Ours(CustomKTOTrainer):
        options = {"max_tokens_per_pass": 40}

    trainers = [
        build(kind, folder / name, policy, reference, **run)
        for kind, name in ((Theirs, "theirs"), (Ours, "ours"))
    ]
    for trainer in trainers:
        trainer.train()
    return trainers[0], trainers[1]


def assert_equal_logs(
    theirs: list[dict[str, Any]],
    ours: list[dict[str, Any]],
    *,
    batches: int = 1,
    kl_used: bool = True,
) -> None:
    """Losses within 1e-4, and all other values but those that LLaMA-Factory gets wrong.

    `batches` is how many micro-batches a log has, over which LLaMA-Factory adds its KL estimates.
    """
    history = list(zip(theirs, ours, strict=True))
    for number, (expected, actual) in enumerate(history):
        is_evaluation = any(name.startswith("eval_") for name in expected)
        expected = dict(expected)
        if is_evaluation:  # a sum over all batches, under the name that training uses
            del expected["kl"]
            assert actual["eval_kl"] >= 0
        elif "kl" in expected:
            expected["kl"] /= batches
        assert set(actual) - {"eval_kl"} == set(expected), f"names of log {number}"
        for name in expected:
            if "logits/" in name or any(part in name for part in NOT_COMPARED):
                continue  # their logits are sums over padding, and as large as the vocabulary
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (name, number)
    if kl_used:
        assert any(log.get("kl", 0) > 0 for log, _ in history), "the KL estimate is always 0"


def assert_equal_runs(theirs: Any, ours: Any, **how: Any) -> None:
    """Equal logs, see `assert_equal_logs`, and equal parameters."""
    assert_equal_logs(theirs.state.log_history, ours.state.log_history, **how)
    parameters = zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True)
    for (name, expected), actual in parameters:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=name)


RUNS = {
    "full": {},
    "lora": {"lora": True},
    "weights": {"finetuning": {"kto_chosen_weight": 1.7, "kto_rejected_weight": 0.6}},
    "beta": {"finetuning": {"pref_beta": 0.3}},
    "sft": {"finetuning": {"pref_ftx": 0.5}},
    "sft lora": {"lora": True, "finetuning": {"pref_ftx": 0.5, "kto_chosen_weight": 1.7}},
    "mixture of experts": {"family": "mixtral", "seeds": (2, 1)},
    "gemma 2": {"family": "gemma2", "lora": True},
    "in order": {"finetuning": {"disable_shuffling": True}},
    "qwen 3, with left-over rows": {"family": "qwen3", "per_device_train_batch_size": 5},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
def test_training_is_the_same(tmp_path: Path, run: dict[str, Any]) -> None:
    assert_equal_runs(*both(tmp_path, **run))


def test_accumulation_is_the_same(tmp_path: Path) -> None:
    run = {"gradient_accumulation_steps": 2, "finetuning": {"pref_ftx": 0.5}}
    assert_equal_runs(*both(tmp_path, **run), batches=2)


def test_batches_of_one_row_are_the_same(tmp_path: Path) -> None:
    run = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    assert_equal_runs(*both(tmp_path, **run, finetuning={"pref_ftx": 0.5}), batches=4)


def test_one_class_alone_is_the_same(tmp_path: Path) -> None:
    for label in (True, False):
        rows = kto_rows(label=label)
        run = {"train_rows": rows, "finetuning": {"pref_ftx": 0.5}}
        theirs, ours = both(tmp_path, **run)
        assert_equal_runs(theirs, ours)
        assert ("rewards/chosen" in ours.state.log_history[0]) == label


def test_evaluation_is_the_same(tmp_path: Path) -> None:
    """With a last batch of two rows, and `eval_kl` as the mean of the batches' estimates."""
    run = {"seeds": (2, 1), "eval_rows": kto_rows(10, seed=5), "finetuning": {"pref_ftx": 0.5}}
    theirs, ours = both(tmp_path, **run)
    assert_equal_runs(theirs, ours)
    expected, actual = theirs.evaluate(), ours.evaluate()
    assert expected["kl"] > 0
    assert actual["eval_kl"] == pytest.approx(expected["kl"] / 3, rel=1e-4)
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)


def test_a_log_averages_over_its_rows(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, logging_steps=4)
    assert_equal_runs(theirs, ours, batches=4)


def test_the_model_is_its_own_reference_in_evaluation_alone(tmp_path: Path) -> None:
    policy, _ = models("llama")
    trainers = [
        build(kind, tmp_path, policy, "policy", eval_rows=kto_rows(8))
        for kind in (Theirs, CustomKTOTrainer)
    ]
    expected, actual = (trainer.evaluate() for trainer in trainers)
    assert actual["eval_loss"] == pytest.approx(expected["eval_loss"]) == 0.5
    assert actual["eval_rewards/chosen"] == actual["eval_kl"] == 0
    with pytest.raises(ValueError, match="ref_model is model, so the reference would be trained"):
        trainers[1].train()


def test_equal_with_a_stream_for_a_model_with_a_table_of_positions(tmp_path: Path) -> None:
    """LLaMA-Factory has cut its rows, so no `max_length` has to say that they fit."""
    rows = kto_rows(16).to_iterable_dataset()
    assert_equal_runs(*both(tmp_path, family="gpt2", train_rows=rows))
