"""Passes of any size, run as a step runs its own, that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from fastkto.data.batch import TokenSequence, matched_sequences
from fastkto.modes import evaluating, keeping_modes
from fastkto.passes import sequence_logprobs
from fastkto.plan_passes import Layout
from fastkto.reference import ReleasedReference
from fastkto.sharding import before_the_last_pass, release_gathered
from fastkto.step import BatchLoss, StepSettings
from fastkto.window import PairedBatch

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer


class TrialPasses:
    """Passes over sequences as long as the longest rows, every token but the first one scored."""

    def __init__(
        self,
        settings: StepSettings,
        lengths: Sequence[int],  # of the rows of the largest batch, the longest first
        tokens: Tensor,  # [T] int64, of a real row
        backward: Callable[[Callable[[], Tensor]], None],  # forward and backward of a loss
        model: nn.Module,  # the policy in its wrappers
    ) -> None:
        self._settings, self._lengths, self._tokens = settings, lengths, tokens
        self._backward, self._model = backward, model

    @property
    def least(self) -> int:
        """Tokens of the longest sequence, which is a pass whatever the budget."""
        return self._lengths[0]

    @property
    def most(self) -> int:
        """Tokens of a pass over the largest batch, the most that a budget has a use for."""
        layout = self._settings.policy_layout
        if layout is Layout.PACKED:
            return sum(self._lengths)
        return self.least * (len(self._lengths) if layout is Layout.PADDED else 1)

    def with_gradient(self, tokens: int) -> None:
        """A gradient pass of so many tokens; its gradients are added to what is there."""
        sequences = self._sequences(tokens, self._settings.policy_layout)
        self._model.train()
        self._backward(lambda: self._loss(sequences))

    def without_gradient(self, tokens: int) -> None:
        """A pass of the reference, and one of the policy."""
        settings = self._settings
        with evaluating(settings.policy):
            if not isinstance(settings.reference.model, ReleasedReference):
                with settings.reference.scoring(settings.policy) as reference:
                    self._score(reference, tokens, settings.reference_layout)
            if settings.reference.model is not None:
                release_gathered(settings.reference.model)
            self._score(settings.policy, tokens, settings.policy_layout)

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Random state and modes are what they were, and gradients are gone."""
        device = self._tokens.device
        try:
            devices = [device] if device.type == "cuda" else []
            with keeping_modes(self._model), torch.random.fork_rng(devices):
                yield
        finally:
            self._model.zero_grad(set_to_none=True)

    def _score(self, model: nn.Module, tokens: int, layout: Layout) -> None:
        sequences = self._sequences(tokens, layout)
        plan = [[[row] for row in range(len(sequences))]]
        backend = self._settings.args.backend
        device = self._tokens.device
        sequence_logprobs(model, sequences, plan, layout, device=device, backend=backend)

    def _loss(self, sequences: list[TokenSequence]) -> Tensor:
        count = len(sequences)
        batch: dict[str, Any] = {
            "label": torch.ones(count, dtype=torch.bool, device=self._tokens.device),
            "input_ids": torch.cat([torch.cat([one.prompt, one.completion]) for one in sequences]),
            "rows": list(range(count)),
            "prompt_lengths": [len(one.prompt) for one in sequences],
            "completion_lengths": [len(one.completion) for one in sequences],
            "prompt_keys": [one.prompt_key for one in sequences],
        }
        loss = BatchLoss(self._settings, batch, PairedBatch([None] * count, 0, 0), count)
        loss.reference_logprob = torch.zeros(count, dtype=torch.float64, device=self._tokens.device)
        loss.kl = loss.reference_logprob.new_zeros(())
        loss.plan = [[[row] for row in range(count)]]
        return loss.pass_loss(self._model, loss.plan[0])

    def _sequences(self, tokens: int, layout: Layout) -> list[TokenSequence]:
        """Sequences of so many tokens in all, and one at least."""
        if layout is Layout.PACKED:
            lengths, left = [], tokens
            for length in cycle(self._lengths):
                lengths.append(min(length, left))
                left -= lengths[-1]
                if left == 0:
                    break
        else:
            rows = tokens // self.least if layout is Layout.PADDED else 1
            lengths = [self.least] * max(rows, 1)
        return [self._sequence(index, length) for index, length in enumerate(lengths)]

    def _sequence(self, index: int, length: int) -> TokenSequence:
        repeated = self._tokens.repeat(-(-length // len(self._tokens)))[:length]
        return TokenSequence(repeated[:0], repeated, index)


def trial_passes(trainer: KTOTrainer, batches: Sequence[dict[str, Any]]) -> TrialPasses:
    """Passes with the lengths of the training data; without one of known rows, of `max_length`.

    Without either, of the longest row of the first step on any rank.
    """
    args, settings = trainer.args, trainer.step_settings
    rows = [row for batch in batches for row in matched_sequences(batch, args.max_length)]
    longest = max(rows, key=lambda row: row.length)
    data = trainer.train_dataset
    if isinstance(data, Dataset):
        known = sorted(trainer._row_lengths(data))
        lengths = known[::-1][: trainer._train_batch_size]
    else:
        length = int(most_of_ranks(longest.length, trainer.accelerator))
        length = max(args.max_length or 0, length)
        lengths = [length] * trainer._train_batch_size
    tokens = torch.cat([longest.prompt, longest.completion])
    return TrialPasses(
        settings, lengths, tokens, partial(_run_backward, trainer), trainer.model_wrapped
    )


def _run_backward(trainer: KTOTrainer, loss: Callable[[], Tensor]) -> None:
    """Forward and backward of a pass that is not the step's last."""
    with before_the_last_pass(trainer.model_wrapped, trainer.accelerator):
        with trainer.compute_loss_context_manager():
            value = loss()
        trainer.accelerator.backward(value)


def most_of_ranks(value: float, accelerator: Accelerator) -> float:
    """The largest of all ranks' values."""
    values = torch.tensor([value], dtype=torch.float32, device=accelerator.device)
    return accelerator.gather(values).max().item()
