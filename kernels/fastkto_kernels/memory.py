"""The memory that a call of `linear_logprob` needs beside its inputs, its results and gradients.

With N tokens, D hidden size, V vocabulary, tiles of R tokens and C entries (`tiles.tile_shape`);
w and m the bytes of a number of the weight and of the products (on a CPU these are fp32):

    tile         4 R C           its temporaries included at most `head_memory_mib`; on a CPU at
                 + m R C         most 2^20 logits. The result of a tile, where it is a 16-bit one
    operands     m (R + C) D     rows of hidden and weight, each where its dtype is another
    tokens       36 N            running sums and scores
    frozen head  8 R D           forward: an fp32 sum, and the targets' rows of the weight in fp32
                 w R D           these rows in the weight's dtype, where it is another
    trainable    8 R D           backward: hidden states times the upstream gradient
                 4 L D           fp32 sums of 16-bit gradients, the smaller of L = N + C, L = V + R

From forward to backward N D numbers of the compute dtype are kept with a frozen head, in place of
the hidden states, which nothing else needs then; with a trainable head autograd keeps those.
"""

from typing import NamedTuple

import torch

from .tiles import tile_shape


class HeadCall(NamedTuple):
    """A call, as far as its memory depends on it. The hidden states need a gradient."""

    num_tokens: int  # on a CPU those that are not ignored
    hidden_size: int
    vocab_size: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    trainable: bool  # the weight needs one too
    memory_bytes: int  # head_memory_mib
    bytes_per_logit: int  # of the backend: BYTES_PER_LOGIT, as a bound
    temporaries: int = 0  # of a tile's size in fp32 beside it; 0 in Triton, up to 2 in PyTorch
    device_type: str = "cuda"


class HeadMemory(NamedTuple):
    """Bytes."""

    forward: int  # peak, with what is kept
    kept: int  # until the backward pass
    backward: int  # peak, without what is kept


def head_memory(call: HeadCall) -> HeadMemory:
    """The peaks of a call and of its backward pass, by the formula above."""
    product_dtype = torch.float32 if call.device_type == "cpu" else call.compute_dtype
    result_bytes = product_dtype.itemsize % 4  # an fp32 tile is its own result
    rows, columns = tile_shape(
        call.num_tokens,
        call.vocab_size,
        bytes_per_logit=call.bytes_per_logit + result_bytes,
        memory_bytes=call.memory_bytes,
        device_type=call.device_type,
    )
    width = call.hidden_size
    tile = rows * columns * (4 + result_bytes)
    size = product_dtype.itemsize * width
    hidden_rows = size * rows * (call.hidden_dtype != product_dtype)
    weight_rows = size * columns * (call.weight_dtype != product_dtype)
    always = tile + hidden_rows + 36 * call.num_tokens
    passing = weight_rows + rows * columns * 4 * call.temporaries  # with one tile
    if call.trainable:
        sums = 4 * width * (2 * rows + _sum_rows(call, rows, columns))
        return HeadMemory(always + passing, 0, always + passing + sums)
    target_rows = rows * width * (call.weight_dtype.itemsize % 4 + 4)
    kept = call.num_tokens * width * call.compute_dtype.itemsize
    forward = always + kept + 4 * rows * width + max(passing, target_rows)
    return HeadMemory(forward, kept, 0)


def _sum_rows(call: HeadCall, rows: int, columns: int) -> int:
    """Rows of the fp32 sums of 16-bit gradients."""
    of_tokens = call.num_tokens * (call.hidden_dtype != torch.float32)
    of_vocabulary = call.vocab_size * (call.weight_dtype != torch.float32)
    if of_tokens < of_vocabulary:  # as `gradients` chooses
        return of_tokens + min(columns, of_vocabulary)
    return of_vocabulary + min(rows, of_tokens)
