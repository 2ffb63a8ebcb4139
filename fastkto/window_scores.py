"""What the losses of one optimizer step need besides gradients.

The weights do not change between the micro-batches of an optimizer step, so all its passes without
gradient run at once, before the first loss: the reference on matched and mismatched sequences, the
policy on mismatched ones, and a router's expert counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkto.data.batch import TokenSequence, check_given_mismatched
from fastkto.data.pairing import DATASET_PAIRING
from fastkto.modes import evaluating
from fastkto.passes import move_index, sequence_logprobs
from fastkto.plan_passes import Layout, Plan, computed_tokens, plan_passes
from fastkto.positions import check_sequences
from fastkto.reference_cache import Lookup
from fastkto.sharding import release_gathered
from fastkto.step import BatchLoss, StepSettings
from fastkto.window import pair_window

# A prompt that several completions share is read once where that saves this part of all tokens, and
# so many tokens for each prompt. Short ones are not worth that the reference then reaches the same
# scores by another path, so that equal weights give a KL estimate of 1e-6 where it is 0.
_LEAST_SAVED = 0.1
_LONG_PROMPT = 128


def score_window(
    settings: StepSettings,
    batches: Sequence[dict[str, Any]],
    *,
    counted: Sequence[int] | None = None,
    single_pass: bool = False,
) -> list[BatchLoss]:
    """The losses of this rank's micro-batches of one optimizer step, ready for their passes.

    `counted` is as for `pair_window`. With `single_pass` each of them is one pass over all rows,
    whatever its size.
    """
    losses = pair_losses(settings, batches, counted)
    jobs = _plan(settings, losses, single_pass)
    # Dropout would be noise, and gradient checkpointing only cost, where no gradient is needed.
    with evaluating(settings.policy):
        _score(settings, losses, jobs)
        if settings.has_router:
            _count_experts(losses)
    return losses


def pair_losses(
    settings: StepSettings, batches: Sequence[dict[str, Any]], counted: Sequence[int] | None
) -> list[BatchLoss]:
    """The losses of `score_window`, with nothing scored or planned yet."""
    args, accelerator = settings.args, settings.ranks.accelerator
    if args.needs_kl and args.kl_pairing == DATASET_PAIRING:
        for batch in batches:
            check_given_mismatched(batch)
    window = pair_window(
        batches,
        kl_scope=args.kl_scope,
        kl_pairing=args.kl_pairing,
        accelerator=accelerator,
        counted=counted,
    )
    losses = []
    for index, (batch, pairs) in enumerate(zip(batches, window.batches, strict=True)):
        loss = BatchLoss(
            settings, batch, pairs, len(batch["rows"]) if counted is None else counted[index]
        )
        paired_rows = [loss.rows[index] for index in loss.paired_rows]
        check_sequences(loss.rows, loss.matched, settings.positions)
        check_sequences(paired_rows, loss.mismatched, settings.positions)
        if args.kl_scope == "window":
            # The mean over micro-batches and ranks is then the mean over the window's rows.
            loss.num_rows = window.num_rows / (len(batches) * accelerator.num_processes)
        losses.append(loss)
    return losses


def score_reference(settings: StepSettings, losses: Sequence[BatchLoss]) -> Tensor:
    """Put the reference's scores that the losses need into the cache, as far as it lacks them.

    Returns them, of all matched, then all mismatched completions, fp64.
    """
    jobs = _plan(settings, losses, single_pass=False)
    with evaluating(settings.policy):
        return _reference_logprobs(settings, losses, jobs)


class _Job(NamedTuple):
    """Sequences that one model scores, and in which passes."""

    sequences: list[TokenSequence]
    plan: Plan
    layout: Layout


class _Jobs(NamedTuple):
    """What is scored without gradient for the losses of a step."""

    known: Tensor | None  # the reference's scores, if the batches brought all of them
    lookup: Lookup  # of matched sequences, then mismatched ones; of none that are known
    reference: list[_Job]  # those that it misses, in one job or in two
    policy: list[_Job]  # mismatched sequences; none if the loss needs no KL estimate


def _plan(settings: StepSettings, losses: Sequence[BatchLoss], single_pass: bool) -> _Jobs:
    """Plan the passes of every loss, and of what is scored before them."""
    matched = [sequence for loss in losses for sequence in loss.matched]
    mismatched = [sequence for loss in losses for sequence in loss.mismatched]
    settings.ranks.check_images(any(one.media is not None for one in matched))
    known = _known_reference(losses)
    sets = [matched, mismatched] if known is None else [[], []]
    lookup = Lookup(settings.reference_cache, sets)
    losses[0].add(ref_cache_hits=lookup.hits, ref_cache_misses=lookup.misses)
    missing = lookup.missing
    share = _saves_tokens(settings, missing[0] + missing[1])
    if settings.ranks.in_lockstep:
        share = settings.ranks.all(share)
    # One plan for both, so that a prompt is read once; or the plan that the policy has for the
    # mismatched ones, so that equal weights give equal bits, and a KL estimate of exactly 0.
    reference_sets = [missing[0] + missing[1]] if share else missing
    policy_sets = [mismatched] if settings.args.needs_kl else []
    scored = [(one, settings.reference_layout) for one in reference_sets]
    scored += [(one, settings.policy_layout) for one in policy_sets]
    budget = settings.args.no_grad_tokens
    plans = [_plan_gradient(loss, single_pass) for loss in losses]
    plans += [plan_passes(one, budget, layout, share_prompts=share) for one, layout in scored]
    levelled = iter(settings.ranks.level(plans))
    for loss in losses:
        loss.plan = next(levelled)
        _count_tokens(loss, _Job(loss.matched, loss.plan, settings.policy_layout))
    jobs = [_Job(one, next(levelled), layout) for one, layout in scored]
    for job in jobs:
        _count_tokens(losses[0], job)
    return _Jobs(known, lookup, jobs[: len(reference_sets)], jobs[len(reference_sets) :])


def _known_reference(losses: Sequence[BatchLoss]) -> Tensor | None:
    """What the batches brought, in the order of `_reference_logprobs`; None if any is missing."""
    known = [one for loss in losses if (one := loss.known_reference()) is not None]
    if len(known) < len(losses):
        return None
    return torch.cat([part for kind in zip(*known, strict=True) for part in kind])


def _plan_gradient(loss: BatchLoss, single_pass: bool) -> Plan:
    args, layout = loss.settings.args, loss.settings.policy_layout
    if single_pass:
        if layout is Layout.ALONE and len(loss.matched) > 1:
            raise ValueError(
                f"a subclass's compute_loss gets the batch of {len(loss.matched)} rows in one "
                "pass, and this model scores a sequence differently beside another; use "
                "per_device_train_batch_size=1 with kl_scope='window'"
            )
        return [[[row] for row in range(len(loss.matched))]]
    # A router's loss is over the tokens of all rows, so there each row has its own prompt.
    share_prompts = not loss.settings.has_router
    return plan_passes(loss.matched, args.grad_tokens, layout, share_prompts=share_prompts)


def _saves_tokens(settings: StepSettings, sequences: Sequence[TokenSequence]) -> bool:
    """Whether reading shared prompts once is worth a plan of its own."""
    if settings.reference_layout is not Layout.PACKED:
        return False
    plan = plan_passes(sequences, settings.args.no_grad_tokens, Layout.PACKED, share_prompts=True)
    shared = [group for groups in plan for group in groups if len(group) > 1]
    saved = [(len(group) - 1) * len(sequences[group[0]].prompt) for group in shared]
    total = sum(sequence.length for sequence in sequences)
    return sum(saved) >= max(_LEAST_SAVED * total, _LONG_PROMPT * len(shared), 1)


def _count_tokens(loss: BatchLoss, job: _Job) -> None:
    sequences, plan, layout = job
    loss.add(
        sequence_tokens=sum(sequence.length for sequence in sequences),
        computed_tokens=sum(computed_tokens(sequences, groups, layout) for groups in plan),
    )


def _score(settings: StepSettings, losses: Sequence[BatchLoss], jobs: _Jobs) -> None:
    logprob = _reference_logprobs(settings, losses, jobs)
    sizes = [len(loss.matched) for loss in losses]
    for loss, part in zip(losses, logprob[: sum(sizes)].split(sizes), strict=True):
        loss.reference_logprob = part
        if settings.args.nonfinite == "nanmean":
            loss.leave_out_nan()
    for job in jobs.policy:
        policy_logprob = _logprobs(losses[0], settings.policy, job, "policy")
        _estimate_kl(settings, losses, torch.stack([policy_logprob, logprob[sum(sizes) :]]))


def _reference_logprobs(settings: StepSettings, losses: Sequence[BatchLoss], jobs: _Jobs) -> Tensor:
    """Log-probability of all matched, then all mismatched completions, fp64."""
    with settings.reference.scoring(settings.policy) as reference:
        scored = torch.cat(
            [_logprobs(losses[0], reference, job, "reference") for job in jobs.reference]
        )
    if settings.reference.model is not None:
        release_gathered(settings.reference.model)
    return jobs.lookup.complete(scored) if jobs.known is None else jobs.known


def _logprobs(loss: BatchLoss, model: nn.Module, job: _Job, of: str) -> Tensor:
    """Log-probability of each completion, [len(job.sequences)] fp64."""
    device, backend = loss.is_desirable.device, loss.settings.args.backend
    return sequence_logprobs(model, *job, device=device, of=of, backend=backend)


def _estimate_kl(
    settings: StepSettings,
    losses: Sequence[BatchLoss],
    logprob: Tensor,  # [2, B'] fp64: the policy's and the reference's of mismatched sequences
) -> None:
    """`max(0, mean log-ratio of the mismatched sequences)`, over the rows of all ranks.

    In the scope "batch" those of one micro-batch, in the scope "window" those of all.
    """
    parts = logprob.split([len(loss.mismatched) for loss in losses], dim=1)
    table = []
    for loss, part in zip(losses, parts, strict=True):
        paired = move_index(torch.tensor(loss.paired_rows, dtype=torch.int64), part)
        loss.scores[2:, paired] = part
        kl_sum = (part[0] - part[1]).sum()
        table.append(torch.stack([kl_sum, torch.full_like(kl_sum, part.shape[1])]))
    local = torch.stack(table)  # [micro-batches, 2]
    if settings.args.kl_scope == "window":
        local = local.sum(0).expand_as(local)
    total = settings.ranks.sum(local.clone())
    for loss, (kl_sum, kl_rows), (all_sum, all_rows) in zip(losses, local, total, strict=True):
        loss.add(kl_sum=kl_sum, kl_rows=kl_rows)
        loss.kl = (all_sum / all_rows.clamp(min=1)).clamp(min=0)


def _count_experts(losses: Sequence[BatchLoss]) -> None:
    for loss in losses:
        if len(loss.plan) > 1:
            loss.expert_counts = torch.stack([loss.count_experts(p) for p in loss.plan]).sum(0)
