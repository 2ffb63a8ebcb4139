"""Ragged batches: the collator, which also pairs rows for the KL estimate, and a check for others.

Dimensions: `B` rows, `S` tokens of all matched sequences, `K` tokens of all paired completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_KEYS = ("label", "input_ids", "rows", "prompt_lengths", "completion_lengths")
_KL_KEYS = ("kl_completion_ids", "kl_completion_lengths")
_ROW_COLUMNS = ("prompt_ids", "completion_ids", "label", "row")


@dataclass(frozen=True)
class KTOCollator:
    """Rows of `prepare_rows` to one ragged batch, without padding.

    Sequences longer than `max_length` (None: any length) lose their end. With `needs_kl`, row i is
    paired with the completion of row i - 1, and row 0 with that of the last row, as TRL 1.16 pairs
    them when it maps its data set: `(x_1, y_n), (x_2, y_1), ...`. Here the pairs are made anew in
    every batch, so rows may come in any order. A row alone in its batch has no partner.

    The batch is a dict:
        label: [B] bool
        input_ids: [S] int64, each row's prompt and completion, row after row
        kl_completion_ids: [K] int64, each row's paired completion, cut so that it fits behind the
            row's prompt; only with `needs_kl`
        rows: the user's row numbers
        prompt_lengths, completion_lengths, kl_completion_lengths: tokens of each row; the last is
            0 for a row without a partner
    Lists of integers stay on the CPU when the batch moves to a device, so that passes are planned
    without waiting for the device. `label` comes first: accelerate reads the batch size from it.
    """

    max_length: int | None
    needs_kl: bool = True

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be 1 or more, or None")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        _check_rows(rows, self.max_length)
        prompts = [row["prompt_ids"] for row in rows]
        completions = [row["completion_ids"] for row in rows]
        own = [self._cut(*pair) for pair in zip(prompts, completions, strict=True)]
        paired: list[list[int]] = [[] for _ in rows]
        if self.needs_kl and len(rows) > 1:
            rotated = [completions[-1], *completions[:-1]]
            paired = [self._cut(*pair) for pair in zip(prompts, rotated, strict=True)]
        matched = [ids for pair in zip(prompts, own, strict=True) for ids in pair]
        batch = {
            "label": torch.tensor([row["label"] for row in rows], dtype=torch.bool),
            "input_ids": _flatten(matched),
            "kl_completion_ids": _flatten(paired),
            "rows": [row["row"] for row in rows],
            "prompt_lengths": [len(ids) for ids in prompts],
            "completion_lengths": [len(ids) for ids in own],
            "kl_completion_lengths": [len(ids) for ids in paired],
        }
        if not self.needs_kl:
            del batch["kl_completion_ids"]
        return batch

    def _cut(self, prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
        """What of a completion fits behind a prompt."""
        if self.max_length is None:
            return completion_ids
        return completion_ids[: self.max_length - len(prompt_ids)]


def check_batch(batch: Any, *, needs_kl: bool = True) -> None:
    """Raise TypeError or ValueError if a batch is not laid out as those of `KTOCollator`.

    For batches of other collators. Looks at types and sizes only, so nothing waits for the device.
    """
    remedy = "use fastkto.data.batch.KTOCollator, or have your data_collator return what it returns"
    if not isinstance(batch, dict):
        raise TypeError(f"the batch is a {type(batch).__name__}, expected a dict; {remedy}")
    wanted = (*_KEYS, *_KL_KEYS) if needs_kl else _KEYS
    if missing := [key for key in wanted if key not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}; {remedy}"
        )
    for key in wanted:
        value, is_ids = batch[key], key.endswith("_ids")
        if key == "label" or is_ids:
            dtype = torch.int64 if is_ids else torch.bool
            if not isinstance(value, torch.Tensor) or value.ndim != 1 or value.dtype != dtype:
                raise ValueError(
                    f"{key} is {_describe(value)}, expected one row of {dtype}; {remedy}"
                )
        elif not isinstance(value, list) or not all(type(number) is int for number in value):
            raise ValueError(f"{key} is {_describe(value)}, expected a list of int; {remedy}")
        elif len(value) != len(batch["label"]):
            raise ValueError(
                f"{key} has {len(value)} entries for {len(batch['label'])} labels; {remedy}"
            )
    sums: dict[str, tuple[str, ...]] = {"input_ids": ("prompt_lengths", "completion_lengths")}
    if needs_kl:
        sums["kl_completion_ids"] = ("kl_completion_lengths",)
    for key, lengths in sums.items():
        total = sum(sum(batch[name]) for name in lengths)
        if total != len(batch[key]):
            raise ValueError(
                f"{key} has {len(batch[key])} tokens, but {' and '.join(lengths)} add up to "
                f"{total}; {remedy}"
            )


def _check_rows(rows: Sequence[dict[str, Any]], max_length: int | None) -> None:
    for row in rows:
        if missing := [column for column in _ROW_COLUMNS if column not in row]:
            raise ValueError(
                f"a row has no {', '.join(missing)}; it has {', '.join(row) or 'no columns'}; pass "
                "the data set through fastkto.data.rows.prepare_rows first"
            )
        room = 1 if max_length is None else max_length - len(row["prompt_ids"])
        if room < 1 or not row["completion_ids"]:
            raise ValueError(
                f"row {row['row']} has {len(row['prompt_ids'])} prompt and "
                f"{len(row['completion_ids'])} completion tokens, which leaves no completion "
                f"within max_length={max_length}; prepare the data set with the same max_length"
            )


def _flatten(sequences: list[list[int]]) -> torch.Tensor:
    """The sequences one after the other, `[S]` int64."""
    return torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def pair_first_rows(batch: dict[str, Any], count: int, max_length: int | None) -> dict[str, Any]:
    """The batch with its first `count` rows paired among themselves, as if there were no others.

    All of these but row 0 have a partner among them already; row 0 gets the last one's completion,
    or none if it is the only one. That completion is as its own row has it: what `max_length` cut
    off there stays cut. The rows after them are left as they are.
    """
    if count in (0, len(batch["rows"])) or "kl_completion_ids" not in batch:
        return batch
    prompts, completions = batch["prompt_lengths"], batch["completion_lengths"]
    end = sum(prompts[:count]) + sum(completions[:count])
    partner = batch["input_ids"][end - completions[count - 1] : end]
    if max_length is not None:
        partner = partner[: max_length - prompts[0]]
    if count == 1:
        partner = partner[:0]
    lengths = batch["kl_completion_lengths"]
    rest = batch["kl_completion_ids"][lengths[0] :]
    return {
        **batch,
        "kl_completion_ids": torch.cat([partner, rest]),
        "kl_completion_lengths": [len(partner), *lengths[1:]],
    }
