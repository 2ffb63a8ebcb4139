"""Images, videos and audios in LLaMA-Factory's batches, as a model's forward takes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkto.data.media import TOKEN_INPUTS, MediaTokens, media_kind
from fastkto.vision import media_tokens

SEQUENCES = ("input_ids", "attention_mask", "labels")
# Positions of a batch's own padding; a model works them out from the other inputs.
_POSITIONS = ("position_ids", "rope_deltas")
_METADATA = ("video_metadata",)  # from which the positions were worked out
_TYPES = {"image": 1, "video": 2, "audio": 3}  # in mm_token_type_ids


@dataclass(frozen=True)
class MediaReader:
    """What a model reads beside text.

    Attributes:
        tokens: those that stand for media.
        parameters: names that its forward takes.
    """

    tokens: MediaTokens
    parameters: frozenset[str]

    @classmethod
    def of(cls, model: Any) -> MediaReader:
        """That of a model, in an adapter or not."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        parameters = inspect.signature(type(model).forward).parameters
        return cls(media_tokens(model), frozenset(parameters))

    def read(self, batch: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
        """Model inputs beside the tokens of a padded batch; none if the batch is text alone.

        What LLaMA-Factory adds to a batch without an image, hidden by its attention mask, is left
        out. Raises ValueError for an input that is no tensor, and where the model needs another.

        prefix: "" for matched sequences, "kl_" for mismatched ones; the names have none.
        """
        kinds = self._kinds(batch)
        media = {
            name: _as_tensor(name, value)
            for name, value in batch.items()
            if _is_media(name) and value is not None and media_kind(name) in kinds
        }
        if not media:
            return {}
        if "moe_mm_token_type_ids" in self.parameters:
            raise ValueError(
                "the model chooses experts by moe_mm_token_type_ids, which LLaMA-Factory's batches "
                "do not have; leave out the rows with images and videos, or choose another model"
            )
        for name in TOKEN_INPUTS:
            if batch.get(prefix + name) is not None:
                media[name] = _as_tensor(name, batch[prefix + name])
        if "mm_token_type_ids" in self.parameters:  # the batches have none, or matched ones alone
            input_ids = batch[f"{prefix}input_ids"]
            types = torch.zeros_like(input_ids)
            for kind in kinds & self.tokens.keys():
                types[input_ids == self.tokens[kind]] = _TYPES[kind]
            media["mm_token_type_ids"] = types
        return media

    def _kinds(self, batch: dict[str, Any]) -> set[str]:
        """The kinds of media but for those of which there is a hidden one alone."""
        is_real = batch["attention_mask"].bool()
        hidden = set()
        for kind, token in self.tokens.items():
            is_token = batch["input_ids"] == token
            if bool((is_token & ~is_real).any()) and not bool((is_token & is_real).any()):
                hidden.add(kind)
        return set(_TYPES) - hidden


def _is_media(name: str) -> bool:
    known = {"kto_tags", *SEQUENCES, *TOKEN_INPUTS, *_POSITIONS, *_METADATA}
    return name not in known and not name.startswith("kl_")


def _as_tensor(name: str, value: Any) -> Tensor:
    """Tensors, and lists of numbers or rows as such."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the batch has {name}, a {type(value).__name__} that is no tensor; leave out the rows "
            "with it, or train with LLaMA-Factory's own trainer"
        ) from None
