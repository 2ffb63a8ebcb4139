"""Rows of a user's data set as tokens: `prompt_ids`, `completion_ids`, `label`, `length`, `row`.

Tokens, order and dropped rows are those of TRL 1.16's `KTOTrainer._prepare_dataset`. Unlike there,
rows are checked before anything is tokenised, and nothing is paired here (see `window.py` and
`pairing.py`).
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value
from pyarrow import compute
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fastkto.data import formats
from fastkto.data.dropped import DROPPED_COLUMN, DropLong
from fastkto.data.formats import Problem, RowFormat
from fastkto.data.tokenise import (
    Check,
    Tokenise,
    TokeniseStream,
    check_completions,
    merged_warning,
    source_digest,
)

logger = logging.getLogger(__name__)

# TRL splits pairs in blocks of this many: all desirable answers of a block come first.
PAIR_BLOCK = 1000
# Rows of a stream that are tokenised together, unless they are pairs.
STREAM_BLOCK = 64

_COLUMNS = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(Value("int32")),
    "label": Value("bool"),
    "row": Value("int64"),
}


@dataclass(frozen=True)
class RowReport:
    """What became of the rows of one data set.

    `read` counts the user's rows; everything else counts rows after pairs were split in two.
    `dropped` rows have a prompt that fills `max_length` alone, `cut` ones more tokens than that,
    `merged` ones a prompt whose end is tokenised differently once the completion follows.
    """

    name: str
    read: int
    desirable: int
    undesirable: int
    dropped: int
    cut: int
    merged: int
    longest: int  # tokens, after the cut
    max_length: int | None
    largest_id: int = field(default=-1, compare=False)  # of any token; -1: not known

    @property
    def rows(self) -> int:
        """Rows that are left to train on or to evaluate."""
        return self.desirable + self.undesirable

    @property
    def classes(self) -> str:
        """How many rows there are of each class, in words."""
        pairs = f" from {self.read:,} pairs" if self.read < self.rows + self.dropped else ""
        return (
            f"{self.rows:,} rows{pairs}: {self.desirable:,} desirable, "
            f"{self.undesirable:,} undesirable"
        )

    @property
    def losses(self) -> str:
        """What was dropped or cut, and the longest sequence, in words."""
        limit = f"max_length={self.max_length}"
        dropped = f"{self.dropped:,} dropped, their prompt alone fills {limit}; "
        cut = f"{self.cut:,} cut at {limit}; " if self.cut else "none cut; "
        dropped = dropped if self.dropped else "none dropped, "
        return f"{dropped}{cut}longest sequence {self.longest:,} tokens"

    def weight_advice(self, desirable_weight: float, undesirable_weight: float) -> str | None:
        """TRL's advice when the class weights do not balance the classes, else None.

        The weighted number of desirable rows should be 1 to 1.33 times that of undesirable ones:
        equation 8 of arXiv:2402.01306, rounded and bounded as TRL does.
        """
        desirable, undesirable = max(self.desirable, 1), max(self.rows - max(self.desirable, 1), 1)
        if desirable == undesirable:
            return None
        wanted = undesirable * undesirable_weight / desirable
        bounds = round(wanted, 2), round(wanted * 1.33, 2)
        wanted = desirable * desirable_weight / undesirable
        other_bounds = round(wanted / 1.33, 2), round(wanted, 2)
        if (
            bounds[0] <= desirable_weight <= bounds[1]
            or other_bounds[0] <= undesirable_weight <= other_bounds[1]
        ):
            return None
        return (
            f"the {self.name} data has {self.desirable:,} desirable and {self.undesirable:,} "
            f"undesirable rows, and the class weights ({desirable_weight} and "
            f"{undesirable_weight}) do not balance them. Set EITHER desirable_weight in "
            f"[{bounds[0]}, {bounds[1]}] OR undesirable_weight in [{other_bounds[0]}, "
            f"{other_bounds[1]}], not both"
        )


def prepare_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
    name: str = "train",
    in_blocks: bool = False,
    keep_columns: bool = False,
) -> tuple[Dataset | IterableDataset, RowReport | None]:
    """The rows as tokens, in TRL's order, and a report of what became of them.

    Accepted columns: `prompt`, `completion`, `label` as text or conversations; `prompt`, `chosen`,
    `rejected`, with the prompt in a column of its own or at the beginning of both answers; and
    the tokenised `prompt_ids`, `completion_ids`, `label`. Conversations may bring `tools` (a list
    or a JSON string) and `chat_template_kwargs`. Other columns are left out, unless `keep_columns`
    asks for them and the rows are no pairs.

    Columns of the result: `prompt_ids` and `completion_ids` (uncut), `label` (bool), `length`
    (tokens of both, at most `max_length`), `row` (the row's index in `dataset`, counted from 0;
    both rows of a pair have the same).

    A streamed data set stays one: its rows are checked as they are read, `row` is counted by each
    worker that reads it, and there is no report. Its column `dropped_rows` says how many rows were
    dropped just before one.

    `in_blocks`: the chat template is a processor's, which reads contents as lists of blocks.

    Raises TypeError for anything that is no data set or tokenizer, and ValueError that names the
    rows if any cannot be used, before anything is tokenised.
    """
    _check_arguments(dataset, tokenizer, max_length, name)
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"the {name} data has no rows")
    columns = dataset.column_names or list(first_row)
    row_format = formats.detect_format(columns, first_row, name)
    if row_format.paired and (ignored := {"completion", "label"} & set(columns)):
        logger.warning(
            "the %s data has chosen and rejected, whose pairs become its rows, so its %s will not "
            "be used; leave out one or the other",
            name,
            " and ".join(sorted(ignored)),
        )
    check_tokenizer(tokenizer, row_format, first_row, name)
    tokenise = Tokenise(tokenizer, row_format, source_digest(), in_blocks)
    known = dataset.features if keep_columns and not row_format.paired else None
    own = (*row_format.columns, *_COLUMNS, "length", "merged", DROPPED_COLUMN)
    kept = {column: kind for column, kind in (known or {}).items() if column not in own}
    if isinstance(dataset, IterableDataset):
        # What would be dropped is cut with "keep_end".
        drop = DropLong(max_length if truncation_mode == "keep_start" else None, name)
        stream = dataset.map(
            TokeniseStream(tokenise, max_length, drop, name, tuple(kept)),
            batched=True,
            batch_size=PAIR_BLOCK if row_format.paired else STREAM_BLOCK,
            with_indices=True,
            remove_columns=[column for column in columns if column not in kept],
            features=Features(
                {**kept, **_COLUMNS, "length": Value("int64"), DROPPED_COLUMN: Value("int64")}
            ),
        )
        return stream, None
    dataset = dataset.select_columns([c for c in (*row_format.columns, *kept) if c in columns])
    check_rows(dataset, row_format, num_proc, name)
    rows = dataset.map(
        tokenise,
        batched=True,
        with_indices=True,
        remove_columns=[column for column in dataset.column_names if column not in kept],
        features=Features({**kept, **_COLUMNS, "merged": Value("bool")}),
        num_proc=num_proc,
        desc=f"Tokenising the {name} data",
    )
    return _finish(rows, row_format, len(dataset), max_length, truncation_mode, name)


def _finish(
    rows: Dataset,
    row_format: RowFormat,
    read: int,
    max_length: int | None,
    truncation_mode: str,
    name: str,
) -> tuple[Dataset, RowReport]:
    """Add `length`, put pairs in TRL's order, drop rows without room for a completion."""
    prompts, completions = _list_lengths(rows, "prompt_ids"), _list_lengths(rows, "completion_ids")
    number, label, merged = (rows.data.column(c).to_numpy() for c in ("row", "label", "merged"))
    check_completions(completions, number, name)
    if merged.any():
        which = f"{merged.sum():,} of {len(merged):,} rows (the first is row {number[merged][0]})"
        logger.warning(merged_warning(name, which))
    full = prompts + completions
    length = full if max_length is None else np.minimum(full, max_length)
    # A completion is never empty, so this drops full prompts only.
    fits = (prompts < length) | (truncation_mode == "keep_end")
    check_some_fit(fits, prompts, max_length, name)
    order = np.arange(len(rows))
    if row_format.paired:
        # Several processes work on blocks of their own; the order does not depend on them.
        order = np.lexsort((number, ~label, number // PAIR_BLOCK))
    order = order[fits[order]]
    report = RowReport(
        name=name,
        read=read,
        desirable=int(label[fits].sum()),
        undesirable=int((~label)[fits].sum()),
        dropped=int((~fits).sum()),
        cut=int((full > length)[fits].sum()),
        merged=int(merged.sum()),
        longest=int(length[fits].max()),
        max_length=max_length,
        largest_id=max(_largest(rows, column) for column in ("prompt_ids", "completion_ids")),
    )
    rows = rows.remove_columns("merged").add_column("length", length)
    if len(order) < len(rows) or (order[1:] < order[:-1]).any():
        rows = rows.select(order)
    return rows, report


def _check_arguments(dataset: Any, tokenizer: Any, max_length: int | None, name: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"the {name} data is a {type(dataset).__name__}; pass a datasets.Dataset or "
            "IterableDataset (of a DatasetDict: one of its splits)"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; pass a tokenizer (of a processor: its "
            "attribute tokenizer)"
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be 1 or more, or None")


def check_some_fit(
    fits: np.ndarray, prompts: np.ndarray, max_length: int | None, name: str
) -> None:
    """Raise ValueError if no row fits, by the tokens of their prompts."""
    if not fits.any():
        raise ValueError(
            f"all {len(fits):,} rows of the {name} data are too long: their prompts have "
            f"{prompts.min():,} to {prompts.max():,} tokens, which leaves no room for a completion "
            f"within max_length={max_length:,}; raise max_length"
        )


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    row_format: RowFormat,
    first_row: dict[str, Any],
    name: str,
) -> None:
    """Raise ValueError if the tokenizer, or processor, lacks what this format needs."""
    if row_format.kind == "text" and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, which every completion ends with; set "
            "tokenizer.eos_token"
        )
    kwargs = first_row.get("chat_template_kwargs")
    has_template = bool(tokenizer.chat_template) or "chat_template" in (kwargs or ())
    if row_format.kind == "conversation" and not has_template:
        raise ValueError(
            f"the {name} data holds conversations, but the tokenizer has no chat template; use the "
            "tokenizer of a chat model, set tokenizer.chat_template, or write prompt and "
            "completion as text"
        )


def check_rows(dataset: Dataset, row_format: RowFormat, num_proc: int | None, name: str) -> None:
    """Raise ValueError with the numbers of all rows that cannot be used, if any."""
    found = dataset.map(
        Check(row_format, source_digest()),
        batched=True,
        remove_columns=dataset.column_names,
        features=Features({field: Value("string") for field in Problem._fields}),
        num_proc=num_proc,
        desc=f"Checking the {name} data",
    )
    bad = np.flatnonzero(found.data.column("what").is_valid().to_numpy())
    problems = ((row, Problem(**found[row])) for row in bad.tolist())
    formats.raise_problems(problems, name)


def _largest(dataset: Dataset, column: str) -> int:
    """Of all numbers in a column of lists; -1 if there are none."""
    largest = (compute.max(chunk.flatten()).as_py() for chunk in dataset.data.column(column).chunks)
    return max((value for value in largest if value is not None), default=-1)


def _list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Length of each list in a column, read from its offsets alone."""
    chunks = dataset.data.column(column).chunks
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).astype(np.int64)
