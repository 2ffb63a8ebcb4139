"""A data set with images, checked and numbered before the first step; long rows are dropped.

Only the processor knows how many tokens an image takes. So with `max_length` it sees every image
once before `ImageCollator` has it see them again, batch by batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import ProcessorMixin

from fastkto.data import formats, images, messages
from fastkto.data.dropped import DropLong
from fastkto.data.formats import RowFormat
from fastkto.data.rows import RowReport, check_rows, check_some_fit, check_tokenizer


def has_images(columns: Sequence[str]) -> bool:
    """Whether a data set with these columns has one for images."""
    return any(column in columns for column in images.IMAGE_COLUMNS)


def prepare_image_rows(
    dataset: Dataset | IterableDataset,
    processor: ProcessorMixin,
    *,
    max_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, RowReport | None]:
    """Rows with `image` or `images` and `prompt`, `completion`, `label`, checked and numbered.

    With `max_length`, those whose prompt fills it are dropped: of a data set at once, with a report
    of what became of its rows; of a stream, which is encoded as it is read, with a count in its
    column `dropped_rows`. Without, no image is looked at here: `ImageCollator` does that batch by
    batch. Of a stream only the columns are checked at once. Raises as `prepare_rows` does.
    """
    dataset = dataset.with_format(None)
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"the {name} data has no rows")
    columns = dataset.column_names or list(first_row)
    row_format = _detect_format(columns, first_row, name)
    if row_format.kind == "conversation":
        check_tokenizer(processor, row_format, first_row, name)
    if isinstance(dataset, Dataset):
        texts = dataset.select_columns([c for c in row_format.columns if c in columns])
        check_rows(texts, row_format, num_proc, name)
    dataset = _number(dataset)
    if max_length is None:
        return dataset, None
    if isinstance(dataset, Dataset):
        return _drop_long(dataset, processor, max_length, num_proc, name)
    encode = EncodeStream(images.ImageCollator(processor, None), DropLong(max_length, name))
    return dataset.map(
        encode, batched=True, batch_size=1, with_indices=True, remove_columns=columns
    ), None


def _detect_format(columns: Sequence[str], first_row: dict[str, Any], name: str) -> RowFormat:
    """The format of a data set with images; ValueError if it is not prompt, completion, label."""
    image = next(column for column in images.IMAGE_COLUMNS if column in columns)
    if {"chosen", "rejected"} & set(columns):
        raise ValueError(
            f"the {name} data has images and pairs of answers (chosen, rejected), which cannot be "
            "split without reading every image; write two rows with prompt, completion, label "
            "and the same images instead, for example with trl.unpair_preference_dataset"
        )
    if "prompt_ids" in columns:
        raise ValueError(
            f"the {name} data has tokens (prompt_ids) and {image}, whose placeholders only the "
            "processor can write; give prompt and completion as text or conversations"
        )
    texts = [column for column in columns if column not in images.IMAGE_COLUMNS]
    return formats.detect_format(texts, first_row, name)


def _number(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with a column `row` for errors; integers that are there already stay."""
    if isinstance(dataset, IterableDataset):
        return dataset.map(_number_row, with_indices=True)
    if "row" in dataset.column_names:
        if dataset.features["row"].dtype == "int64":
            return dataset
        dataset = dataset.remove_columns("row")
    return dataset.add_column("row", np.arange(len(dataset)))


def _number_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {**row, "row": row["row"] if type(row.get("row")) is int else index}


def _drop_long(
    dataset: Dataset, processor: ProcessorMixin, max_length: int, num_proc: int | None, name: str
) -> tuple[Dataset, RowReport]:
    """The data set without rows whose prompt fills `max_length`, and what became of its rows."""
    measured = dataset.map(
        Measure(images.ImageCollator(processor, None), source_digest()),
        remove_columns=dataset.column_names,
        features=Features({column: Value(kind) for column, kind in Measure.COLUMNS.items()}),
        num_proc=num_proc,
        desc=f"Measuring the {name} data for max_length={max_length}",
    )
    prompts, completions, label = (measured.data.column(c).to_numpy() for c in Measure.COLUMNS)
    fits = prompts < max_length
    check_some_fit(fits, prompts, max_length, name)
    length = prompts + completions
    report = RowReport(
        name=name,
        read=len(dataset),
        desirable=int(label[fits].sum()),
        undesirable=int((~label)[fits].sum()),
        dropped=int((~fits).sum()),
        cut=int((length > max_length)[fits].sum()),
        merged=0,
        longest=int(np.minimum(length, max_length)[fits].max()),
        max_length=max_length,
    )
    return (dataset if fits.all() else dataset.select(np.flatnonzero(fits))), report


@dataclass(frozen=True)
class Measure:
    """The tokens of a row's prompt with its images, and of its completion, for `Dataset.map`.

    `source` as in `fastkto.data.tokenise.Tokenise`.
    """

    COLUMNS: ClassVar = {"prompt_tokens": "int64", "completion_tokens": "int64", "label": "bool"}
    collator: images.ImageCollator
    source: str

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        encoded = self.collator.encode(row)
        return {
            "prompt_tokens": len(encoded["prompt_ids"]),
            "completion_tokens": len(encoded["completion_ids"]),
            "label": encoded["label"],
        }


@dataclass(frozen=True)
class EncodeStream:
    """A row's tokens and images, for `IterableDataset.map` in batches of one; long rows drop."""

    collator: images.ImageCollator
    drop: DropLong

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        encoded = self.collator.encode({column: values[0] for column, values in batch.items()})
        columns = {name: [value] for name, value in encoded.items()}
        return self.drop(columns, [len(encoded["prompt_ids"])], indices[0])


@functools.cache
def source_digest() -> str:
    """A digest of the code that turns rows with images into tokens."""
    modules = (sys.modules[__name__], images, formats, messages)
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()
