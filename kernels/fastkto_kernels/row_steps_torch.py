"""The row steps of `kto_loss` in PyTorch, for any device; the readable twin of the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowLosses(NamedTuple):
    """Per row, all [B] fp64."""

    loss: Tensor  # weighted
    logprob: Tensor  # sum over the row's tokens, nats
    log_ratio: Tensor  # logprob - reference_logprob, nats
    slope: Tensor  # d loss / d logprob of each of the row's tokens


def sum_rows(logprob: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row, [B] fp64, one after the other."""
    if offsets.shape[0] == 1:
        return logprob.new_zeros(0, dtype=torch.float64)
    return torch.segment_reduce(logprob.double(), "sum", offsets=offsets, initial=0.0)


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
    """Loss of each row and its slope.

    With sign = 1 for desirable rows and -1 for others, x = sign * beta * (log_ratio - kl):
    loss = weight * sigmoid(-x) - [desirable] * sft_weight * logprob / length
    """
    row_logprob = sum_rows(logprob, offsets)
    log_ratio = row_logprob - reference_logprob
    sign = is_desirable.double() * 2 - 1
    weight = torch.where(is_desirable, desirable_weight, undesirable_weight).double()
    distance = sign * beta * (log_ratio - kl)
    missing = torch.sigmoid(-distance)
    sft_slope = -sft_weight * is_desirable.double() / offsets.diff().clamp_min(1)
    loss = weight * missing + sft_slope * row_logprob
    slope = sft_slope - weight * sign * beta * missing * torch.sigmoid(distance)
    return RowLosses(loss, row_logprob, log_ratio, slope)


def expand_rows(row_gradient: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """Each row's value at each of its tokens, [N] fp32."""
    return torch.repeat_interleave(row_gradient, offsets.diff(), output_size=num_tokens)
