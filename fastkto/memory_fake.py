"""Models on tensors that hold no data, and a count of the bytes that would be alive."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel, masking_utils

from fastkto.activation_offloading import is_activation
from fastkto.logprob_operator import IMPLEMENTATIONS
from fastkto_kernels import gradients, scan

_ATTENTION = "fastkto_memory"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still alive, and the most there were.

    A number read from a fake tensor, of which there is none, is `number`: with 0, checks of data
    find nothing.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, number: int = 0) -> None:
        super().__init__()
        self._number = number
        self.now = self.peak = self.weight_copies = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number
        if func is torch.ops.aten.is_nonzero.default:  # of a tensor inside an operator
            return bool(self._number)
        if func is torch.ops.aten._grouped_mm.default:
            result = _empty_grouped_mm(*args[:3])
        elif func in IMPLEMENTATIONS:
            with self:  # what the head's operators need inside counts too
                result = IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default
        is_copy = is_copy and args[0].untyped_storage()._cdata in self._known
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage(), is_copy)
        return result

    def restart_peak(self) -> int:
        """The peak since the last restart."""
        peak, self.peak = self.peak, self.now
        return peak

    def _track(self, storage: torch.UntypedStorage, is_weight_copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        self._alive.add(key)
        weakref.finalize(storage, self._free, key, size, is_weight_copy)
        self.now += size
        self.weight_copies += size * is_weight_copy
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int, is_weight_copy: bool) -> None:
        self._alive.discard(key)
        self.now -= size
        self.weight_copies -= size * is_weight_copy


class ActivationsNowhere(saved_tensors_hooks):
    """`ActivationsOnHost` with a host whose memory does not count."""

    def __init__(self) -> None:
        super().__init__(_forget, _remember)


def _forget(tensor: Tensor) -> Any:
    if not is_activation(tensor):
        return tensor
    return partial(torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _remember(saved: Any) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved()


def _empty_grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """What `grouped_mm` returns for experts; PyTorch's fake one refuses all dtypes but bf16."""
    if right.ndim == 3:  # [S, K] with [E, K, N]
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])  # [K, S] with [S, N]


def layer_kinds(decoder: nn.Module) -> list[list[nn.Module]]:
    """The decoder's layers, those of equal structure together; empty if it has no list of layers.

    Equal are layers whose modules have the same names and classes, and their parameters the same
    shapes, dtypes and need of a gradient.
    """
    kinds: dict[Any, list[nn.Module]] = {}
    for layer in _layers(decoder):
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        parameters = tuple(
            (name, parameter.shape, parameter.dtype, parameter.requires_grad)
            for name, parameter in layer.named_parameters()
        )
        kinds.setdefault((modules, parameters), []).append(layer)
    return list(kinds.values())


def _layers(decoder: nn.Module) -> nn.ModuleList:
    """The outermost list of modules with the most parameters."""

    def size(modules: nn.Module) -> int:
        return sum(parameter.numel() for parameter in modules.parameters())

    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=size, default=nn.ModuleList())


def fake_copy(model: nn.Module, without: Iterable[nn.Module]) -> Any:
    """A copy of `model` without some of its layers; call it inside a `FakeTensorMode`.

    Tensors become fake ones on the CPU, shared where they were shared; nothing is read or copied.
    """
    memo: dict[int, Any] = {id(layer): _Dropped() for layer in without}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for tensor in tensors.values():
                if isinstance(tensor, Tensor):
                    memo.setdefault(id(tensor), _fake(tensor))
    fake = copy.deepcopy(model, memo)
    for module in fake.modules():
        if isinstance(module, nn.ModuleList) and any(isinstance(m, _Dropped) for m in module):
            kept = [layer for layer in module if not isinstance(layer, _Dropped)]
            module._modules = {str(index): layer for index, layer in enumerate(kept)}
    return fake


class _Dropped(nn.Module):
    """Stands where a layer was."""


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def use_linear_attention(model: PreTrainedModel) -> None:
    """Give `model` an attention that needs what FlashAttention needs, and masks nothing."""
    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)


@contextmanager
def shortcuts() -> Iterator[None]:
    """What code cannot know on fake tensors, and what it need not repeat on them.

    transformers masks as for packed sequences where it cannot read the positions: there are none.
    The head's loops take their first two steps and their last, since every step needs the same;
    their tiles are those of a GPU.
    """
    packed, spans = masking_utils.find_packed_sequence_indices, scan.spans
    tile_shape = scan.tile_shape

    def few_spans(length: int, step: int) -> Iterator[tuple[int, int]]:
        every = list(spans(length, step))
        yield from every if len(every) <= 3 else (*every[:2], every[-1])

    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    scan.spans = gradients.spans = few_spans
    scan.tile_shape = partial(_gpu_tile_shape, tile_shape)
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = packed
        scan.spans = gradients.spans = spans
        scan.tile_shape = tile_shape


def _gpu_tile_shape(
    tile_shape: Callable[..., tuple[int, int]], *args: int, device_type: str, **kwargs: int
) -> tuple[int, int]:
    return tile_shape(*args, device_type="cuda", **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, K, T, D]
    value: Tensor,  # [B, K, T, E], E <= D
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, [B, T, H, E]; windows and softcaps need no memory and are left out."""
    width = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - width))  # as FlashAttention wants it
    output = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output[..., :width].transpose(1, 2).contiguous(), None
