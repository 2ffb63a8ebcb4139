"""What vision-language models need of a run beside their rows."""

from __future__ import annotations

from typing import Any

from fastkto.config import KTOConfig
from fastkto.model_class import is_vision_language


def image_token(model: Any) -> int | None:
    """The token that stands for images in a model's input; None if it reads none."""
    for name in ("image_token_id", "image_token_index"):
        if (token := getattr(model.config, name, None)) is not None:
            return token
    return None


def set_vision_defaults(model: Any, args: KTOConfig) -> None:
    """Settings that a vision-language model needs, as in TRL, unless they are set.

    Rows without images leave the vision tower without a gradient, and DistributedDataParallel has
    to expect that. With reentrant checkpointing it cannot.
    """
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if is_vision_language(model.config) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = not reentrant or None
