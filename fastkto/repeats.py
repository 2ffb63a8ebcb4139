"""Rows that accelerate repeats to give all ranks batches of one size at a data set's end."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object


class RepeatedRows:
    """Counts them in evaluation batches, so that no metric counts a row twice."""

    def __init__(self, accelerator: Accelerator, num_workers: int) -> None:
        self.accelerator = accelerator
        self.num_workers = num_workers  # of a rank's data loader
        self._first_rows: set[int] | None = None

    def start(self) -> None:
        """Before the first batch of an evaluation."""
        self._first_rows = None

    def count(self, batch: dict[str, Any]) -> int:
        """How many rows of an evaluation batch, its last ones, only repeat others."""
        state, size = self.accelerator.gradient_state, len(batch["rows"])
        if self.accelerator.num_processes == 1:
            return 0
        if state.remainder < 0:
            return self._count_in_stream(batch)
        if not state.end_of_dataloader or state.remainder == 0:
            return 0
        before = size * self.accelerator.process_index  # rows of lower ranks in this batch
        return size - min(max(state.remainder - before, 0), size)

    def _count_in_stream(self, batch: dict[str, Any]) -> int:
        """Nobody knows a stream's length; the rows repeated are those of its first batch."""
        if self.num_workers > 1:
            raise ValueError(
                f"a stream is evaluated on several processes with dataloader_num_workers="
                f"{self.num_workers}, and each worker counts rows from 0, so that rows repeated to "
                "fill the last batch cannot be told from others; use at most 1"
            )
        is_first = self._first_rows is None
        if not (is_first or self.accelerator.gradient_state.end_of_dataloader):
            return 0
        # The two rows of a pair share their number and differ in their label.
        labels = batch["label"].tolist()
        own = [2 * row + label for row, label in zip(batch["rows"], labels, strict=True)]
        seen = set(self._first_rows or ())
        repeated = 0
        for rank, rows in enumerate(gather_object([own])):
            for row in rows:
                repeated += row in seen and rank == self.accelerator.process_index
                seen.add(row)
        if is_first:
            self._first_rows = seen
        return repeated
