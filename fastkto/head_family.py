"""What a model family does between its hidden states and its logits.

A family with an odd head belongs here: `LOGIT_FACTORS` and `SOFTCAPS` are the lists to extend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.head_lora import HeadLora, is_lora, read_lora, unreadable_adapter
from fastkto.quantised import is_quantised

# Config fields by which families scale their logits, and the power with which the field enters.
# logit_scale: Cohere; lm_head_multiplier: Falcon-H1; output_multiplier: Muse;
# logits_scaling: Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
LOGIT_FACTORS = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
}
# softcap * tanh(logits / softcap): Gemma 2 and others; RecurrentGemma; xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_WAY_OUT = 'use head="logits", which scores with the model\'s own logits in slices'


class Head(NamedTuple):
    """What turns hidden states into logits: softcap(logit_scale * (hidden @ weight.T + bias)).

    What `adapters` add is inside the scale and the softcap.
    """

    module: Any  # an nn.Linear or like one: weight [V, D] and bias [V] or None
    logit_scale: float
    softcap: float | None
    adapters: tuple[HeadLora, ...] = ()
    wrappers: tuple[nn.Module, ...] = ()  # around `module`, outermost first

    @property
    def called(self) -> list[nn.Module]:
        """The modules that the model would call, whose hooks gather weights."""
        parts = [part for a in self.adapters for part in (a.down, a.up, a.magnitude)]
        return [*self.wrappers, self.module, *(part for part in parts if part is not None)]


def read_head(model: PreTrainedModel) -> Head:
    """The module, scale and softcap between `model`'s hidden states and its logits."""
    module = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        module = (
            module.original_module
            if module.disable_adapters or not active
            else module.modules_to_save[active[0]]
        )
    name = type(model).__name__
    if (adapter := unreadable_adapter(module)) is not None:
        raise ValueError(
            f"the output head of {name} carries a peft adapter that is not scored by its weights "
            f"({adapter}); drop the head from target_modules, or {_WAY_OUT}"
        )
    wrappers: tuple[nn.Module, ...] = ()
    adapters: tuple[HeadLora, ...] = ()
    if is_lora(module):
        wrappers, adapters, module = (module,), read_lora(module), module.base_layer
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(module, nn.Module):
        raise ValueError(
            f"{name} has no output head with a weight (got {type(module).__name__}); {_WAY_OUT}"
        )
    if is_quantised(weight):
        raise ValueError(
            f"the output head of {name} is quantised ({type(weight).__name__} of {weight.dtype}), "
            f"expected floating point; load the head unquantised, or {_WAY_OUT}"
        )
    return Head(module, *_read_transform(model.config.get_text_config()), adapters, wrappers)


def _read_transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a text config."""
    logit_scale = 1.0
    for field, power in LOGIT_FACTORS.items():
        factor = getattr(config, field, None)
        if isinstance(factor, (int, float)):  # MPT's may be a word, which its forward ignores
            logit_scale *= factor if config.model_type == "hyperclovax" else factor**power
    softcaps = (getattr(config, field, None) for field in SOFTCAPS)
    return logit_scale, next((softcap for softcap in softcaps if softcap is not None), None)
