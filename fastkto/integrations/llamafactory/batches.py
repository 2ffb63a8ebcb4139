"""LLaMA-Factory's batches: which are taken, and as what.

Dimensions: `B` rows, `T` positions, padding included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastkto.data.media import TOKEN_INPUTS
from fastkto.data.padded import from_padded, is_padded
from fastkto.integrations.llamafactory.media import SEQUENCES, MediaReader

_KEYS = ("kto_tags", *SEQUENCES, *(f"kl_{key}" for key in SEQUENCES))


@dataclass(frozen=True)
class Collator:
    """LLaMA-Factory's collator, whose batches become those of `KTOCollator`."""

    collator: Callable[[list[dict[str, Any]]], Any]
    media: MediaReader

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collator(rows)
        return to_ragged(batch, self.media) if is_padded(batch) else batch


def to_ragged(batch: Any, media: MediaReader) -> dict[str, Any]:
    """The batch of `KTOCollator` with the same sequences, see `from_padded`.

    `num_desirable`, an int, comes with it. Raises ValueError if a part is missing, or is not what
    a model takes.
    """
    check_keys(batch)
    padded = {key: batch[key] for key in _KEYS} | media.read(batch)
    of_mismatched = media.read(batch, "kl_")
    padded |= {f"kl_{name}": of_mismatched[name] for name in TOKEN_INPUTS if name in of_mismatched}
    ragged = from_padded(padded, media_tokens=media.tokens)
    return {**ragged, "num_desirable": int(batch["kto_tags"].sum())}


def check_keys(batch: Any) -> None:
    """Raise ValueError if a batch lacks a part, such as the mismatched sequences."""
    if missing := [key for key in _KEYS if batch.get(key) is None]:
        raise ValueError(
            f"the batch has no {', '.join(sorted(missing))}; use LLaMA-Factory's "
            "KTODataCollatorWithPadding on a data set that it prepared with stage: kto"
        )


def tensors_of(batch: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `labels` of one kind of sequences, `[B, T]` int64 each."""
    names = {key: f"{prefix}{key}" for key in SEQUENCES}
    if missing := [name for name in names.values() if name not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(missing)}; it has {', '.join(map(str, batch))}. Pass one "
            "of LLaMA-Factory's KTODataCollatorWithPadding: data loaders give batches of fastkto's"
        )
    return {key: batch[name] for key, name in names.items()}
