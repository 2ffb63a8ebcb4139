"""Padded batches of other libraries hold the same sequences once they are ragged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import KTOCollator, check_batch, given_mismatched, matched_sequences
from fastkto.data.padded import RaggedCollator, from_padded, is_padded
from tests.models import tiny_model, tiny_tokenizer
from tests.test_batch import MAX_LENGTH, trl_batches, trl_sequences
from tests.trl_runs import text_rows


def as_lists(sequences: Any) -> list[tuple[list[int], list[int]]]:
    return [(one.prompt.tolist(), one.completion.tolist()) for one in sequences]


def llama_factory(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's batch in LLaMA-Factory's layout."""
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
        "kl_input_ids": batch["KL_input_ids"],
        "kl_attention_mask": batch["KL_attention_mask"],
        "kl_labels": batch["KL_input_ids"].masked_fill(batch["KL_completion_mask"] == 0, -100),
        "kto_tags": batch["label"],
    }


@pytest.mark.parametrize("layout", [dict, llama_factory])
def test_the_sequences_are_the_same(layout: Any) -> None:
    for batch in trl_batches(4):
        padded = layout(batch)
        assert is_padded(padded)
        ragged = from_padded(padded)
        assert not is_padded(ragged)
        check_batch(ragged, MAX_LENGTH)
        assert ragged["label"].equal(batch["label"])
        matched = as_lists(matched_sequences(ragged, MAX_LENGTH))
        assert matched == trl_sequences(batch, "")
        given = given_mismatched(ragged, MAX_LENGTH)
        assert given is not None and as_lists(given) == trl_sequences(batch, "KL_")


def test_left_padding_and_known_scores() -> None:
    batch = trl_batches(4)[0]
    padding = {prefix: (batch[f"{prefix}attention_mask"] == 0).sum(1) for prefix in ("", "KL_")}
    left = {
        key: torch.stack(
            [
                row.roll(int(shift))
                for row, shift in zip(
                    value, padding["KL_" if key.startswith("KL_") else ""], strict=True
                )
            ]
        )
        for key, value in batch.items()
        if value.ndim == 2
    }
    assert not left["input_ids"].equal(batch["input_ids"])
    scores = {
        "ref_logps": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        "ref_KL_logps": torch.tensor([-5.0, -6.0, -7.0, -8.0]),
    }
    ragged = from_padded({**left, **scores, "label": batch["label"]})
    assert as_lists(matched_sequences(ragged, MAX_LENGTH)) == trl_sequences(batch, "")
    assert ragged["reference_logprob"].tolist() == [-1, -2, -3, -4]
    assert ragged["kl_reference_logprob"].tolist() == [-5, -6, -7, -8]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 0, 0], "row 7 has no token marked in completion_mask.*give it the max_length of"),
        ([0, 1, 0], "row 7 has tokens that are not at its end marked in completion_mask"),
    ],
)
def test_completions_that_cannot_be_scored_name_the_row(mask: list[int], message: str) -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "completion_mask": torch.tensor([mask]),
        "label": torch.tensor([True]),
    }
    with pytest.raises(ValueError, match=message):
        from_padded(batch, [7])


def test_known_scores_of_unknown_pairs_are_refused() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1, 1]]),
        "label": torch.tensor([True]),
        "ref_logps": torch.tensor([-1.0]),
        "ref_KL_logps": torch.tensor([-1.0]),
    }
    with pytest.raises(ValueError, match="the batch has ref_KL_logps without KL_input_ids"):
        from_padded(batch)


def run(folder: Path, config: dict[str, Any] | None = None, **arguments: Any) -> KTOTrainer:
    fields = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1}
    fields |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    fields |= {"learning_rate": 0.05, "optim": "sgd", "max_length": MAX_LENGTH}
    return KTOTrainer(
        model=tiny_model("llama", seed=1),
        args=KTOConfig(str(folder), **fields | (config or {})),
        train_dataset=text_rows(8),
        processing_class=tiny_tokenizer(),
        **arguments,
    )


class Rotated(DataCollatorForUnpairedPreference):
    """TRL's collator on rows that its own data set preparation would have paired."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        completions = [example["completion_ids"] for example in examples]
        rotated = zip(examples, completions[-1:] + completions[:-1], strict=True)
        paired = [example | {"KL_completion_ids": other} for example, other in rotated]
        return super().torch_call(paired)


def test_trls_collator_trains_the_same_way(tmp_path: Path) -> None:
    ours = run(tmp_path / "ours")
    theirs = run(tmp_path / "theirs", data_collator=Rotated(0, max_length=MAX_LENGTH))
    assert isinstance(theirs.data_collator, RaggedCollator)
    for trainer in (ours, theirs):
        trainer.train()
    for one, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for key in ("loss", "grad_norm", "kl", "rewards/margins"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-6)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_rows_are_as_long_as_a_collator_of_ones_own_may_leave_them(tmp_path: Path) -> None:
    """By which max_tokens_per_pass="auto" and checkpoint_passes="auto" plan."""
    ours = run(tmp_path, {"max_length": 40})
    theirs = run(tmp_path, {"max_length": 40}, data_collator=DataCollatorForUnpairedPreference(0))
    cut, uncut = (trainer._row_lengths(trainer.train_dataset) for trainer in (ours, theirs))
    assert max(cut) == 40 < max(uncut)
    batch = theirs.data_collator([theirs.train_dataset[index] for index in range(len(uncut))])
    assert [one.length for one in matched_sequences(batch, 40)] == uncut
    for collator in (KTOCollator(40), DataCollatorForUnpairedPreference(0, max_length=40)):
        own = run(tmp_path, {"max_length": 40}, data_collator=collator)
        assert own._row_lengths(own.train_dataset) == cut


def test_a_collator_may_take_its_rows_apart(tmp_path: Path) -> None:
    def taken(rows: list[dict[str, Any]]) -> dict[str, Any]:
        columns = ("prompt_ids", "completion_ids", "label", "row")
        return KTOCollator(None)([{key: row.pop(key) for key in columns} for row in rows])

    trainer = run(tmp_path, data_collator=taken)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_a_function_around_our_collator_changes_no_pair(strategy: str, tmp_path: Path) -> None:
    """The data set has pairs for padded batches; those of ragged ones are formed in the batch."""
    logs = []
    for collator in (None, lambda rows: KTOCollator(MAX_LENGTH)(rows)):
        trainer = run(tmp_path, {"train_sampling_strategy": strategy}, data_collator=collator)
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            assert one[key] == other[key], key


def test_a_batch_of_lists_is_refused(tmp_path: Path) -> None:
    def lists(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = KTOCollator(None)(rows)
        return batch | {"input_ids": batch["input_ids"].tolist()}

    with pytest.raises(ValueError, match="input_ids is a list, expected one row of torch.int64"):
        run(tmp_path, data_collator=lists).train()


def test_known_scores_need_no_reference(tmp_path: Path) -> None:
    """Given log-probabilities count, and the reference is not asked."""
    trainer = run(tmp_path)
    assert trainer.reference.model is not None
    rows = [trainer.train_dataset[index] for index in range(4)]
    padded = Rotated(0, max_length=MAX_LENGTH)(rows)
    first = trainer._prepare_inputs(padded)
    (loss,) = trainer._score([first])
    known = {"ref_logps": loss.reference_logprob, "ref_KL_logps": loss.reference_logprob}
    calls: list[Any] = []
    trainer.reference.model.register_forward_hook(lambda *_: calls.append(1))
    (given,) = trainer._score([trainer._prepare_inputs({**padded, **known})])
    assert not calls
    assert given.reference_logprob.equal(loss.reference_logprob)
    assert given.kl is not None and loss.kl is not None and not given.kl.equal(loss.kl)
