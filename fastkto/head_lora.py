"""LoRA adapters on the output head, read from peft's layer so that nothing has to be merged."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class HeadLora(NamedTuple):
    """Adds scaling * (dropout(hidden) @ down.weight.T @ up.weight.T + up.bias) to the logits."""

    down: Any  # peft's lora_A, an nn.Linear: weight [E, D]
    up: Any  # peft's lora_B, an nn.Linear: weight [V, E], bias [V] or None
    dropout: nn.Module
    scaling: float


def is_lora(module: Any) -> bool:
    """Whether it computes as peft's LoRA layer of a linear layer; FSDP2 makes a class of its own.

    Other tuners, and LoRA on quantised layers, are other classes.
    """
    return isinstance(module, LoraLinear) and type(module).forward is LoraLinear.forward


def unreadable_adapter(module: Any) -> str | None:
    """What peft has put on a head that is not LoRA alone, plain or rsLoRA; None if nothing.

    Variants of LoRA (DoRA, aLoRA, Arrow, ...) do more than add a product of two factors. DoRA would
    need a factor for each token of the vocabulary, made of the norms of a merged weight.
    """
    if is_lora(module):
        for name in _active(module):
            if name in module.lora_variant:
                return f"{type(module.lora_variant[name]).__name__} of adapter {name!r}"
        module = module.base_layer
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return f"{type(module).__module__}.{type(module).__name__}"
    return None


def read_lora(layer: LoraLinear) -> tuple[HeadLora, ...]:
    """The adapters that take part in `layer`'s output beside its base layer."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward does
    return tuple(
        HeadLora(
            layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
        )
        for name in _active(layer)
    )


def _active(layer: LoraLinear) -> list[str]:
    """Adapters that are on, and not in the base layer's weight already."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]
