"""The images of a row: model inputs that stand beside the tokens of its prompt.

A row's `media` is a dict, or None if it has no image:
    inputs: tensors such as `pixel_values` and `image_grid_thw`, whose first dimension is counted in
        images, patches or rows, so that those of several rows are concatenated along it
    token_inputs: tensors [P] with a number for each token of the prompt, such as
        `mm_token_type_ids`; 0 at every token behind it
    whole (only where a batch's images could not be told apart): a number that stands for that
        batch. Its first row's `inputs` hold all of them, so its rows stay together, in order
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Media: TypeAlias = dict[str, Any]

# Model inputs with a number for each token.
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
_PARTS = ("inputs", "token_inputs")


def check_media(media: Any, prompt_lengths: Sequence[int], remedy: str) -> None:
    """Raise ValueError if a batch's `media` is not one entry a row, laid out as above."""
    if not isinstance(media, list) or len(media) != len(prompt_lengths):
        what = f"{len(media)} entries" if isinstance(media, list) else f"a {type(media).__name__}"
        raise ValueError(
            f"media is {what} for {len(prompt_lengths)} rows, expected a list with one entry for "
            f"each; {remedy}"
        )
    for row, (one, length) in enumerate(zip(media, prompt_lengths, strict=True)):
        if one is None:
            continue
        parts = [one.get(part) if isinstance(one, dict) else None for part in _PARTS]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(
                f"entry {row} of media is no dict with {' and '.join(_PARTS)}; {remedy}"
            )
        for name, value in parts[1].items():  # type: ignore[union-attr]
            if not isinstance(value, Tensor) or value.shape != (length,):
                raise ValueError(
                    f"{name} in entry {row} of media has not one number for each of the prompt's "
                    f"{length} tokens; {remedy}"
                )


def digest_media(media: Media) -> bytes:
    """16 bytes that stand for the names, shapes and values of a row's images."""
    digest = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    for part in _PARTS:
        for name, value in sorted(media[part].items()):
            digest.update(f"{part} {name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(str(media.get("whole")).encode())
    return digest.digest()


def kind_of(media: Media) -> tuple[Any, ...]:
    """Equal for rows whose images can be concatenated; for rows of a whole batch, that batch's."""
    if "whole" in media:
        return ("whole", media["whole"])
    inputs = ((name, value.dtype, value.shape[1:]) for name, value in media["inputs"].items())
    return (*sorted(inputs, key=lambda one: one[0]), *sorted(media["token_inputs"]))


def join_media(media: Sequence[Media | None], length: int) -> dict[str, Tensor]:
    """Model inputs of a padded pass: of its rows' media, each row `length` tokens; {} for none."""
    present = [one for one in media if one is not None]
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in present for name in one["inputs"]):
        parts = [one["inputs"][name] for one in present if name in one["inputs"]]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"{name} of the rows of one pass have the shapes {shapes}, which cannot be "
                "concatenated; bring images to one size in the processor, or do not override "
                "compute_loss, which puts all rows into one pass"
            )
        joined[name] = torch.cat(parts)
    for name in dict.fromkeys(name for one in present for name in one["token_inputs"]):
        like = next(one["token_inputs"][name] for one in present if name in one["token_inputs"])
        joined[name] = like.new_zeros(len(media), length)
        for row, one in enumerate(media):
            if one is not None and name in one["token_inputs"]:
                values = one["token_inputs"][name]
                joined[name][row, : len(values)] = values
    return joined
