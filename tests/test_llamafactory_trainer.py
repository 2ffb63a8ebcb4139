"""LLaMA-Factory's trainer class without LLaMA-Factory, beside our own trainer on the same rows."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.rows import prepare_rows
from fastkto.integrations.llamafactory import CustomKTOTrainer
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

BETA, MAX_LENGTH = 0.3, 64
FIELDS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "optim": "sgd",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """LLaMA-Factory's batch of prepared rows, each with the completion of the row before."""
    batch: dict[str, Any] = {"kto_tags": torch.tensor([row["label"] for row in rows])}
    for prefix, shift in (("", 0), ("kl_", 1)):
        prompts = [row["prompt_ids"] for row in rows]
        answers = [rows[index - shift]["completion_ids"] for index in range(len(rows))]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        marks = [
            [-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)
        ]
        longest = max(map(len, whole))
        for key, sequences, filler in (
            ("input_ids", whole, 0),
            ("attention_mask", [[1] * len(ids) for ids in whole], 0),
            ("labels", marks, -100),
        ):
            filled = [ids + [filler] * (longest - len(ids)) for ids in sequences]
            batch[f"{prefix}{key}"] = torch.tensor(filled)
    return batch


def rows() -> Any:
    prepared, _ = prepare_rows(text_rows(8, seed=4), tiny_tokenizer(), max_length=MAX_LENGTH)
    return prepared


def build(
    folder: Path,
    kind: Any = CustomKTOTrainer,
    *,
    model: Any = None,
    reference: Any = 2,
    ftx: float = 0.0,
    collator: Any = padded,
    train_rows: Any = None,
    **own: Any,
) -> Any:
    """A trainer of `kind`; `reference` is a seed, "model" or a model."""
    model = tiny_model("llama", seed=1) if model is None else model
    if reference == "model":
        reference = model
    elif isinstance(reference, int):
        reference = tiny_model("llama", seed=reference)
    optimizers = ("galore", "apollo", "badam", "adam_mini", "muon")
    finetuning_args = SimpleNamespace(
        **{f"use_{name}": False for name in optimizers},
        loraplus_lr_ratio=None,
        pref_beta=BETA,
        pref_ftx=ftx,
        kto_chosen_weight=2.0,
        kto_rejected_weight=0.5,
        disable_shuffling=True,
    )
    return kind(
        model,
        reference,
        finetuning_args,
        None,
        args=Seq2SeqTrainingArguments(str(folder), **{**FIELDS, **own}),
        data_collator=collator,
        train_dataset=rows() if train_rows is None else train_rows,
        eval_dataset=rows() if train_rows is None else train_rows,
        tokenizer=tiny_tokenizer(),
    )


def test_it_trains_as_our_own_trainer(tmp_path: Path) -> None:
    config = {"beta": BETA, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    ours = KTOTrainer(
        tiny_model("llama", seed=1),
        tiny_model("llama", seed=2),
        KTOConfig(str(tmp_path), gradient_checkpointing=False, **config, **FIELDS),
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=tiny_tokenizer(),
    )
    theirs = build(tmp_path)
    for trainer in (ours, theirs):
        trainer.train()
    for one, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        names = [name for name in other if "runtime" not in name and "per_second" not in name]
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    expected, actual = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_kl"):  # of equally many rows in each batch
        assert actual[name] == pytest.approx(expected[name], rel=1e-5)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_the_sft_term_is_that_of_the_formula(tmp_path: Path, size: int) -> None:
    """The mean over desirable rows of the mean loss of their tokens, times all rows over those."""
    ftx, fields = 0.5, {"per_device_train_batch_size": size, "max_steps": 1}
    losses = []
    for weight in (0.0, ftx):
        trainer = build(tmp_path, ftx=weight, **fields)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    first = padded([dict(row) for row in rows()][:size])
    labels, tags = first["labels"][:, 1:], first["kto_tags"]
    model = tiny_model("llama", seed=1).double()
    logits = model(first["input_ids"], attention_mask=first["attention_mask"]).logits
    logprob = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    scored = labels != -100
    mean = (logprob * scored).sum(-1) / scored.sum(-1)
    count = int(tags.sum())
    term = -mean[tags].mean() / count * size if count else torch.zeros(())
    assert losses[1] - losses[0] == pytest.approx(ftx * term.item(), rel=1e-4)


def test_a_subclass_is_obeyed_and_said_once(tmp_path: Path, caplog: Any) -> None:
    seen: list[Any] = []

    class Own(CustomKTOTrainer):
        def get_batch_loss_metrics(self, model: Any, batch: Any) -> Any:
            seen.append(batch["input_ids"].shape)
            loss, metrics = super().get_batch_loss_metrics(model, batch)
            return 3 * loss, metrics | {"own": 7.0}

    plain, own = build(tmp_path), build(tmp_path, Own)
    for trainer in (plain, own):
        trainer.train()
    for one, other in zip(plain.state.log_history[:1], own.state.log_history, strict=False):
        assert other["loss"] == pytest.approx(3 * one["loss"], rel=1e-4)
        assert other["own"] == 7.0
        for name in ("kl", "rewards/margins", "logps/chosen", "logits/rejected"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert len(seen) == 2 and all(len(shape) == 2 and shape[0] == 4 for shape in seen)
    said = [one.message for one in caplog.records if "overrides" in one.message]
    assert len(said) == 1 and "Own overrides get_batch_loss_metrics" in said[0]


def test_a_loader_of_ragged_batches_is_explained(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="the batch has no attention_mask, labels; it has label"):
        trainer.get_batch_loss_metrics(trainer.model, batch)


def test_mistakes_are_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, reference="model")
    assert trainer.evaluate()["eval_kl"] == 0
    with pytest.raises(ValueError, match="ref_model is model, so the reference would be trained"):
        trainer.train()
    with pytest.raises(ValueError, match="data_collator is None; pass LLaMA-Factory's"):
        CustomKTOTrainer(trainer.model, None, trainer.finetuning_args, None)


@pytest.mark.skipif(find_spec("llamafactory") is not None, reason="LLaMA-Factory is installed")
def test_an_optimizer_of_a_library_that_is_not_there_is_refused(tmp_path: Path) -> None:
    class Asking(CustomKTOTrainer):
        def __init__(self, model: Any, ref: Any, finetuning_args: Any, *rest: Any, **kw: Any):
            finetuning_args.use_muon = True
            super().__init__(model, ref, finetuning_args, *rest, **kw)

    with pytest.raises(ValueError, match="use_muon, an optimizer of LLaMA-Factory's, which is not"):
        build(tmp_path, Asking)
