"""Padded batches, as TRL's and LLaMA-Factory's collators make them, turned into ragged ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkto.data.batch import AS_GIVEN, check_tokens, prompt_key
from fastkto.data.cut_media import cut_media
from fastkto.data.dropped import dropped_rows
from fastkto.data.media import REPEATED, TOKEN_INPUTS, Media, MediaTokens
from fastkto.data.pairing import MISMATCHED_COLUMN


class _Names(NamedTuple):
    """What a library calls the parts of its batches."""

    library: str
    label: str
    mismatched: str  # prefix of the mismatched sequences' keys
    completion: str  # marks the tokens to be scored: a mask, or labels with -100 elsewhere
    reference: tuple[str, str]  # log-probabilities that are known, if they are
    remedy: str  # where it has cut away a completion


_LIBRARIES = (
    _Names(
        "TRL",
        "label",
        "KL_",
        "completion_mask",
        ("ref_logps", "ref_KL_logps"),
        "if the data_collator cuts rows, give it the max_length of the KTOConfig, by which rows "
        "without room for a completion were dropped",
    ),
    _Names(
        "LLaMA-Factory",
        "kto_tags",
        "kl_",
        "labels",
        ("", ""),
        "raise cutoff_len, or leave the row out",
    ),
)


_MEDIA = ("pixel_values", "input_features", "input_values")  # how the names of media begin


_RAGGED = ("rows", "input_ids", "prompt_lengths", "completion_lengths")


@dataclass(frozen=True)
class RaggedCollator:
    """Another library's collator, or one of the user's, whose padded batches become ragged ones."""

    collator: Callable[[list[dict[str, Any]]], Any]
    media_tokens: MediaTokens = field(default_factory=dict)  # the model's
    vocab_size: int | None = None  # its tokens
    pairs_ragged: bool = True  # whether rows of ragged batches are paired as `KTOCollator`'s are

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        numbers = [row.get("row", index) for index, row in enumerate(rows)]
        dropped = dropped_rows(rows)
        has_pairs = any(MISMATCHED_COLUMN in row for row in rows)
        batch = self.collator(rows)
        if is_padded(batch):
            batch = from_padded(batch, numbers, self.media_tokens)
        elif self.pairs_ragged and has_pairs and isinstance(batch, dict):
            # The data set has them for padded batches.
            batch = {key: value for key, value in batch.items() if not key.startswith("kl_")}
        if not (isinstance(batch, dict) and isinstance(batch.get("input_ids"), Tensor)):
            return batch  # for `check_batch` to refuse
        if set(_RAGGED) <= batch.keys() and "media" not in batch:  # a placeholder may be no token
            check_tokens(batch, self.vocab_size)
        batch.setdefault("dropped_rows", dropped)
        return batch


def is_padded(batch: Any) -> bool:
    """Whether `batch` is laid out as one of TRL's or LLaMA-Factory's collators."""
    return _names(batch) is not None


def from_padded(
    batch: dict[str, Any],
    rows: Sequence[int] | None = None,
    media_tokens: MediaTokens | None = None,
) -> dict[str, Any]:
    """The batch of `KTOCollator` that holds the same sequences, which nothing cuts after this.

    The batch has `B` rows of `T` tokens, padded on either side:
        input_ids, attention_mask: [B, T]
        completion_mask: [B, T], 1 at the completion's tokens (TRL), or labels: [B, T], -100
            everywhere else (LLaMA-Factory)
        label (TRL) or kto_tags (LLaMA-Factory): [B] bool
        KL_* or kl_*: the same three of the mismatched sequences, [B, T']; without them rows are
            paired as those of `KTOCollator` are
        ref_logps, ref_KL_logps: [B], the reference's log-probabilities in nats, if they are known
        pixel_values, pixel_values_videos, input_features or input_values, and beside them other
            tensors such as image_grid_thw: the images, videos and audios of the batch, row after
            row, the same for mismatched sequences
        token_type_ids, mm_token_type_ids: [B, T], cross_attention_mask: [B, T, ...], beside these

    What comes with it in addition: `kl_input_ids`, `kl_prompt_lengths`, `kl_completion_lengths` and
    `kl_prompt_keys` for given mismatched sequences, and `reference_logprob` and
    `kl_reference_logprob`, [B] fp64, for known scores.

    rows: numbers of the rows in errors; by default their positions in the batch.
    media_tokens: the tokens that stand for media, by which they are given to the rows; if they
        cannot be, all rows of the batch stay in one pass.

    Waits for the device of the batch, since lengths have to be known on the CPU. Raises ValueError,
    which names the row, if a completion is empty or has gaps.
    """
    names = _names(batch)
    if names is None:
        raise ValueError(
            f"the batch has {', '.join(map(str, batch))}, which is neither TRL's layout nor "
            "LLaMA-Factory's; see fastkto.data.padded.from_padded"
        )
    label = batch[names.label]
    numbers = list(range(len(label))) if rows is None else list(rows)
    matched = _ragged(batch, names, "", numbers, media_tokens or {})
    ragged = {"label": label.bool(), **matched, "rows": numbers, "truncation_mode": AS_GIVEN}
    if f"{names.mismatched}input_ids" in batch:
        mismatched = _ragged(batch, names, names.mismatched, numbers, media_tokens or {})
        ragged |= {f"kl_{key}": value for key, value in mismatched.items()}
    elif names.reference[1] in batch:
        raise ValueError(
            f"the batch has {names.reference[1]} without {names.mismatched}input_ids, and the "
            "scores are not those of the pairs that would be formed here; have the data_collator "
            f"return the mismatched sequences too, or leave {names.reference[1]} out"
        )
    for key, name in zip(
        ("reference_logprob", "kl_reference_logprob"), names.reference, strict=True
    ):
        if name in batch:
            ragged[key] = batch[name].double()
    return ragged


def _names(batch: Any) -> _Names | None:
    if not isinstance(batch, dict) and not hasattr(batch, "keys"):
        return None
    keys = set(batch.keys())
    needed = ({"input_ids", "attention_mask", one.label, one.completion} for one in _LIBRARIES)
    return next((one for one, own in zip(_LIBRARIES, needed, strict=True) if own <= keys), None)


def _ragged(
    batch: dict[str, Any],
    names: _Names,
    prefix: str,
    numbers: list[int],
    tokens: MediaTokens,
) -> dict[str, Any]:
    """`input_ids`, the lengths, images and prompt keys of one kind of sequences."""
    input_ids = batch[f"{prefix}input_ids"]
    real = batch[f"{prefix}attention_mask"].bool()
    marks = batch[f"{prefix}{names.completion}"]
    scored = (marks != -100 if names.completion == "labels" else marks.bool()) & real
    prompts, completions = [], []
    rows = zip(input_ids.cpu(), real.cpu(), scored.cpu(), strict=True)
    for number, (ids, is_real, is_scored) in zip(numbers, rows, strict=True):
        ids, is_scored = ids[is_real], is_scored[is_real]
        first = len(ids) - int(is_scored.sum())
        if first == len(ids) or not bool(is_scored[first:].all()):
            is_empty = first == len(ids)
            what = "no token" if is_empty else "tokens that are not at its end"
            remedy = f"; {names.remedy}" if is_empty else ""
            raise ValueError(
                f"row {number} has {what} marked in {prefix}{names.completion}; a sequence is a "
                f"prompt and, behind it, the completion that is scored{remedy}"
            )
        prompts.append(ids[:first].tolist())
        completions.append(ids[first:].tolist())
    flat = [*chain(*chain(*zip(prompts, completions, strict=True)))]
    media = _media(batch, names, prefix, prompts, numbers, tokens)
    ragged = {
        "input_ids": torch.tensor(flat, dtype=torch.int64).to(input_ids.device),
        "prompt_lengths": [len(ids) for ids in prompts],
        "completion_lengths": [len(ids) for ids in completions],
        "prompt_keys": [prompt_key(ids, one) for ids, one in zip(prompts, media, strict=True)],
    }
    return ragged if media == [None] * len(media) else {**ragged, "media": media}


def _media(
    batch: dict[str, Any],
    names: _Names,
    prefix: str,
    prompts: list[list[int]],
    numbers: list[int],
    tokens: MediaTokens,
) -> list[Media | None]:
    """Each row's media; those of mismatched sequences are the matched ones', by name too."""
    own = {"input_ids", "attention_mask", names.label, names.completion, *names.reference}
    inputs = {
        name: value
        for name, value in batch.items()
        if isinstance(value, Tensor)
        and name not in own | set(TOKEN_INPUTS)
        and not name.startswith(names.mismatched)
    }
    if not any(name.startswith(_MEDIA) for name in inputs):
        return [None] * len(prompts)
    if "position_ids" in inputs:
        raise ValueError(
            "the batch has images and position_ids, which are of its own padding; have the "
            "data_collator leave them out: the model works them out from mm_token_type_ids"
        )
    token_inputs = {
        name: _of_prompts(batch, prefix, name, prompts, numbers)
        for name in TOKEN_INPUTS
        if prefix + name in batch
    }
    return cut_media(prompts, inputs, token_inputs, tokens)


def _of_prompts(
    batch: dict[str, Any], prefix: str, name: str, prompts: list[list[int]], numbers: list[int]
) -> list[Tensor]:
    """One of `TOKEN_INPUTS` for the tokens of each row's prompt, [P, ...]."""
    real = batch[f"{prefix}attention_mask"].bool()
    of_prompts = []
    for number, values, is_real, prompt in zip(
        numbers, batch[prefix + name], real, prompts, strict=True
    ):
        values = values[is_real]
        if name not in REPEATED and bool(values[len(prompt) :].any()):
            raise ValueError(
                f"row {number} has {prefix}{name} other than 0 behind its prompt; models that tell "
                "a completion's tokens by them, such as PaliGemma, are not supported"
            )
        of_prompts.append(values[: len(prompt)])
    return of_prompts
