"""The images, videos and audios of a row: model inputs beside the tokens of its prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

# Model inputs with an entry for each token. Behind the prompt stand zeros, or its last entry again.
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask")
REPEATED = ("cross_attention_mask",)

# The tokens that stand for "image", "video" and "audio", of those that a model reads.
MediaTokens: TypeAlias = dict[str, int]


def media_kind(name: str) -> str:
    """Which of "image", "video" and "audio" a model input is of."""
    if "video" in name or name == "second_per_grid_ts":
        return "video"
    is_audio = name.startswith(("input_features", "input_values", "feature_attention_mask"))
    return "audio" if is_audio or "audio" in name else "image"


@dataclass(frozen=True)
class Media:
    """What a processor makes of one row's images, videos and audios.

    It stays on the CPU when its batch moves to a device, and goes there pass by pass, so that
    memory there follows the passes and not the batch.

    Attributes:
        inputs: tensors such as `pixel_values` and `image_grid_thw`, whose first dimension counts
            images, patches or rows, so that those of several rows are concatenated along it.
        token_inputs: `TOKEN_INPUTS`, tensors [P, ...] int64 with an entry for each token of the
            prompt, such as `mm_token_type_ids`.
        whole: only where a batch's media could not be told apart, a number that stands for that
            batch. The `inputs` of its first row hold all of them, so its rows stay together.
    """

    inputs: dict[str, Tensor]
    token_inputs: dict[str, Tensor]
    whole: int | None = None

    def pin_memory(self) -> Media:
        """For DataLoader: a copy that can be moved without waiting."""
        inputs, token_inputs = (
            {name: value.pin_memory() for name, value in part.items()}
            for part in (self.inputs, self.token_inputs)
        )
        return replace(self, inputs=inputs, token_inputs=token_inputs)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for rows whose inputs can be concatenated, and for all rows of a whole batch."""
        if self.whole is not None:
            return ("whole", self.whole)
        inputs = [(name, self.inputs[name]) for name in sorted(self.inputs)]
        inputs += [(name, self.token_inputs[name]) for name in sorted(self.token_inputs)]
        return tuple((name, value.dtype, value.shape[1:]) for name, value in inputs)

    def digest(self) -> bytes:
        """16 bytes that stand for the names, types, shapes and values."""
        digest = hashlib.blake2b(digest_size=16, usedforsecurity=False)
        for part in (self.inputs, self.token_inputs):
            for name, value in sorted(part.items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(str(self.whole).encode())
        return digest.digest()


def check_media(media: Any, prompt_lengths: Sequence[int], remedy: str) -> None:
    """Raise ValueError unless a batch's `media` is a list of a `Media` or None for each row."""
    if not isinstance(media, list) or len(media) != len(prompt_lengths):
        what = f"{len(media)} entries" if isinstance(media, list) else f"a {type(media).__name__}"
        raise ValueError(
            f"media is {what} for {len(prompt_lengths)} rows, expected a list with one entry for "
            f"each; {remedy}"
        )
    for row, (one, length) in enumerate(zip(media, prompt_lengths, strict=True)):
        if not isinstance(one, Media | None):
            raise ValueError(
                f"entry {row} of media is a {type(one).__name__}, expected a "
                f"fastkto.data.media.Media or None; {remedy}"
            )
        for name, value in one.token_inputs.items() if one is not None else ():
            if value.shape[:1] != (length,):
                raise ValueError(
                    f"{name} in entry {row} of media has the shape {tuple(value.shape)}, expected "
                    f"one entry for each of the prompt's {length} tokens; {remedy}"
                )


def join_media(
    media: Sequence[Media | None], length: int, device: torch.device
) -> dict[str, Tensor]:
    """Model inputs of a padded pass: of its rows' media, each row `length` tokens; {} for none."""
    present = [one for one in media if one is not None]
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in present for name in one.inputs):
        parts = [one.inputs[name] for one in present if name in one.inputs]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"{name} of the rows of one pass have the shapes {shapes}, which cannot be "
                "concatenated; bring images to one size in the processor, or leave out "
                "compute_metrics and what overrides compute_loss: these put a batch into one pass"
            )
        moved = [part.to(device, non_blocking=True) for part in parts]
        joined[name] = torch.cat(moved)
    for name in dict.fromkeys(name for one in present for name in one.token_inputs):
        rows = [None if one is None else one.token_inputs.get(name) for one in media]
        joined[name] = _join_tokens(name, rows, length).to(device, non_blocking=True)
    return joined


def _join_tokens(name: str, rows: Sequence[Tensor | None], length: int) -> Tensor:
    """Rows of one of `TOKEN_INPUTS`, [P, ...] each, as `[len(rows), length, ...]`."""
    shape = next(row.shape[1:] for row in rows if row is not None)
    joined = torch.zeros(len(rows), length, *shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        if row is not None:
            joined[index, : len(row)] = row
            if name in REPEATED:
                joined[index, len(row) :] = row[-1]
    return joined
