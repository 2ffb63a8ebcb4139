"""The tile steps of `linear_logprob` as Triton kernels with their launchers.

`fold_tile` and `gradient_tile` follow the contracts `FoldStep` and `GradientStep` in `tiles`.
One program handles one row of a tile: rows are the long axis and lie on grid axis x.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .tiles import EXP_FLOOR, GRADIENT_UNIT, LogitTransform, RowState

# The fp32 tile alone: everything else stays in registers.
BYTES_PER_LOGIT = 4
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _load_logits(
    tile_row_ptr, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP: tl.constexpr
):
    """(logits, slope of the softcap) of one block, fp32; slope is 1 without a softcap."""
    logits = tl.load(tile_row_ptr + offs_v, mask=mask_v, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    logits *= inner_scale
    slope = tl.full(logits.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        # From exp(-2|x|): 1 - tanh^2 would lose the small slopes to cancellation.
        decay = tl.exp(-2.0 * tl.abs(logits))
        size = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        logits = outer_scale * tl.where(logits < 0, -size, size)
    return logits, slope


@triton.jit
def _fold_kernel(
    tile_ptr,  # [R, C] fp32
    bias_ptr,  # [C] fp32 or None
    target_ptr,  # [R] int64
    other_max_ptr,  # [R] fp32, this and all below are read and written
    other_sum_ptr,  # [R] fp32
    target_logit_ptr,  # [R] fp32
    weighted_sum_ptr,  # [R] fp32 or None
    logit_sum_ptr,  # [R] fp32 or None
    vocab_start,
    num_columns,
    inner_scale,
    outer_scale,
    HAS_SOFTCAP: tl.constexpr,
    EXP_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile_row_ptr = tile_ptr + row * num_columns
    target = tl.load(target_ptr + row) - vocab_start
    other_max = tl.load(other_max_ptr + row)
    other_sum = tl.load(other_sum_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)
    if weighted_sum_ptr is not None:
        weighted_sum = tl.load(weighted_sum_ptr + row)
        logit_sum = tl.load(logit_sum_ptr + row)

    for start in range(0, num_columns, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        mask_v = offs_v < num_columns
        logits, _ = _load_logits(
            tile_row_ptr, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP
        )
        is_target = offs_v == target
        # Zero before the tile that holds the target, and one column there matches.
        target_logit += tl.sum(tl.where(is_target & mask_v, logits, 0.0), 0)
        others = tl.where(mask_v & (offs_v != target), logits, -float("inf"))
        new_max = tl.maximum(other_max, tl.max(others, 0))
        distance = others - new_max
        exponentials = tl.exp(distance)
        shift = other_max - new_max
        # By comparison: tl.maximum would drop a NaN that must stay visible.
        shift = tl.where(shift < EXP_FLOOR, EXP_FLOOR, shift)
        decay = tl.exp(shift)
        if weighted_sum_ptr is not None:
            # The distance may be -inf where its exp() is zero.
            distance = tl.where(exponentials > 0, distance, 0.0)
            weighted_sum = decay * (weighted_sum + other_sum * shift)
            weighted_sum += tl.sum(exponentials * distance, 0)
            logit_sum += tl.sum(tl.where(mask_v, logits, 0.0), 0)
        other_sum = other_sum * decay + tl.sum(exponentials, 0)
        other_max = new_max

    tl.store(other_max_ptr + row, other_max)
    tl.store(other_sum_ptr + row, other_sum)
    tl.store(target_logit_ptr + row, target_logit)
    if weighted_sum_ptr is not None:
        tl.store(weighted_sum_ptr + row, weighted_sum)
        tl.store(logit_sum_ptr + row, logit_sum)


def fold_tile(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    state: RowState,
    *,
    vocab_start: int,
    transform: LogitTransform,
) -> None:
    """Fold one tile into the state, in place: running maximum and sums without the target."""
    num_rows, num_columns = tile.shape
    inner_scale, outer_scale = transform.factors
    _fold_kernel[(num_rows,)](
        tile_ptr=tile,
        bias_ptr=bias,
        target_ptr=target,
        other_max_ptr=state.other_max,
        other_sum_ptr=state.other_sum,
        target_logit_ptr=state.target_logit,
        weighted_sum_ptr=state.weighted_sum,
        logit_sum_ptr=state.logit_sum,
        vocab_start=vocab_start,
        num_columns=num_columns,
        inner_scale=inner_scale,
        outer_scale=outer_scale,
        HAS_SOFTCAP=transform.softcap is not None,
        EXP_FLOOR=EXP_FLOOR,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def _gradient_kernel(
    tile_ptr,  # [R, C] fp32
    bias_ptr,  # [C] fp32 or None
    target_ptr,  # [R] int64
    other_max_ptr,  # [R] fp32
    other_sum_ptr,  # [R] fp32
    row_scale_ptr,  # [R] fp32
    direction_ptr,  # [R, C] fp32, fp16 or bf16, or None
    scaled_ptr,  # [R, C] fp32, fp16 or bf16, or None
    vocab_start,
    num_columns,
    inner_scale,
    outer_scale,
    HAS_SOFTCAP: tl.constexpr,
    GRADIENT_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_start = row * num_columns
    target = tl.load(target_ptr + row)
    other_max = tl.load(other_max_ptr + row)
    row_scale = tl.load(row_scale_ptr + row)
    # At least 1, the largest term, except in a vocabulary of the target alone.
    other_sum = tl.load(other_sum_ptr + row)
    factor = -GRADIENT_UNIT / tl.where(other_sum < 1.0, 1.0, other_sum)

    for start in range(0, num_columns, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        mask_v = offs_v < num_columns
        logits, slope = _load_logits(
            tile_ptr + row_start, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP
        )
        gradient = tl.exp(logits - other_max) * factor
        gradient = tl.where(offs_v == target - vocab_start, GRADIENT_UNIT, gradient) * slope
        gradient = tl.where(target < 0, 0.0, gradient)
        if direction_ptr is not None:
            direction = gradient.to(direction_ptr.dtype.element_ty)
            tl.store(direction_ptr + row_start + offs_v, direction, mask=mask_v)
        if scaled_ptr is not None:
            scaled = (gradient * row_scale).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + row_start + offs_v, scaled, mask=mask_v)


def gradient_tile(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    state: RowState,
    *,
    vocab_start: int,
    transform: LogitTransform,
    row_scale: Tensor,
    direction: Tensor | None,
    scaled: Tensor | None,
) -> None:
    """Write the gradients of the raw logits, see `GradientStep`."""
    num_rows, num_columns = tile.shape
    inner_scale, outer_scale = transform.factors
    _gradient_kernel[(num_rows,)](
        tile_ptr=tile,
        bias_ptr=bias,
        target_ptr=target,
        other_max_ptr=state.other_max,
        other_sum_ptr=state.other_sum,
        row_scale_ptr=row_scale,
        direction_ptr=direction,
        scaled_ptr=scaled,
        vocab_start=vocab_start,
        num_columns=num_columns,
        inner_scale=inner_scale,
        outer_scale=outer_scale,
        HAS_SOFTCAP=transform.softcap is not None,
        GRADIENT_UNIT=GRADIENT_UNIT,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


_SCALARS = {
    "vocab_start": "i32",
    "num_columns": "i32",
    "inner_scale": "fp32",
    "outer_scale": "fp32",
}


def compile_cases() -> list[CompileCase]:
    """Every form in which the launchers above launch their kernels."""
    cases = []
    for has_bias, has_softcap, stats in product((False, True), repeat=3):
        pointers = {
            "tile_ptr": "*fp32",
            "bias_ptr": "*fp32" if has_bias else None,
            "target_ptr": "*i64",
            "other_max_ptr": "*fp32",
            "other_sum_ptr": "*fp32",
            "target_logit_ptr": "*fp32",
            "weighted_sum_ptr": "*fp32" if stats else None,
            "logit_sum_ptr": "*fp32" if stats else None,
        }
        constexprs: dict[str, Any] = {
            "HAS_SOFTCAP": has_softcap,
            "EXP_FLOOR": EXP_FLOOR,
            "BLOCK": BLOCK,
        }
        cases.append(_case(_fold_kernel, pointers, constexprs))
    outputs = ((True, False), (False, True), (True, True))
    for has_bias, has_softcap, (direction, scaled), kind in product(
        (False, True), (False, True), outputs, ("*fp32", "*fp16", "*bf16")
    ):
        pointers = {
            "tile_ptr": "*fp32",
            "bias_ptr": "*fp32" if has_bias else None,
            "target_ptr": "*i64",
            "other_max_ptr": "*fp32",
            "other_sum_ptr": "*fp32",
            "row_scale_ptr": "*fp32",
            "direction_ptr": kind if direction else None,
            "scaled_ptr": kind if scaled else None,
        }
        values = {"HAS_SOFTCAP": has_softcap, "GRADIENT_UNIT": GRADIENT_UNIT, "BLOCK": BLOCK}
        cases.append(_case(_gradient_kernel, pointers, values))
    return cases


def _case(
    kernel: triton.JITFunction, pointers: dict[str, str | None], constexprs: Mapping[str, Any]
) -> CompileCase:
    """A case in which absent pointers are compile-time None, as Triton treats them."""
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    absent = {name: None for name, kind in pointers.items() if kind is None}
    return CompileCase(kernel, present | _SCALARS, absent | dict(constexprs), NUM_WARPS)
