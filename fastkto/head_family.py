"""What a model family does between its hidden states and its logits.

A family with an odd head belongs here: `LOGIT_FACTORS` and `SOFTCAPS` are the lists to extend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

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
    """What turns hidden states into logits: softcap(logit_scale * (hidden @ weight.T + bias))."""

    module: Any  # an nn.Linear or like one: weight [V, D] and bias [V] or None
    logit_scale: float
    softcap: float | None


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
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        raise ValueError(
            f"the output head of {name} carries a peft adapter ({type(module).__name__}), which is "
            f"not a plain weight; drop the head from target_modules, or {_WAY_OUT}"
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(module, nn.Module):
        raise ValueError(
            f"{name} has no output head with a weight (got {type(module).__name__}); {_WAY_OUT}"
        )
    # fp8 stands for a weight with scales; torchao's weights are subclasses that show a plain dtype
    is_plain = weight.is_floating_point() and weight.dtype.itemsize >= 2
    if not is_plain or (is_traceable_wrapper_subclass(weight) and not isinstance(weight, DTensor)):
        raise ValueError(
            f"the output head of {name} is quantised ({type(weight).__name__} of {weight.dtype}), "
            f"expected floating point; load the head unquantised, or {_WAY_OUT}"
        )
    return Head(module, *_read_transform(model.config.get_text_config()))


def _read_transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a text config."""
    logit_scale = 1.0
    for field, power in LOGIT_FACTORS.items():
        factor = getattr(config, field, None)
        if isinstance(factor, (int, float)):  # MPT's may be a word, which its forward ignores
            logit_scale *= factor if config.model_type == "hyperclovax" else factor**power
    softcaps = (getattr(config, field, None) for field in SOFTCAPS)
    return logit_scale, next((softcap for softcap in softcaps if softcap is not None), None)
