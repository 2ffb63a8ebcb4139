"""The media of a whole batch, as processors concatenate them, given to the rows they belong to."""

from __future__ import annotations

import logging
from itertools import count

import torch
from torch import Tensor

from fastkto.data.media import REPEATED, Media, MediaTokens, media_kind

logger = logging.getLogger(__name__)

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_batches = count()


def cut_media(
    prompts: list[list[int]],
    inputs: dict[str, Tensor],
    token_inputs: dict[str, list[Tensor]],
    tokens: MediaTokens,
) -> list[Media | None]:
    """Each row's media, None without any.

    Images and videos stand in the order of the rows, and each takes as many tokens as its grid of
    patches says, or, without `image_grid_thw` or `video_grid_thw`, as every other one. With
    `cross_attention_mask` every input has an entry for each row. Where that does not come out
    even, and with audio, the batch stays whole: one pass, which is said once.

    Args:
        prompts: of the batch's rows, with media tokens.
        inputs: the batch's model inputs, counted in images, patches or rows in their first
            dimension.
        token_inputs: for each name the entries of each row's prompt, [P, ...].
        tokens: the tokens that stand for media.
    """
    of_tokens = [
        {name: values[index] for name, values in token_inputs.items()}
        for index in range(len(prompts))
    ]
    sizes = _entries_of_rows(prompts, inputs, tokens)
    if any(name in REPEATED for name in token_inputs):
        sizes = {name: [1] * len(prompts) for name in inputs}
    if sizes is None or any(sum(sizes[name]) != len(value) for name, value in inputs.items()):
        logger.warning_once(  # type: ignore[attr-defined]
            "The images, videos or audios of a batch (%s) cannot be told apart by their tokens, so "
            "each batch is one pass, whatever max_tokens_per_pass is; without a data_collator of "
            "your own images are cut into passes.",
            ", ".join(inputs),
        )
        number = next(_batches)
        held = [inputs, *({} for _ in prompts[1:])]
        return [Media(*parts, number) for parts in zip(held, of_tokens, strict=True)]
    parts = {name: value.split(sizes[name]) for name, value in inputs.items()}
    own = [
        {name: values[index] for name, values in parts.items() if len(values[index])}
        for index in range(len(prompts))
    ]
    return [Media(*row) if row[0] else None for row in zip(own, of_tokens, strict=True)]


def _entries_of_rows(
    prompts: list[list[int]], inputs: dict[str, Tensor], tokens: MediaTokens
) -> dict[str, list[int]] | None:
    """How many entries of each input each row has; None if that cannot be told."""
    sizes: dict[str, list[int]] = {}
    for kind in dict.fromkeys(media_kind(name) for name in inputs):
        own = {name: value for name, value in inputs.items() if media_kind(name) == kind}
        marked = [prompt.count(tokens.get(kind, -1)) for prompt in prompts]
        part = _entries_of_kind(kind, own, marked)
        if part is None:
            return None
        sizes |= part
    return sizes


def _entries_of_kind(
    kind: str, inputs: dict[str, Tensor], tokens: list[int]
) -> dict[str, list[int]] | None:
    """`_entries_of_rows` for images or for videos, which take so many `tokens` of each row."""
    total, pixels = sum(tokens), inputs.get(_PIXELS.get(kind, ""))
    if total == 0 or pixels is None:
        return None
    grid = inputs.get(f"{kind}_grid_thw")
    if grid is not None:  # some patches of an image make one token
        number, patches = len(grid), grid.cpu().prod(-1)
    elif any(value is not pixels and not _all_equal(value) for value in inputs.values()):
        return None  # sizes or masks, by which each may have another number of tokens
    else:  # of images that all have as many tokens, an entry each
        number, patches = len(pixels), torch.ones(len(pixels), dtype=torch.int64)
    tokens_of_each = (patches * total // patches.sum()).tolist()
    counts = _numbers_of_rows(tokens_of_each, tokens)
    if counts is None:
        return None
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    of_patches = [int(patches[a:b].sum()) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    return {name: counts if len(value) == number else of_patches for name, value in inputs.items()}


def _all_equal(value: Tensor) -> bool:
    return bool((value == value[:1]).all())


def _numbers_of_rows(tokens_of_each: list[int], row_tokens: list[int]) -> list[int] | None:
    """How many images fill each row's tokens, in order; None if they do not come out even."""
    left, counts = list(tokens_of_each), []
    for tokens in row_tokens:
        number = 0
        while tokens > 0 and left:
            tokens -= left.pop(0)
            number += 1
        if tokens != 0:
            return None
        counts.append(number)
    return None if left else counts
