"""One device batch: reference and KL scores first, then its loss, pass by pass.

Everything in a row's loss but its own log-probability is known once the passes without gradient
are done. So each pass with gradient forms its part of the loss and can run backward at once, and
the activations of one pass exist at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkto.config import KTOConfig
from fastkto.head_check import evaluating
from fastkto.loss import KTOLoss, kto_loss
from fastkto.passes import (
    Pass,
    Sequences,
    build_pass,
    matched_sequences,
    mismatched_sequences,
    move_index,
    plan_passes,
    run_pass,
    sequence_logprobs,
)
from fastkto.reference import Reference
from fastkto.router import balancing_loss, expert_counts


@dataclass
class StepSettings:
    """What stays the same from batch to batch."""

    args: KTOConfig
    policy: Any  # as prepared by accelerate, without a DistributedDataParallel around it
    reference: Reference
    router_aux_loss_coef: float  # 0 without a router
    experts_per_token: int
    reduce: Callable[[Tensor], Tensor]  # sums a tensor over ranks


class BatchLoss:
    """The loss of one device batch of `B` rows, in parts that add up to the mean over its rows.

    `plan` lists the rows of each pass. `pass_loss` runs one of them; once all have run, `sums`
    holds the batch's metrics and `finite` says which rows' scores are finite. The first `counted`
    rows count in the KL estimate and the metrics: all but those that fill a last evaluation batch.
    With `single_pass` the plan is one pass over all rows, whatever its size.
    """

    def __init__(
        self,
        settings: StepSettings,
        batch: dict[str, Any],
        counted: int,
        *,
        single_pass: bool = False,
    ) -> None:
        self.settings = settings
        self.rows: list[int] = batch["rows"]
        self.is_desirable = batch["label"]
        index_B = torch.arange(len(self.rows), device=self.is_desirable.device)
        self.counted = (index_B < counted).double()
        self.matched = matched_sequences(batch)
        self.plan = plan_passes(self.matched.lengths, settings.args.max_tokens_per_pass)
        if single_pass:
            self.plan = [list(range(len(self.rows)))]
        self.finite = torch.ones_like(self.is_desirable)
        self.sums: dict[str, Tensor] = {}
        self.kl: Tensor | None = None
        self._expert_counts: Tensor | None = None
        # Dropout would be noise, and gradient checkpointing only cost, where no gradient is needed.
        with evaluating(settings.policy):
            self._score_without_gradient(batch)

    def _score_without_gradient(self, batch: dict[str, Any]) -> None:
        settings, args = self.settings, self.settings.args

        def score(model: nn.Module, sequences: Sequences) -> Tensor:
            return sequence_logprobs(
                model, sequences, args.max_tokens_per_pass, backend=args.backend
            )

        with settings.reference.scoring(settings.policy) as reference:
            self.reference_logprob = score(reference, self.matched)
            if args.needs_kl:
                mismatched = mismatched_sequences(batch)
                kl_reference_logprob = score(reference, mismatched)
        if args.needs_kl:
            kl_logprob = score(settings.policy, mismatched)
            self._estimate_kl(kl_logprob - kl_reference_logprob, batch["kl_completion_lengths"])
        if settings.router_aux_loss_coef and len(self.plan) > 1:
            counts = [self._count_experts(rows) for rows in self.plan]
            self._expert_counts = torch.stack(counts).sum(0)

    def _estimate_kl(self, log_ratio: Tensor, kl_lengths: list[int]) -> None:
        """`max(0, mean log-ratio of the mismatched sequences)`, over all ranks' rows."""
        rows = [row for row, length in enumerate(kl_lengths) if length > 0]
        paired = move_index(torch.tensor(rows, dtype=torch.int64), log_ratio)
        counted = self.counted[paired]
        self.finite[paired] &= torch.isfinite(log_ratio)
        local = torch.stack([(log_ratio * counted).sum(), counted.sum()])
        self._add(kl_sum=local[0], kl_rows=local[1])
        self._add(lone_rows=self.counted.sum() - local[1])
        kl_sum, kl_rows = self.settings.reduce(local.clone())
        self.kl = (kl_sum / kl_rows.clamp(min=1)).clamp(min=0)

    def _count_experts(self, rows: list[int]) -> Tensor:
        pass_ = build_pass(self.matched, rows)
        unscored = pass_._replace(
            score_row=pass_.score_row[:0],
            score_position=pass_.score_position[:0],
            score_target=pass_.score_target[:0],
        )
        output = run_pass(self.settings.policy, unscored, router_logits=True)
        return expert_counts(
            output.router_logits, pass_.real_tokens, self.settings.experts_per_token
        )

    def pass_loss(self, model: nn.Module, rows: list[int]) -> Tensor:
        """This pass's part of the batch's loss: a scalar with the graph of the pass."""
        args, pass_ = self.settings.args, build_pass(self.matched, rows)
        has_router = self.settings.router_aux_loss_coef != 0.0
        scores = run_pass(model, pass_, stats=True, router_logits=has_router)
        result = kto_loss(
            scores.logprob,
            pass_.offsets,
            self.reference_logprob[pass_.rows],
            self.is_desirable[pass_.rows],
            kl=self.kl,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            loss_type=args.loss_type,
            num_rows=len(self.rows),
            backend=args.backend,
        )
        self._record(pass_, scores, result)
        if not has_router:
            return result.loss
        return result.loss + self._router_loss(scores.router_logits, pass_)

    def _router_loss(self, router_logits: tuple[Tensor, ...], pass_: Pass) -> Tensor:
        counts = self._expert_counts
        if counts is None:  # a single pass is the whole device batch
            with torch.no_grad():
                top_k = self.settings.experts_per_token
                counts = expert_counts(router_logits, pass_.real_tokens, top_k)
        num_tokens = sum(self.matched.lengths)
        loss = balancing_loss(router_logits, pass_.real_tokens, counts, num_tokens)
        self._add(aux_loss_sum=loss.detach())
        loss = self.settings.router_aux_loss_coef * loss
        # A batch's loss holds it once, so in a mean over rows each of them has it.
        self._add(loss_sum=loss.detach() * self.counted.sum())
        return loss

    @torch.no_grad()
    def _record(self, pass_: Pass, scores: Any, result: KTOLoss) -> None:
        counted, desirable = self.counted[pass_.rows], self.is_desirable[pass_.rows]
        self.finite[pass_.rows] &= torch.isfinite(result.log_ratio)
        self._add(
            loss_sum=(result.row_loss * counted).sum(),
            rows=counted.sum(),
            entropy_sum=(scores.entropy * counted[pass_.score_row]).sum(),
            tokens=counted[pass_.score_row].sum(),
        )
        for label, mask in (("chosen", counted * desirable), ("rejected", counted * ~desirable)):
            token_mask = mask[pass_.score_row]
            self._add(
                **{
                    f"{label}_rows": mask.sum(),
                    f"{label}_reward_sum": self.settings.args.beta
                    * (result.log_ratio * mask).sum(),
                    f"{label}_logp_sum": (result.logprob * mask).sum(),
                    f"{label}_logit_sum": (scores.mean_logit * token_mask).sum(),
                    f"{label}_tokens": token_mask.sum(),
                }
            )

    def _add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
