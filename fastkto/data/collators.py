"""Which collator a run has, and how long rows are as it leaves them."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from pyarrow.compute import add, list_value_length
from transformers import ProcessorMixin

from fastkto.config import KTOConfig
from fastkto.data.batch import KTOCollator
from fastkto.data.images import ImageCollator
from fastkto.data.media import MediaTokens
from fastkto.data.padded import RaggedCollator
from fastkto.data.pairing import DATASET_PAIRING

Collator = Callable[[list[dict[str, Any]]], Any]


def choose_collator(
    given: Collator | None,
    processing: Any,
    args: KTOConfig,
    vocab_size: int | None,
    media_tokens: MediaTokens,
) -> Collator:
    """`given`, its batches made ragged; or fastkto's own, for text or for rows with images."""
    if given is not None:
        pairs_ragged = args.kl_pairing != DATASET_PAIRING
        return RaggedCollator(given, media_tokens, vocab_size, pairs_ragged)
    if isinstance(processing, ProcessorMixin):
        return ImageCollator(processing, args.max_length, args.truncation_mode, vocab_size)
    return KTOCollator(args.max_length, args.truncation_mode, vocab_size)


def row_lengths(dataset: Dataset, collator: Any) -> list[int]:
    """Most tokens of each row's matched sequence; a collator of one's own says its limit."""
    given = getattr(collator, "collator", None)
    if given is None or isinstance(given, KTOCollator):
        return dataset.with_format("numpy", columns=["length"])["length"][:].tolist()
    table = dataset.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")[:]
    prompts, completions = (list_value_length(column) for column in table.columns)
    most = getattr(given, "max_length", None) or float("inf")
    return [min(length, most) for length in add(prompts, completions).to_pylist()]
