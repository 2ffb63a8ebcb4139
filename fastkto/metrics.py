"""Metrics: sums and counts on the device, reduced over ranks once and read once per log.

Names and, by default, averaging are TRL 1.16's: a value is formed for each micro-batch over all
ranks, and a log shows the mean of those values. A metric whose micro-batches hold no such row is
left out. With `metrics="exact"` it is the mean over all rows, or tokens, since the last log.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

METRICS = ("trl", "exact")

# What a micro-batch contributes on one rank; all are sums or counts, so ranks simply add up.
FIELDS = (
    "loss_sum",  # weighted losses of the rows, in loss units
    "rows",
    "kl_sum",  # policy minus reference on mismatched sequences, in nats
    "kl_rows",
    "lone_rows",  # rows without a completion to be paired with
    "same_prompt_rows",  # rows paired with another completion of their own prompt
    "dropped_rows",  # rows of a stream whose prompt alone fills max_length
    "sequence_tokens",  # tokens of all sequences scored, by policy and reference
    "computed_tokens",  # tokens that went through the models for that, padding included
    "ref_cache_hits",  # sequences whose reference score was in the cache
    "ref_cache_misses",  # and those that were scored and stored
    "entropy_sum",  # in nats, over scored tokens
    "tokens",  # scored tokens
    "aux_loss_sum",
    "aux_losses",  # how many ranks have one
    *(
        f"{label}_{name}"
        for label in ("chosen", "rejected")
        for name in ("rows", "reward_sum", "logp_sum", "logit_sum", "tokens")
    ),
)

# Logged where there are any.
_COUNTS = {
    "kl_lone_rows": "lone_rows",
    "kl_same_prompt_rows": "same_prompt_rows",
    "dropped_rows": "dropped_rows",
}


class Metrics:
    """Collects micro-batches and turns them into the values of a log, averaged as in `METRICS`."""

    def __init__(self, averaging: str = "trl") -> None:
        self._averaging = averaging
        self._micro_batches: list[Tensor] = []

    def add(self, sums: dict[str, Tensor | float], device: torch.device) -> None:
        """Record one micro-batch; fields that are absent count as 0. Does not synchronise."""
        unknown = set(sums) - set(FIELDS)
        if unknown:
            raise ValueError(f"unknown metric fields {sorted(unknown)}; known are {FIELDS}")
        values = [_on_device(sums.get(name, 0.0), device) for name in FIELDS]
        self._micro_batches.append(torch.stack(values))

    def clear(self) -> None:
        """Forget the recorded micro-batches."""
        self._micro_batches.clear()

    def take(self, reduce: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """Sums over ranks, of each micro-batch since the last call.

        `reduce` sums a tensor over ranks; all ranks must have recorded equally many micro-batches.
        """
        if not self._micro_batches:
            return []
        table = reduce(torch.stack(self._micro_batches)).tolist()
        self.clear()
        return [dict(zip(FIELDS, row, strict=True)) for row in table]

    def collect(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], float | None]:
        """Values since the last call, and the mean loss over rows (None without any)."""
        micro_batches = self.take(reduce)
        if not micro_batches:
            return {}, None
        total = {name: sum(sums[name] for sums in micro_batches) for name in FIELDS}
        per_batch = [_values(sums) for sums in micro_batches]
        names = dict.fromkeys(name for values in per_batch for name in values)
        logs = {name: _mean([v[name] for v in per_batch if name in v]) for name in names}
        if self._averaging == "exact":
            # An estimate for each micro-batch, which no sum over them replaces.
            pairs = zip(micro_batches, per_batch, strict=True)
            kl = sum(sums["rows"] * values["kl"] for sums, values in pairs)
            logs = _values(total) | {"kl": kl / max(total["rows"], 1)}
        logs |= {name: total[field] for name, field in _COUNTS.items() if total[field]}
        if total["ref_cache_hits"] or total["ref_cache_misses"]:
            logs |= {name: total[name] for name in ("ref_cache_hits", "ref_cache_misses")}
        if total["computed_tokens"]:
            logs["pass_efficiency"] = total["sequence_tokens"] / total["computed_tokens"]
        return logs, total["loss_sum"] / total["rows"] if total["rows"] else None


def _on_device(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _values(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of one micro-batch, from its sums over ranks."""
    values = {"kl": 0.0}
    if sums["kl_rows"]:
        values["kl_raw"] = sums["kl_sum"] / sums["kl_rows"]
        values["kl"] = max(values["kl_raw"], 0.0)
    if sums["tokens"]:
        values["entropy"] = sums["entropy_sum"] / sums["tokens"]
    for label in ("chosen", "rejected"):
        if sums[f"{label}_tokens"]:
            values[f"logits/{label}"] = sums[f"{label}_logit_sum"] / sums[f"{label}_tokens"]
        if sums[f"{label}_rows"]:
            values[f"rewards/{label}"] = sums[f"{label}_reward_sum"] / sums[f"{label}_rows"]
            values[f"logps/{label}"] = sums[f"{label}_logp_sum"] / sums[f"{label}_rows"]
    if sums["chosen_rows"] and sums["rejected_rows"]:
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    if sums["aux_losses"]:
        values["aux_loss"] = sums["aux_loss_sum"] / sums["aux_losses"]
    return values


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


class TokenCount(TrainerCallback, ExportableState):
    """Tokens of the matched sequences trained on, over all ranks; kept in checkpoints."""

    def __init__(self, num_tokens: int = 0) -> None:
        self.num_tokens = num_tokens

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in transformers' layout."""
        return {"args": {"num_tokens": self.num_tokens}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at zero, or where the checkpoint stopped; TRL's keep it in the log alone."""
        logged = (log["num_tokens"] for log in reversed(state.log_history) if "num_tokens" in log)
        self.num_tokens = int(next(logged, 0)) if state.global_step > 0 else 0
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self.num_tokens = saved["args"]["num_tokens"]
