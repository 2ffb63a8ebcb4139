"""The images of a whole batch, as processors concatenate them, given to the rows they belong to."""

from __future__ import annotations

import logging
from itertools import count

import torch
from torch import Tensor

from fastkto.data.media import Media

logger = logging.getLogger(__name__)

_GRID = "image_grid_thw"
_batches = count()


def cut_media(
    prompts: list[list[int]],
    inputs: dict[str, Tensor],
    token_inputs: dict[str, list[Tensor]],
    image_token: int | None,
) -> list[Media | None]:
    """Each row's media, None without an image.

    Images stand in the order of the rows, and each takes as many image tokens as its grid of
    patches says, or, without `image_grid_thw`, as every other one. Where that does not come out
    even, the batch stays whole: one pass, which is said once.

    Args:
        prompts: of the batch's rows, with image tokens.
        inputs: the batch's model inputs, counted in images or patches in their first dimension.
        token_inputs: for each name the numbers of each row's prompt, [P].
        image_token: the token that stands for images.
    """
    tokens = [sum(token == image_token for token in prompt) for prompt in prompts]
    of_tokens = [
        {name: values[index] for name, values in token_inputs.items()}
        for index in range(len(prompts))
    ]
    sizes = _rows_of_inputs(inputs, tokens)
    if sizes is None:
        logger.warning_once(  # type: ignore[attr-defined]
            "The images of a batch (%s) cannot be told apart by their tokens, so each batch is one "
            "pass, whatever max_tokens_per_pass is; without a data_collator of your own they are "
            "cut into passes.",
            ", ".join(inputs),
        )
        number = next(_batches)
        held = [inputs, *({} for _ in prompts[1:])]
        return [Media(*parts, number) for parts in zip(held, of_tokens, strict=True)]
    parts = {name: value.split(sizes[name]) for name, value in inputs.items()}
    return [
        Media({name: values[index] for name, values in parts.items()}, of_tokens[index])
        if number
        else None
        for index, number in enumerate(tokens)
    ]


def _rows_of_inputs(inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, list[int]] | None:
    """How many entries of each input each row has; None if that cannot be told."""
    total = sum(tokens)
    if total == 0 or "pixel_values" not in inputs or any("video" in name for name in inputs):
        return None
    grid = inputs.get(_GRID)
    if grid is None:  # of images that all have as many tokens, an entry each
        images = len(inputs["pixel_values"])
        patches = torch.ones(images, dtype=torch.int64)
    else:  # some patches of an image make one token
        images, patches = len(grid), grid.cpu().prod(-1)
    image_tokens = (patches * total // patches.sum()).tolist()
    counts = _images_of_rows(image_tokens, tokens)
    if counts is None:
        return None
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    of_patches = [int(patches[a:b].sum()) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    sizes = {}
    for name, value in inputs.items():
        if len(value) == images:
            sizes[name] = counts
        elif len(value) == int(patches.sum()):
            sizes[name] = of_patches
        else:
            return None
    return sizes


def _images_of_rows(image_tokens: list[int], row_tokens: list[int]) -> list[int] | None:
    """How many images fill each row's tokens, in order; None if they do not come out even."""
    left, counts = list(image_tokens), []
    for tokens in row_tokens:
        number = 0
        while tokens > 0 and left:
            tokens -= left.pop(0)
            number += 1
        if tokens != 0:
            return None
        counts.append(number)
    return None if left else counts
