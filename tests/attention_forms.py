"""Every attention that packed passes can use, as far as a CPU runs it.

FlashAttention and PyTorch's varlen_attn run on GPUs only. Here a plain implementation of what both
document stands in for their kernels; all around them is the real code of transformers and fastkto.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils

from fastkto import attention
from tests.models import tiny_model

FLASH = ("flash_attention_2", "flash_attention_3")
FORMS = ("sdpa", "eager", *FLASH, "varlen", "flex_attention")
HAVE_BACKWARD = FORMS[:-1]  # PyTorch: "FlexAttention does not support backward on CPU"
ABSENT = {("gemma2", "sdpa"), ("gemma2", "varlen")}  # they know no softcap


def attends_at_bottom_right(queries: int, keys: int, window: int | None) -> Tensor:
    """[Q, K] causal mask in which the last query is at the last key; a window counts itself."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def varlen_attention(
    query: Tensor,  # [T_q, H, D]
    key: Tensor,  # [T_k, H_kv, D]
    value: Tensor,  # [T_k, H_kv, D]
    queries_before: Tensor,
    keys_before: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None,
    left: int,  # keys before a query's own that it attends to; -1: all
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each sequence, [T_q, H, D], as both libraries document it."""
    for offsets, states, most in (
        (queries_before, query, most_queries),
        (keys_before, key, most_keys),
    ):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous()
        assert type(most) is int and most == offsets.diff().max()  # a tensor would be read back
        assert offsets[0] == 0 and offsets[-1] == len(states)
    assert query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    query, key, value = query.float(), key.float(), value.float()  # as the kernels do inside
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    bounds = zip(queries_before.diff().tolist(), keys_before.diff().tolist(), strict=True)
    for number, (num_queries, num_keys) in enumerate(bounds):
        q = query[queries_before[number] :][:num_queries]
        k, v = (states[keys_before[number] :][:num_keys] for states in (key, value))
        scores = scale * torch.einsum("qhd,khd->hqk", q, k)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        mask = attends_at_bottom_right(num_queries, num_keys, None if left < 0 else left + 1)
        scores = scores.masked_fill(~mask, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs).to(dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """FlashAttention 2's, from 2.1 on. With `causal` the window's right side does not count."""
    assert causal and dropout_p == 0.0
    return varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        left=window_size[0],
        softcap=softcap,
    )


def flash_attn_3_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """FlashAttention 3's, as far as transformers calls it: it knows no dropout."""
    assert seqused_q is None and seqused_k is None
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(
        q, k, v, *lengths, 0.0, softmax_scale, causal, window_size, softcap, deterministic
    )


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Both FlashAttentions' for [B, T, H, D]."""
    rows, length = q.shape[:2]
    before = torch.arange(rows + 1, dtype=torch.int32) * length
    flat = (states.flatten(0, 1) for states in (q, k, v))
    output = flash_attn_varlen_func(*flat, before, before, length, length, **kwargs)
    return output.view(rows, length, *output.shape[1:])


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's: a window of (-1, 0) is causal, (W, 0) causal with W keys to the left."""
    assert window_size[1] == 0
    is_asked = "enable_gqa" in attention._VARLEN_ARGUMENTS  # PyTorch 2.11 shares keys unasked
    assert enable_gqa == (is_asked and query.shape[1] != key.shape[1])
    return varlen_attention(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=window_size[0]
    )


@contextmanager
def use_form(form: str) -> Iterator[None]:
    """Within, models of `model_with` can run."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "varlen":
            patch.setattr(attention.varlen, "varlen_attn", varlen_attn)
            patch.setattr(attention, "_has_varlen", lambda *args: True)
        if form in FLASH:
            varlen_func = flash_attn_varlen_func if form == FLASH[0] else flash_attn_3_varlen_func
            utils = modeling_flash_attention_utils
            # Newer transformers have one more, for a cache.
            absent = 3 if hasattr(utils, "_flash_with_kvcache_fn") else 2
            functions = flash_attn_func, varlen_func, *(None,) * absent
            patch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
            patch.setattr(utils, "_loaded_implementation", None)
        if form == "flex_attention":
            # Compiled for a CPU it returns NaN for these shapes, in PyTorch 2.13.
            with torch.compiler.set_stance("force_eager"):
                yield
            return
        yield


def model_with(form: str, family: str, **config: Any) -> PreTrainedModel:
    """A tiny model that attends by `form`."""
    if form in FLASH:  # they cannot be asked for where they are not installed
        model = tiny_model(family, **config)
        attend_by(form, model)
        return model
    return tiny_model(family, attn_implementation=_implementation(form), **config)


def attend_by(form: str, model: PreTrainedModel) -> None:
    """Have a model attend by `form` from now on."""
    model.config.get_text_config()._attn_implementation_internal = _implementation(form)


def _implementation(form: str) -> str:
    return "sdpa" if form == "varlen" else form
