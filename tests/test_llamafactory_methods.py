"""LLaMA-Factory's methods: what they return, and that a subclass's own are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from llamafactory.train.kto.trainer import CustomKTOTrainer as Theirs
from torch import Tensor

from fastkto.integrations.llamafactory import CustomKTOTrainer
from tests.llamafactory_runs import build, collator, kto_rows, models
from tests.test_llamafactory import assert_equal_runs
from tests.test_pass_budget import RecordedMemory


class ByLogits(CustomKTOTrainer):
    options = {"head": "logits"}


class ByAPO(CustomKTOTrainer):
    options = {"loss_type": "apo_zero_unpaired"}


def trainer_and_batch(kind: Any, folder: Path, *, lora: bool = False, **run: Any) -> Any:
    policy, reference = models("llama", lora=lora)
    trainer = build(kind, folder, policy, reference, train_rows=kto_rows(8), **run)
    rows = [dict(trainer.train_dataset[index]) for index in range(5)]
    return trainer, collator()(rows)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [CustomKTOTrainer, ByLogits])
def test_the_methods_give_what_theirs_give(tmp_path: Path, kind: Any, lora: bool) -> None:
    run = {"lora": lora, "finetuning": {"pref_ftx": 0.5, "kto_chosen_weight": 1.7}}
    theirs, batch = trainer_and_batch(Theirs, tmp_path, **run)
    ours, _ = trainer_and_batch(kind, tmp_path, **run)
    for prefix in ("", "kl_"):
        expected = theirs.forward(theirs.model, batch, prefix)
        actual = ours.forward(ours.model, batch, prefix)
        scored = batch[f"{prefix}labels"][:, 1:] != -100
        if kind is ByLogits:
            real = batch[f"{prefix}attention_mask"].bool()
            torch.testing.assert_close(actual[0][real], expected[0][real], rtol=1e-4, atol=1e-4)
        else:
            sums = (expected[0][:, :-1].mean(-1) * scored).sum(-1)
            torch.testing.assert_close(actual[0], sums, rtol=1e-4, atol=1e-4)
        for one, other in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)
    for name in ("concatenated_forward", "compute_reference_log_probs"):
        expected = getattr(theirs, name)(theirs.model, batch)
        actual = getattr(ours, name)(ours.model, batch)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert one.shape == other.shape or one.ndim == 1  # logit sums in the place of logits
            if other.ndim == 1:
                torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-5)
    expected_loss, expected = theirs.get_batch_loss_metrics(theirs.model, batch)
    loss, actual = ours.get_batch_loss_metrics(ours.model, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert set(actual) - set(expected) == {"count/chosen_tokens", "count/rejected_tokens"}
    for name in expected:
        if "logits" not in name:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    expected_loss.backward()
    loss.backward()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [CustomKTOTrainer, ByAPO])
def test_training_follows_the_methods(tmp_path: Path, kind: Any) -> None:
    """Though it does not call them: the loss of the first step is that of the first batch."""
    fields = {"finetuning": {"disable_shuffling": True, "pref_ftx": 0.5}, "max_steps": 1}
    trainer, batch = trainer_and_batch(kind, tmp_path, per_device_train_batch_size=5, **fields)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["kl"] == pytest.approx(metrics["kl"], rel=1e-5)
    for name in ("rewards/chosen", "logps/rejected"):
        count = metrics[f"count/{name.split('/')[1]}"]
        assert log[name] == pytest.approx(metrics[f"{name}_sum"] / count, rel=1e-5)
    tokens = metrics["count/chosen_tokens"]
    assert log["logits/chosen"] == pytest.approx(metrics["logits/chosen_sum"] / tokens, abs=1e-5)


class _Doubled:
    """Overrides that LLaMA-Factory's users write, the same for both trainers."""

    def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
        loss, metrics = super().get_batch_loss_metrics(model, batch)  # type: ignore[misc]
        return 2 * loss, metrics


class _Scaled:
    def compute_reference_log_probs(self, model: Any, batch: Any) -> Any:
        scores = super().compute_reference_log_probs(model, batch)  # type: ignore[misc]
        return tuple(0.9 * score for score in scores)


class _ByLength:
    def forward(self, model: Any, batch: Any, prefix: Any = "") -> Any:
        logits, _, average = super().forward(model, batch, prefix)  # type: ignore[misc]
        return logits, 10 * average, average


class _Concatenated:
    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        chosen, rejected, *rest = super().concatenated_forward(model, batch)  # type: ignore[misc]
        return 0.5 * chosen, 0.5 * rejected, *rest


class _Loss:
    def kto_loss(self, *scores: Any) -> Any:
        losses, *rest = super().kto_loss(*scores)  # type: ignore[misc]
        return losses.square(), *rest


class _Penalised:
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert inputs["labels"].ndim == 2
        return super().compute_loss(model, inputs) + inputs["labels"].ge(0).sum()  # type: ignore


@pytest.mark.parametrize("change", [_Doubled, _Scaled, _ByLength, _Concatenated, _Loss, _Penalised])
def test_overrides_are_obeyed(tmp_path: Path, change: Any, caplog: Any) -> None:
    policy, reference = models("llama", seeds=(2, 1))
    # LLaMA-Factory does not ask compute_loss in evaluation; we do.
    eval_rows = None if change is _Penalised else kto_rows(10, seed=5)
    run = {"eval_rows": eval_rows, "finetuning": {"pref_ftx": 0.5}}
    trainers = []
    for own in (Theirs, CustomKTOTrainer):
        kind = type("Changed", (change, own), {})
        trainers.append(build(kind, tmp_path, policy, reference, **run))
        trainers[-1].train()
    theirs, ours = trainers
    assert_equal_runs(theirs, ours, kl_used=False)
    method = next(name for name in vars(change) if not name.startswith("_"))
    said = [one.message for one in caplog.records if f"overrides {method}" in one.message]
    assert len(said) == 1 and "one pass over all its rows" in said[0]
    assert "nothing was left to train" not in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"kl_scope": "window"},
        {"precompute_ref_log_probs": True},
        {"activation_offloading": True},
        {"router_aux_loss_coef": 0.1},
        {"nonfinite": "nanmean"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_overrides_do_not_see_to_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    kind = type("Changed", (_Doubled, CustomKTOTrainer), {"options": options})
    policy, reference = models("llama")
    message = f"{next(iter(options))} is .* overrides get_batch_loss_metrics, which score a batch"
    with pytest.raises(ValueError, match=message):
        build(kind, tmp_path, policy, reference)


def test_a_loss_of_an_override_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Broken(CustomKTOTrainer):
        def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
            loss, metrics = super().get_batch_loss_metrics(model, batch)
            return loss * float("nan"), metrics

    policy, reference = models("llama")
    trainer = build(Broken, tmp_path, policy, reference)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="of a batch of step 0 is not finite, by the meth"):
        trainer.train()
    assert all(map(torch.equal, trainer.model.parameters(), before))


def test_a_window_has_one_kl_estimate_and_the_same_sft_term(tmp_path: Path) -> None:
    class Window(CustomKTOTrainer):
        options = {"kl_scope": "window"}

    policy, reference = models("llama", seeds=(2, 1))
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    runs = []
    for kind, fields in ((Window, small), (CustomKTOTrainer, {})):
        # one class alone: LLaMA-Factory scales its SFT term by the classes of each batch
        rows = kto_rows(16, label=True)
        run = {"finetuning": {"pref_ftx": 0.5, "disable_shuffling": True}, "train_rows": rows}
        runs.append(build(kind, tmp_path, policy, reference, **run, **fields))
        runs[-1].train()
    for one, other in zip(*(run.state.log_history for run in runs), strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "logps/chosen"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_rows_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    policy, reference = models("llama")
    rows = kto_rows(8)
    bad = max(rows[3]["input_ids"])
    policy.get_input_embeddings().weight.data[bad] = torch.nan
    trainer = build(CustomKTOTrainer, tmp_path, policy, reference, train_rows=rows)
    with pytest.raises(FloatingPointError, match="these are positions in their batch, from 0"):
        trainer.train()


def test_log_probabilities_of_the_reference_can_be_kept(tmp_path: Path) -> None:
    """Also in random order, since the mismatched sequences are the rows' own."""

    class Kept(CustomKTOTrainer):
        options = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache")}

    policy, reference = models("llama", seeds=(2, 1))
    runs = [build(kind, tmp_path, policy, reference) for kind in (CustomKTOTrainer, Kept)]
    for run in runs:
        run.train()
    assert type(runs[1].reference.model).__name__ == "ReleasedReference"
    first, second = (
        [log["loss"] for log in run.state.log_history if "loss" in log] for run in runs
    )
    assert second == pytest.approx(first, rel=1e-5)


def test_a_budget_is_found_from_their_rows(tmp_path: Path) -> None:
    class Auto(CustomKTOTrainer):
        options = {"max_tokens_per_pass": "auto"}

        def _device_memory(self) -> Any:
            return RecordedMemory(1e9)

    policy, reference = models("llama", seeds=(2, 1))
    runs = [build(kind, tmp_path, policy, reference) for kind in (CustomKTOTrainer, Auto)]
    for run in runs:
        run.train()
    longest = sorted(len(row["input_ids"]) for row in kto_rows())[-4:]
    assert runs[1].step_settings.args.max_tokens_per_pass == sum(longest)
    first, second = ([log.get("grad_norm") for log in run.state.log_history] for run in runs)
    assert second[:-1] == pytest.approx(first[:-1], rel=1e-4)
