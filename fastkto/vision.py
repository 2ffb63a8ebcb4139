"""What vision-language models need of a run beside their rows."""

from __future__ import annotations

from typing import Any

from fastkto.config import KTOConfig
from fastkto.data.media import MediaTokens
from fastkto.model_class import is_vision_language


def media_tokens(model: Any) -> MediaTokens:
    """The tokens that stand for images, videos and audios in a model's input."""
    tokens: MediaTokens = {}
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if (token := getattr(model.config, name, None)) is not None:
                tokens.setdefault(kind, token)
    return tokens


def check_vision_model(model: Any) -> None:
    """Refuse models that need more than tokens and media say."""
    if "omni" in model.config.model_type:
        raise ValueError(
            f"the model is a {model.config.model_type}, whose positions depend on how videos and "
            "their sound are interleaved, which passes do not provide for; choose another model"
        )
    if model.config.model_type == "paligemma":
        raise ValueError(
            "the model is a PaliGemma, whose tokens of a prompt attend to each other in both "
            "directions, which passes do not provide for; choose a model with causal attention, "
            "such as Qwen2.5-VL or Gemma 3"
        )


def set_vision_defaults(model: Any, args: KTOConfig) -> None:
    """Settings that a vision-language model needs, as in TRL, unless they are set.

    Rows without images leave the vision tower without a gradient, and DistributedDataParallel has
    to expect that. With reentrant checkpointing it cannot.
    """
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if is_vision_language(model.config) and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = not reentrant or None
