"""Rows of a stream whose prompt alone fills `max_length`: dropped, and counted as they are."""

import logging
from collections.abc import Sequence
from typing import Any

DROPPED_COLUMN = "dropped_rows"

logger = logging.getLogger(__name__)


class DropLong:
    """Drops them from the blocks of a stream; a row says how many were dropped just before it.

    So the count comes along with the rows, from whatever process has read them. Rows dropped behind
    the last one that is kept are in no count.
    """

    def __init__(self, max_length: int | None, name: str) -> None:
        self.max_length, self.name = max_length, name
        self._dropped = 0  # since the last row that was kept
        self._has_warned = False

    def __call__(
        self, columns: dict[str, list[Any]], prompt_lengths: Sequence[int], first_index: int
    ) -> dict[str, list[Any]]:
        """The rows of a block that fit; `first_index` is 0 where a stream begins (again)."""
        if first_index == 0:
            self._dropped = 0
        kept, counts = [], []
        for row, length in enumerate(prompt_lengths):
            if self.max_length is not None and length >= self.max_length:
                self._warn(columns["row"][row])
                self._dropped += 1
            else:
                kept.append(row)
                counts.append(self._dropped)
                self._dropped = 0
        rows = {name: [values[row] for row in kept] for name, values in columns.items()}
        return rows | {DROPPED_COLUMN: counts}

    def _warn(self, row: int) -> None:
        if not self._has_warned:
            logger.warning(
                "rows of the %s data are dropped: their prompt alone fills max_length=%s; the "
                "first is row %s, and dropped_rows in the log counts them",
                self.name,
                self.max_length,
                row,
            )
        self._has_warned = True


def dropped_rows(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many rows of a stream were dropped just before each of these."""
    return [row.get(DROPPED_COLUMN) or 0 for row in rows]
