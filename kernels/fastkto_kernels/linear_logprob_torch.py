"""The tile steps of `linear_logprob` in PyTorch, for any device; the readable twin of the kernels.

`fold_tile` and `gradient_tile` follow the contracts `FoldStep` and `GradientStep` in `tiles`.
"""

import torch
from torch import Tensor

from .tiles import EXP_FLOOR, GRADIENT_UNIT, LogitTransform, RowState

# The fp32 tile and two temporaries of its size.
BYTES_PER_LOGIT = 12


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
    logits, _ = _transform_in_place(tile, bias, transform, needs_slope=False)
    index, inside = _locate(target, vocab_start, logits.shape[1])
    target_logit = logits.gather(1, index)
    state.target_logit.copy_(torch.where(inside, target_logit, state.target_logit[:, None])[:, 0])
    if state.logit_sum is not None:
        state.logit_sum.add_(logits.sum(1))
    logits.scatter_(1, index, torch.where(inside, -torch.inf, target_logit))

    new_max = torch.maximum(state.other_max, logits.amax(1))
    shift = (state.other_max - new_max).clamp_min(EXP_FLOOR)
    decay = shift.exp()
    distance = logits.sub_(new_max[:, None]).clamp_min_(EXP_FLOOR)
    if state.weighted_sum is None:
        tile_sum = distance.exp_().sum(1)
    else:
        exponentials = distance.exp()
        tile_sum = exponentials.sum(1)
        moved = state.weighted_sum + state.other_sum * shift
        state.weighted_sum.copy_(decay * moved + distance.mul_(exponentials).sum(1))
    state.other_sum.copy_(state.other_sum * decay + tile_sum)
    state.other_max.copy_(new_max)


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
    logits, slope = _transform_in_place(tile, bias, transform, needs_slope=True)
    index, inside = _locate(target, vocab_start, logits.shape[1])
    gradient = logits.sub_(state.other_max[:, None]).exp_()
    # At least 1, the largest term, except in a vocabulary of the target alone.
    gradient.mul_((-GRADIENT_UNIT / state.other_sum.clamp_min(1.0))[:, None])
    target_gradient = torch.where(inside, GRADIENT_UNIT, gradient.gather(1, index))
    gradient.scatter_(1, index, target_gradient)
    if slope is not None:
        gradient.mul_(slope)
    gradient.masked_fill_((target < 0)[:, None], 0.0)
    if direction is not None:
        direction.copy_(gradient)
    if scaled is not None:
        scaled.copy_(gradient.mul_(row_scale[:, None]))


def _transform_in_place(
    tile: Tensor, bias: Tensor | None, transform: LogitTransform, *, needs_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(logits, slope of the softcap or None); the logits overwrite the tile."""
    if bias is not None:
        tile.add_(bias)
    inner_scale, outer_scale = transform.factors
    tile.mul_(inner_scale)
    if transform.softcap is None:
        return tile, None
    # 1 / cosh^2 and not 1 - tanh^2, which loses the small slopes to cancellation.
    slope = tile.cosh().square_().reciprocal_() if needs_slope else None
    return tile.tanh_().mul_(outer_scale), slope


def _locate(target: Tensor, vocab_start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """(index [R, 1] of the target's column, made legal; inside [R, 1]: is it in this tile?)."""
    column = (target - vocab_start)[:, None]
    inside = (column >= 0) & (column < num_columns)
    return column.clamp(0, num_columns - 1), inside
