"""Do fastkto's scores follow from the model's own logits? Asked once, before anything is trained.

The list of what model families do behind their hidden states can never be complete. So the scores
of a few real tokens are compared with the logits that the model itself returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.head import scoring_model, scoring_of
from fastkto.quantised import is_quantised

MAX_ROWS = 2
MAX_TOKENS = 512  # of each row
# Tokens of the vocabulary whose logits are compared, and at how many positions of a row.
_VOCABULARY_TOKENS = 32
_POSITIONS = 32


class HeadMismatchError(ValueError):
    """fastkto's log-probabilities are not those of the model's own logits."""


class HeadCheck(NamedTuple):
    """How far scores and logits are apart, and how far they may be."""

    scale_error: float  # spread of the scores over that of the logits, minus 1
    scale_tolerance: float
    logprob_error: float  # mean absolute difference over the real next tokens, nats
    logprob_tolerance: float


class _Row(NamedTuple):
    """One row's scores beside its logits, P positions, K tokens of the vocabulary, all fp32."""

    logprob_error_T: Tensor
    largest_logit_T: Tensor
    scores_PK: Tensor
    logits_PK: Tensor


def check_head(model: nn.Module, rows: Sequence[Tensor | Sequence[int]]) -> HeadCheck:
    """Compare scores with the model's own logits on up to two rows; raise HeadMismatchError.

    Two things are compared. The scale: differences between the scores of some tokens of the
    vocabulary, against differences between their logits; this shows a wrong factor however
    confident the model is. And the log-probabilities of the rows' real tokens: this shows a bias, a
    softcap, a shift. What is allowed depends on the precision in which the model computes logits.

    Runs in eval mode without gradient, uses no random numbers, and puts the modes back. With a
    sharded model every rank has to call it, with the same number of rows.

    Args:
        model: what is trained: a model after `attach_scoring`, in whatever wrappers.
        rows: token ids of real sequences; each is cut to 512 tokens.
    """
    inner = scoring_model(model)
    device = inner.get_input_embeddings().weight.device
    sequences = [torch.as_tensor(row, device=device)[:MAX_TOKENS] for row in rows[:MAX_ROWS]]
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise ValueError("rows has no sequence of two tokens or more; pass real rows")
    with evaluating(model):
        dtypes: set[torch.dtype] = set()
        measured = [_measure_row(model, inner, sequence, dtypes) for sequence in sequences]
    rounding = max(unit_rounding(dtype) for dtype in dtypes)
    check = _judge(measured, rounding)
    # written so that a NaN fails
    if not (
        abs(check.scale_error) <= check.scale_tolerance
        and check.logprob_error <= check.logprob_tolerance
    ):
        raise HeadMismatchError(_describe(inner, check, sequences, dtypes))
    return check


def _measure_row(
    model: nn.Module, inner: PreTrainedModel, tokens: Tensor, dtypes: set[torch.dtype]
) -> _Row:
    """The row's scores and logits; adds the dtypes in which logits are computed to `dtypes`."""
    length = len(tokens)
    with _recorded_dtypes(inner.get_output_embeddings(), dtypes):
        # [T - 1, V], after each token but the last, without what prompt tuning puts in front
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, -length:-1]
    dtypes.add(logits.dtype)
    device = logits.device
    tokens = tokens.to(device)
    # in parts: an fp32 copy of all logits can be larger than everything else here
    normaliser_T = torch.cat([part.float().logsumexp(-1) for part in logits.split(64)])
    logprob_T = logits.gather(1, tokens[1:, None])[:, 0].float() - normaliser_T
    if not logprob_T.isfinite().all():
        raise ValueError(
            f"the logits of {type(inner).__name__} are not finite on real rows, in {logits.dtype}; "
            "check its weights, and that its dtype is the one it was trained in"
        )

    vocab_size = logits.shape[1]
    chosen_P = torch.arange(0, length - 1, math.ceil((length - 1) / _POSITIONS), device=device)
    # spread over the vocabulary, and others at each position
    steps_K = torch.arange(_VOCABULARY_TOKENS, device=device) * vocab_size // _VOCABULARY_TOKENS
    tokens_PK = (steps_K + 7 * chosen_P[:, None]) % vocab_size
    positions = torch.cat(
        [torch.arange(length - 1, device=device), chosen_P.repeat_interleave(_VOCABULARY_TOKENS)]
    )
    scores = model(
        input_ids=tokens[None],
        use_cache=False,
        score_row=torch.zeros_like(positions),
        score_position=positions - length,
        score_target=torch.cat([tokens[1:], tokens_PK.flatten()]),
    ).logprob.to(device)
    return _Row(
        logprob_error_T=(scores[: length - 1] - logprob_T).abs(),
        largest_logit_T=logits.abs().amax(-1).float(),
        scores_PK=scores[length - 1 :].view_as(tokens_PK),
        logits_PK=logits[chosen_P].gather(1, tokens_PK).float(),
    )


def _judge(measured: Sequence[_Row], rounding: float) -> HeadCheck:
    """Errors over all rows, and what `rounding` of logits (relative, at most) explains of them."""
    scores = torch.cat([row.scores_PK for row in measured])
    logits = torch.cat([row.logits_PK for row in measured])
    scores_PK = scores - scores.mean(-1, keepdim=True)
    logits_PK = logits - logits.mean(-1, keepdim=True)
    # Least squares at each position. Rounding is in the logits, so that regressing them on the
    # scores is unbiased; the other way round it would look like a scale.
    covariance_P = (scores_PK * logits_PK).sum(-1)
    variance_P = (scores_PK * scores_PK).sum(-1)
    is_flat_P = (variance_P == 0) & (logits_PK == 0).all(-1)  # an output head of zeros
    slope_P = torch.where(is_flat_P, 1.0, covariance_P / variance_P)
    # The median: a router that decides differently in the second call disturbs few positions.
    scale_error = 1 / slope_P.median().item() - 1

    # rms of rounding is 0.4 of its maximum; families with a scale and a softcap round four times
    noise = 0.4 * rounding * logits.square().mean().sqrt() / variance_P.sum().sqrt()
    mean_error = torch.cat([row.logprob_error_T for row in measured]).mean()
    largest_logit = torch.cat([row.largest_logit_T for row in measured]).mean()
    return HeadCheck(
        scale_error=scale_error,
        scale_tolerance=max(1e-3, 0.75 * rounding) + 3 * noise.nan_to_num(0, 0, 0).item(),
        logprob_error=mean_error.item(),
        logprob_tolerance=1e-3 + rounding * largest_logit.item(),
    )


def _describe(
    inner: PreTrainedModel,
    check: HeadCheck,
    sequences: Sequence[Tensor],
    dtypes: set[torch.dtype],
) -> str:
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
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


def unit_rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding in matmuls of `dtype`."""
    rounding = torch.finfo(dtype).eps / 2
    if dtype == torch.float32:  # matmuls may be allowed to take fewer bits of their inputs
        mkldnn_matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        for backend in (torch.backends.cuda.matmul, mkldnn_matmul):
            allowed = {"tf32": 2**-11, "bf16": 2**-8}.get(backend.fp32_precision, 0.0)
            rounding = max(rounding, allowed)
    return rounding


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; every module gets its own mode back.

    Quantised layers are left in training mode, which means nothing to them but for bitsandbytes on
    a CPU: there a 4-bit layer in eval mode repacks its weight for good, and no gradient passes it
    any more.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = any(map(is_quantised, module.parameters(recurse=False)))
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recorded_dtypes(head: nn.Module | None, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Adds the dtypes in which the head computes to `dtypes`: autocast's, if a wrapper turns it on.

    The logits that come out may have been converted to fp32 since, and an adapter's product too.
    """

    def record(module: nn.Module, inputs: object, output: Tensor) -> None:
        dtypes.add(output.dtype)

    modules = [] if head is None else head.modules()
    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
