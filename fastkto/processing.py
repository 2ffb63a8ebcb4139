"""The tokenizer of a run, or the processor of a vision-language model."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from fastkto.model_class import is_vision_language, read_config


def load_processing(
    processing_class: Any, model: Any, init_kwargs: dict[str, Any]
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer or processor given, or the one beside the model; it has a padding token."""
    if processing_class is None:
        path = model if isinstance(model, str) else model.config._name_or_path
        if not path:
            raise ValueError(
                "processing_class is missing, and model has no path beside which there would be a "
                "tokenizer; pass the tokenizer it was made with"
            )
        config = read_config(path, init_kwargs) if isinstance(model, str) else model.config
        if is_vision_language(config):
            processing_class = AutoProcessor.from_pretrained(
                path,
                revision=init_kwargs.get("revision"),
                trust_remote_code=init_kwargs["trust_remote_code"],
            )
    if not isinstance(processing_class, ProcessorMixin):
        return _load_tokenizer(processing_class, model, init_kwargs)
    _load_tokenizer(processing_class.tokenizer, model, init_kwargs)
    return processing_class


def _load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, model: Any, init_kwargs: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside the model; it pads with EOS if it has no pad token."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else model.config._name_or_path,
            revision=init_kwargs.get("revision"),
            trust_remote_code=init_kwargs["trust_remote_code"],
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(tokenizer).__name__}; pass a tokenizer, or the "
            "processor of a vision-language model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(processing: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself; a processor's has the processor's chat template."""
    if not isinstance(processing, ProcessorMixin):
        return processing
    tokenizer = processing.tokenizer
    if tokenizer.chat_template is None and processing.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = processing.chat_template
    return tokenizer
