"""The methods of LLaMA-Factory's `CustomKTOTrainer` that score one of its batches.

Training does without them unless a subclass overrides one: they hold the whole batch in one graph.

Dimensions: `B` rows, `C` desirable and `R` undesirable of them, `T` positions, `V` vocabulary.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastkto.data.batch import matched_sequences
from fastkto.data.padded import from_padded
from fastkto.integrations.llamafactory.batches import tensors_of
from fastkto.integrations.llamafactory.media import MediaReader
from fastkto.modes import evaluating
from fastkto.passes import Layout, build_pass, run_pass
from fastkto.plan_passes import check_whole_media
from fastkto.ranks import Ranks
from fastkto.reference import Reference
from fastkto.step import StepSettings

Batch: TypeAlias = dict[str, Any]


class BatchMethods:
    """Log-probabilities, loss and metrics of a padded batch, under LLaMA-Factory's names.

    Log-probabilities are fp64, in nats. Logits are each row's logit sum, over its completion's
    tokens of the mean over the vocabulary, fp32; with `head="logits"` they are `[B, T, V]` fp32.
    """

    step_settings: StepSettings
    reference: Reference
    ranks: Ranks
    accelerator: Any
    ref_model: Any
    media: MediaReader
    beta: float
    desirable_weight: float
    undesirable_weight: float
    ftx_gamma: float

    def forward(
        self, model: nn.Module, batch: Batch, prefix: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, log-probability of each completion [B], and the same by token [B].

        prefix: "" for matched sequences, "kl_" for mismatched ones.
        """
        tensors = {**tensors_of(batch, prefix), **self.media.read(batch, prefix)}
        score = _score_logits if self.step_settings.args.head == "logits" else self._score_tokens
        logits, logps, valid_length = score(model, tensors)
        return logits, logps, logps / valid_length

    def _score_tokens(
        self, model: nn.Module, tensors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logit sums, log-probabilities and numbers of scored tokens, [B] each, without logits."""
        settings = self.step_settings
        size, device = len(tensors["labels"]), tensors["labels"].device
        tags = torch.zeros(size, dtype=torch.bool, device=device)  # of no meaning here
        ragged = from_padded({**tensors, "kto_tags": tags}, media_tokens=self.media.tokens)
        sequences = matched_sequences(ragged, None)
        is_reference = model is self.ref_model
        layout = settings.reference_layout if is_reference else settings.policy_layout
        check_whole_media(sequences, layout)
        rows = [[row] for row in range(size)]
        logit_sum_B, logprob_B, tokens_B = torch.zeros(
            3, size, dtype=torch.float64, device=device
        ).unbind()
        for groups in [[row] for row in rows] if layout is Layout.ALONE else [rows]:
            pass_ = build_pass(sequences, groups, layout)
            scores = run_pass(model, pass_, stats=True)
            row_N = pass_.rows[pass_.sequence]
            logit_sum_B = logit_sum_B.index_add(0, row_N, scores.mean_logit.double())
            logprob_B = logprob_B.index_add(0, row_N, scores.logprob.double())
            tokens_B = tokens_B.index_add(0, row_N, torch.ones_like(row_N, dtype=torch.float64))
        return logit_sum_B.float(), logprob_B, tokens_B

    def concatenated_forward(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities [C], [R]; logits; of mismatched sequences [B]; and by token [C].

        Those of the mismatched sequences have no gradient; without a use for them they are 0.
        """
        logits, logps, logps_avg = self.forward(model, batch)
        if self.step_settings.args.needs_kl:
            with torch.no_grad(), evaluating(model):
                _, kl_logps, _ = self.forward(model, batch, prefix="kl_")
        else:
            kl_logps = torch.zeros_like(logps)
        tags = batch["kto_tags"].bool()
        return logps[tags], logps[~tags], logits[tags], logits[~tags], kl_logps, logps_avg[tags]

    def compute_reference_log_probs(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's log-probabilities [C], [R], and of mismatched sequences [B]."""
        policy = self.accelerator.unwrap_model(model)
        with (
            torch.no_grad(),
            self.reference.scoring(policy) as reference,
            evaluating(reference),
        ):
            chosen, rejected, _, _, kl, _ = self.concatenated_forward(reference, batch)
        return chosen, rejected, kl

    def kto_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_KL_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_KL_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses [B], desirable ones first; rewards [C] and [R]; the KL estimate, a scalar."""
        difference = (policy_KL_logps - reference_KL_logps).detach()
        sums = self.ranks.sum(
            torch.stack([difference.sum(), difference.new_tensor(len(difference))])
        )
        kl = (sums[0] / sums[1]).clamp(min=0)
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        losses = [
            self.desirable_weight * (1 - torch.sigmoid(self.beta * (chosen - kl))),
            self.undesirable_weight * (1 - torch.sigmoid(self.beta * (kl - rejected))),
        ]
        return (
            torch.cat(losses),
            self.beta * chosen.detach(),
            self.beta * rejected.detach(),
            kl,
        )

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Tensor, dict[str, float]]:
        """The batch's loss, a scalar with its graph, and the sums and counts that a log is made of.

        Metrics of a class that the batch has no row of are left out.
        """
        chosen, rejected, chosen_logits, rejected_logits, kl_logps, chosen_avg = (
            self.concatenated_forward(model, batch)
        )
        reference_chosen, reference_rejected, reference_kl = self.compute_reference_log_probs(
            model, batch
        )
        losses, chosen_rewards, rejected_rewards, kl = self.kto_loss(
            chosen, rejected, kl_logps, reference_chosen, reference_rejected, reference_kl
        )
        loss = losses.mean()
        if self.ftx_gamma > 1e-6 and len(chosen) > 0:
            # divided by the rows twice and by none once, as LLaMA-Factory does
            sft_loss = -chosen_avg.mean() / len(chosen) * len(batch["labels"])
            loss = loss + self.ftx_gamma * sft_loss
        tags = batch["kto_tags"].bool()
        metrics = {"kl": kl}
        for name, mask, rewards, logps, logits in (
            ("chosen", tags, chosen_rewards, chosen, chosen_logits),
            ("rejected", ~tags, rejected_rewards, rejected, rejected_logits),
        ):
            if len(rewards) == 0:
                continue
            scored = batch["labels"][mask][:, 1:] != -100
            metrics |= {
                f"rewards/{name}_sum": rewards.sum(),
                f"logps/{name}_sum": logps.sum(),
                f"logits/{name}_sum": _logit_sums(logits, scored).sum(),
                f"count/{name}": scored.new_tensor(len(rewards), dtype=torch.float64),
                f"count/{name}_tokens": scored.sum(),
            }
        with torch.no_grad():  # read at once, since each read waits for the device
            values = torch.stack([value.double() for value in metrics.values()]).tolist()
        return loss.float(), dict(zip(metrics, values, strict=True))


def _score_logits(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The model's logits [B, T, V], log-probabilities and numbers of scored tokens [B]."""
    inputs = {name: value for name, value in tensors.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    labels = tensors["labels"][:, 1:]
    scored = labels != -100
    logprob = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return logits, (logprob.double() * scored).sum(-1), scored.sum(-1)


def _logit_sums(logits: Tensor, scored: Tensor) -> Tensor:
    """Each row's logit sum, of what `BatchMethods.forward` returns; `scored` is [B, T - 1] bool."""
    return logits if logits.ndim == 1 else (logits[:, :-1].mean(-1) * scored).sum(-1)
