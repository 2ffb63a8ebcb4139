"""The memory that a call of `linear_logprob` needs beside its inputs, its results and gradients.

With N tokens, D hidden size, V vocabulary, tiles of R tokens and C entries (`tiles.tile_shape`);
h, w, c and m the bytes of a number of the hidden states, of the weight, of the compute dtype and of
the products (on a CPU these are fp32):

    tile         4 R C           its temporaries included at most `head_memory_mib`; on a CPU at
                 + m R C         most 2^20 logits. The result of a tile, where it is a 16-bit one
    operands     m (R + C) D     rows of hidden and weight, each where its dtype is another; in
                 c C D           two steps where three dtypes differ
    tokens       36 N            running sums and scores
    frozen head  8 R D           forward: an fp32 sum, and the targets' rows of the weight in fp32
                 w R D           these rows in the weight's dtype, where it is another
                 4 N             a scale for each token
    ignored      h N (D + E)     on a CPU, where ignored tokens are left out: the others' hidden
                                 states, copied. What is kept, and gradients, are formed without
                                 them first
    trainable    m R D           backward: hidden states times the upstream gradient
                 4 L D           fp32 sums of 16-bit gradients, the smaller of L = N + C, L = V + R;
                                 with the first, C is so small that 4 C D fits `head_memory_mib`
    rank         m (R + C) E     a low-rank addition: its rows as the operands'
                 2 m R E         backward, where it is more
                 4 L E           with a frozen head the vocabulary's part of L D falls away
    factor       4 R C           backward, where it needs a gradient: the products, copied
                 8 V             it and its like in fp32

From forward to backward N D numbers of the compute dtype's size, and those scales, are kept with a
frozen head, in place of the hidden states, which nothing else needs then; with a trainable head or
a low-rank addition autograd keeps those.

The fused kernel, without gradients, needs at most `head_memory_mib` for rows of hidden states in
the compute dtype and for what its programs find, 4 V for the bias, and the tokens' 36 N.
"""

from typing import NamedTuple

import torch

from .tiles import TILE_MULTIPLE, tile_shape


class HeadCall(NamedTuple):
    """A call, as far as its memory depends on it."""

    num_tokens: int  # on a CPU those that are not ignored: N above
    hidden_size: int
    vocab_size: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    trainable: bool  # the weight needs one too
    memory_bytes: int  # head_memory_mib
    bytes_per_logit: int  # of the backend: BYTES_PER_LOGIT, as a bound
    hidden_needs_gradient: bool = True
    rank: int = 0  # of a low-rank addition in the dtypes of hidden and weight, which needs one too
    temporaries: int = 0  # of a tile's size in fp32 beside it; 0 in Triton, up to 2 in PyTorch
    ignored_tokens: int = 0  # on a CPU
    device_type: str = "cuda"
    has_factor: bool = False  # for each entry of the vocabulary, in fp32, which needs a gradient


class HeadMemory(NamedTuple):
    """Bytes."""

    forward: int  # peak, with what is kept
    kept: int  # until the backward pass, for all tokens
    backward: int  # peak, without what is kept


def head_memory(call: HeadCall) -> HeadMemory:
    """The peaks of a call in tiles and of its backward pass, by the formula above."""
    rows, columns = tile_shape(
        call.num_tokens,
        call.vocab_size,
        bytes_per_logit=call.bytes_per_logit + _result_bytes(call) + 4 * call.has_factor,
        memory_bytes=call.memory_bytes,
        device_type=call.device_type,
    )
    hidden_rows, weight_rows = _operand_rows(call, rows, columns)
    always = _always(call, rows, columns)
    # with one tile
    temporaries = rows * columns * 4 * call.temporaries
    passing = weight_rows * call.hidden_size
    passing += max(temporaries, (hidden_rows + weight_rows) * call.rank)
    if call.trainable or call.rank or call.has_factor:
        return HeadMemory(always + passing, 0, _backward(call, rows, columns))
    if not call.hidden_needs_gradient:
        return HeadMemory(always + passing, 0, 0)
    return _frozen(call, always, passing, rows)


def _backward(call: HeadCall, rows: int, columns: int) -> int:
    """Bytes at the peak, where tiles are computed again."""
    sums_of_tokens, sums_of_entry = _sums(call)
    if call.num_tokens * sums_of_tokens < call.vocab_size * sums_of_entry:  # as `gradients` does
        most = max(call.memory_bytes // sums_of_entry, TILE_MULTIPLE)
        columns = min(columns, most - most % TILE_MULTIPLE)
        sums = call.num_tokens * sums_of_tokens + columns * sums_of_entry
    else:
        sums = call.vocab_size * sums_of_entry + rows * sums_of_tokens
    hidden_rows, weight_rows = _operand_rows(call, rows, columns)
    scaled = rows * _product_dtype(call).itemsize
    of_rank = (hidden_rows + max(weight_rows, scaled)) * call.rank
    peak = _always(call, rows, columns) + weight_rows * call.hidden_size + sums
    peak += scaled * call.hidden_size * call.trainable
    peak += max(rows * columns * 4 * call.temporaries, of_rank)
    peak += (4 * rows * columns + 8 * call.vocab_size) * call.has_factor
    # Gradients are formed without the ignored tokens, and are spread when all else is done.
    row = (call.hidden_size * call.hidden_needs_gradient + call.rank) * call.hidden_dtype.itemsize
    spread = row * call.num_tokens if call.ignored_tokens else 0
    return max(peak - row * call.ignored_tokens, spread)


def _frozen(call: HeadCall, always: int, passing: int, rows: int) -> HeadMemory:
    """`head_memory` with the direction of the hidden states' gradient alone."""
    row = call.hidden_size * call.compute_dtype.itemsize + 4
    kept = (call.num_tokens + call.ignored_tokens) * row
    selected = call.weight_dtype.itemsize + _rounded_bytes(call, call.weight_dtype)
    target_rows = rows * call.hidden_size * max(selected, _result_bytes(call) + 4)
    sweep = always + call.num_tokens * row
    sweep += 4 * rows * call.hidden_size + max(passing, target_rows)
    spread = kept + call.num_tokens * row if call.ignored_tokens else 0
    return HeadMemory(max(sweep, spread), kept, 0)


def _always(call: HeadCall, rows: int, columns: int) -> int:
    """Bytes of the tile and its result, of rows of hidden states, and of the tokens' numbers."""
    hidden_rows, _ = _operand_rows(call, rows, columns)
    size = rows * columns * (4 + _result_bytes(call))
    size += hidden_rows * call.hidden_size + 36 * call.num_tokens
    if call.ignored_tokens:
        size += call.num_tokens * (call.hidden_size + call.rank) * call.hidden_dtype.itemsize
    return size


def _operand_rows(call: HeadCall, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of a column of a tile's hidden states and weight as they are multiplied, if copied."""
    product_dtype = _product_dtype(call)
    is_copied = call.hidden_dtype != product_dtype or _in_two_steps(call, call.hidden_dtype)
    weight_rows = columns * _rounded_bytes(call, call.weight_dtype)
    return product_dtype.itemsize * rows * is_copied, weight_rows


def _product_dtype(call: HeadCall) -> torch.dtype:
    return torch.float32 if call.device_type == "cpu" else call.compute_dtype


def _result_bytes(call: HeadCall) -> int:
    """Of a logit beside its fp32: an fp32 tile is its own result."""
    return _product_dtype(call).itemsize % 4


def _in_two_steps(call: HeadCall, dtype: torch.dtype) -> bool:
    """Whether a tensor is rounded to the compute dtype and then widened to the products'."""
    return call.device_type == "cpu" and torch.float32 == dtype != call.compute_dtype


def _rounded_bytes(call: HeadCall, dtype: torch.dtype) -> int:
    """Bytes of a number for a tensor's rows as they are multiplied, while they are made."""
    product_dtype = _product_dtype(call)
    if _in_two_steps(call, dtype):
        return call.compute_dtype.itemsize + product_dtype.itemsize
    return product_dtype.itemsize * (dtype != product_dtype)


def _sums(call: HeadCall) -> tuple[int, int]:
    """Bytes of the fp32 sums of 16-bit gradients, for a token and for a vocabulary entry."""
    token_width = (call.hidden_size + call.rank) * (call.hidden_dtype != torch.float32)
    entry_width = call.hidden_size * call.trainable + call.rank
    return 4 * token_width, 4 * entry_width * (call.weight_dtype != torch.float32)
