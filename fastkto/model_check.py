"""What is found out about the models on real rows, once, before anything is scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkto.data.batch import matched_sequences
from fastkto.data.rows import RowReport
from fastkto.head_check import agree_on_head
from fastkto.limits import check_vocabulary
from fastkto.packing import agree_on_layout
from fastkto.positions import check_positions, check_sequences, fewest_positions
from fastkto.reference_cache import ReferenceCache
from fastkto.reference_fingerprint import reference_fingerprint

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer


def check_data(
    reports: dict[str, RowReport], policy: Any, ref_model: Any, *, lengths_are_known: bool
) -> None:
    """Refuse data whose tokens or lengths are more than a model has embeddings for.

    Rows of streams, and lengths that are a collator's to decide, are checked batch by batch.
    """
    check_vocabulary(reports, policy)
    if ref_model is not None:
        check_vocabulary(reports, ref_model, "ref_model")
    if lengths_are_known:
        check_positions(reports, fewest_positions(policy, ref_model))


def check_models(trainer: KTOTrainer, batches: list[dict[str, Any]]) -> bool:
    """On rows of the first batches: are heads scored right, and may passes be packed?

    False if this is left to the next batches, since a model has no finite score for any row: then
    nothing is trained on these, the step's own check sees to it.

    With several ranks all of them have to call this. The weights of the reference are read for the
    cache here too, since they are in their place by now.
    """
    settings = trainer.step_settings
    for batch in batches:
        matched = matched_sequences(batch, settings.args.max_length)
        check_sequences(batch["rows"], matched, settings.positions)
    rows = _rows_by_length(batches, settings.args.max_length)
    policy, reference = settings.policy, settings.reference.model
    tried = agree_on_head(policy, rows, trainer.ranks)
    are_checked = bool(tried)
    if tried:
        settings.policy_layout = agree_on_layout(policy, "policy", tried, trainer.ranks)
    settings.reference_layout = settings.policy_layout
    if reference is not None:
        tried = agree_on_head(reference, rows, trainer.ranks)
        are_checked &= bool(tried)
        if tried:
            layout = agree_on_layout(reference, "reference", tried, trainer.ranks)
            settings.reference_layout = layout
    if trainer.score_store is not None:
        fingerprint = reference_fingerprint(
            settings.reference, trainer.model, mixed_precision=trainer.accelerator.mixed_precision
        )
        settings.reference_cache = ReferenceCache(trainer.score_store, fingerprint)
    return are_checked


def _rows_by_length(batches: list[dict[str, Any]], max_length: int | None) -> list[Tensor]:
    """The longest first; each of two tokens and more, so that there is a token to predict."""
    sequences = [one for batch in batches for one in matched_sequences(batch, max_length)]
    sequences.sort(key=lambda sequence: -sequence.length)
    rows = [torch.cat([one.prompt, one.completion]) for one in sequences]
    return [row.repeat(2) if len(row) == 1 else row for row in rows]
