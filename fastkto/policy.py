"""The policy before training: loading, adapters, dropout."""

import logging
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fastkto.config import KTOConfig
from fastkto.model_class import load_model

logger = logging.getLogger(__name__)

DTYPES = ("auto", "bfloat16", "float16", "float32")


def model_init_kwargs(args: KTOConfig, quantization_config: Any, model: Any) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`, with TRL's defaults (fp32 unless told otherwise).

    Those of the config are for a `model` that is a path or id.
    """
    given = args.model_init_kwargs or {}
    if isinstance(given, str):
        raise TypeError(f"model_init_kwargs is {given!r}; pass a dict or a JSON object")
    if given and not isinstance(model, str):
        logger.warning(
            "model_init_kwargs is ignored, since model is a %s already and not a path",
            type(model).__name__,
        )
        given = {}
    kwargs: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    kwargs.update(given)
    if isinstance(kwargs["dtype"], str):
        if kwargs["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {kwargs['dtype']!r}; choose from {DTYPES}")
        if kwargs["dtype"] != "auto":
            kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is given twice, as an argument of the trainer and in "
                "args.model_init_kwargs; keep the argument"
            )
        kwargs["quantization_config"] = quantization_config
    return kwargs


def load_policy(
    model: str | PreTrainedModel | PeftModel, init_kwargs: dict[str, Any], peft_config: Any
) -> PreTrainedModel | PeftModel:
    """The model, loaded if it is a path or id, in a new adapter if there is a `peft_config`."""
    if isinstance(model, str):
        model = load_model(model, init_kwargs)
    elif "quantization_config" in init_kwargs:
        raise ValueError(
            "quantization_config applies when a model is loaded, and model is already an object; "
            "pass the model's path, or leave quantization_config out"
        )
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; pass a peft.PeftConfig such as "
            "peft.LoraConfig(...)"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel already and peft_config asks for another adapter; merge the "
            "first with model.merge_and_unload(), or leave peft_config out to train it further"
        )
    return get_peft_model(model, peft_config)


def prepare_adapter(policy: PreTrainedModel | PeftModel, args: KTOConfig) -> None:
    """What adapters need for gradient checkpointing and on quantised weights, as in TRL."""
    if not isinstance(policy, PeftModel):
        return
    if args.load_best_model_at_end and policy.active_adapter != "default":
        raise ValueError(
            f"load_best_model_at_end=True and the adapter is named {policy.active_adapter!r}: the "
            "best one of a run is loaded only if its name is 'default'; make the adapter without "
            "adapter_name, or leave load_best_model_at_end out"
        )
    if args.gradient_checkpointing:
        # transformers should do this: https://github.com/huggingface/transformers/issues/42489
        policy.enable_input_require_grads()
    if getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
        for name, parameter in policy.named_parameters():
            # DoRA's magnitudes change by less than bf16 can represent.
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, that of attention weights included."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
