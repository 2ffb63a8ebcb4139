"""Models that look positions up in a table, which no sequence may be longer than."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastkto.data.batch import TokenSequence
from fastkto.data.rows import RowReport
from fastkto.embeddings import without_adapter

# How transformers names the tables, learned (GPT-2, OPT) or computed (GPT-J, CTRL).
_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed", "pos_encoding")


def num_positions(model: Any) -> int | None:
    """Most tokens of a sequence, None for a model that works its positions out."""
    config = model.config.get_text_config()
    adapter: Any = getattr(model, "active_peft_config", None)  # a frozen copy stands beside it
    virtual = adapter.num_virtual_tokens if adapter and adapter.is_prompt_learning else 0
    if config.model_type == "mpt":  # whose ALiBi is a table too
        return int(config.max_seq_len) - virtual
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    for module in model.modules():
        for name in _TABLES:
            table = without_adapter(getattr(module, name, None))
            if isinstance(table, nn.Embedding):
                unused = getattr(table, "offset", 0)  # OPT's table begins with two
                if table.padding_idx is not None:  # RoBERTa counts from behind it
                    unused = table.padding_idx + 1
                size = table.num_embeddings
            elif isinstance(table, Tensor):
                size, unused = len(table), 0
            else:
                continue
            if size - most in (0, unused):  # else that of images
                return size - unused - virtual
    return None


def fewest_positions(*models: Any) -> int | None:
    """The least `num_positions` of those models that are not None."""
    tables = [num_positions(model) for model in models if model is not None]
    return min((size for size in tables if size is not None), default=None)


def check_positions(reports: dict[str, RowReport], most: int | None) -> None:
    """Refuse data sets of longer rows."""
    for name, report in reports.items():
        if most is not None and report.longest > most:
            raise ValueError(
                f"the {name} data has a row of {report.longest:,} tokens; {_remedy(most)}"
            )


def check_sequences(
    rows: Sequence[int], sequences: Sequence[TokenSequence], most: int | None
) -> None:
    """Refuse longer sequences, matched or mismatched ones, of these rows."""
    for row, sequence in zip(rows, sequences, strict=True):
        if most is not None and sequence.length > most:
            raise ValueError(
                f"row {row} has {sequence.length:,} tokens, with its own completion or with the "
                f"one it is paired with; {_remedy(most)}"
            )


def _remedy(most: int) -> str:
    return (
        f"the model or its reference has {most:,} positions: set max_length={most} (cutoff_len in "
        "LLaMA-Factory)"
    )
