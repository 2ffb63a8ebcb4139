"""Where reference log-probabilities come from: a second model, or the policy's own adapters."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.model_class import load_model
from fastkto.sharding import gathered, is_divided_by_zero

logger = logging.getLogger(__name__)

FROZEN_ADAPTER = "ref"  # TRL's name for it


@dataclass
class Reference:
    """The reference policy. Exactly one of three: a model, a frozen adapter, or no adapter."""

    description: str
    model: nn.Module | None = None
    adapter: str | None = None

    @contextmanager
    def scoring(self, policy: Any) -> Iterator[nn.Module]:
        """Yield the module that scores as the reference does, within the block only."""
        if self.model is not None:
            yield self.model
            return
        # Switching adapters makes all of an adapter's parameters trainable, also frozen ones.
        trainable = [(parameter, parameter.requires_grad) for parameter in policy.parameters()]
        try:
            if self.adapter is None:
                with policy.disable_adapter():
                    yield policy
            else:
                with _active_adapter(policy, self.adapter):
                    yield policy
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)


class ReleasedReference(nn.Module):
    """Stands where the reference model was, when the cache has all that the run will ask for."""

    def forward(self, **inputs: Any) -> Any:
        """There is none."""
        raise ValueError(
            "the reference is asked for a log-probability that was not computed before the first "
            "step, and its model has been released since; give all rows to evaluate on as "
            "eval_dataset, or set precompute_ref_log_probs=False"
        )


def choose_reference(
    policy: PreTrainedModel | PeftModel,
    reference_model: PreTrainedModel | None,
    *,
    new_adapter: bool,
    init_kwargs: dict[str, Any],
) -> Reference:
    """The reference for `policy`, as TRL chooses it.

    A given model is the reference. Otherwise it is the initial policy: without its adapter if the
    adapter is new, a frozen copy of the adapter if it came with the model, and a second model,
    equal to the policy's weights as they are now, if there is no adapter.
    """
    if reference_model is not None:
        return Reference("the given ref_model", model=_freeze(reference_model))
    if isinstance(policy, PeftModel):
        if new_adapter:
            return Reference("the base model, adapter switched off")
        _copy_adapter(policy)
        return Reference("a frozen copy of the initial adapter", adapter=FROZEN_ADAPTER)
    model, origin = _initial_policy(policy, init_kwargs)
    return Reference(f"the initial policy, {origin}", model=_freeze(model))


@contextmanager
def _active_adapter(policy: PeftModel, name: str) -> Iterator[None]:
    trained = policy.active_adapter
    policy.set_adapter(name)
    try:
        yield
    finally:
        policy.set_adapter(trained)


def _freeze(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def _copy_adapter(policy: PeftModel) -> None:
    trained = policy.active_adapter
    if FROZEN_ADAPTER in policy.peft_config:
        raise ValueError(
            f"the model already has an adapter named {FROZEN_ADAPTER!r}, the name of the frozen "
            "copy that serves as the reference; pass a model with the trained adapter alone, or "
            "pass ref_model"
        )
    before = len(list(policy.parameters()))
    policy.add_adapter(FROZEN_ADAPTER, policy.peft_config[trained])
    pairs = list(adapter_pairs(policy))
    assert len(pairs) == len(list(policy.parameters())) - before, "a parameter has no counterpart"
    for frozen, parameter in pairs:
        frozen.data.copy_(parameter.data)
        frozen.requires_grad_(False)


def adapter_pairs(policy: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of the frozen adapter, with that of the trained one."""
    trained = policy.active_adapter
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        # Adapters name their parameters in different ways; the adapter's own name comes last.
        front, found, back = name.rpartition(FROZEN_ADAPTER)
        original = parameters.get(f"{front}{trained}{back}") if found else None
        if original is not None:
            yield parameter, original


def _initial_policy(
    policy: PreTrainedModel, init_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str]:
    """The policy loaded once more from its path if the weights there are its own, else a copy."""
    path = policy.config._name_or_path
    if path:
        kwargs = {
            **init_kwargs,
            "dtype": policy.dtype,
            "attn_implementation": policy.config._attn_implementation,
        }
        try:
            loaded = load_model(path, kwargs)
        except (OSError, ValueError) as error:
            logger.info("the reference is a copy: %s cannot be loaded again (%s)", path, error)
        else:
            if _same_weights(policy, loaded):
                return loaded, f"loaded again from {path}"
            logger.warning(
                "The weights at %s are not the policy's; the reference is a copy of the policy.",
                path,
            )
    if any(is_divided_by_zero(weight) for weight in policy.parameters()):
        raise ValueError(
            "there is no ref_model, and the policy, whose weights are not those at its path "
            f"({path or 'it has none'}), cannot be copied: ZeRO-3 has divided it; pass ref_model, "
            "or make the model before the KTOConfig"
        )
    return copy.deepcopy(policy), "copied"


def _same_weights(model: nn.Module, other: nn.Module) -> bool:
    weights = model.state_dict(keep_vars=True)
    other_weights = other.state_dict(keep_vars=True)
    return weights.keys() == other_weights.keys() and all(
        _same(weight, other_weights[name]) for name, weight in weights.items()
    )


@torch.no_grad()
def _same(weight: Tensor, other: Tensor) -> bool:
    with gathered(weight, other):
        return weight.dtype == other.dtype and torch.equal(weight, other.to(weight.device))
