"""The tile steps of `linear_logprob` as Triton kernels with their launchers.

The launchers follow the contracts in `tiles`: `FoldStep`, `RescaleStep` and `GradientStep`. One
program handles one row of a tile: rows are the long axis and lie on grid axis x.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .tiles import EXP_FLOOR, GRADIENT_UNIT, MAX_LAG, LogitTransform, RowState

# The fp32 tile alone: everything else stays in registers.
BYTES_PER_LOGIT = 4
BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def transform_logits(logits, inner_scale, outer_scale, HAS_SOFTCAP: tl.constexpr):
    """(logits, slope of the softcap) from raw logits with their bias; slope 1 without a softcap."""
    logits *= inner_scale
    slope = tl.full(logits.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        # From exp(-2|x|): 1 - tanh^2 would lose the small slopes to cancellation.
        decay = tl.exp(-2.0 * tl.abs(logits))
        inverse = 1.0 / (1.0 + decay)
        size = (1.0 - decay) * inverse
        slope = 4.0 * decay * inverse * inverse
        # Near zero 1 - decay would lose the small logits of a large softcap: tanh's series there.
        square = logits * logits
        series = logits * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        tanh = tl.where(square < 0.01, series, tl.where(logits < 0, -size, size))
        logits = outer_scale * tanh
    return logits, slope


@triton.jit
def _load_logits(
    tile_row_ptr, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP: tl.constexpr
):
    """(logits, slope of the softcap) at some columns of a row, or at one, fp32."""
    logits = tl.load(tile_row_ptr + offs_v, mask=mask_v, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0)
    return transform_logits(logits, inner_scale, outer_scale, HAS_SOFTCAP)


@triton.jit
def _fold_kernel(
    tile_ptr,  # [R, C] fp32
    bias_ptr,  # [C] fp32 or None
    target_ptr,  # [R] int64
    reference_ptr,  # [R] fp32, this and all down to the sums are read and written
    other_sum_ptr,  # [R] fp32
    target_logit_ptr,  # [R] fp32
    target_slope_ptr,  # [R] fp32
    weighted_sum_ptr,  # [R] fp32 or None
    logit_sum_ptr,  # [R] fp32 or None
    decay_ptr,  # [R] fp32
    exponentials_ptr,  # [R, C] fp32, fp16 or bf16, or None; may be the tile
    vocab_start,
    num_columns,
    inner_scale,
    outer_scale,
    unit,
    HAS_SOFTCAP: tl.constexpr,
    EXP_FLOOR: tl.constexpr,
    MAX_LAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * num_columns
    target = (tl.load(target_ptr + row) - vocab_start).to(tl.int32)
    has_target = (target >= 0) & (target < num_columns)
    # Read before the exponentials may be written over it.
    target_logit, target_slope = _load_logits(
        row_ptr, bias_ptr, target, has_target, inner_scale, outer_scale, HAS_SOFTCAP
    )
    old_reference = tl.load(reference_ptr + row)

    # Each lane has a maximum and sums of its own, which are joined behind the loop: a reduction
    # inside would make all warps wait for each other at every block.
    largest_lanes = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, num_columns, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        mask_v = offs_v < num_columns
        logits, _ = _load_logits(
            row_ptr, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP
        )
        others = tl.where(mask_v & (offs_v != target), logits, -float("inf"))
        largest_lanes = tl.maximum(largest_lanes, others)
    largest = tl.max(largest_lanes, 0)
    reference = tl.where(largest > old_reference + MAX_LAG, largest, old_reference)
    shift = old_reference - reference
    shift = tl.where(shift < EXP_FLOOR, EXP_FLOOR, shift)
    decay = tl.exp(shift)

    sum_lanes = tl.zeros([BLOCK], tl.float32)
    weighted_lanes = tl.zeros([BLOCK], tl.float32)
    logit_lanes = tl.zeros([BLOCK], tl.float32)
    # The row is in the cache by now.
    for start in range(0, num_columns, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        mask_v = offs_v < num_columns
        logits, slope = _load_logits(
            row_ptr, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP
        )
        is_other = mask_v & (offs_v != target)
        distance = tl.where(is_other, logits - reference, -float("inf"))
        terms = tl.exp(distance)
        sum_lanes += terms
        if weighted_sum_ptr is not None:
            # The distance may be -inf where its exp() is zero.
            weighted_lanes += terms * tl.where(terms > 0, distance, 0.0)
            logit_lanes += tl.where(mask_v, logits, 0.0)
        if exponentials_ptr is not None:
            values = (terms * slope * unit).to(exponentials_ptr.dtype.element_ty)
            tl.store(exponentials_ptr + row * num_columns + offs_v, values, mask=mask_v)

    other_sum = tl.load(other_sum_ptr + row)
    if weighted_sum_ptr is not None:
        weighted_sum = decay * (tl.load(weighted_sum_ptr + row) + other_sum * shift)
        tl.store(weighted_sum_ptr + row, weighted_sum + tl.sum(weighted_lanes, 0))
        tl.store(logit_sum_ptr + row, tl.load(logit_sum_ptr + row) + tl.sum(logit_lanes, 0))
    tl.store(other_sum_ptr + row, other_sum * decay + tl.sum(sum_lanes, 0))
    tl.store(reference_ptr + row, reference)
    tl.store(target_logit_ptr + row, target_logit, mask=has_target)
    tl.store(target_slope_ptr + row, target_slope, mask=has_target)
    tl.store(decay_ptr + row, decay)


def fold_tile(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    state: RowState,
    *,
    vocab_start: int,
    transform: LogitTransform,
    decay: Tensor,
    exponentials: Tensor | None,
    unit: float,
) -> None:
    """Fold one tile into the state, in place, and write its exponentials where asked."""
    num_rows, num_columns = tile.shape
    inner_scale, outer_scale = transform.factors
    _fold_kernel[(num_rows,)](
        tile_ptr=tile,
        bias_ptr=bias,
        target_ptr=target,
        reference_ptr=state.reference,
        other_sum_ptr=state.other_sum,
        target_logit_ptr=state.target_logit,
        target_slope_ptr=state.target_slope,
        weighted_sum_ptr=state.weighted_sum,
        logit_sum_ptr=state.logit_sum,
        decay_ptr=decay,
        exponentials_ptr=exponentials,
        vocab_start=vocab_start,
        num_columns=num_columns,
        inner_scale=inner_scale,
        outer_scale=outer_scale,
        unit=unit,
        HAS_SOFTCAP=transform.softcap is not None,
        EXP_FLOOR=EXP_FLOOR,
        MAX_LAG=MAX_LAG,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def _rescale_kernel(
    total_ptr,  # [R, D] fp32, read and written
    decay_ptr,  # [R] fp32
    hidden_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    decay = tl.load(decay_ptr + row)
    if decay != 1.0:
        for start in range(0, hidden_size, BLOCK):
            offs_d = start + tl.arange(0, BLOCK)
            mask_d = offs_d < hidden_size
            total_ptrs = total_ptr + row * hidden_size + offs_d
            total = tl.load(total_ptrs, mask=mask_d, other=0.0)
            tl.store(total_ptrs, total * decay, mask=mask_d)


def rescale_rows(total: Tensor, decay: Tensor) -> None:
    """Multiply the rows of the total by the decay, in place; a factor of 1 costs nothing."""
    num_rows, hidden_size = total.shape
    _rescale_kernel[(num_rows,)](
        total_ptr=total,
        decay_ptr=decay,
        hidden_size=hidden_size,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit
def _gradient_kernel(
    tile_ptr,  # [R, C] fp32
    bias_ptr,  # [C] fp32 or None
    target_ptr,  # [R] int64
    reference_ptr,  # [R] fp32
    other_sum_ptr,  # [R] fp32
    direction_ptr,  # [R, C] fp32, fp16 or bf16; may be the tile
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
    reference = tl.load(reference_ptr + row)
    # At least 1, its first term, except in a vocabulary of the target alone.
    other_sum = tl.load(other_sum_ptr + row)
    factor = -GRADIENT_UNIT / tl.where(other_sum < 1.0, 1.0, other_sum)

    for start in range(0, num_columns, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        mask_v = offs_v < num_columns
        logits, slope = _load_logits(
            tile_ptr + row_start, bias_ptr, offs_v, mask_v, inner_scale, outer_scale, HAS_SOFTCAP
        )
        gradient = tl.exp(logits - reference) * factor
        gradient = tl.where(offs_v == target - vocab_start, GRADIENT_UNIT, gradient) * slope
        gradient = tl.where(target < 0, 0.0, gradient)
        direction = gradient.to(direction_ptr.dtype.element_ty)
        tl.store(direction_ptr + row_start + offs_v, direction, mask=mask_v)


def gradient_tile(
    tile: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reference: Tensor,
    other_sum: Tensor,
    *,
    vocab_start: int,
    transform: LogitTransform,
    direction: Tensor,
) -> None:
    """Write the gradients of the raw logits, see `GradientStep`."""
    num_rows, num_columns = tile.shape
    inner_scale, outer_scale = transform.factors
    _gradient_kernel[(num_rows,)](
        tile_ptr=tile,
        bias_ptr=bias,
        target_ptr=target,
        reference_ptr=reference,
        other_sum_ptr=other_sum,
        direction_ptr=direction,
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
_TILE_DTYPES = ("*fp32", "*fp16", "*bf16")


def compile_cases() -> list[CompileCase]:
    """Every form in which the launchers above launch their kernels."""
    rescaled = {"total_ptr": "*fp32", "decay_ptr": "*fp32"}
    cases = [_case(_rescale_kernel, rescaled, {"hidden_size": "i32"}, {"BLOCK": BLOCK})]
    forms = product((False, True), (False, True), (False, True), (None, *_TILE_DTYPES))
    for has_bias, has_softcap, stats, exponentials in forms:
        pointers = {
            "tile_ptr": "*fp32",
            "bias_ptr": "*fp32" if has_bias else None,
            "target_ptr": "*i64",
            "reference_ptr": "*fp32",
            "other_sum_ptr": "*fp32",
            "target_logit_ptr": "*fp32",
            "target_slope_ptr": "*fp32",
            "weighted_sum_ptr": "*fp32" if stats else None,
            "logit_sum_ptr": "*fp32" if stats else None,
            "decay_ptr": "*fp32",
            "exponentials_ptr": exponentials,
        }
        constexprs: dict[str, Any] = {
            "HAS_SOFTCAP": has_softcap,
            "EXP_FLOOR": EXP_FLOOR,
            "MAX_LAG": MAX_LAG,
            "BLOCK": BLOCK,
        }
        cases.append(_case(_fold_kernel, pointers, _SCALARS | {"unit": "fp32"}, constexprs))
    for has_bias, has_softcap, kind in product((False, True), (False, True), _TILE_DTYPES):
        pointers = {
            "tile_ptr": "*fp32",
            "bias_ptr": "*fp32" if has_bias else None,
            "target_ptr": "*i64",
            "reference_ptr": "*fp32",
            "other_sum_ptr": "*fp32",
            "direction_ptr": kind,
        }
        values = {"HAS_SOFTCAP": has_softcap, "GRADIENT_UNIT": GRADIENT_UNIT, "BLOCK": BLOCK}
        cases.append(_case(_gradient_kernel, pointers, _SCALARS, values))
    return cases


def _case(
    kernel: triton.JITFunction,
    pointers: Mapping[str, str | None],
    scalars: Mapping[str, str],
    constexprs: Mapping[str, Any],
) -> CompileCase:
    """A case in which absent pointers are compile-time None, as Triton treats them."""
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    absent = {name: None for name, kind in pointers.items() if kind is None}
    return CompileCase(kernel, present | dict(scalars), absent | dict(constexprs), NUM_WARPS)
