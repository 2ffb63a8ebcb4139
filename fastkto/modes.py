"""The training and eval modes of a model's modules, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastkto.quantised import is_quantised


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; every module gets its own mode back.

    Quantised layers are left in training mode, which means nothing to them but for bitsandbytes on
    a CPU: there a 4-bit layer in eval mode repacks its weight for good, and no gradient passes it
    any more.
    """
    with keeping_modes(model), torch.no_grad():
        for module in model.modules():
            module.training = any(map(is_quantised, module.parameters(recurse=False)))
        yield
