"""Matmul and fold in one Triton kernel: the state of all rows without any tile in memory.

A program owns some rows and a share of the vocabulary; it multiplies block by block and folds each
block of logits while it is in registers. The shares' results are joined at the end, in one order:
no locks and no atomics. What a row gets does not depend on the other rows.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .operands import Operands
from .scan_table import ALIGNMENT, CANDIDATES, Blocks
from .tile_steps_triton import transform_logits
from .tiles import EXP_FLOOR, LOWEST_LOGIT, RowState, spans

# Programs that share the rows of a block: enough to fill a GPU when there are few tokens.
NUM_SHARES = 8
# Five results of each share, and as much again while they are joined.
BYTES_PER_ROW = 2 * 5 * 4 * NUM_SHARES


@triton.jit
def _scan_kernel(
    hidden_ptr,  # [N, D] fp16 or bf16, contiguous
    weight_ptr,  # [V, D] in the same dtype or fp32, rows of weight_stride
    bias_ptr,  # [shares * share_size] fp32
    target_ptr,  # [N] int64
    reference_ptr,  # [shares, N] fp32, this and all below are written
    other_sum_ptr,
    target_logit_ptr,
    weighted_sum_ptr,  # or None
    logit_sum_ptr,  # or None
    num_rows,
    vocab_size,
    hidden_size,
    share_size,  # vocabulary entries of a share
    weight_stride,
    inner_scale,
    outer_scale,
    HAS_SOFTCAP: tl.constexpr,
    EXP_FLOOR: tl.constexpr,
    LOWEST_LOGIT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64 up to the start of a block and int32 inside it: 64-bit offsets would fill the registers.
    start_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    rows_left = tl.minimum(num_rows - start_n, BLOCK_N).to(tl.int32)
    mask_n = offs_n < rows_left
    hidden_block_ptr = tl.multiple_of(hidden_ptr + start_n * hidden_size, 16)
    # Rows past the end repeat the last one, so that the loads need no mask for them.
    hidden_offs = tl.multiple_of(tl.minimum(offs_n, rows_left - 1) * hidden_size, ALIGNMENT)
    share = tl.program_id(1).to(tl.int64)
    share_start = share * share_size
    share_length = tl.minimum(share_size, vocab_size - share_start).to(tl.int32)
    target = tl.load(target_ptr + start_n + offs_n, mask=mask_n, other=-1)
    # Counted from the share's start: negative in the shares behind it, and for ignored rows.
    target = (target - share_start).to(tl.int32)

    reference = tl.full([BLOCK_N], LOWEST_LOGIT, tl.float32)
    other_sum = tl.zeros([BLOCK_N], tl.float32)
    target_logit = tl.zeros([BLOCK_N], tl.float32)
    weighted_sum = tl.zeros([BLOCK_N], tl.float32)
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    offs_v = tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    for start in range(0, share_length, BLOCK_V):
        columns_left = share_length - start
        weight_block_ptr = tl.multiple_of(weight_ptr + (share_start + start) * weight_stride, 16)
        weight_offs = tl.minimum(offs_v, columns_left - 1) * weight_stride
        weight_offs = tl.multiple_of(weight_offs, ALIGNMENT)
        logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for depth in range(0, hidden_size, BLOCK_D):
            mask_d = offs_d < tl.multiple_of(hidden_size - depth, ALIGNMENT)
            hidden_ptrs = hidden_block_ptr + depth + (hidden_offs[:, None] + offs_d[None, :])
            weight_ptrs = weight_block_ptr + depth + (weight_offs[None, :] + offs_d[:, None])
            hidden = tl.load(hidden_ptrs, mask=mask_d[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_d[:, None], other=0.0).to(hidden.dtype)
            if UPCAST:
                hidden, weight = hidden.to(tl.float32), weight.to(tl.float32)
            logits = tl.dot(hidden, weight, logits, input_precision="ieee")
        logits += tl.load(tl.multiple_of(bias_ptr + (share_start + start), 16) + offs_v)[None, :]
        logits, _ = transform_logits(logits, inner_scale, outer_scale, HAS_SOFTCAP)

        mask_v = (offs_v < columns_left)[None, :]
        # Never past the vocabulary's end: columns past a share's end exist in the last one only.
        is_target = offs_v[None, :] == (target - start)[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), 1)
        if weighted_sum_ptr is not None:
            logit_sum += tl.sum(tl.where(mask_v, logits, 0.0), 1)
        distance = tl.where(mask_v & (~is_target), logits, -float("inf"))
        # By comparison, which is false for a NaN: that stays in the terms, where it is seen.
        largest = tl.max(distance, 1)
        new_reference = tl.where(largest > reference, largest, reference)
        shift = reference - new_reference
        shift = tl.where(shift < EXP_FLOOR, EXP_FLOOR, shift)
        decay = tl.exp(shift)
        distance -= new_reference[:, None]
        terms = tl.exp(distance)
        if weighted_sum_ptr is not None:
            # The distance may be -inf where its exp() is zero.
            weighted = tl.sum(terms * tl.where(terms > 0, distance, 0.0), 1)
            weighted_sum = decay * (weighted_sum + other_sum * shift) + weighted
        other_sum = other_sum * decay + tl.sum(terms, 1)
        reference = new_reference

    offs_out = share * num_rows + start_n + offs_n
    tl.store(reference_ptr + offs_out, reference, mask=mask_n)
    tl.store(other_sum_ptr + offs_out, other_sum, mask=mask_n)
    tl.store(target_logit_ptr + offs_out, target_logit, mask=mask_n)
    if weighted_sum_ptr is not None:
        tl.store(weighted_sum_ptr + offs_out, weighted_sum, mask=mask_n)
        tl.store(logit_sum_ptr + offs_out, logit_sum, mask=mask_n)


# Triton's interpreter cannot multiply bf16: there the rounded numbers are multiplied as fp32.
_UPCAST = not isinstance(_scan_kernel, triton.JITFunction)


def scan_fused(operands: Operands, blocks: Blocks, *, stats: bool, memory_bytes: int) -> RowState:
    """The state of all N rows after all V logits: one matmul's worth of work.

    The softcap's slope is for gradients only: target_slope is NaN. As many rows are taken at a time
    as memory_bytes hold in the compute dtype with what the shares find; [V] fp32 come on top.
    """
    num_rows, hidden_size = operands.hidden.shape
    row_bytes = hidden_size * operands.compute_dtype.itemsize + BYTES_PER_ROW
    rows_at_once = max(memory_bytes // row_bytes, blocks.rows)
    bias = _padded_bias(operands, blocks)
    state = RowState.empty(num_rows, operands.hidden.device, stats=stats)
    state.target_slope.fill_(float("nan"))
    for rows in spans(num_rows, rows_at_once):
        _scan_rows(operands, blocks, rows, bias, state.rows(*rows))
    return state


def _padded_bias(operands: Operands, blocks: Blocks) -> Tensor:
    """[shares * share_size] fp32, zero where there is none: loads of it need no mask."""
    vocab_size = operands.weight.shape[0]
    share_size = triton.cdiv(vocab_size, NUM_SHARES * blocks.columns) * blocks.columns
    device = operands.weight.device
    padded = torch.zeros(NUM_SHARES * share_size, dtype=torch.float32, device=device)
    bias = operands.bias_rows(0, vocab_size)
    if bias is not None:
        padded[:vocab_size] = bias
    return padded


def _scan_rows(
    operands: Operands, blocks: Blocks, rows: tuple[int, int], bias: Tensor, state: RowState
) -> None:
    """Write the state of some rows."""
    hidden = operands.hidden[slice(*rows)].to(operands.compute_dtype).contiguous()
    if hidden.data_ptr() % 16:
        hidden = hidden.clone()
    num_rows, (vocab_size, hidden_size) = hidden.shape[0], operands.weight.shape
    num_results = 3 if state.weighted_sum is None else 5
    shares = state.reference.new_empty(num_results, NUM_SHARES, num_rows)
    reference, other_sum, target_logit, *sums = shares
    inner_scale, outer_scale = operands.transform.factors
    _scan_kernel[(triton.cdiv(num_rows, blocks.rows), NUM_SHARES)](
        hidden_ptr=hidden,
        weight_ptr=operands.weight,
        bias_ptr=bias,
        target_ptr=operands.target[slice(*rows)].contiguous(),
        reference_ptr=reference,
        other_sum_ptr=other_sum,
        target_logit_ptr=target_logit,
        weighted_sum_ptr=sums[0] if sums else None,
        logit_sum_ptr=sums[1] if sums else None,
        num_rows=num_rows,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        share_size=bias.shape[0] // NUM_SHARES,
        weight_stride=operands.weight.stride(0),
        inner_scale=inner_scale,
        outer_scale=outer_scale,
        HAS_SOFTCAP=operands.transform.softcap is not None,
        **_constants(blocks),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        enable_fp_fusion=True,
    )
    _join(shares, state)


def _join(shares: Tensor, state: RowState) -> None:
    """Write the state of all shares together, in their order."""
    reference, other_sum, target_logit, *sums = shares
    torch.amax(reference, 0, out=state.reference)
    shift = (reference - state.reference).clamp_min_(EXP_FLOOR)
    decay = shift.exp()
    torch.sum(target_logit, 0, out=state.target_logit)
    if state.weighted_sum is not None and state.logit_sum is not None:
        torch.sum(decay * (sums[0] + other_sum * shift), 0, out=state.weighted_sum)
        torch.sum(sums[1], 0, out=state.logit_sum)
    torch.sum(other_sum * decay, 0, out=state.other_sum)


def _constants(blocks: Blocks) -> dict[str, Any]:
    return {
        "EXP_FLOOR": EXP_FLOOR,
        "LOWEST_LOGIT": LOWEST_LOGIT,
        "ALIGNMENT": ALIGNMENT,
        "UPCAST": _UPCAST,
        "BLOCK_N": blocks.rows,
        "BLOCK_V": blocks.columns,
        "BLOCK_D": blocks.depth,
    }


def compile_cases() -> list[CompileCase]:
    """Every form in which the launcher above launches the kernel, in every configuration."""
    sizes = ("num_rows", "vocab_size", "hidden_size", "share_size", "weight_stride")
    always = {"bias_ptr": "*fp32", "target_ptr": "*i64"}
    always |= dict.fromkeys(("reference_ptr", "other_sum_ptr", "target_logit_ptr"), "*fp32")
    always |= dict.fromkeys(sizes, "i32") | {"inner_scale": "fp32", "outer_scale": "fp32"}
    sums = ("weighted_sum_ptr", "logit_sum_ptr")
    cases = []
    forms = product(CANDIDATES.items(), ("*fp16", "*bf16"), (False, True), (False, True), (0, 1))
    for (blocks, targets), hidden, has_fp32_weight, has_softcap, stats in forms:
        operands = {"hidden_ptr": hidden, "weight_ptr": "*fp32" if has_fp32_weight else hidden}
        signature = operands | always | (dict.fromkeys(sums, "*fp32") if stats else {})
        constexprs = _constants(blocks) | {"HAS_SOFTCAP": has_softcap}
        constexprs |= {} if stats else dict.fromkeys(sums, None)
        form = (blocks.num_warps, blocks.num_stages, targets)
        cases.append(CompileCase(_scan_kernel, signature, constexprs, *form))
    return cases
