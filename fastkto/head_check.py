"""Do fastkto's scores follow from the model's own logits? Asked once, before anything is trained.

The list of what model families do behind their hidden states can never be complete. So the scores
of a few real tokens are compared with the logits that the model itself returns, where both are
finite: rows that are not are for the step to name.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.head import scoring_model, scoring_of
from fastkto.head_rows import MAX_TOKENS, MeasuredRow, measure_row
from fastkto.modes import evaluating
from fastkto.ranks import Ranks

MAX_ROWS = 2


class HeadMismatchError(ValueError):
    """fastkto's log-probabilities are not those of the model's own logits."""


class HeadCheck(NamedTuple):
    """How far scores and logits are apart, and how far they may be."""

    scale_error: float  # spread of the scores over that of the logits, minus 1
    scale_tolerance: float
    logprob_error: float  # mean absolute difference over the real next tokens, nats
    logprob_tolerance: float


class _Comparison(NamedTuple):
    """What was found on some rows."""

    check: HeadCheck | None  # None: nothing is finite
    mismatch: str  # "" if there is none
    whole_rows: list[int]  # those of which everything is finite
    what: str  # was not finite, if nothing is


def check_head(model: nn.Module, rows: Sequence[Tensor | Sequence[int]]) -> HeadCheck:
    """Compare scores with the model's own logits on up to two rows; raise HeadMismatchError.

    Two things are compared. The scale: differences between the scores of some tokens of the
    vocabulary, against differences between their logits; this shows a wrong factor however
    confident the model is. And the log-probabilities of the rows' real tokens: this shows a bias, a
    softcap, a shift. What is allowed depends on the precision in which the model computes logits.
    Positions where neither is finite are left out; nothing finite at all is a ValueError.

    Runs in eval mode without gradient, uses no random numbers, and puts the modes back. With a
    sharded model every rank has to call it, with the same number of rows.

    Args:
        model: what is trained: a model after `attach_scoring`, in whatever wrappers.
        rows: token ids of real sequences; each is cut to 512 tokens.
    """
    found = _compare(model, rows)
    if found.mismatch:
        raise HeadMismatchError(found.mismatch)
    if found.check is None:
        raise ValueError(
            f"{found.what} are not finite on real rows; check its weights, and that its dtype is "
            "the one it was trained in"
        )
    return found.check


def agree_on_head(model: nn.Module, rows: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """`check_head` on all ranks, which raise HeadMismatchError together if it does on one.

    Takes this rank's `rows` two by two, until something is finite on any rank: weights are the same
    on all. Returns the last two, without one that is not finite beside one that is; none if nothing
    is finite in the rows of any rank, which says nothing about the head.
    """
    for start in itertools.count(step=MAX_ROWS):
        # always two, so that all ranks run the same forwards of a sharded model
        tried = [rows[index % len(rows)] for index in range(start, start + MAX_ROWS)]
        found = _compare(model, tried)
        left = max(len(rows) - start - MAX_ROWS, 0)
        counts = [bool(found.mismatch), found.check is not None, left]
        device = ranks.accelerator.device
        failed, compared, left = ranks.sum(torch.tensor(counts, device=device).float()).tolist()
        if failed:
            raise HeadMismatchError(ranks.first_text(found.mismatch))
        if compared:
            return [tried[index] for index in found.whole_rows] or tried
        if not left:
            break
    return []


def _compare(model: nn.Module, rows: Sequence[Tensor | Sequence[int]]) -> _Comparison:
    inner = scoring_model(model)
    device = inner.get_input_embeddings().weight.device
    sequences = [torch.as_tensor(row, device=device)[:MAX_TOKENS] for row in rows[:MAX_ROWS]]
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise ValueError("rows has no sequence of two tokens or more; pass real rows")
    with evaluating(model):
        dtypes: set[torch.dtype] = set()
        measured = [measure_row(model, inner, sequence, dtypes) for sequence in sequences]
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    what = f"the logits of {type(inner).__name__}, in {names},"
    whole = [index for index, row in enumerate(measured) if row.is_whole]
    only_scores = sum(row.only_scores for row in measured)
    only_logits = sum(row.only_logits for row in measured)
    if only_scores or only_logits:
        return _Comparison(None, _describe_finite(inner, what, only_scores, only_logits), whole, "")
    comparable = [row for row in measured if row.is_comparable]
    if not comparable:
        return _Comparison(None, "", whole, what)
    check = _judge(comparable, max(unit_rounding(dtype) for dtype in dtypes))
    # written so that a NaN fails
    is_right = (
        abs(check.scale_error) <= check.scale_tolerance
        and check.logprob_error <= check.logprob_tolerance
    )
    mismatch = "" if is_right else _describe(inner, check, sequences, names)
    return _Comparison(check, mismatch, whole, "")


def _judge(measured: Sequence[MeasuredRow], rounding: float) -> HeadCheck:
    """Errors over all rows, and what `rounding` of logits (relative, at most) explains of them."""
    scores = torch.cat([row.scores_PK for row in measured])
    logits = torch.cat([row.logits_PK for row in measured])
    scores_PK = (scores - scores.nanmean(-1, keepdim=True)).nan_to_num(0)
    logits_PK = (logits - logits.nanmean(-1, keepdim=True)).nan_to_num(0)
    # Least squares at each position. Rounding is in the logits, so that regressing them on the
    # scores is unbiased; the other way round it would look like a scale.
    covariance_P = (scores_PK * logits_PK).sum(-1)
    variance_P = (scores_PK * scores_PK).sum(-1)
    is_flat_P = (variance_P == 0) & (logits_PK == 0).all(-1)  # an output head of zeros
    slope_P = torch.where(is_flat_P, 1.0, covariance_P / variance_P)
    # The median: a router that decides differently in the second call disturbs few positions.
    scale_error = 1 / slope_P.median().item() - 1

    # rms of rounding is 0.4 of its maximum; families with a scale and a softcap round four times
    noise = 0.4 * rounding * logits.square().nanmean().sqrt() / variance_P.sum().sqrt()
    mean_error = torch.cat([row.logprob_error_T for row in measured]).mean()
    largest_logit = torch.cat([row.largest_logit_T for row in measured]).mean()
    return HeadCheck(
        scale_error=scale_error,
        scale_tolerance=max(1e-3, 0.75 * rounding) + 3 * noise.nan_to_num(0, 0, 0).item(),
        logprob_error=mean_error.item(),
        logprob_tolerance=1e-3 + rounding * largest_logit.item(),
    )


def _describe(
    inner: PreTrainedModel, check: HeadCheck, sequences: Sequence[Tensor], names: str
) -> str:
    remedy = (
        'set head="logits", which scores with the model\'s own logits in slices'
        if scoring_of(inner).head == "auto"
        else "its forward gives different logits from one call to the next"
    )
    return (
        f"fastkto does not score as {type(inner).__name__} does: on {len(sequences)} rows of "
        f"{', '.join(str(len(sequence)) for sequence in sequences)} tokens, logits in {names}, "
        f"differences between logits are off by {check.scale_error:+.2%} (allowed: "
        f"{check.scale_tolerance:.2%}) and log-probabilities by {check.logprob_error:.3g} nats on "
        f"average (allowed: {check.logprob_tolerance:.3g}); {remedy}"
    )


def _describe_finite(inner: PreTrainedModel, what: str, only_scores: int, only_logits: int) -> str:
    remedy = "check its weights, and that its dtype is the one it was trained in"
    if scoring_of(inner).head == "auto":
        remedy += '; if it masks tokens, set head="logits"'
    if only_scores:
        found = f"are not finite for {only_scores} tokens of real rows where fastkto's scores are"
    else:
        found = f"are finite for {only_logits} tokens of real rows where fastkto's scores are not"
    return f"{what} {found}; {remedy}"


def unit_rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding in matmuls of `dtype`."""
    rounding = torch.finfo(dtype).eps / 2
    if dtype == torch.float32:  # matmuls may be allowed to take fewer bits of their inputs
        mkldnn_matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        for backend in (torch.backends.cuda.matmul, mkldnn_matmul):
            allowed = {"tf32": 2**-11, "bf16": 2**-8}.get(backend.fp32_precision, 0.0)
            rounding = max(rounding, allowed)
    return rounding
