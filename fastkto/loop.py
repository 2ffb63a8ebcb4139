"""The parts of a KTO step for a training loop of one's own: from a model and a batch to metrics.

    attach_scoring(model)                                       # once, also on the reference
    reference_logprob = completion_logprobs(reference, batch)   # a batch of KTOCollator
    kl = estimate_kl(model, reference, batch)
    scores = score_completions(model, batch)
    result = kto_loss(*scores, reference_logprob, batch["label"], kl=kl)
    result.loss.backward()
    metrics = reward_metrics(result, batch["label"], beta=0.1)

`KTOTrainer` does the same with passes of bounded size, shared prompts and a reference cache, and
on sharded models (FSDP2, ZeRO), whose ranks have to run equally many forwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkto.data.batch import (
    TokenSequence,
    given_mismatched,
    matched_sequences,
    mismatched_sequences,
    split_rows,
)
from fastkto.data.pairing import pair
from fastkto.loss import KTOLoss
from fastkto.modes import evaluating
from fastkto.passes import build_pass, run_pass, sequence_logprobs
from fastkto.plan_passes import Layout, plan_passes


class CompletionScores(NamedTuple):
    """Per-token log-probabilities of a batch's completions, in nats, as `kto_loss` takes them."""

    logprob: Tensor  # [N] fp32, row after row
    offsets: Tensor  # [B + 1] int64, row i owns logprob[offsets[i]:offsets[i + 1]]


def score_completions(
    model: nn.Module, batch: dict[str, Any], *, max_length: int | None = None
) -> CompletionScores:
    """Score each row's own completion in one forward, with a gradient where that is on.

    Args:
        model: prepared by `attach_scoring`, in whatever wrappers (DistributedDataParallel, ...).
        batch: as `KTOCollator` makes it, on the model's device.
        max_length: of prompt and completion together; the completion's end is cut.
    """
    sequences = matched_sequences(batch, max_length)
    groups = [[row] for row in range(len(sequences))]
    pass_ = build_pass(sequences, groups, Layout.PADDED)
    return CompletionScores(run_pass(model, pass_).logprob, pass_.offsets)


def completion_logprobs(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    max_length: int | None = None,
    max_tokens: int = 8192,
) -> Tensor:
    """Log-probability of each row's own completion: [B] fp64, nats, without gradient.

    In eval mode, and in forwards of at most `max_tokens` tokens (or one sequence). Other arguments
    are those of `score_completions`.
    """
    return _logprobs(model, matched_sequences(batch, max_length), batch, max_tokens)


def estimate_kl(
    policy: nn.Module,
    reference: nn.Module,
    batch: dict[str, Any],
    *,
    max_length: int | None = None,
    max_tokens: int = 8192,
    kl_pairing: str = "rotate",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`max(0, mean(policy - reference))` over mismatched completions: scalar fp64, in nats.

    Each prompt is scored with the completion of another row of the batch (`kl_pairing` as in
    `KTOConfig`), or with the mismatched one that the batch brings. Section 4.1 of arXiv:2402.01306.

    reduce: sums a tensor over ranks, for example `lambda t: accelerator.reduce(t, "sum")`; every
        rank has to call this function then.
    """
    sequences = given_mismatched(batch, max_length)
    if sequences is None:
        completions = [completion for _, completion in split_rows(batch)]
        pairs = pair(batch["prompt_keys"], kl_pairing)
        partners = [None if index is None else completions[index] for index in pairs]
        found = mismatched_sequences(batch, partners, max_length)
        sequences = [sequence for sequence in found if sequence is not None]
    log_ratio = _logprobs(policy, sequences, batch, max_tokens)
    log_ratio -= _logprobs(reference, sequences, batch, max_tokens)
    total = torch.stack([log_ratio.sum(), torch.full_like(log_ratio.sum(), len(log_ratio))])
    if reduce is not None:
        total = reduce(total)
    return (total[0] / total[1].clamp(min=1)).clamp(min=0)


def reward_metrics(result: KTOLoss, is_desirable: Tensor, *, beta: float) -> dict[str, float]:
    """Means over the rows of each class, under TRL's names; a class without rows has none.

    `rewards/chosen`, `rewards/rejected` (beta times the log-ratio), `logps/chosen`,
    `logps/rejected` (nats) and `rewards/margins`. Waits for the device.
    """
    metrics = {}
    for name, rows in (("chosen", is_desirable), ("rejected", ~is_desirable)):
        if rows.any():
            metrics[f"rewards/{name}"] = beta * result.log_ratio[rows].mean().item()
            metrics[f"logps/{name}"] = result.logprob[rows].mean().item()
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _logprobs(
    model: nn.Module, sequences: list[TokenSequence], batch: dict[str, Any], max_tokens: int
) -> Tensor:
    if isinstance(model, DistributedDataParallel):  # its forwards wait for those of other ranks
        model = model.module
    plan = plan_passes(sequences, max_tokens, Layout.PADDED)
    device = batch["label"].device
    with evaluating(model):
        return sequence_logprobs(model, sequences, plan, Layout.PADDED, device=device)
