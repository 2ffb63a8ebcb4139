"""The tile steps of `linear_logprob` in PyTorch, for any device; the readable twin of the kernels.

The functions follow the contracts in `tiles`: `FoldStep`, `RescaleStep` and `GradientStep`.
"""

import torch
from torch import Tensor

from .tiles import EXP_FLOOR, GRADIENT_UNIT, MAX_LAG, LogitTransform, RowState

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
    decay: Tensor,
    exponentials: Tensor | None,
    unit: float,
) -> None:
    """Fold one tile into the state, in place, and write its exponentials where asked."""
    needs_slope = exponentials is not None
    logits, slope = _transform_in_place(tile, bias, transform, needs_slope=needs_slope)
    index, inside = _locate(target, vocab_start, logits.shape[1])
    _pick(state.target_logit, logits, index, inside)
    if slope is None:
        state.target_slope.fill_(1.0)
    else:
        _pick(state.target_slope, slope, index, inside)
    if state.logit_sum is not None:
        state.logit_sum.add_(logits.sum(1))
    logits.scatter_(1, index, torch.where(inside, -torch.inf, logits.gather(1, index)))

    largest = logits.amax(1)
    reference = torch.where(largest > state.reference + MAX_LAG, largest, state.reference)
    shift = (state.reference - reference).clamp_min(EXP_FLOOR)
    torch.exp(shift, out=decay)
    distance = logits.sub_(reference[:, None])
    if state.weighted_sum is None:
        terms = distance.exp_()
    else:
        terms = distance.exp()
        moved = state.weighted_sum + state.other_sum * shift
        # The distance may be -inf where its exp() is zero.
        weighted = distance.clamp_min_(EXP_FLOOR).mul_(terms).sum(1)
        state.weighted_sum.copy_(decay * moved + weighted)
    state.other_sum.copy_(state.other_sum * decay + terms.sum(1))
    state.reference.copy_(reference)
    if exponentials is not None:
        if slope is not None:
            terms.mul_(slope)
        if unit != 1.0:
            terms.mul_(unit)
        if terms is not exponentials:  # where the tile is fp32 they are one buffer
            exponentials.copy_(terms)


def rescale_rows(total: Tensor, decay: Tensor) -> None:
    """Multiply the rows of the total by the decay, in place."""
    # On a CPU a look costs less than the multiplication, which is rarely needed.
    if total.device.type != "cpu" or not bool((decay == 1.0).all()):
        total.mul_(decay[:, None])


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
    logits, slope = _transform_in_place(tile, bias, transform, needs_slope=True)
    index, inside = _locate(target, vocab_start, logits.shape[1])
    gradient = logits.sub_(reference[:, None]).exp_()
    # At least 1, its first term, except in a vocabulary of the target alone.
    factor = -GRADIENT_UNIT / other_sum.clamp_min(1.0)
    gradient.mul_(factor[:, None])
    target_gradient = torch.where(inside, GRADIENT_UNIT, gradient.gather(1, index))
    gradient.scatter_(1, index, target_gradient)
    if slope is not None:
        gradient.mul_(slope)
    gradient.masked_fill_((target < 0)[:, None], 0.0)
    if gradient is not direction:  # where the tile is fp32 they are one buffer
        direction.copy_(gradient)


def _transform_in_place(
    tile: Tensor, bias: Tensor | None, transform: LogitTransform, *, needs_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """(logits, slope of the softcap or None); the logits overwrite the tile."""
    if bias is not None:
        tile.add_(bias)
    inner_scale, outer_scale = transform.factors
    if inner_scale != 1.0:
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


def _pick(out: Tensor, values: Tensor, index: Tensor, inside: Tensor) -> None:
    """Write the target's value to the rows whose target is in this tile."""
    out.copy_(torch.where(inside, values.gather(1, index), out[:, None])[:, 0])
