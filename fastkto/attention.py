"""Variable-length attention in Hugging Face models: passes without padding, prompts read once.

transformers asks `AttentionInterface` for the function behind `config._attn_implementation` and
hands it whatever keyword arguments the model was called with. `enable_segments` puts functions
there that are transformers' own, unless a call has `segments`: then they attend within those.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastkto.segments import LayerCall, Segments

Attention = Callable[..., tuple[Tensor, Tensor | None]]

# Each family has its own "eager" function, which has no entry in AttentionInterface.
SEGMENTED_EAGER = "fastkto_eager"
_VARLEN_ARGUMENTS = inspect.signature(varlen.varlen_attn).parameters


def enable_segments(model: PreTrainedModel) -> None:
    """Let the attention layers of `model` take `segments`; other calls stay what they are.

    Whether all layers heed them is for `fastkto.packing` to find out.
    """
    config = model.config.get_text_config()
    name = own_attention(model)
    if name == "eager":
        AttentionInterface.register(SEGMENTED_EAGER, segmented(_own_eager, "eager"))
        AttentionMaskInterface.register(SEGMENTED_EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        config._attn_implementation_internal = SEGMENTED_EAGER
        return
    own = ALL_ATTENTION_FUNCTIONS.get(name)
    if own is not None and not is_segmented(own):
        AttentionInterface.register(name, segmented(own, name))


def disable_segments(model: PreTrainedModel) -> None:
    """Give `model` back the attention it was loaded with."""
    model.config.get_text_config()._attn_implementation_internal = own_attention(model)


def own_attention(model: PreTrainedModel) -> str:
    """The name of the attention that `model` was loaded with."""
    name = model.config.get_text_config()._attn_implementation
    return "eager" if name == SEGMENTED_EAGER else name


def segmented(own: Attention, name: str) -> Attention:
    """transformers' function `own`, registered as `name`, which also takes `segments`."""
    forms = {"eager": _attend_eager, "sdpa": _attend_sdpa, "flex_attention": _attend_flex}
    attend = forms.get(name, _attend_flash)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        _note_call(segments, value, attention_mask, kwargs.get("sliding_window"))
        return attend(partial(own, module), query, key, value, segments, **kwargs), None

    attention.is_segmented = True  # type: ignore[attr-defined]
    return attention


def is_segmented(function: Attention) -> bool:
    """Whether `function` comes from `segmented`."""
    return getattr(function, "is_segmented", False)


def _own_eager(module: nn.Module, *states: Tensor | None, **kwargs: Any) -> Any:
    """The family's own function in plain PyTorch."""
    return _family_eager(module)(module, *states, **kwargs)


def _family_eager(module: nn.Module) -> Attention:
    """The `eager_attention_forward` that the attention's own code refers to."""
    for kind in type(module).__mro__:
        forward: Any = vars(kind).get("forward")
        own = getattr(inspect.unwrap(forward), "__globals__", {}).get("eager_attention_forward")
        if own is not None:
            return own
    raise NotImplementedError(
        f"{type(module).__name__} has no eager_attention_forward beside it, which "
        'attn_implementation="eager" needs here; load the model with another one'
    )


def _note_call(segments: Segments, value: Tensor, mask: Tensor | None, window: int | None) -> None:
    has_mask = mask is not None and mask.numel() > 1  # the one that `run_pass` hands out has one
    segments.calls.append(LayerCall(window, value.dtype, has_mask))


def _attend_eager(
    own: Attention, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **kwargs: Any
) -> Tensor:
    outputs = []
    for part in segments.parts(kwargs.pop("sliding_window", None), always_masked=True):
        attends = part.mask(query.device)
        assert attends is not None
        bias = torch.zeros(attends.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(~attends, torch.finfo(query.dtype).min)
        outputs.append(
            own(part.queries(query), part.keys(key), part.keys(value), bias, **kwargs)[0]
        )
    return torch.cat(outputs, 1)


def _attend_flash(
    own: Attention, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **kwargs: Any
) -> Tensor:
    """FlashAttention; given the segments, transformers reads nothing back from the device."""
    output, _ = own(
        query,
        segments.gather_keys(key),
        segments.gather_keys(value),
        None,
        cu_seq_lens_q=segments.queries_before,
        cu_seq_lens_k=segments.keys_before,
        max_length_q=segments.most_queries,
        max_length_k=segments.most_keys,
        **kwargs,
    )
    return output


def _attend_flex(
    own: Attention, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **kwargs: Any
) -> Tensor:
    mask = segments.block_mask(kwargs.pop("sliding_window", None), query.device)
    output, _ = own(query, key, value, mask, **kwargs)
    return output


def _attend_sdpa(
    own: Attention, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **kwargs: Any
) -> Tensor:
    """PyTorch's varlen_attn where it can run, else scaled_dot_product_attention on each part."""
    window = kwargs.pop("sliding_window", None)
    # As SDPA would: rotary embeddings in fp32 leave queries wider than the values.
    query, key, value = map(_as_autocast, (query, key, value))
    if _has_varlen(query, value, kwargs.get("dropout", 0.0)):
        return _attend_varlen(query, key, value, segments, kwargs.get("scaling"), window)
    outputs = []
    for part in segments.parts(window, always_masked=False):
        mask = part.mask(query.device)
        states = part.queries(query), part.keys(key), part.keys(value)
        outputs.append(own(*states, mask, **kwargs)[0])
    return torch.cat(outputs, 1)


def _attend_varlen(
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H_kv, T, D]
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    # Before PyTorch had this argument, grouped queries needed none.
    has_groups = query.shape[1] != key.shape[1] and "enable_gqa" in _VARLEN_ARGUMENTS
    options: dict[str, Any] = {"enable_gqa": True} if has_groups else {}
    output: Any = varlen.varlen_attn(
        query[0].transpose(0, 1),
        segments.gather_keys(key)[0].transpose(0, 1),
        segments.gather_keys(value)[0].transpose(0, 1),
        segments.queries_before,
        segments.keys_before,
        segments.most_queries,
        segments.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return output[None]


def _as_autocast(states: Tensor) -> Tensor:
    """In the dtype of autocast where that is on."""
    device = states.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return states.to(torch.get_autocast_dtype(device))
    return states


def _has_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    head_dim = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        # Between 192 and 224 its backward does not run on consumer GPUs.
        and (head_dim <= 192 or 224 < head_dim <= 256)
        and dropout == 0.0
        and {"scale", "window_size"} <= set(_VARLEN_ARGUMENTS)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
