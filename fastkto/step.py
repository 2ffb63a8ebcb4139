"""The loss of one device batch, pass by pass.

Everything in a row's loss but its own log-probability is known once the passes without gradient
are done (see `fastkto.window_scores`). So each pass with gradient forms its part of the loss and
can run backward at once, and the activations of one pass exist at a time.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkto.activation_offloading import ActivationsOnHost
from fastkto.config import KTOConfig
from fastkto.data.batch import given_mismatched, matched_sequences, mismatched_sequences
from fastkto.loss import KTOLoss, kto_loss
from fastkto.out_of_memory import PassFacts, naming_pass
from fastkto.passes import Pass, build_pass, run_pass
from fastkto.plan_passes import Group, Layout, Plan, pass_facts
from fastkto.ranks import Ranks
from fastkto.reference import Reference
from fastkto.reference_cache import ReferenceCache
from fastkto.router import RouterSettings, balancing_loss, expert_counts
from fastkto.window import PairedBatch

# What is asked of each row; the last two only where there is a KL estimate.
SCORES = (
    "the policy",
    "the reference",
    "the policy on another row's completion",
    "the reference on another row's completion",
)


@dataclass
class StepSettings:
    """What stays the same from step to step."""

    args: KTOConfig
    policy: Any  # what passes without gradient run: prepared, without DistributedDataParallel
    reference: Reference
    policy_layout: Layout
    reference_layout: Layout
    router: RouterSettings
    ranks: Ranks
    positions: int | None = None  # most tokens of a sequence, where a model has a table of them
    reference_cache: ReferenceCache | None = None

    @property
    def has_router(self) -> bool:
        """Whether there is a load-balancing loss."""
        return self.router.coefficient != 0.0


class BatchLoss:
    """The loss of one device batch of `B` rows, in parts that add up to the mean over its rows.

    `plan` lists the passes. `pass_loss` runs one of them; once all have run, `sums` holds the
    batch's metrics and `scores` the log-probabilities of each row, as in `SCORES`. The first
    `counted` rows count in the KL estimate and the metrics: all but those that fill a last
    evaluation batch. What its parts need besides gradients,
    `fastkto.window_scores.score_window` fills in.
    """

    reference_logprob: Tensor  # [B] fp64, nats
    plan: Plan

    def __init__(
        self, settings: StepSettings, batch: dict[str, Any], pairs: PairedBatch, counted: int
    ) -> None:
        self.settings = settings
        self.rows: list[int] = batch["rows"]
        self.is_desirable: Tensor = batch["label"]
        self.input_ids: Tensor = batch["input_ids"]
        max_length = settings.args.max_length
        self.matched = matched_sequences(batch, max_length)
        given = given_mismatched(batch, max_length)
        if given is None:
            mismatched = mismatched_sequences(batch, pairs.partners, max_length)
        else:
            mismatched = [*given[:counted], *[None] * (len(given) - counted)]
        self.paired_rows = [row for row, sequence in enumerate(mismatched) if sequence is not None]
        self.mismatched = [sequence for sequence in mismatched if sequence is not None]
        if not settings.args.needs_kl:
            self.leave_out_mismatched()
        index_B = torch.arange(len(self.rows), device=self.is_desirable.device)
        self.counted = (index_B < counted).double()
        self.scores = self.counted.new_zeros(len(SCORES), len(self.rows))  # [4, B] fp64, nats
        self.num_rows: float = len(self.rows)  # what the sum of the rows' losses is divided by
        self.sft_weight = 0.0  # of the SFT term, in a desirable row's loss
        self.kl: Tensor | None = None
        self.expert_counts: Tensor | None = None
        self._running: tuple[str, list[Group]] | None = None  # the last pass: its kind, its groups
        self.sums: dict[str, Tensor | float] = {}
        self.add(dropped_rows=sum(batch.get("dropped_rows", ())[:counted]))
        self._known = batch.get("reference_logprob"), batch.get("kl_reference_logprob")
        if settings.args.needs_kl and given is None:
            self.add(lone_rows=pairs.lone_rows, same_prompt_rows=pairs.same_prompt_pairs)

    def leave_out_mismatched(self) -> None:
        """Score the matched sequences alone: there is no KL estimate, or the pairs will change."""
        self.paired_rows, self.mismatched = [], []

    def leave_out_nan(self) -> None:
        """Take no loss, gradient or metric from rows whose reference score is NaN.

        Waits for the device. TRL's `nanmean` takes no loss from them, and a gradient of NaN.
        """
        is_nan = self.reference_logprob.isnan()
        # So far from the policy that the row's loss and its gradient are 0.
        far = torch.where(self.is_desirable, -1e30, 1e30).double()
        self.reference_logprob = torch.where(is_nan, far, self.reference_logprob)
        self.counted = self.counted * ~is_nan
        self.num_rows = max(self.num_rows - is_nan.sum().item(), 1)

    def known_reference(self) -> tuple[Tensor, Tensor] | None:
        """The reference's scores of `matched` and `mismatched`, fp64, if the batch brought them."""
        matched, mismatched = self._known
        if matched is None or (mismatched is None and self.mismatched):
            return None
        return matched, matched[:0] if mismatched is None else mismatched[: len(self.mismatched)]

    def take_labels(self, batch: dict[str, Any]) -> None:
        """Labels as they are now: a subclass may have changed them since the rows were scored."""
        tokens = batch["input_ids"]  # Trainer may have copied them; comparing waits for the device
        is_same = tokens.data_ptr() == self.input_ids.data_ptr()
        if not is_same and not torch.equal(tokens, self.input_ids):
            raise ValueError(
                "input_ids of a batch were replaced after its sequences had been scored; change "
                "rows in data_collator"
            )
        self.is_desirable = batch["label"]

    @property
    def num_tokens(self) -> int:
        """Tokens of the matched sequences."""
        return sum(sequence.length for sequence in self.matched)

    def pass_loss(self, model: nn.Module, groups: list[Group]) -> Tensor:
        """This pass's part of the batch's loss: a scalar with the graph of the pass."""
        args, settings = self.settings.args, self.settings
        self._running = "gradient" if torch.is_grad_enabled() else "evaluation", groups
        pass_ = self._build_pass(groups)
        with ActivationsOnHost() if args.activation_offloading else nullcontext():
            scores = run_pass(model, pass_, stats=True, router_logits=settings.has_router)
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
            sft_weight=self.sft_weight,
            num_rows=self.num_rows,
            backend=args.backend,
        )
        self._record(pass_, scores, result)
        if not settings.has_router:
            return result.loss
        return result.loss + self._router_loss(scores.router_logits, pass_)

    def naming_pass(self) -> AbstractContextManager[None]:
        """Out-of-memory errors from within name the pass that `pass_loss` ran last."""
        return naming_pass(self._running_facts)

    def _running_facts(self) -> PassFacts:
        kind, groups = self._running or ("gradient", self.plan[0])
        name = f"{kind} pass {self.plan.index(groups) + 1} of {len(self.plan)}"
        facts = pass_facts(name, self.matched, groups, self.settings.policy_layout)
        return facts._replace(args=self.settings.args)

    def count_experts(self, groups: list[Group]) -> Tensor:
        """How often a pass's tokens choose each expert: [E], without gradient."""
        pass_ = self._build_pass(groups)
        unscored = pass_._replace(
            score_row=pass_.score_row[:0],
            score_position=pass_.score_position[:0],
            score_target=pass_.score_target[:0],
        )
        layout = self.settings.policy_layout
        name = "pass without gradient that counts the policy's experts"
        with naming_pass(partial(pass_facts, name, self.matched, groups, layout)):
            output = run_pass(self.settings.policy, unscored, router_logits=True)
        top_k = self.settings.router.experts_per_token
        return expert_counts(output.router_logits, pass_.real_tokens, top_k)

    def _build_pass(self, groups: list[Group]) -> Pass:
        layout, device = self.settings.policy_layout, self.is_desirable.device
        return build_pass(self.matched, groups, layout, device)

    def _router_loss(self, router_logits: tuple[Tensor, ...], pass_: Pass) -> Tensor:
        counts = self.expert_counts
        if counts is None:  # a single pass is the whole device batch
            with torch.no_grad():
                top_k = self.settings.router.experts_per_token
                counts = expert_counts(router_logits, pass_.real_tokens, top_k)
        loss = balancing_loss(router_logits, pass_.real_tokens, counts, self.num_tokens)
        self.add(aux_loss_sum=loss.detach())
        loss = self.settings.router.coefficient * loss
        # A batch's loss holds it once, so in a mean over rows each of them has it.
        self.add(loss_sum=loss.detach() * self.counted.sum())
        return loss

    @torch.no_grad()
    def _record(self, pass_: Pass, scores: Any, result: KTOLoss) -> None:
        counted, desirable = self.counted[pass_.rows], self.is_desirable[pass_.rows]
        self.scores[0, pass_.rows] = result.logprob
        self.scores[1, pass_.rows] = self.reference_logprob[pass_.rows]
        self.add(
            loss_sum=(result.row_loss * counted).sum(),
            rows=counted.sum(),
            entropy_sum=(scores.entropy * counted[pass_.sequence]).sum(),
            tokens=counted[pass_.sequence].sum(),
        )
        for label, mask in (("chosen", counted * desirable), ("rejected", counted * ~desirable)):
            token_mask = mask[pass_.sequence]
            self.add(
                **{
                    f"{label}_rows": mask.sum(),
                    f"{label}_reward_sum": self.settings.args.beta
                    * (result.log_ratio * mask).sum(),
                    f"{label}_logp_sum": (result.logprob * mask).sum(),
                    f"{label}_logit_sum": (scores.mean_logit * token_mask).sum(),
                    f"{label}_tokens": token_mask.sum(),
                }
            )

    def add(self, **sums: Tensor | float) -> None:
        """Add to the batch's metrics, see `fastkto.metrics.FIELDS`."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
