"""Rows of every format against TRL's own, and what is reported about them."""

import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from trl import KTOTrainer as TRLTrainer
from trl.data_utils import extract_prompt as trl_extract_prompt

from fastkto.data.dropped import DROPPED_COLUMN
from fastkto.data.formats import extract_prompt
from fastkto.data.rows import STREAM_BLOCK, RowReport, prepare_rows
from tests.models import tiny_tokenizer
from tests.row_data import (
    MAX_LENGTH,
    ROWS,
    conversation_row,
    make,
    paired_row,
    stream_of,
    template_row,
    text_data,
    text_row,
    text_row_with_eos,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def trl_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int | None = MAX_LENGTH,
    weights: tuple[float, float] = (1.0, 1.0),
) -> list[dict[str, Any]]:
    """What TRL's own preparation makes of a data set, without the pairing."""
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        calculate_KL=False,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    prepared = TRLTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    return [{k: row[k] for k in ("prompt_ids", "completion_ids", "label")} for row in prepared]


def without_extras(rows: Any) -> list[dict[str, Any]]:
    return [{k: row[k] for k in ("prompt_ids", "completion_ids", "label")} for row in rows]


@pytest.mark.parametrize("max_length", [MAX_LENGTH, None])
@pytest.mark.parametrize("row", ROWS)
def test_tokens_order_and_dropped_rows_are_those_of_trl(
    row: Callable[..., Any], max_length: int | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = make(row, 40)
    ours, report = prepare_rows(dataset, tokenizer, max_length=max_length)
    theirs = trl_rows(dataset, tokenizer, max_length=max_length)
    assert without_extras(ours) == theirs
    assert report is not None and report.rows == len(theirs)
    assert ours.column_names == ["prompt_ids", "completion_ids", "label", "row", "length"]


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_of_the_comparison_have_all_the_hard_cases(
    row: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Dropped, cut and merged rows occur, so that equality with TRL above says something."""
    _, report = prepare_rows(make(row, 40), tokenizer, max_length=MAX_LENGTH)
    assert report.dropped > 1 and report.cut > 2
    assert report.desirable > 3 and report.undesirable > 3
    assert report.merged > 1 or row not in (text_row, text_row_with_eos, template_row, paired_row)


@pytest.mark.parametrize("row", ROWS)
def test_a_stream_gives_the_same_rows(
    row: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = make(row, 100)
    rows, expected = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    stream, report = prepare_rows(
        dataset.to_iterable_dataset(num_shards=3), tokenizer, max_length=MAX_LENGTH
    )
    assert report is None
    assert isinstance(stream, IterableDataset)
    assert set(stream.column_names) == {*rows.column_names, DROPPED_COLUMN}
    for _ in range(2):  # a second epoch counts anew
        streamed = list(stream)
        dropped = [row.pop(DROPPED_COLUMN) for row in streamed]
        assert streamed == list(rows)
        behind_the_last = 99 - rows[-1]["row"]
        assert sum(dropped) == expected.dropped - behind_the_last > 1


def test_a_stream_counts_what_it_drops_across_blocks(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning names the first; rows behind the last that is kept are in no count."""
    long = {"prompt": "a" * 90, "completion": "b", "label": True}
    rows = [long | {"prompt": "a"}, *[long] * 3 * STREAM_BLOCK, long | {"prompt": "aa"}, long]
    stream, _ = prepare_rows(stream_of(rows), tokenizer, max_length=40, name="streamed")
    assert [row[DROPPED_COLUMN] for row in stream] == [0, 3 * STREAM_BLOCK]
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "the first is row 1, and dropped_rows in the log counts" in said[0]


def test_pairs_keep_the_order_of_trl_beyond_one_block(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [{"prompt": f"{i} ", "chosen": f"{i}", "rejected": "x"} for i in range(1003)]
    dataset = Dataset.from_list(pairs)
    theirs = trl_rows(dataset, tokenizer)
    ours, report = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    assert without_extras(ours) == theirs
    assert ours["row"][998:1002] == [998, 999, 0, 1] and ours["row"][-1] == 1002
    assert (report.read, report.desirable, report.undesirable) == (1003, 1003, 1003)
    several, _ = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH, num_proc=2)
    assert list(several) == list(ours)
    stream, _ = prepare_rows(dataset.to_iterable_dataset(), tokenizer, max_length=MAX_LENGTH)
    for row in (streamed := list(stream)):
        assert row.pop(DROPPED_COLUMN) == 0
    assert streamed == list(ours)


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_the_implicit_prompt_is_that_of_trl(chosen: str, rejected: str) -> None:
    prompt = extract_prompt(chosen, rejected)
    if chosen[0] != rejected[0]:  # where TRL looks at the last character: there is no prompt
        assert prompt == ""
        return
    theirs = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
    assert prompt == theirs["prompt"]
    assert (chosen[len(prompt) :], rejected[len(prompt) :]) == (
        theirs["chosen"],
        theirs["rejected"],
    )


def test_row_numbers_and_lengths_are_the_users(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = make(text_row, 40)
    rows, report = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    for row in rows:
        own = dataset[row["row"]]
        tokens = len(row["prompt_ids"]) + len(row["completion_ids"])
        assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == (
            own["prompt"] + own["completion"] + "<eos>"
        )
        assert row["length"] == min(tokens, MAX_LENGTH)
        assert row["label"] is own["label"]
    assert len(set(rows["row"])) == len(rows) == 40 - report.dropped
    assert report.cut == sum(
        len(row["prompt_ids"]) + len(row["completion_ids"]) > MAX_LENGTH for row in rows
    )
    assert report.longest == max(rows["length"]) == MAX_LENGTH


def test_tokenised_rows_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list(
        [
            {"prompt_ids": [7, 8], "completion_ids": [9], "label": 1, "row": "a name"},
            {"prompt_ids": [5] * 9, "completion_ids": [9], "label": 0, "row": "another"},
            {"prompt_ids": [], "completion_ids": [4] * 10, "label": 0, "row": "a third"},
        ]
    )
    rows, report = prepare_rows(dataset, tokenizer, max_length=9)
    assert list(rows) == [
        {"prompt_ids": [7, 8], "completion_ids": [9], "label": True, "row": 0, "length": 3},
        {"prompt_ids": [], "completion_ids": [4] * 10, "label": False, "row": 2, "length": 9},
    ]
    assert (report.read, report.rows, report.dropped, report.cut) == (3, 2, 1, 1)


def test_prepared_rows_can_be_prepared_again(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, _ = prepare_rows(make(paired_row, 30), tokenizer, max_length=MAX_LENGTH)
    again, _ = prepare_rows(rows, tokenizer, max_length=MAX_LENGTH)
    assert list(again) == list(rows)


def test_several_processes_give_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = make(conversation_row, 41)
    one = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    two = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH, num_proc=2)
    assert list(one[0]) == list(two[0])
    assert one[1] == two[1]


def test_a_formatted_data_set_is_read_as_plain_python(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = make(text_row, 20)
    plain, _ = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    formatted, _ = prepare_rows(dataset.with_format("torch"), tokenizer, max_length=MAX_LENGTH)
    assert list(formatted) == list(plain)


def test_merged_prompts_are_warned_about_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = text_data(200, prompt={7: "say ", 9: "say "}, completion={7: "the", 9: "t"})
    prepare_rows(Dataset.from_list(rows), tokenizer, max_length=20)
    assert [r.message[:46] for r in caplog.records if "tokens merge" in r.message] == [
        "in 2 of 200 rows (the first is row 7) of the t"
    ]
    caplog.clear()
    list(prepare_rows(stream_of(rows), tokenizer, max_length=20, name="streamed")[0])
    assert [r.message[:33] for r in caplog.records if "tokens merge" in r.message] == [
        "in some rows of the streamed data"
    ]


def test_completions_beside_pairs_are_named(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"prompt": "p", "completion": "c", "label": True, "chosen": "a", "rejected": "b"}
    rows, _ = prepare_rows(Dataset.from_list([both]), tokenizer, max_length=None)
    assert len(rows) == 2
    assert "so its completion and label will not be used" in caplog.text


def test_the_report_counts_rows_and_pairs(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_data(5, prompt={0: "x" * 20}, completion={3: "x" * 20})
    _, report = prepare_rows(Dataset.from_list(rows), tokenizer, max_length=10)
    assert report == RowReport(
        "train", 5, 2, 2, dropped=1, cut=1, merged=0, longest=10, max_length=10
    )
    pairs = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    _, report = prepare_rows(pairs, tokenizer, max_length=None, name="eval")
    assert report == RowReport("eval", 1, 1, 1, 0, 0, 0, longest=3, max_length=None)
    assert report.rows == 2


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 1.0), (1.0, 4.0), (2.5, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("desirable", [0, 1, 3, 5, 6, 9, 10])
def test_the_advice_on_weights_is_that_of_trl(
    desirable: int,
    weights: tuple[float, float],
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = Dataset.from_list(text_data(10, label={i: i < desirable for i in range(10)}))
    with caplog.at_level(logging.WARNING, logger="trl"):
        trl_rows(dataset, tokenizer, weights=weights)
    warnings = [r.message for r in caplog.records if "desirable_weight in" in r.message]
    _, report = prepare_rows(dataset, tokenizer, max_length=MAX_LENGTH)
    advice = report.weight_advice(*weights)
    bounds = r"desirable_weight in \[[0-9., ]+\]"
    assert [re.findall(bounds, text) for text in warnings] == (
        [re.findall(bounds, advice)] if advice else []
    )


def test_the_advice_depends_on_the_weights() -> None:
    report = RowReport("train", 10, 3, 7, 0, 0, 0, 9, 9)
    assert report.weight_advice(2.5, 1.0) is None
    assert "EITHER desirable_weight in [2.33, 3.1] OR undesirable" in report.weight_advice(1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_other_columns_stay_where_they_are_asked_for(stream: bool) -> None:
    rows = [{"prompt": "a" * n, "completion": "b", "label": True, "own": n} for n in (1, 90, 2)]
    dataset: Any = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if stream else dataset
    prepared, _ = prepare_rows(dataset, tiny_tokenizer(), max_length=40, keep_columns=True)
    assert [row["own"] for row in prepared] == [1, 2]
    assert "prompt" not in next(iter(prepared))
    prepared, _ = prepare_rows(dataset, tiny_tokenizer(), max_length=40)
    assert "own" not in next(iter(prepared))
