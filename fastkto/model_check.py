"""What is found out about the models on real rows, once, before anything is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkto.data.batch import matched_sequences
from fastkto.head_check import check_head
from fastkto.packing import agree_on_layout
from fastkto.reference_cache import ReferenceCache
from fastkto.reference_fingerprint import reference_fingerprint

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer


def check_models(trainer: KTOTrainer, batches: list[dict[str, Any]]) -> None:
    """On rows of the first batches: are heads scored right, and may passes be packed?

    With several ranks all of them have to call this. The weights of the reference are read for the
    cache here too, since they are in their place by now.
    """
    settings = trainer.step_settings
    rows = _longest_rows(batches, settings.args.max_length)
    policy, reference = settings.policy, settings.reference.model
    check_head(policy, rows)
    settings.policy_layout = agree_on_layout(policy, "policy", rows, trainer.ranks)
    settings.reference_layout = settings.policy_layout
    if reference is not None:
        check_head(reference, rows)
        settings.reference_layout = agree_on_layout(reference, "reference", rows, trainer.ranks)
    if trainer.score_store is not None:
        fingerprint = reference_fingerprint(
            settings.reference, trainer.model, mixed_precision=trainer.accelerator.mixed_precision
        )
        settings.reference_cache = ReferenceCache(trainer.score_store, fingerprint)


def _longest_rows(batches: list[dict[str, Any]], max_length: int | None) -> list[Tensor]:
    """Two of two tokens and more, so that all ranks run the same forwards of a sharded model."""
    sequences = [one for batch in batches for one in matched_sequences(batch, max_length)]
    longest = sorted(sequences, key=lambda sequence: -sequence.length)[:2]
    rows = [torch.cat([one.prompt, one.completion]) for one in longest]
    rows = [row.repeat(2) if len(row) == 1 else row for row in rows]
    return (rows * 2)[:2]
