"""LoRA and DoRA adapters on the output head, read from peft's layer: nothing has to be merged."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class HeadLora(NamedTuple):
    """Adds scaling * (dropout(hidden) @ down.weight.T @ up.weight.T + up.bias) to the logits.

    With a magnitude (DoRA) there is no up.bias, and the logits but for the head's own bias are then
    multiplied by the factor in `fastkto.head_dora`.
    """

    down: Any  # peft's lora_A, an nn.Linear: weight [E, D]
    up: Any  # peft's lora_B, an nn.Linear: weight [V, E], bias [V] or None
    dropout: nn.Module
    scaling: float
    magnitude: Any | None = None  # DoRA's, a module with weight [V]


def is_lora(module: Any) -> bool:
    """Whether it computes as peft's LoRA layer of a linear layer; FSDP2 makes a class of its own.

    Other tuners, and LoRA on quantised layers, are other classes.
    """
    return isinstance(module, LoraLinear) and type(module).forward is LoraLinear.forward


def unreadable_adapter(module: Any) -> str | None:
    """What peft has put on a head beside LoRA, rsLoRA and DoRA; None if nothing.

    Other variants of LoRA (aLoRA, Arrow, ...) compute something else.
    """
    if is_lora(module):
        names = _active(module)
        for name in names:
            variant = module.lora_variant.get(name)
            if variant is None:
                continue
            if type(variant) is not DoraLinearVariant:
                return f"{type(variant).__name__} of adapter {name!r}"
            if len(names) > 1:  # peft multiplies what came before it, and not what comes after
                return f"DoRA adapter {name!r} is active among others; activate it alone"
            # peft scales what it computes from dropped hidden states, and adds W (hidden - dropped)
            if getattr(module.lora_dropout[name], "p", 0.0) > 0:
                return (
                    f"DoRA adapter {name!r} has dropout, so that its logits are not a product with "
                    "one hidden state; set lora_dropout=0, or disable_dropout=True"
                )
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
            layer.lora_A[name],
            layer.lora_B[name],
            layer.lora_dropout[name],
            layer.scaling[name],
            layer.lora_magnitude_vector[name] if name in layer.lora_variant else None,
        )
        for name in _active(layer)
    )


def _active(layer: LoraLinear) -> list[str]:
    """Adapters that are on, and not in the base layer's weight already."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]
