"""The one read of an optimizer step: are all scores finite, and how many tokens were there?"""

from collections.abc import Callable

import torch
from torch import Tensor


class StepCheck:
    """Collects the micro-batches of a step, and stops before the optimizer uses a bad one."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce  # sums a tensor over ranks
        self.clear()

    def clear(self) -> None:
        """Forget what was not checked."""
        self._micro_batches: list[tuple[list[int], Tensor]] = []
        self._tokens = 0

    def add(self, rows: list[int], finite: Tensor, tokens: int) -> None:
        """Record a micro-batch: its rows' numbers, which of them are finite [B], its tokens."""
        self._micro_batches.append((rows, finite))
        self._tokens += tokens

    def read(self, step: int) -> int:
        """Tokens of all ranks since the last read.

        Raises FloatingPointError, on all ranks at once, if a row's scores are not finite.
        """
        if not self._micro_batches:
            return 0  # a subclass's loss has asked for none, on any rank
        bad = torch.stack([(~finite).sum() for _, finite in self._micro_batches]).sum()
        counts = torch.stack([bad, torch.full_like(bad, self._tokens)])
        num_bad, num_tokens = self._reduce(counts).tolist()
        micro_batches = self._micro_batches
        self.clear()
        if num_bad == 0:
            return num_tokens
        rows = [
            row
            for numbers, finite in micro_batches
            for row, is_finite in zip(numbers, finite.tolist(), strict=True)
            if not is_finite
        ]
        where = f"rows {rows} of the data set" if rows else "rows on another rank"
        raise FloatingPointError(
            f"the log-probabilities of {where} are not finite (step {step}, {num_bad} rows over "
            "all ranks). Look at these rows and at the learning rate; with fp16, use bf16. "
            "Nothing was updated from them"
        )
