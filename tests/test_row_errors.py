"""Labels that are accepted, and the message for every mistake in a user's rows."""

import re
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from fastkto.data.formats import read_label
from fastkto.data.rows import prepare_rows
from tests.models import tiny_tokenizer
from tests.row_data import assistant, conversation_row, make, stream_of, text_data, text_row, user


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True", " 1 "])
def test_labels_for_desirable(value: Any) -> None:
    assert read_label(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", "FALSE", "0"])
def test_labels_for_undesirable(value: Any) -> None:
    assert read_label(value) is False


@pytest.mark.parametrize("value", ["maybe", "", 2, -1, 0.5, float("nan"), None, [True]])
def test_labels_that_are_none(value: Any) -> None:
    assert read_label(value) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            text_data(30, completion={4: "", 17: "", 23: ""}),
            "in the train data, counted from row 0, 3 rows have an empty completion: rows 4, 17, "
            "23 (leave the row out or fill it in)",
        ),
        (text_data(30, completion=dict.fromkeys(range(5, 20), "")), "rows 5, 6, 7, 8, 9, 10, 11, "),
        (text_data(30, completion=dict.fromkeys(range(5, 20), "")), "13, 14 and 5 more"),
        (text_data(6, label={2: None}), "1 row has no label: row 2 (write true (desirable)"),
        (text_data(6, prompt={2: None}), "1 row has no prompt: row 2"),
        (text_data(6, completion={5: None}), "1 row has no completion: row 5"),
        (
            text_data(6, label={i: "true" for i in range(6)} | {3: "maybe", 4: "2"}),
            "2 rows have a label that is no boolean: rows 3 ('maybe'), 4 ('2') (write true",
        ),
        (
            text_data(6, completion={1: ""}, prompt={3: None}),
            "1 row has an empty completion: row 1 (leave the row out or fill it in); 1 row has no "
            "prompt: row 3",
        ),
        ([{"prompt": "p", "completion": 7, "label": True}], "no text: row 0 (7) (write a string"),
        (
            [{"prompt": ["p"], "completion": ["c"], "label": True}],
            "a prompt that is no conversation: row 0 (['p']) (write a list of messages such as",
        ),
        (
            [{"prompt": user("q"), "completion": "text", "label": True}],
            "a completion that is no conversation: row 0 ('text')",
        ),
        (
            [{"prompt": user("q"), "completion": assistant(""), "label": True}],
            "an empty completion: row 0",
        ),
        (
            [{"prompt": user("q"), "completion": user("a"), "label": True, "tools": "{"}],
            "tools that are no JSON: row 0 ('{')",
        ),
        (
            [{"prompt": user("q"), "completion": user("a"), "label": True, "tools": "{}"}],
            "tools that are no list: row 0 ({})",
        ),
        (
            [{"prompt": user("q"), "completion": user("a"), "chat_template_kwargs": 3, "label": 1}],
            "chat_template_kwargs that are no mapping: row 0 (3)",
        ),
        ([{"prompt": "p", "chosen": "", "rejected": "b"}], "an empty chosen: row 0"),
        ([{"prompt": "p", "chosen": "a", "rejected": ""}], "an empty rejected: row 0"),
        (
            [{"chosen": "pa", "rejected": "pb"}, {"chosen": "no", "rejected": "yes"}],
            "1 row has no shared beginning of chosen and rejected: row 1 (add a column prompt)",
        ),
        (
            [{"prompt_ids": [1], "completion_ids": [], "label": True}],
            "an empty completion_ids: row 0",
        ),
        (
            [{"prompt_ids": [1], "completion_ids": [-1], "label": True}],
            "completion_ids that are no token ids: row 0 ([-1]) (a list of integers)",
        ),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_rows_are_named_before_anything_is_tokenised(
    rows: list[dict[str, Any]], message: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "_encode_plus", None)  # using it would be another error
    with pytest.raises(ValueError, match=re.escape(message)):
        if streamed:
            list(prepare_rows(stream_of(rows), tokenizer, max_length=9)[0])
        else:
            prepare_rows(Dataset.from_list(rows), tokenizer, max_length=9)


def test_a_stream_is_checked_as_it_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_data(200, completion={150: ""})
    stream = iter(prepare_rows(stream_of(rows), tokenizer, max_length=20)[0])
    assert [next(stream)["row"] for _ in range(100)] == list(range(100))
    with pytest.raises(ValueError, match="1 row has an empty completion: row 150"):
        list(stream)


def test_rows_of_a_stream_may_differ_in_their_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = text_data(3)
    rows[1]["note"] = "only here"
    assert len(list(prepare_rows(stream_of(rows), tokenizer, max_length=20)[0])) == 3
    del rows[2]["label"]
    with pytest.raises(ValueError, match="1 row has no label: row 2"):
        list(prepare_rows(stream_of(rows), tokenizer, max_length=20)[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "completion": "c"},
            "columns prompt, completion, but no label; write true",
        ),
        ({"text": "p", "label": True}, "has the columns text, label; accepted are prompt, comple"),
        ({"prompt": "p", "label": True}, "accepted are prompt, completion, label; prompt, chosen"),
        ({"prompt": "p", "completion": "c", "label": 1, "images": []}, "images are not supported"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_unknown_columns_are_refused(
    row: dict[str, Any], message: str, streamed: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = stream_of([row]) if streamed else Dataset.from_list([row])
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_rows(dataset, tokenizer, max_length=9)


def test_all_rows_too_long(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list(text_data(3, prompt={0: "x" * 12, 1: "x" * 9, 2: "x" * 30}))
    message = "all 3 rows of the eval data .* 9 to 30 tokens.* max_length=9; raise max_length"
    with pytest.raises(ValueError, match=message):
        prepare_rows(dataset, tokenizer, max_length=9, name="eval")


def test_a_completion_that_leaves_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": user("q"), "completion": assistant("a"), "label": True}] * 2
    silent = tiny_tokenizer()
    silent.chat_template = "{{ messages[1]['content'] }}"
    message = "2 rows have a completion without tokens: rows 0, 1"
    with pytest.raises(ValueError, match=message):
        prepare_rows(Dataset.from_list(rows), silent, max_length=9)
    with pytest.raises(ValueError, match=message):
        list(prepare_rows(stream_of(rows), silent, max_length=9)[0])


def test_what_is_no_data_set_or_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(text_data(3))
    with pytest.raises(TypeError, match="the train data is a list; pass a datasets.Dataset"):
        prepare_rows(text_data(3), tokenizer, max_length=9)
    with pytest.raises(TypeError, match="is a DatasetDict.* one of its splits"):
        prepare_rows(DatasetDict(train=rows), tokenizer, max_length=9)
    with pytest.raises(TypeError, match="tokenizer is a str; pass a tokenizer"):
        prepare_rows(rows, "gpt2", max_length=9)
    with pytest.raises(ValueError, match="max_length is 0; it must be 1 or more"):
        prepare_rows(rows, tokenizer, max_length=0)
    with pytest.raises(ValueError, match="the train data has no rows"):
        prepare_rows(rows.select([]), tokenizer, max_length=9)


def test_a_tokenizer_without_chat_template_or_eos() -> None:
    plain = tiny_tokenizer()
    plain.chat_template = plain.eos_token = None
    message = "the eval data holds conversations, but the tokenizer has no chat template; use"
    with pytest.raises(ValueError, match=message):
        prepare_rows(make(conversation_row, 3), plain, max_length=9, name="eval")
    with pytest.raises(ValueError, match="no end-of-sequence token.*set tokenizer.eos_token"):
        prepare_rows(make(text_row, 3), plain, max_length=9)
