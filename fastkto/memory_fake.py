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
# A storage from before, a weight in another dtype, and a gradient of the head or the embedding.
_KNOWN, _COPY, _GRADIENT = "known", "copy", "gradient"
aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still alive, and the most there were.

    A number read from a fake tensor, of which there is none, is `number`: with 0, checks of data
    find nothing.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, number: int = 0) -> None:
        super().__init__()
        self._number = number
        self.now = self.peak = self.peak_gradients = 0
        self._bytes = {_COPY: 0, _GRADIENT: 0, None: 0}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, str | None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._number
        if func is aten.is_nonzero.default:  # of a tensor inside an operator
            return bool(self._number)
        if func is aten._grouped_mm.default:
            result = _empty_grouped_mm(*args[:3])
        elif func in IMPLEMENTATIONS:
            with self:  # what the head's operators need inside counts too
                result = IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        kind = self._kind(func, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage(), kind)
        return result

    @property
    def weight_copies(self) -> int:
        """Bytes of weights in another dtype, as autocast makes them."""
        return self._bytes[_COPY]

    def restart_peak(self) -> tuple[int, int]:
        """The peak since the last restart, and how much of it were gradients of vocabularies."""
        peak = self.peak, self.peak_gradients
        self.peak, self.peak_gradients = self.now, self._bytes[_GRADIENT]
        return peak

    def _kind(self, func: Any, args: tuple[Any, ...]) -> str | None:
        """What `func` makes of weights, if it is known.

        The head's operator begins its weights' gradients, and their fp32 sums, as zeros like them;
        autograd adds up those of a tied head and embedding.
        """
        sources = [arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)]
        kinds = {_KNOWN if key in self._known else self._alive.get(key) for key in sources}
        if func is aten._to_copy.default and kinds == {_KNOWN}:
            return _COPY
        if func is aten.zeros_like.default and kinds <= {_KNOWN, _GRADIENT}:
            return _GRADIENT
        is_sum = func is aten.add.Tensor and kinds == {_GRADIENT}
        return _GRADIENT if is_sum or func is aten.embedding_dense_backward.default else None

    def _track(self, storage: torch.UntypedStorage, kind: str | None) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._alive:
            return
        self._alive[key] = kind
        weakref.finalize(storage, self._free, key, size)
        self.now += size
        self._bytes[kind] += size
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self._bytes[_GRADIENT]

    def _free(self, key: int, size: int) -> None:
        self.now -= size
        self._bytes[self._alive.pop(key)] -= size


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
