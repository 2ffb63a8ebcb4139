"""LLaMA-Factory's batches: which are taken, and as what.

Dimensions: `B` rows, `T` positions, padding included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastkto.data.padded import from_padded, is_padded

_SEQUENCES = ("input_ids", "attention_mask", "labels")
_KEYS = {"kto_tags", *_SEQUENCES, *(f"kl_{key}" for key in _SEQUENCES)}
_ZEROS = ("token_type_ids", "kl_token_type_ids")  # of text, for models that read images too


@dataclass(frozen=True)
class Collator:
    """LLaMA-Factory's collator, whose batches become those of `KTOCollator`."""

    collator: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collator(rows)
        return to_ragged(batch) if is_padded(batch) else batch


def to_ragged(batch: Any, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """The batch of `KTOCollator` with the same sequences, see `from_padded`.

    `num_desirable`, an int, comes with it. Raises ValueError for what is not text.
    """
    check_keys(batch)
    return {**from_padded(batch, rows), "num_desirable": int(batch["kto_tags"].sum())}


def check_keys(batch: Any) -> None:
    """Raise ValueError if a batch lacks mismatched sequences, or has more than text."""
    present = {key for key, value in batch.items() if value is not None}
    if missing := sorted(_KEYS - present):
        raise ValueError(
            f"the batch has no {', '.join(missing)}; use LLaMA-Factory's "
            "KTODataCollatorWithPadding on a data set that it prepared with stage: kto"
        )
    for key in _ZEROS:
        if key in present and not bool(batch[key].any()):
            present.discard(key)
    if unknown := sorted(present - _KEYS):
        raise ValueError(
            f"the batch has {', '.join(unknown)}, inputs beside text, which are not supported; "
            "train on rows without images, videos and audios, or with LLaMA-Factory's own trainer"
        )


def tensors_of(batch: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `labels` of one kind of sequences, `[B, T]` int64 each."""
    names = {key: f"{prefix}{key}" for key in _SEQUENCES}
    if missing := [name for name in names.values() if name not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}. Pass one "
            "of LLaMA-Factory's KTODataCollatorWithPadding: data loaders give batches of fastkto's"
        )
    return {key: batch[name] for key, name in names.items()}
