"""Ragged batches: the collator, a check for those of others, and the sequences rows are scored as.

Dimensions: `B` rows, `S` tokens of all prompts and completions.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkto.data.dropped import dropped_rows
from fastkto.data.media import Media, check_media
from fastkto.data.pairing import DATASET_PAIRING, MISMATCHED_COLUMN

_TENSORS = {"label": torch.bool, "input_ids": torch.int64}
_LISTS = ("rows", "prompt_lengths", "completion_lengths", "prompt_keys")
_SEQUENCE_KEYS = ("input_ids", "prompt_lengths", "completion_lengths", "prompt_keys", "media")
_ROW_COLUMNS = ("prompt_ids", "completion_ids", "label", "row")


TRUNCATION_MODES = ("keep_start", "keep_end")
AS_GIVEN = "as given"  # of a batch that another library's collator has cut, or not
VOCABULARY_REMEDY = (
    "use the model's own tokenizer, or resize its embeddings with "
    "model.resize_token_embeddings(len(tokenizer))"
)


@dataclass(frozen=True)
class KTOCollator:
    """Rows of `prepare_rows` to one ragged batch, without padding.

    What is longer than `max_length` loses the end of its completion ("keep_start"), or the
    beginning of its prompt ("keep_end").

    The batch is a dict:
        label: [B] bool
        input_ids: [S] int64, each row's prompt and completion, row after row; a completion has at
            most `max_length` tokens (None: any number), and is cut to what fits behind a prompt
            only when it is scored, since it is scored behind its own and behind another
        rows: the user's row numbers
        prompt_lengths, completion_lengths: tokens of each row
        prompt_keys: `prompt_key` of each row's prompt; equal keys mean that one prompt is read for
            all their completions
        kl_input_ids, kl_prompt_lengths, kl_completion_lengths, kl_prompt_keys (only if the rows
            have a column "KL_completion_ids"): the same of each prompt and that completion
        dropped_rows: how many rows of a stream were dropped just before each
        truncation_mode: that of the collator; a batch without it is cut as with "keep_start"
        media (only if a row has images): each row's `fastkto.data.media.Media`, or None
    Lists of integers and media stay on the CPU when the batch moves to a device, so that rows are
    paired and passes planned without waiting for the device. `label` comes first: accelerate reads
    the batch size from it.

    vocab_size: tokens of the model; a row with another one is refused here, on the CPU.
    """

    max_length: int | None
    truncation_mode: str = "keep_start"
    vocab_size: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; it must be 1 or more, or None")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode is {self.truncation_mode!r}; choose from {list(TRUNCATION_MODES)}"
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for row in rows:
            if missing := [column for column in _ROW_COLUMNS if column not in row]:
                raise ValueError(
                    f"a row has no {', '.join(missing)}; it has {', '.join(row) or 'no columns'}; "
                    "pass the data set through fastkto.data.rows.prepare_rows first"
                )
        batch: dict[str, Any] = {
            "label": torch.tensor([row["label"] for row in rows], dtype=torch.bool),
            **self._sequences(rows, "completion_ids"),
            "rows": [row["row"] for row in rows],
            "dropped_rows": dropped_rows(rows),
            "truncation_mode": self.truncation_mode,
        }
        if all(MISMATCHED_COLUMN in row for row in rows):
            mismatched = self._sequences(rows, MISMATCHED_COLUMN)
            batch |= {f"kl_{key}": value for key, value in mismatched.items()}
        _check_lengths(batch, self.max_length)
        check_tokens(batch, self.vocab_size)
        return batch

    def _sequences(self, rows: Sequence[dict[str, Any]], column: str) -> dict[str, Any]:
        """The entries of `_SEQUENCE_KEYS` for each row's prompt and the completion in `column`."""
        prompts = [row["prompt_ids"] for row in rows]
        most = self.max_length
        kept = slice(most) if self.truncation_mode == "keep_start" else slice(-(most or 0), None)
        completions = [row[column][kept] for row in rows]
        media = [row.get("media") for row in rows]
        keys = zip(prompts, media, strict=True)
        sequences = {
            "input_ids": _flatten([*chain(*zip(prompts, completions, strict=True))]),
            "prompt_lengths": [len(ids) for ids in prompts],
            "completion_lengths": [len(ids) for ids in completions],
            "prompt_keys": [prompt_key(ids, images) for ids, images in keys],
        }
        return {**sequences, "media": media} if any(one is not None for one in media) else sequences


def prompt_key(prompt_ids: Sequence[int], media: Media | None = None) -> int:
    """A number of 63 bits that stands for a prompt with its images, the same in every process."""
    digest = hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=8, usedforsecurity=False)
    if media is not None:
        digest.update(media.digest())
    return int.from_bytes(digest.digest(), "big") >> 1


def check_batch(batch: Any, max_length: int | None) -> None:
    """Raise TypeError or ValueError if a batch is not laid out as those of `KTOCollator`.

    For batches of other collators. Looks at types and sizes only, so nothing waits for the device.
    """
    remedy = "use fastkto.data.batch.KTOCollator, or have your data_collator return what it returns"
    if not isinstance(batch, dict):
        raise TypeError(f"the batch is a {type(batch).__name__}, expected a dict; {remedy}")
    if missing := [key for key in (*_TENSORS, *_LISTS) if key not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}; {remedy}"
        )
    for key, dtype in _TENSORS.items():
        value = batch[key]
        if not isinstance(value, Tensor) or value.ndim != 1 or value.dtype != dtype:
            raise ValueError(f"{key} is {_describe(value)}, expected one row of {dtype}; {remedy}")
    for key in _LISTS:
        value = batch[key]
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise ValueError(f"{key} is {_describe(value)}, expected a list of int; {remedy}")
        if len(value) != len(batch["label"]):
            raise ValueError(
                f"{key} has {len(value)} entries for {len(batch['label'])} labels; {remedy}"
            )
    total, tokens = sum(_alternating_lengths(batch)), len(batch["input_ids"])
    if total != tokens:
        raise ValueError(
            f"input_ids has {tokens} tokens, but prompt_lengths and completion_lengths add up to "
            f"{total}; {remedy}"
        )
    _check_lengths(batch, max_length)
    if "media" in batch:
        check_media(batch["media"], batch["prompt_lengths"], remedy)
        if _keeps_end(batch):
            raise ValueError(
                "the batch has images and truncation_mode='keep_end', which would cut the prompts "
                "that they stand in; use 'keep_start'"
            )
    lengths: dict[int, int] = {}
    for key, length in zip(batch["prompt_keys"], batch["prompt_lengths"], strict=True):
        if lengths.setdefault(key, length) != length:
            raise ValueError(
                f"prompt_keys has {key} for prompts of {lengths[key]} and {length} tokens, and "
                "prompts with equal keys are read once for all their completions; use "
                "fastkto.data.batch.prompt_key(prompt_ids)"
            )


def check_given_mismatched(batch: dict[str, Any]) -> None:
    """Raise ValueError if a batch does not bring its mismatched sequences."""
    if "kl_input_ids" not in batch:
        raise ValueError(
            f"kl_pairing is {DATASET_PAIRING!r}, and a batch of the data_collator has no "
            f"kl_input_ids; use fastkto.data.batch.KTOCollator, which makes them of the column "
            f"{MISMATCHED_COLUMN}, or kl_pairing='rotate'"
        )


def check_tokens(batch: dict[str, Any], vocab_size: int | None) -> None:
    """Raise ValueError if a row has a token that the model does not have.

    For batches on the CPU, since on a GPU it would wait for the device.
    """
    for kind in (batch, _given(batch)):
        if vocab_size is None or kind is None or not (kind["input_ids"] >= vocab_size).any():
            continue
        for row, pieces in zip(batch["rows"], split_rows(kind), strict=True):
            if (largest := int(torch.cat(pieces).max())) >= vocab_size:
                raise ValueError(
                    f"row {row} has the token {largest:,}, and the model or its reference has a "
                    f"vocabulary of {vocab_size:,}; {VOCABULARY_REMEDY}"
                )


def _check_lengths(batch: dict[str, Any], max_length: int | None) -> None:
    """Every row has a completion, and room for a token of it behind its prompt."""
    lengths = zip(batch["prompt_lengths"], batch["completion_lengths"], strict=True)
    limit = None if _keeps_end(batch) else _limit(batch, max_length)
    for row, (prompt, completion) in zip(batch["rows"], lengths, strict=True):
        if prompt < 0 or completion < 1 or (limit is not None and prompt >= limit):
            raise ValueError(
                f"row {row} has {prompt} prompt and {completion} completion tokens, which leaves "
                f"no completion within max_length={max_length}; prepare the data set with the "
                "same max_length"
            )


def _flatten(sequences: list[list[int]]) -> Tensor:
    """The sequences one after the other, `[S]` int64."""
    return torch.tensor([token for ids in sequences for token in ids], dtype=torch.int64)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


class TokenSequence(NamedTuple):
    """A prompt and the completion that is scored behind it; views of a batch where it is local."""

    prompt: Tensor  # int64, may be empty
    completion: Tensor  # int64, at least one token, cut to what fits behind the prompt
    prompt_key: int  # equal for equal prompts
    media: Media | None = None  # the prompt's images

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.completion)


def matched_sequences(batch: dict[str, Any], max_length: int | None) -> list[TokenSequence]:
    """Each row's prompt with its own completion: `B` sequences of at most `max_length` tokens."""
    form = partial(_form, max_length=_limit(batch, max_length), keep_end=_keeps_end(batch))
    return [
        form(prompt, completion, key, media)
        for (prompt, completion), key, media in zip(
            split_rows(batch), batch["prompt_keys"], _media(batch), strict=True
        )
    ]


def mismatched_sequences(
    batch: dict[str, Any], partners: Sequence[Tensor | None], max_length: int | None
) -> list[TokenSequence | None]:
    """Each row's prompt, with its images, and its partner's completion; None without a partner."""
    form = partial(_form, max_length=_limit(batch, max_length), keep_end=_keeps_end(batch))
    rows = zip(split_rows(batch), partners, batch["prompt_keys"], _media(batch), strict=True)
    return [
        None if partner is None else form(prompt, partner, key, media)
        for (prompt, _), partner, key, media in rows
    ]


def given_mismatched(batch: dict[str, Any], max_length: int | None) -> list[TokenSequence] | None:
    """The mismatched sequences that the batch brings, `B`; None if it has none."""
    given = _given(batch)
    return None if given is None else matched_sequences(given, max_length)


def _given(batch: dict[str, Any]) -> dict[str, Any] | None:
    """The mismatched sequences that the batch brings, laid out as its matched ones are."""
    if "kl_input_ids" not in batch:
        return None
    own = {key: batch[f"kl_{key}"] for key in _SEQUENCE_KEYS if f"kl_{key}" in batch}
    return {**own, "truncation_mode": batch.get("truncation_mode")}


def split_rows(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Each row's prompt and its completion, not cut to fit behind any prompt; views."""
    pieces = torch.split(batch["input_ids"], _alternating_lengths(batch))
    return list(zip(pieces[::2], pieces[1::2], strict=True))


def _media(batch: dict[str, Any]) -> list[Media | None]:
    """Each row's images, None without."""
    return batch.get("media") or [None] * len(batch["prompt_keys"])


def _alternating_lengths(batch: dict[str, Any]) -> list[int]:
    return [*chain(*zip(batch["prompt_lengths"], batch["completion_lengths"], strict=True))]


def _limit(batch: dict[str, Any], max_length: int | None) -> int | None:
    return None if batch.get("truncation_mode") == AS_GIVEN else max_length


def _keeps_end(batch: dict[str, Any]) -> bool:
    return batch.get("truncation_mode") == "keep_end"


def _form(
    prompt: Tensor,
    completion: Tensor,
    prompt_key: int,
    media: Media | None,
    *,
    max_length: int | None,
    keep_end: bool,
) -> TokenSequence:
    if max_length is not None and keep_end:
        completion = completion[-max_length:]
        room = max_length - len(completion)
        if len(prompt) > room:
            # Prompts that are cut alike are read once for all their completions.
            prompt, prompt_key = prompt[len(prompt) - room :], hash((prompt_key, room))
    elif max_length is not None:
        # A negative end would cut elsewhere; check_batch has refused prompts that leave no room.
        assert len(prompt) < max_length, (len(prompt), max_length)
        completion = completion[: max_length - len(prompt)]
    assert len(completion) > 0
    return TokenSequence(prompt, completion, prompt_key, media)
