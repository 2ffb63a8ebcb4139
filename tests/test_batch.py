"""The collator against TRL's on TRL's own data set, its properties, and what a batch survives."""

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, send_to_device
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import KTOTrainer as TRLTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from fastkto.data.batch import KTOCollator, check_batch, pair_first_rows
from fastkto.data.rows import prepare_rows
from tests.models import tiny_model, tiny_tokenizer

MAX_LENGTH = 24
ROWS = 23


def dataset() -> Dataset:
    """Text rows of which some are dropped and some cut at MAX_LENGTH."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "prompt": f"{i}:" + "p" * rng.randint(0, 24),
                "completion": "".join(rng.choices("abc", k=rng.randint(1, 20))),
                "label": rng.random() < 0.5,
            }
            for i in range(ROWS)
        ]
    )


def prepared() -> Dataset:
    return prepare_rows(dataset(), tiny_tokenizer(), max_length=MAX_LENGTH)[0]


def trl_batches(batch_size: int) -> list[dict[str, torch.Tensor]]:
    """TRL's own batches of `dataset()`: its preparation, its collator, sequential order."""
    tokenizer = tiny_tokenizer()
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=MAX_LENGTH, per_device_train_batch_size=batch_size
    )
    rows = TRLTrainer._prepare_dataset(trainer, dataset(), tokenizer, args, "train")
    collator = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=MAX_LENGTH)
    return list(DataLoader(rows, batch_size=batch_size, collate_fn=collator))


def trl_sequences(batch: dict[str, torch.Tensor], prefix: str) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row of TRL's padded batch."""
    sequences = []
    for ids, real, scored in zip(
        batch[f"{prefix}input_ids"],
        batch[f"{prefix}attention_mask"].bool(),
        batch[f"{prefix}completion_mask"].bool(),
        strict=True,
    ):
        sequences.append((ids[real & ~scored].tolist(), ids[scored].tolist()))
    return sequences


def sequences(batch: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Prompt and completion of each row's matched and mismatched sequence."""
    lengths = zip(batch["prompt_lengths"], batch["completion_lengths"], strict=True)
    pieces = iter(batch["input_ids"].split([n for pair in lengths for n in pair]))
    matched = [(prompt.tolist(), next(pieces).tolist()) for prompt in pieces]
    if "kl_completion_ids" not in batch:
        return matched, []
    paired = batch["kl_completion_ids"].split(batch["kl_completion_lengths"])
    return matched, [(p, ids.tolist()) for (p, _), ids in zip(matched, paired, strict=True)]


@pytest.mark.parametrize("batch_size", [2, 3, 4, 7, 64])
def test_full_batches_and_their_pairs_are_those_of_trl(batch_size: int) -> None:
    loader = DataLoader(
        prepared(), batch_size=batch_size, collate_fn=KTOCollator(MAX_LENGTH), shuffle=False
    )
    ours, theirs = list(loader), trl_batches(batch_size)
    assert len(ours) == len(theirs)
    compared = 0
    for own, other in zip(ours, theirs, strict=True):
        matched, mismatched = sequences(own)
        assert matched == trl_sequences(other, "")
        assert torch.equal(own["label"], other["label"])
        if len(own["rows"]) > 1:  # TRL pairs a lone row with itself
            assert mismatched == trl_sequences(other, "KL_")
            compared += len(mismatched)
    assert compared >= ROWS - 8  # some rows are dropped


def test_some_sequences_of_the_comparison_are_cut() -> None:
    batch = KTOCollator(MAX_LENGTH)(list(prepared()))
    matched, mismatched = sequences(batch)
    for some in (matched, mismatched):
        lengths = [len(prompt) + len(completion) for prompt, completion in some]
        assert 2 < lengths.count(MAX_LENGTH) < len(lengths) - 2
    assert len(matched) < ROWS


TOKENS = st.lists(st.integers(0, 9), max_size=12)
TOKEN_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": TOKENS,
            "completion_ids": TOKENS.filter(bool),
            "label": st.booleans(),
            "row": st.integers(0, 99),
        }
    ),
    min_size=1,
    max_size=6,
)


@given(TOKEN_ROWS)
def test_uncut_pairs_are_the_batchs_completions_each_with_another_row(
    rows: list[dict[str, Any]],
) -> None:
    batch = KTOCollator(None)(rows)
    _, mismatched = sequences(batch)
    completions = [row["completion_ids"] for row in rows]
    paired = [completion for _, completion in mismatched]
    if len(rows) == 1:
        assert paired == [[]]
        return
    assert Counter(map(tuple, paired)) == Counter(map(tuple, completions))
    for i in range(len(rows)):
        assert paired[i] == completions[i - 1]


@given(TOKEN_ROWS, st.integers(13, 25), st.booleans())
def test_nothing_exceeds_max_length_and_every_row_keeps_a_completion(
    rows: list[dict[str, Any]], max_length: int, needs_kl: bool
) -> None:
    batch = KTOCollator(max_length, needs_kl=needs_kl)(rows)
    check_batch(batch, needs_kl=needs_kl)
    matched, mismatched = sequences(batch)
    for row, (prompt, completion) in zip(rows, matched, strict=True):
        assert prompt + completion == (row["prompt_ids"] + row["completion_ids"])[:max_length]
        assert prompt == row["prompt_ids"] and completion
    for i, (prompt, completion) in enumerate(mismatched):
        wanted = (prompt + rows[i - 1]["completion_ids"])[:max_length] if len(rows) > 1 else prompt
        assert prompt + completion == wanted
    assert batch["label"].tolist() == [row["label"] for row in rows]
    assert batch["rows"] == [row["row"] for row in rows]
    assert ("kl_completion_ids" in batch) is needs_kl
    assert any(batch["kl_completion_lengths"]) is (needs_kl and len(rows) > 1)


def test_a_lone_row_has_no_partner() -> None:
    batch = KTOCollator(9)([{"prompt_ids": [1], "completion_ids": [2], "label": True, "row": 5}])
    assert batch["kl_completion_lengths"] == [0]
    assert batch["kl_completion_ids"].shape == (0,)
    assert batch["kl_completion_ids"].dtype == torch.int64
    check_batch(batch)


def test_the_key_order_and_types_of_a_batch() -> None:
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:3])
    assert type(batch) is dict
    assert list(batch)[:2] == ["label", "input_ids"]
    assert batch["label"].dtype == torch.bool
    assert batch["input_ids"].dtype == batch["kl_completion_ids"].dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_survives_accelerate_and_workers(num_workers: int) -> None:
    collator, rows = KTOCollator(MAX_LENGTH), prepared()
    loader = DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=num_workers)
    batches = list(Accelerator(cpu=True).prepare_data_loader(loader))
    wanted = [
        collator([rows[i] for i in range(k, min(k + 4, len(rows)))]) for k in range(0, len(rows), 4)
    ]
    assert len(batches) == len(wanted)
    for batch, other in zip(batches, wanted, strict=True):
        assert_equal(batch, other)
        assert find_batch_size(batch) == len(batch["rows"])
        check_batch(batch)


def assert_equal(batch: dict[str, Any], other: dict[str, Any]) -> None:
    """Same keys in the same order, same types, same values."""
    assert list(batch) == list(other)
    for key, value in other.items():
        assert type(batch[key]) is type(value)
        same = torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value
        assert same, key


def test_lists_stay_lists_when_a_batch_moves_to_another_device() -> None:
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:4])
    moved = send_to_device(batch, "meta", non_blocking=True)
    assert moved["input_ids"].device.type == moved["label"].device.type == "meta"
    for key in ("rows", "prompt_lengths", "completion_lengths", "kl_completion_lengths"):
        assert moved[key] == batch[key]


def test_a_batch_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are pinned, lists of integers pass: the walk is torch's, memory needs no GPU here."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:4])
    assert_equal(torch.utils.data._utils.pin_memory.pin_memory(batch), batch)


def test_a_batch_survives_the_trainers_own_loader_and_token_count(tmp_path: Any) -> None:
    """`Trainer.train` places the batches by `_prepare_inputs` and counts every token."""
    seen: list[dict[str, Any]] = []

    class Watcher(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            seen.append(inputs)
            return sum(p.sum() for p in model.parameters()) * 0.0

    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        remove_unused_columns=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        train_sampling_strategy="sequential",
        dataloader_pin_memory=True,
        save_strategy="no",
    )
    rows = prepared()
    collator = KTOCollator(MAX_LENGTH)
    trainer = Watcher(tiny_model("llama"), args, collator, train_dataset=rows)
    trainer.train()
    assert_equal(seen[0], collator([rows[i] for i in range(4)]))
    assert [number for batch in seen for number in batch["rows"]] == rows["row"][:]
    assert trainer.state.num_input_tokens_seen == sum(rows["length"])


def good() -> dict[str, Any]:
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": True, "row": i} for i in (0, 1)]
    return KTOCollator(9)(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None, "prompt_lengths": None}, "batch has no rows, prompt_lengths; it has label"),
        ({"kl_completion_ids": None}, "the batch has no kl_completion_ids; .*KTOCollator"),
        ({"input_ids": torch.ones(2, 3).long()}, r"input_ids is a tensor of torch.int64 and shape"),
        ({"input_ids": [1, 2]}, "input_ids is a list, expected one row of torch.int64"),
        ({"label": torch.tensor([1, 0])}, "label is a tensor of torch.int64.*row of torch.bool"),
        ({"rows": torch.tensor([0, 1])}, "rows is a tensor of .*expected a list of int"),
        ({"rows": ["0", "1"]}, "rows is a list, expected a list of int"),
        ({"completion_lengths": [2]}, "completion_lengths has 1 entries for 2 labels"),
        ({"prompt_lengths": [1, 2]}, "input_ids has 6 tokens, but prompt_lengths and .* up to 7"),
        ({"kl_completion_lengths": [2, 0]}, "kl_completion_ids has 4 tokens, but .* up to 2"),
    ],
)
def test_a_foreign_batch_is_named_and_refused(changes: dict[str, Any], message: str) -> None:
    batch = good() | changes
    batch = {key: value for key, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_batch(batch)


def test_a_batch_without_pairs_is_fine_where_none_are_needed() -> None:
    batch = good()
    del batch["kl_completion_ids"], batch["kl_completion_lengths"]
    check_batch(batch, needs_kl=False)
    with pytest.raises(TypeError, match="the batch is a list, expected a dict; use fastkto"):
        check_batch([1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "completion": "c"},
            "a row has no prompt_ids, completion_ids, label, row;",
        ),
        (
            {"prompt_ids": [1] * 9, "completion_ids": [1], "label": True, "row": 7},
            "row 7 has 9 prompt and 1 completion tokens, .* max_length=9; prepare the data set",
        ),
        (
            {"prompt_ids": [1], "completion_ids": [], "label": True, "row": 7},
            "row 7 has 1 prompt and 0 completion tokens",
        ),
    ],
)
def test_rows_that_were_not_prepared_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTOCollator(9)([row])


def test_a_max_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 0; it must be 1 or more, or None"):
        KTOCollator(0)


@pytest.mark.parametrize("count", range(5))
def test_first_rows_are_paired_as_if_there_were_no_others(count: int) -> None:
    rows = list(prepare_rows(dataset(), tiny_tokenizer(), max_length=None)[0].select(range(4)))
    collate = KTOCollator(max_length=None)
    batch = pair_first_rows(collate(rows), count, None)
    check_batch(batch)
    if count > 0:
        alone = collate(rows[:count])
        lengths = alone["kl_completion_lengths"]
        assert batch["kl_completion_lengths"][:count] == lengths
        paired = batch["kl_completion_ids"][: sum(lengths)]
        assert paired.tolist() == alone["kl_completion_ids"].tolist()
    assert batch["input_ids"].tolist() == collate(rows)["input_ids"].tolist()


def test_first_rows_stay_within_max_length() -> None:
    rows = [
        {"prompt_ids": [1] * 9, "completion_ids": [2], "label": True, "row": 0},
        {"prompt_ids": [1], "completion_ids": [3] * 20, "label": True, "row": 1},
        {"prompt_ids": [1], "completion_ids": [4], "label": True, "row": 2},
    ]
    batch = pair_first_rows(KTOCollator(max_length=12)(rows), 2, 12)
    assert batch["kl_completion_lengths"][0] == 3
    assert batch["kl_completion_ids"][:3].tolist() == [3, 3, 3]
