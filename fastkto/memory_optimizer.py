"""What an optimizer keeps for the parameters that it trains, in bytes."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from fastkto.config import KTOConfig
from fastkto.memory_fake import LiveBytes

# Optimizers that run on fake tensors are measured; for others the values kept for each parameter.
MEASURED = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
VALUES_KEPT = {"lion": 1, "rmsprop": 1, "ademamix": 3, "lomo": 0}
ADAM_VALUES = 2
# One fp32 scale for 256 values; bitsandbytes keeps small tensors and embeddings in fp32.
BYTES_OF_8_BIT, BYTES_OF_4_BIT = 1 + 4 / 256, 0.5 + 4 / 128
SMALL_TENSOR = 4096


class OptimizerBytes(NamedTuple):
    """`state` stays from the first step on; `step` is needed on top while the optimizer steps."""

    state: int
    step: int


def optimizer_bytes(model: nn.Module, args: KTOConfig) -> OptimizerBytes:
    """Bytes of the optimizer that `args.optim` names, for the parameters that need a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    name = args.optimizer_name
    if name in MEASURED and parameters:
        return _measure(parameters, args)
    values = next((n for kind, n in VALUES_KEPT.items() if kind in name), ADAM_VALUES)
    bits = 8 if "8bit" in name else 4 if "4bit" in name else 32
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    state = 0.0
    for parameter in parameters:
        is_small = parameter.numel() < SMALL_TENSOR or parameter in embeddings
        size = {8: BYTES_OF_8_BIT, 4: BYTES_OF_4_BIT}.get(bits, 4.0)
        state += values * parameter.numel() * (4 if is_small else size)
    return OptimizerBytes(int(state), 0)


def _measure(parameters: list[nn.Parameter], args: KTOConfig) -> OptimizerBytes:
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if not kwargs.get("fused") and "foreach" in inspect.signature(optimizer_class).parameters:
        kwargs["foreach"] = True  # as on a GPU
    with FakeTensorMode():
        fakes = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in parameters]
        for fake in fakes:
            fake.grad = torch.empty_like(fake)
        gradients = [fake.grad for fake in fakes if fake.grad is not None]
        with LiveBytes([*fakes, *gradients], number=1) as live:  # the number of the step
            optimizer = optimizer_class(fakes, **kwargs)
            optimizer.step()
            state = live.now
        return OptimizerBytes(state, live.peak - state)
