"""A digest of everything that a reference's log-probabilities depend on but the tokens."""

import json
from hashlib import blake2b
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastkto.attention import own_attention
from fastkto.backend import choose_backend
from fastkto.head import scoring_model, scoring_of
from fastkto.head_check import unit_rounding
from fastkto.reference import Reference

# Part of every digest: raise it when scores change for another reason than those below.
_FORMAT = 1
_REMEDY = "set precompute_ref_log_probs=False"


def reference_fingerprint(
    reference: Reference, policy: nn.Module, *, mixed_precision: str = "no"
) -> bytes:
    """32 bytes that differ if the reference differs in a bit of a weight or in how it computes.

    Its weights and persistent buffers with names and dtypes (a quantised layer's scales are among
    them), its config (rotary embeddings, softcap, scale, ...; of transformers' version too), the
    configs of its adapters, attention implementation, autocast and fp32 matmul precision, and how
    its head is scored. Not that which changes rounding alone, as the passes do.

    Reads all weights once. With a sharded model every rank has to call this. ValueError if weights
    cannot be read, or are trained with the policy.

    Args:
        reference: after `attach_scoring`, as it scores.
        policy: what its adapters are part of, if it is no model of its own.
        mixed_precision: accelerate's name for autocast's precision.
    """
    model: nn.Module = policy if reference.model is None else reference.model
    inner = scoring_model(model)
    scoring = scoring_of(inner)
    device = inner.get_input_embeddings().weight.device
    settings = {
        "format": _FORMAT,
        "config": _computation(inner.config.to_dict()),
        "adapters": _adapters(reference, model),
        "attention": own_attention(inner),
        "mixed_precision": mixed_precision,
        "fp32_rounding": unit_rounding(torch.float32),
        "head": scoring.head,
        "backend": choose_backend(scoring.backend, device).name,
    }
    digest = blake2b(digest_size=32, usedforsecurity=False)
    digest.update(json.dumps(settings, sort_keys=True, default=_plain).encode())
    others = [] if model is not policy else _other_adapters(policy, reference.adapter)
    _check_weights(model, others)
    for name, weight in model.state_dict().items():
        if not _is_in(name, others):
            _add_weight(digest, name, weight)
    return digest.digest()


def _computation(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says nothing of how hidden states are computed."""
    return {
        key: _computation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("_name_or_path", "use_cache") and not str(key).endswith("_token_id")
    }


def _adapters(reference: Reference, model: nn.Module) -> dict[str, Any]:
    """The configs of the adapters that take part in the reference's scores, by name."""
    if not isinstance(model, PeftModel):
        return {}
    names = model.active_adapters if reference.model is not None else [reference.adapter]
    return {name: model.peft_config[name].to_dict() for name in names if name is not None}


def _other_adapters(policy: nn.Module, adapter: str | None) -> list[str]:
    """The beginnings of the names of weights that are adapters' but not of this adapter.

    peft keeps them as `MODULE.KIND.ADAPTER`.
    """
    kinds = ["prompt_encoder"] if isinstance(policy, PeftModel) else []
    for name, module in policy.named_modules():
        names = getattr(module, "adapter_layer_names", ())
        names += getattr(module, "other_param_names", ())
        kinds += [f"{name}.{kind}" for kind in names]
    adapters = getattr(policy, "peft_config", {})
    return [f"{kind}.{other}" for kind in kinds for other in adapters if other != adapter]


def _is_in(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _check_weights(model: nn.Module, others: list[str]) -> None:
    """The reference's weights are all here, and none of them is trained."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            raise ValueError(
                f"precompute_ref_log_probs=True needs the whole of {name}, which ZeRO-3 has cut "
                f"up; use FSDP2 or ZeRO-2, or {_REMEDY}"
            )
        if parameter.requires_grad and not _is_in(name, others):
            raise ValueError(
                f"precompute_ref_log_probs=True needs a reference that stays what it is, and {name}"
                " is trained in the policy and used by the reference, too (an adapter with trained"
                f" biases?); pass ref_model, or {_REMEDY}"
            )


def _add_weight(digest: blake2b, name: str, weight: Any) -> None:
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    if not isinstance(weight, Tensor) or is_traceable_wrapper_subclass(weight):
        raise ValueError(
            f"precompute_ref_log_probs=True needs the bytes of {name}, a {type(weight).__name__} "
            f"that does not show them; {_REMEDY}"
        )
    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _plain(value: Any) -> Any:
    """For JSON; a set's order differs from process to process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
