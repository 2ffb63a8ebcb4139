"""What a KTO run needs of FSDP2 and DeepSpeed, which divide models over ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fastkto.config import KTOConfig


def reduce_at_every_backward(args: KTOConfig) -> None:
    """Under FSDP the default for micro-batches: to wait, a rank keeps a whole gradient.

    `gradient_accumulation_kwargs={"sync_each_batch": False}` asks for waiting all the same.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        given = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **given}


def keep_outputs_in_fp32(accelerator: Accelerator) -> None:
    """Have FSDP2 leave what modules return as it is.

    accelerate's policy for bf16 rounds it to bf16, log-probabilities included.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def shard_untrained(trainer: Any) -> None:
    """Divide a trainer's policy for an evaluation before training.

    accelerate prepares models for FSDP2 with their optimizer only.
    """
    policy = fsdp2_prepare_model(trainer.accelerator, trainer.model)
    trainer.model = trainer.model_wrapped = policy
    trainer.accelerator._models.append(policy)


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The reference model, placed or divided as the policy will be."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepare_for_deepspeed(model, accelerator)
    # Trainer.evaluate prepares the policy only if accelerate knows of no model yet.
    known = list(accelerator._models)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    accelerator._models[:] = known
    return model


def release_gathered(model: nn.Module) -> None:
    """Drop what is gathered for a backward that does not follow: after passes without gradient.

    FSDP2 keeps its last weights. ZeRO-3 has asked for the next ones, and cannot save the model
    before they have come.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    zero: Any = getattr(model, "optimizer", None)  # of a DeepSpeedEngine
    if hasattr(zero, "empty_partition_cache"):
        zero.empty_partition_cache()


@contextmanager
def gathered(*weights: Tensor) -> Iterator[None]:
    """Within it, weights that ZeRO-3 has divided are whole; every rank has to call it."""
    divided = [weight for weight in weights if is_divided_by_zero(weight)]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided):
        yield


def is_divided_by_zero(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has divided `weight`: outside of forwards it looks empty."""
    return hasattr(weight, "ds_id")


def whole_size(weight: Any) -> int:
    """How many numbers `weight` has, those on other ranks included."""
    return weight.ds_numel if is_divided_by_zero(weight) else weight.numel()


def _prepare_for_deepspeed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """With ZeRO-3 its weights are divided; ZeRO-1 and 2 divide nothing that it has."""
    import deepspeed

    plugin = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = copy.deepcopy(plugin.deepspeed_config)
    for trained in ("optimizer", "scheduler"):
        config.pop(trained, None)
    zero = config["zero_optimization"] if plugin.zero_stage == 3 else {"stage": 0}
    zero.pop("offload_optimizer", None)
    config["zero_optimization"] = zero
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


@contextmanager
def before_the_last_pass(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """For the backward of a pass with others behind it, in which no optimizer step may end.

    DistributedDataParallel adds its gradients up and reduces them in the last pass. FSDP2 and
    DeepSpeed reduce them at once, unless FSDP2 was told to wait.
    """
    state = accelerator.gradient_state
    is_last_batch = state.sync_gradients
    reduces_at_once = state.plugin_kwargs.get("sync_each_batch", False)
    waiting = model if isinstance(model, FSDPModule) and not reduces_at_once else None
    state._set_sync_gradients(False)  # where it is on, accelerate has DeepSpeed's optimizer step
    if waiting is not None:
        waiting.set_requires_gradient_sync(False)
    try:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield
    finally:
        state._set_sync_gradients(is_last_batch)
        if waiting is not None:
            waiting.set_requires_gradient_sync(is_last_batch)
