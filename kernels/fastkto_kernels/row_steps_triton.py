"""The row steps of `kto_loss` as Triton kernels with their launchers.

One program handles one row. A row's tokens are added in an order that depends on the row alone, so
that its sum is the same in whatever batch or pass it comes, to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile_case import CompileCase
from .row_steps_torch import RowLosses

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _add_tokens(logprob_ptr, start, end, BLOCK: tl.constexpr):
    """Sum of logprob[start:end], fp64: a lane for every BLOCK-th token, then the lanes."""
    lanes = tl.zeros([BLOCK], dtype=tl.float64)
    for block_start in range(start, end, BLOCK):
        offs_n = block_start + tl.arange(0, BLOCK)
        lanes += tl.load(logprob_ptr + offs_n, mask=offs_n < end, other=0.0).to(tl.float64)
    return tl.sum(lanes, 0)


@triton.jit
def _sum_kernel(
    logprob_ptr,  # [N] fp32
    offsets_ptr,  # [B + 1] int64
    row_logprob_ptr,  # [B] fp64
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    tl.store(row_logprob_ptr + row, _add_tokens(logprob_ptr, start, end, BLOCK))


def sum_rows(logprob: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row, [B] fp64."""
    num_rows = offsets.shape[0] - 1
    row_logprob = logprob.new_empty(num_rows, dtype=torch.float64)
    if num_rows:
        _sum_kernel[(num_rows,)](
            logprob_ptr=logprob,
            offsets_ptr=offsets,
            row_logprob_ptr=row_logprob,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return row_logprob


@triton.jit
def _row_loss_kernel(
    logprob_ptr,  # [N] fp32
    offsets_ptr,  # [B + 1] int64
    reference_logprob_ptr,  # [B] fp64
    is_desirable_ptr,  # [B] bool
    kl_ptr,  # scalar fp64
    loss_ptr,  # [B] fp64, this and all below are written
    row_logprob_ptr,  # [B] fp64
    log_ratio_ptr,  # [B] fp64
    slope_ptr,  # [B] fp64
    beta,
    desirable_weight,
    undesirable_weight,
    sft_weight,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    row_logprob = _add_tokens(logprob_ptr, start, end, BLOCK)
    log_ratio = row_logprob - tl.load(reference_logprob_ptr + row)

    is_desirable = tl.load(is_desirable_ptr + row) != 0
    sign = tl.where(is_desirable, 1.0, -1.0).to(tl.float64)
    weight = tl.where(is_desirable, desirable_weight, undesirable_weight).to(tl.float64)
    distance = sign * beta * (log_ratio - tl.load(kl_ptr))
    missing = 1.0 / (1.0 + tl.exp(distance))
    reached = 1.0 / (1.0 + tl.exp(-distance))
    length = tl.maximum(end - start, 1).to(tl.float64)
    sft_slope = tl.where(is_desirable, -sft_weight / length, 0.0)

    tl.store(loss_ptr + row, weight * missing + sft_slope * row_logprob)
    tl.store(slope_ptr + row, sft_slope - weight * sign * beta * missing * reached)
    tl.store(row_logprob_ptr + row, row_logprob)
    tl.store(log_ratio_ptr + row, log_ratio)


def row_losses(
    logprob: Tensor,  # [N] fp32
    offsets: Tensor,  # [B + 1] int64
    reference_logprob: Tensor,  # [B] fp64
    is_desirable: Tensor,  # [B] bool
    kl: Tensor,  # scalar fp64, nats
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    sft_weight: float,
) -> RowLosses:
    """Loss of each row and its slope; the formula is in `row_steps_torch.row_losses`."""
    num_rows = is_desirable.shape[0]
    result = RowLosses(*(torch.empty_like(reference_logprob) for _ in RowLosses._fields))
    if num_rows:
        _row_loss_kernel[(num_rows,)](
            logprob_ptr=logprob,
            offsets_ptr=offsets,
            reference_logprob_ptr=reference_logprob,
            is_desirable_ptr=is_desirable,
            kl_ptr=kl,
            loss_ptr=result.loss,
            row_logprob_ptr=result.logprob,
            log_ratio_ptr=result.log_ratio,
            slope_ptr=result.slope,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            sft_weight=sft_weight,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return result


@triton.jit
def _expand_kernel(
    row_gradient_ptr,  # [B] fp32
    offsets_ptr,  # [B + 1] int64
    gradient_ptr,  # [N] fp32, written
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    values = tl.full([BLOCK], 0.0, tl.float32) + tl.load(row_gradient_ptr + row)
    for block_start in range(start, end, BLOCK):
        offs_n = block_start + tl.arange(0, BLOCK)
        tl.store(gradient_ptr + offs_n, values, mask=offs_n < end)


def expand_rows(row_gradient: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """Each row's value at each of its tokens, [N] fp32."""
    gradient = row_gradient.new_empty(num_tokens)
    if num_tokens:
        _expand_kernel[(row_gradient.shape[0],)](
            row_gradient_ptr=row_gradient,
            offsets_ptr=offsets,
            gradient_ptr=gradient,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return gradient


def compile_cases() -> list[CompileCase]:
    """Every form in which the launchers above launch their kernels."""
    rows = {"logprob_ptr": "*fp32", "offsets_ptr": "*i64"}
    inputs = {"reference_logprob_ptr": "*fp64", "is_desirable_ptr": "*i1", "kl_ptr": "*fp64"}
    outputs = dict.fromkeys(("loss_ptr", "row_logprob_ptr", "log_ratio_ptr", "slope_ptr"), "*fp64")
    scalars = dict.fromkeys(
        ("beta", "desirable_weight", "undesirable_weight", "sft_weight"), "fp32"
    )
    expand = {"row_gradient_ptr": "*fp32", "offsets_ptr": "*i64", "gradient_ptr": "*fp32"}
    constexprs = {"BLOCK": BLOCK}
    return [
        CompileCase(_sum_kernel, rows | {"row_logprob_ptr": "*fp64"}, constexprs, NUM_WARPS),
        CompileCase(_row_loss_kernel, rows | inputs | outputs | scalars, constexprs, NUM_WARPS),
        CompileCase(_expand_kernel, expand, constexprs, NUM_WARPS),
    ]
