"""The one read of an optimizer step: are all scores finite, and how many tokens were there?"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from fastkto.ranks import Ranks
from fastkto.step import SCORES, BatchLoss


class StepCheck:
    """Collects the micro-batches of a step, and stops before the optimizer uses a bad one."""

    def __init__(self, ranks: Ranks, folder: str) -> None:
        self._ranks = ranks
        self._folder = Path(folder)  # where rows are written that cannot be used
        self.clear()

    def clear(self) -> None:
        """Forget what was not checked."""
        self._losses: list[BatchLoss] = []
        self._tokens = 0

    def add(self, loss: BatchLoss, tokens: int) -> None:
        """Record a micro-batch all of whose passes have run, and its tokens."""
        self._losses.append(loss)
        self._tokens += tokens

    def read(self, step: int) -> int:
        """Tokens of all ranks since the last read.

        Raises FloatingPointError, on all ranks at once, if a score is not finite: with the rows'
        numbers and whose score it is; the rows themselves are in a file by then.
        """
        if not self._losses:
            return 0  # a subclass's loss has asked for none, on any rank
        bad = torch.stack([(~loss.scores.isfinite()).any(0).sum() for loss in self._losses]).sum()
        counts = torch.stack([bad, torch.full_like(bad, self._tokens)])
        num_bad, num_tokens = self._ranks.sum(counts).tolist()
        losses = self._losses
        self.clear()
        if num_bad == 0:
            return num_tokens
        rows = gather_object([row for loss in losses for row in _bad_rows(loss)])
        path = self._folder / f"not_finite_step_{step}.jsonl"
        where = f"The rows are in {path}"
        if self._ranks.accelerator.is_main_process:
            try:
                _write(rows, path)
            except OSError as error:  # of a full disk, say, which must not hide what was found
                where = f"The rows could not be written to {path}: {error}"
        kinds = {kind: [row["row"] for row in rows if kind in row["not_finite"]] for kind in SCORES}
        found = "; ".join(f"{kind}: rows {sorted(set(of))}" for kind, of in kinds.items() if of)
        raise FloatingPointError(
            f"log-probabilities are not finite in step {step}, of {found}. {where}. "
            "Look at them and at the learning rate; with fp16, use bf16. Nothing was updated from "
            "them"
        )


def _bad_rows(loss: BatchLoss) -> list[dict[str, Any]]:
    """What a file says of each row with a score that is not finite."""
    others = dict(zip(loss.paired_rows, loss.mismatched, strict=True))
    rows = []
    for index, values in enumerate(loss.scores.T.tolist()):
        scores = dict(zip(SCORES, values, strict=True))
        bad = {kind: str(value) for kind, value in scores.items() if not math.isfinite(value)}
        if not bad:
            continue
        sequence, other = loss.matched[index], others.get(index)
        rows.append(
            {
                "row": loss.rows[index],
                "label": bool(loss.is_desirable[index]),
                "not_finite": bad,
                "prompt_ids": sequence.prompt.tolist(),
                "completion_ids": sequence.completion.tolist(),
                "other_completion_ids": None if other is None else other.completion.tolist(),
            }
        )
    return rows


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """JSON Lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    os.replace(part, path)
