"""Activations that autograd saves in a forward, kept in host memory until the backward.

`torch.autograd.graph.save_on_cpu` moves everything that is saved, weights included, and what is
saved several times as often.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

# What is smaller costs more to move than it frees.
SMALLEST_BYTES = 2**16


class ActivationsOnHost(saved_tensors_hooks):
    """Wrap a forward in it; its backward, outside, brings the activations back one by one.

    On CUDA the copies go to pinned memory and are ordered with the kernels of the current stream,
    so nothing waits for them on the host, and nothing overlaps with them on the device.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._on_host: weakref.WeakValueDictionary[Any, _Activation] = weakref.WeakValueDictionary()

    def _pack(self, tensor: Tensor) -> Tensor | _Activation:
        if not is_activation(tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = (
            (storage._cdata, tensor._version, tensor.dtype),
            (tensor.storage_offset(), tensor.shape, tensor.stride()),
        )
        known = self._on_host.get(key)
        # Another storage may have come to the address of one that is gone.
        if known is None or known.storage() is None:
            known = _Activation(to_host(tensor), tensor.device, weakref.ref(storage))
            self._on_host[key] = known
        return known


@dataclass(frozen=True, eq=False)
class _Activation:
    """What autograd keeps of an activation."""

    host: Tensor
    device: torch.device
    storage: weakref.ref[torch.UntypedStorage]  # on the device


def is_activation(tensor: Tensor) -> bool:
    """Whether a saved tensor is worth moving: large, and neither a weight nor a view of one.

    FSDP2's gathered weights are parameters too, and what it frees and gathers again for the
    backward must stay its own. A tensor expanded beyond its memory stays where it is.
    """
    if isinstance(tensor, nn.Parameter | DTensor) or isinstance(tensor._base, nn.Parameter):
        return False
    if tensor.layout is not torch.strided:
        return False
    size = tensor.numel() * tensor.element_size()
    return SMALLEST_BYTES <= size <= tensor.untyped_storage().nbytes()


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of what `to_host` returned on `device`."""
    return host.to(device, non_blocking=True)


def _unpack(saved: Tensor | _Activation) -> Tensor:
    return saved if isinstance(saved, Tensor) else to_device(saved.host, saved.device)
