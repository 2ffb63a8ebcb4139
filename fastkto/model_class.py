"""Which class of transformers loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

# Arguments of from_pretrained that say where a model's files are.
_PLACE = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")


def is_vision_language(config: PretrainedConfig) -> bool:
    """Whether a config is that of a model that reads images and writes text."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_model(path: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model at a path or id, of the class for images and text if its config asks for it."""
    config = read_config(path, init_kwargs)
    auto = AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM
    has_own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not (is_vision_language(config) or has_own_class or config.model_type in CAUSAL):
        raise ValueError(
            f"{path} holds a model of the type {config.model_type!r}, which transformers has no "
            "causal language model of; choose a decoder, such as Qwen3 or Llama"
        )
    return auto.from_pretrained(path, **init_kwargs)


def read_config(path: str, init_kwargs: dict[str, Any]) -> PretrainedConfig:
    """The config of the model that `from_pretrained(path, **init_kwargs)` loads."""
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ValueError(f"there is no folder {path}; give a model's folder or hub id")
    kwargs = {name: init_kwargs[name] for name in _PLACE if name in init_kwargs}
    return AutoConfig.from_pretrained(path, **kwargs)
