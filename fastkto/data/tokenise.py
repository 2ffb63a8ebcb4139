"""Rows to tokens: the functions that `datasets` maps over a data set in `rows.py`.

Each is a small object that holds all it needs and nothing else, since the cache of `datasets`
recognises a function by what it holds.
"""

import functools
import hashlib
import inspect
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkto.data import formats, messages
from fastkto.data.dropped import DropLong
from fastkto.data.formats import Example, Problem, RowFormat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """What is wrong with each row of a batch, for `Dataset.map`; `source` as in `Tokenise`."""

    row_format: RowFormat
    source: str

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[str | None]]:
        found = [formats.check_row(row, self.row_format) for row in _rows_of(batch)]
        return {
            field: [None if problem is None else getattr(problem, field) for problem in found]
            for field in Problem._fields
        }


@dataclass(frozen=True)
class Tokenise:
    """The tokens of each row of a batch, for `Dataset.map`; a batch of pairs gives two per row.

    `source` identifies the code: datasets recognises a class of a module by its name alone, and
    would return what an older version wrote to the cache. `max_length` is no part of this, so that
    the cache serves every value of it. `in_blocks`: the template reads contents as lists of blocks.
    """

    tokenizer: PreTrainedTokenizerBase
    row_format: RowFormat
    source: str
    in_blocks: bool = False

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = list(_rows_of(batch))
        split = [formats.split_row(row, self.row_format) for row in rows]
        # All desirable answers of a batch of pairs come first.
        order = [(i, k) for k in range(len(self.row_format.answers)) for i in range(len(rows))]
        examples = [split[i][k] for i, k in order]
        if self.row_format.kind == "tokens":
            tokens = [(example.prompt, example.completion, False) for example in examples]
            # Rows that were prepared before keep their numbers.
            own = [row.get("row") for row in rows]
            numbers = [n if type(n) is int else i for n, i in zip(own, indices, strict=True)]
        else:
            tokens = [_split_tokens(*ids) for ids in self._encode(examples, rows, order)]
            numbers = indices
        prompts, completions, merged = zip(*tokens, strict=True)
        return {
            "prompt_ids": list(prompts),
            "completion_ids": list(completions),
            "label": [example.label for example in examples],
            "row": [numbers[i] for i, _ in order],
            "merged": list(merged),
        }

    def _encode(
        self, examples: list[Example], rows: list[dict[str, Any]], order: list[tuple[int, int]]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids of each prompt alone, and of each prompt with its completion."""
        if self.row_format.kind == "conversation":
            template = functools.partial(
                self.tokenizer.apply_chat_template, tokenize=True, return_dict=True
            )
            for example, (i, _) in zip(examples, order, strict=True):
                arguments = formats.template_arguments(rows[i])
                start, end = example.prompt, example.completion
                if self.in_blocks:
                    start, end = messages.in_blocks(start), messages.in_blocks(end)
                prompt = template(start, add_generation_prompt=True, **arguments)
                whole = template(start + end, **arguments)
                yield prompt["input_ids"], whole["input_ids"]
            return
        eos = self.tokenizer.eos_token
        prompts = [example.prompt for example in examples]
        whole = [
            prompt + completion + ("" if completion.endswith(eos) else eos)
            for prompt, completion, _ in examples
        ]
        prompt_ids, whole_ids = (self.tokenizer(texts)["input_ids"] for texts in (prompts, whole))
        yield from zip(prompt_ids, whole_ids, strict=True)


@dataclass(frozen=True)
class TokeniseStream:
    """`Tokenise` for `IterableDataset.map`: checks rows, adds `length`, drops long prompts."""

    tokenise: Tokenise
    max_length: int | None
    drop: DropLong
    name: str
    kept: tuple[str, ...] = ()  # columns of the user's that stay beside the tokens

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        checked = (formats.check_row(row, self.tokenise.row_format) for row in _rows_of(batch))
        problems = [(i, p) for i, p in zip(indices, checked, strict=True) if p is not None]
        formats.raise_problems(problems, self.name)
        columns = self.tokenise(batch, indices)
        prompts = [len(ids) for ids in columns["prompt_ids"]]
        completions = [len(ids) for ids in columns["completion_ids"]]
        check_completions(np.array(completions), np.array(columns["row"]), self.name)
        if True in columns["merged"]:
            logger.warning_once(merged_warning(self.name, "some rows"))  # type: ignore[attr-defined]
        del columns["merged"]
        limit = math.inf if self.max_length is None else self.max_length
        columns["length"] = [min(p + c, limit) for p, c in zip(prompts, completions, strict=True)]
        columns |= {column: batch[column] for column in self.kept}
        return self.drop(columns, prompts, indices[0])


def check_completions(completions: np.ndarray, number: np.ndarray, name: str) -> None:
    """Raise ValueError if the chat template or the tokenizer leaves a completion without tokens."""
    problem = Problem(
        "a completion without tokens", "the tokenizer or its chat template leaves nothing of it"
    )
    formats.raise_problems([(int(row), problem) for row in number[completions == 0]], name)


def merged_warning(name: str, which: str) -> str:
    return (
        f"in {which} of the {name} data the tokens of the prompt are not those that the prompt "
        "with its completion begins with: tokens merge across the edge, or the chat template "
        "writes the prompt differently when it stands alone. The completion is scored from where "
        "they part, and the rest of the prompt is left out, so that training sees another context "
        "than generation. End prompts at a token's edge, or use another chat template"
    )


def _split_tokens(prompt_ids: list[int], whole: list[int]) -> tuple[list[int], list[int], bool]:
    """Prompt and completion, split where the two tokenisations part, and whether that is early."""
    length = len(prompt_ids)
    if whole[:length] != prompt_ids:
        pairs = enumerate(zip(prompt_ids, whole, strict=False))
        length = next((i for i, (a, b) in pairs if a != b), len(whole))
    return prompt_ids[:length], whole[length:], length < len(prompt_ids)


def _rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


@functools.cache
def source_digest() -> str:
    """A digest of the code that turns rows into tokens."""
    modules = (sys.modules[__name__], formats, messages)
    source = "".join(map(inspect.getsource, modules))
    return hashlib.sha256(source.encode()).hexdigest()
