"""The collator and its pairs against TRL's on TRL's own data set, and what a batch survives."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
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

from fastkto import KTOConfig
from fastkto.data.batch import (
    KTOCollator,
    check_batch,
    check_given_mismatched,
    given_mismatched,
    matched_sequences,
    mismatched_sequences,
    prompt_key,
    split_rows,
)
from fastkto.data.pairing import MISMATCHED_COLUMN
from fastkto.data.prepare import needs_pairs, prepare_data
from fastkto.data.rows import prepare_rows
from fastkto.window import pair_window
from tests.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
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


def sequences(
    batch: dict[str, Any], max_length: int | None = MAX_LENGTH
) -> tuple[list[Any], list[Any]]:
    """Prompt and completion of each row's matched and mismatched sequence, paired as TRL does."""
    window = pair_window(
        [batch], kl_scope="batch", kl_pairing="rotate", accelerator=Accelerator(cpu=True)
    )
    partners = window.batches[0].partners
    formed = (
        matched_sequences(batch, max_length),
        mismatched_sequences(batch, partners, max_length),
    )
    matched, mismatched = (
        [one and (one.prompt.tolist(), one.completion.tolist()) for one in some] for some in formed
    )
    return matched, mismatched


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


@pytest.mark.parametrize("batch_size", [2, 4, 21])
def test_pairs_of_the_data_set_are_those_of_trl_in_any_order_and_batch(
    batch_size: int, tmp_path: Path
) -> None:
    args = KTOConfig(
        output_dir=str(tmp_path),
        kl_pairing="dataset",
        max_length=MAX_LENGTH,
        per_device_train_batch_size=batch_size,
    )
    rows, _ = prepare_data(dataset(), "train", tiny_tokenizer(), args, pairs_rows=True)
    theirs = {}
    for batch in trl_batches(batch_size):
        own, other = trl_sequences(batch, ""), trl_sequences(batch, "KL_")
        theirs |= {str(one): mismatched for one, mismatched in zip(own, other, strict=True)}
    assert len(theirs) == len(rows) > 2 * 9
    loader = DataLoader(rows.shuffle(seed=1), batch_size=3, collate_fn=KTOCollator(MAX_LENGTH))
    for batch in loader:
        given_ones = given_mismatched(batch, MAX_LENGTH)
        for matched, mismatched in zip(sequences(batch)[0], given_ones, strict=True):
            assert theirs[str(matched)] == (
                mismatched.prompt.tolist(), mismatched.completion.tolist()
            )  # fmt: skip


def test_pairs_of_the_data_set_keep_their_end_if_rows_do(tmp_path: Path) -> None:
    args = KTOConfig(
        output_dir=str(tmp_path),
        kl_pairing="dataset",
        max_length=MAX_LENGTH,
        truncation_mode="keep_end",
        per_device_train_batch_size=ROWS,
    )
    rows, _ = prepare_data(dataset(), "train", tiny_tokenizer(), args, pairs_rows=True)
    batch = KTOCollator(MAX_LENGTH, "keep_end")(list(rows))
    expected = sequences(batch)[1]
    given_ones = given_mismatched(batch, MAX_LENGTH)
    assert [(one.prompt.tolist(), one.completion.tolist()) for one in given_ones] == expected


def test_pairs_of_the_data_set_are_left_out_of_a_run_that_does_not_ask_for_them(
    tmp_path: Path,
) -> None:
    args = KTOConfig(output_dir=str(tmp_path))
    for data in (dataset(), dataset().to_iterable_dataset()):
        paired, _ = prepare_data(data, "train", tiny_tokenizer(), args, pairs_rows=True)
        assert MISMATCHED_COLUMN in next(iter(paired))
        rows, _ = prepare_data(paired, "train", tiny_tokenizer(), args)
        assert MISMATCHED_COLUMN not in next(iter(rows))


def test_scores_of_other_pairs_are_refused(tmp_path: Path) -> None:
    args = KTOConfig(output_dir=str(tmp_path))
    rows = prepared().add_column("ref_KL_logps", [-1.0] * len(prepared()))
    with pytest.raises(ValueError, match="the train data has ref_KL_logps, which are of other"):
        prepare_data(rows, "train", tiny_tokenizer(), args, pairs_rows=True)


def test_whether_rows_are_paired_before_there_are_batches(tmp_path: Path) -> None:
    trls = DataCollatorForUnpairedPreference(pad_token_id=0)

    def asked(collator: Any, **fields: Any) -> bool:
        return needs_pairs(KTOConfig(output_dir=str(tmp_path), **fields), collator)

    assert asked(None, kl_pairing="dataset") and asked(trls) and asked(trls, kl_pairing="dataset")
    assert not asked(None) and not asked(KTOCollator(None)) and not asked(trls, kl_scope="window")
    assert asked(lambda rows: trls(rows)) and not asked(trls, kl_pairing="distinct")
    assert not asked(trls, kl_pairing="dataset", loss_type="apo_zero_unpaired")


def test_pairs_of_the_data_set_are_formed_of_rows_with_a_format(tmp_path: Path) -> None:
    args = KTOConfig(output_dir=str(tmp_path), kl_pairing="dataset", max_length=MAX_LENGTH)
    expected, _ = prepare_data(prepared(), "train", tiny_tokenizer(), args, pairs_rows=True)
    for name in ("numpy", "torch", "arrow"):
        rows, _ = prepare_data(
            prepared().with_format(name), "train", tiny_tokenizer(), args, pairs_rows=True
        )
        assert list(rows) == list(expected)


def test_pairs_of_the_data_set_have_to_be_in_a_batch() -> None:
    with pytest.raises(ValueError, match="a batch of the data_collator has no kl_input_ids; use"):
        check_given_mismatched(KTOCollator(MAX_LENGTH)(list(prepared())))


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
    _, mismatched = sequences(batch, None)
    completions = [row["completion_ids"] for row in rows]
    if len(rows) == 1:
        assert mismatched == [None]
        return
    paired = [completion for _, completion in mismatched]
    assert Counter(map(tuple, paired)) == Counter(map(tuple, completions))
    for i in range(len(rows)):
        assert paired[i] == completions[i - 1]


@given(TOKEN_ROWS, st.integers(13, 25))
def test_nothing_exceeds_max_length_and_every_row_keeps_a_completion(
    rows: list[dict[str, Any]], max_length: int
) -> None:
    batch = KTOCollator(max_length)(rows)
    check_batch(batch, max_length)
    matched, mismatched = sequences(batch, max_length)
    for row, (prompt, completion) in zip(rows, matched, strict=True):
        assert prompt + completion == (row["prompt_ids"] + row["completion_ids"])[:max_length]
        assert prompt == row["prompt_ids"] and completion
    if len(rows) > 1:
        for i, (prompt, completion) in enumerate(mismatched):
            wanted = rows[i]["prompt_ids"] + rows[i - 1]["completion_ids"]
            assert prompt + completion == wanted[:max_length]
    assert batch["label"].tolist() == [row["label"] for row in rows]
    assert batch["rows"] == [row["row"] for row in rows]


@given(TOKEN_ROWS, st.integers(1, 6))
def test_a_batch_holds_completions_to_max_length_whatever_their_prompts(
    rows: list[dict[str, Any]], longest: int
) -> None:
    rows = [row | {"prompt_ids": row["prompt_ids"][: longest - 1]} for row in rows]
    batch = KTOCollator(longest)(rows)
    split = [(prompt.tolist(), completion.tolist()) for prompt, completion in split_rows(batch)]
    assert split == [(row["prompt_ids"], row["completion_ids"][:longest]) for row in rows]


def test_sequences_are_views_of_the_batch() -> None:
    """So they cost no memory, and forming them does not wait for a device."""
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:4])
    partners = [completion for _, completion in split_rows(batch)]
    for one in (
        *matched_sequences(batch, MAX_LENGTH),
        *mismatched_sequences(batch, partners, MAX_LENGTH),
    ):
        assert one is not None and one.length == len(one.prompt) + len(one.completion)
        storage = batch["input_ids"].untyped_storage().data_ptr()
        for part in (one.prompt, one.completion):
            assert part.untyped_storage().data_ptr() == storage


@given(TOKENS, TOKENS)
def test_prompts_have_the_same_key_only_if_they_are_the_same(
    prompt: list[int], other: list[int]
) -> None:
    assert (prompt_key(prompt) == prompt_key(other)) == (prompt == other)
    assert 0 <= prompt_key(prompt) < 2**63


def test_prompt_keys_are_the_same_in_every_process() -> None:
    code = (
        "from fastkto.data.batch import prompt_key; print(prompt_key([]), prompt_key([3, 70000]))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert [int(key) for key in printed.split()] == [prompt_key([]), prompt_key([3, 70000])]


def test_the_key_order_and_types_of_a_batch() -> None:
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:3])
    assert type(batch) is dict
    assert list(batch)[:2] == ["label", "input_ids"]
    assert batch["label"].dtype == torch.bool
    assert batch["input_ids"].dtype == torch.int64


def test_a_batch_without_prompt_tokens_has_the_same_types() -> None:
    batch = KTOCollator(9)([{"prompt_ids": [], "completion_ids": [2], "label": True, "row": 5}])
    assert batch["input_ids"].tolist() == [2] and batch["input_ids"].dtype == torch.int64
    check_batch(batch, 9)


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
        check_batch(batch, MAX_LENGTH)


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
    for key in ("rows", "prompt_lengths", "completion_lengths", "prompt_keys"):
        assert moved[key] == batch[key]


def test_a_batch_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are pinned, lists of integers pass: the walk is torch's, memory needs no GPU here."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    batch = KTOCollator(MAX_LENGTH)(list(prepared())[:4])
    assert_equal(torch.utils.data._utils.pin_memory.pin_memory(batch), batch)


def test_a_batch_survives_the_trainers_own_loader(tmp_path: Any) -> None:
    """`Trainer.train` places the batches by `_prepare_inputs`."""
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


def good() -> dict[str, Any]:
    rows = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": True, "row": i} for i in (0, 1)]
    return KTOCollator(9)(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None, "prompt_lengths": None}, "batch has no rows, prompt_lengths; it has label"),
        ({"prompt_keys": None}, "the batch has no prompt_keys; it has label, .*KTOCollator"),
        ({"input_ids": torch.ones(1, 6).long()}, r"input_ids is a tensor of torch.int64 and shape"),
        ({"input_ids": [1]}, "input_ids is a list, expected one row of torch.int64"),
        ({"input_ids": torch.ones(6)}, "input_ids is a tensor of torch.float32 and"),
        ({"label": torch.tensor([1, 0])}, "label is a tensor of torch.int64.*row of torch.bool"),
        ({"rows": torch.tensor([0, 1])}, "rows is a tensor of .*expected a list of int"),
        ({"prompt_keys": torch.tensor([0, 1])}, "prompt_keys is a tensor of .*expected a list of"),
        ({"rows": ["0", "1"]}, "rows is a list, expected a list of int"),
        ({"completion_lengths": [2]}, "completion_lengths has 1 entries for 2 labels"),
        ({"prompt_keys": [2]}, "prompt_keys has 1 entries for 2 labels"),
        ({"prompt_lengths": [1, 2]}, "input_ids has 6 tokens, but prompt_lengths and .* up to 7"),
        ({"completion_lengths": [2, 0]}, "input_ids has 6 tokens, but .* add up to 4"),
        ({"completion_lengths": [4, 0]}, "row 1 has 1 prompt and 0 completion tokens"),
        ({"prompt_lengths": [-1, 3]}, "row 0 has -1 prompt and 2 completion tokens"),
        (
            {"prompt_keys": [7, 7], "prompt_lengths": [1, 2], "completion_lengths": [2, 1]},
            "prompt_keys has 7 for prompts of 1 and 2 tokens, .* are read once",
        ),
        (
            {"input_ids": torch.ones(14).long(), "prompt_lengths": [9, 1]},
            "row 0 has 9 prompt and 2 completion tokens, .* max_length=9; prepare the data set",
        ),
    ],
)
def test_a_foreign_batch_is_named_and_refused(changes: dict[str, Any], message: str) -> None:
    batch = good() | changes
    batch = {key: value for key, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        check_batch(batch, 9)


def test_a_batch_that_is_no_dict_is_refused() -> None:
    with pytest.raises(TypeError, match="the batch is a list, expected a dict; use fastkto"):
        check_batch([1], None)


def test_a_batch_on_a_device_is_checked_without_reading_it() -> None:
    """A meta tensor holds no values, so reading one would raise."""
    check_batch(send_to_device(good(), "meta"), 9)


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


@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids", "KL_completion_ids"])
def test_a_token_that_the_model_does_not_have_names_its_row(column: str) -> None:
    row = {"prompt_ids": [1], "completion_ids": [2], "KL_completion_ids": [3], "label": True}
    rows = [row | {"row": 6}, row | {"row": 7, column: [1, 64]}]
    KTOCollator(9, vocab_size=65)(rows)
    with pytest.raises(ValueError, match="row 7 has the token 64, and the model or its reference"):
        KTOCollator(9, vocab_size=64)(rows)
