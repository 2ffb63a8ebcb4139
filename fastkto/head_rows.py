"""Scores and the model's own logits on one real row, for `fastkto.head_check` to compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MAX_TOKENS = 512  # of each row
# Tokens of the vocabulary whose logits are compared, and at how many positions of a row.
_VOCABULARY_TOKENS = 32
_POSITIONS = 32


class MeasuredRow(NamedTuple):
    """One row's scores beside its logits, P positions, K tokens of the vocabulary, all fp32.

    Of T and P only positions where something is finite in both; NaN for a token that is not.
    """

    logprob_error_T: Tensor
    largest_logit_T: Tensor
    scores_PK: Tensor
    logits_PK: Tensor
    only_scores: int  # log-probabilities that are finite here and not by the model's own logits
    only_logits: int  # the other way round
    is_whole: bool  # whether all real tokens are finite in both

    @property
    def is_comparable(self) -> bool:
        return len(self.logprob_error_T) > 0 and len(self.scores_PK) > 0


def measure_row(
    model: nn.Module, inner: PreTrainedModel, tokens: Tensor, dtypes: set[torch.dtype]
) -> MeasuredRow:
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
    scores_T, scores_PK = scores[: length - 1], scores[length - 1 :].view_as(tokens_PK)
    logits_PK = logits[chosen_P].gather(1, tokens_PK).float()
    own = torch.cat([logprob_T, (logits_PK - normaliser_T[chosen_P, None]).flatten()])
    of_scores, of_logits = scores.isfinite(), own.isfinite()
    is_finite_T = (of_scores & of_logits)[: length - 1]
    is_finite_PK = (of_scores & of_logits)[length - 1 :].view_as(tokens_PK)
    is_used_P = is_finite_PK.sum(-1) > 1  # one alone has no spread
    # of what is finite: a model may mask tokens of the vocabulary with -inf
    largest_logit_T = logits.nan_to_num(0, 0, 0).abs().amax(-1).float()
    return MeasuredRow(
        logprob_error_T=(scores_T - logprob_T)[is_finite_T].abs(),
        largest_logit_T=largest_logit_T[is_finite_T],
        scores_PK=torch.where(is_finite_PK, scores_PK, torch.nan)[is_used_P],
        logits_PK=torch.where(is_finite_PK, logits_PK, torch.nan)[is_used_P],
        only_scores=int((of_scores & ~of_logits).sum()),
        only_logits=int((of_logits & ~of_scores).sum()),
        is_whole=bool(is_finite_T.all()),
    )


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
