"""Rows with images, turned into tokens and model inputs batch by batch.

Images are large and decoding them is slow, so a processor sees them when a batch is formed. Tokens
are those of TRL 1.16's `DataCollatorForVisionUnpairedPreference`: prompt and completion are
tokenised apart, and no end-of-sequence token is added to text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Image
from torch import Tensor
from transformers import ProcessorMixin

from fastkto.data import formats
from fastkto.data.batch import KTOCollator
from fastkto.data.media import TOKEN_INPUTS, Media
from fastkto.data.messages import render, with_images

IMAGE_COLUMNS = ("image", "images")
RAW_COLUMNS = ["prompt", "completion", *IMAGE_COLUMNS, "tools", "chat_template_kwargs"]


@dataclass(frozen=True)
class ImageCollator:
    """Rows with images to one batch as that of `KTOCollator`, through a processor.

    A row has `prompt`, `completion`, `label`, and `images`, a list, or `image`; an empty list or
    None is a row of text alone. Prompts and completions are conversations or text; the text of a
    prompt has the processor's placeholder for each image. Rows of `prepare_rows` may be among them.
    """

    processor: ProcessorMixin
    max_length: int | None
    truncation_mode: str = "keep_start"  # "keep_end": for rows of `prepare_rows` only
    vocab_size: int | None = None  # as for `KTOCollator`

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        numbered = ({"row": index, **row} for index, row in enumerate(rows))
        encoded = [row if "prompt_ids" in row else self.encode(row) for row in numbered]
        # A placeholder may be no token of the model.
        has_media = any(row.get("media") is not None for row in encoded)
        vocab_size = None if has_media else self.vocab_size
        return KTOCollator(self.max_length, self.truncation_mode, vocab_size)(encoded)

    def encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """`prompt_ids`, `completion_ids`, `label`, `row` and `media` of a row."""
        number, images = row["row"], _images(row)
        label = formats.read_label(row.get("label"))
        if label is None:
            raise ValueError(f"row {number} has the label {row.get('label')!r}; {formats.LABELS}")
        try:
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, list):
                prompt = with_images(prompt, images)
                arguments = formats.template_arguments(row)
                prompt, completion = render(self.processor, prompt, completion, arguments)
            inputs = self._process(prompt, images)
            completion_ids = self._process(completion, [])["input_ids"][0].tolist()
        except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
            raise ValueError(
                f"row {number} with {len(images)} images cannot be processed by "
                f"{type(self.processor).__name__} ({error}); a prompt has one placeholder for each "
                "image, in text as in the processor's own messages"
            ) from error
        prompt_ids = inputs.pop("input_ids")[0].tolist()
        self._check(number, images, prompt_ids, completion_ids)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "label": label,
            "row": number,
            "media": _media(inputs) if images else None,
        }

    def _process(self, text: str, images: list[Any]) -> dict[str, Any]:
        # Chat templates write the special tokens themselves.
        inputs = self.processor(
            images=[images] if images else None,
            text=[text],
            add_special_tokens=False,
            return_tensors="pt",
        )
        return {name: value for name, value in inputs.items() if name != "attention_mask"}

    def _check(
        self, number: int, images: list[Any], prompt_ids: list[int], completion_ids: list[int]
    ) -> None:
        """Raise ValueError for a row that cannot be scored."""
        placeholder = getattr(self.processor, "image_token_id", None)
        # which processors of older transformers do not check
        if placeholder in (completion_ids if images else prompt_ids + completion_ids):
            raise ValueError(
                f"row {number} has a placeholder for which no images were passed; take it out of "
                "the text, or add the image (a completion has none)"
            )
        if images and placeholder is not None and placeholder not in prompt_ids:
            raise ValueError(
                f"row {number} with {len(images)} images has no placeholder for them in its "
                f"prompt, as {type(self.processor).__name__} writes one; add one for each"
            )
        if not completion_ids:
            raise ValueError(
                f"row {number} has a completion without tokens; the processor or its chat template "
                "leaves nothing of it"
            )
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"row {number} has a prompt of {len(prompt_ids)} tokens, with those of "
                f"{len(images)} images, which leaves no room for a completion within max_length="
                f"{self.max_length}; raise max_length (None: any length), have the processor make "
                "images smaller, or leave the row out"
            )


def _images(row: dict[str, Any]) -> list[Any]:
    """A row's images, decoded; a column `image` holds one."""
    try:
        images = row.get("image") if row.get("images") is None else row["images"]
        if images is None:
            return []
        images = images if isinstance(images, list | tuple) else [images]
        return [Image().decode_example(one) if isinstance(one, dict) else one for one in images]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"row {row['row']} has an image that cannot be read ({error}); replace it, or leave "
            "the row out"
        ) from error


def _media(inputs: dict[str, Any]) -> Media:
    """What a processor returns beside `input_ids`, for one row."""
    media = Media({}, {})
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the processor returns {name} as a {type(value).__name__}, expected a tensor"
            )
        if name in TOKEN_INPUTS:
            media.token_inputs[name] = value[0]
        else:
            media.inputs[name] = value
    return media
