"""What LLaMA-Factory's runs log, from sums and counts: averages over rows, of all ranks."""

from collections.abc import Sequence

CLASSES = ("chosen", "rejected")


def sums_of_micro_batches(micro_batches: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Sums over ranks as `fastkto.metrics` has them, under LLaMA-Factory's names."""
    return [
        {"kl": max(sums["kl_sum"], 0.0) / max(sums["kl_rows"], 1.0)}
        | {
            name: sums[own]
            for one in CLASSES
            for name, own in (
                (f"rewards/{one}_sum", f"{one}_reward_sum"),
                (f"logps/{one}_sum", f"{one}_logp_sum"),
                (f"logits/{one}_sum", f"{one}_logit_sum"),
                (f"count/{one}", f"{one}_rows"),
                (f"count/{one}_tokens", f"{one}_tokens"),
            )
        }
        for sums in micro_batches
    ]


def log_values(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The averages that a log shows, from metrics of micro-batches as `get_batch_loss_metrics`'s.

    Sums are divided by the number of rows, those of logits by that of tokens where it is known. Of
    everything else, `kl` included, the mean over the micro-batches that have it.
    """
    totals: dict[str, list[float]] = {}
    for micro_batch in metrics:
        for name, value in micro_batch.items():
            totals.setdefault(name, []).append(value)
    values = {}
    for name in ("rewards", "logps", "logits"):
        for one in CLASSES:
            count = sum(totals.get(f"count/{one}", ()))
            if name == "logits":
                count = sum(totals.get(f"count/{one}_tokens", ())) or count
            if count and f"{name}/{one}_sum" in totals:
                values[f"{name}/{one}"] = sum(totals[f"{name}/{one}_sum"]) / count
    if "rewards/chosen" in values and "rewards/rejected" in values:
        values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
    used = [f"{name}/{one}_sum" for name in ("rewards", "logps", "logits") for one in CLASSES]
    used += [f"count/{one}{what}" for one in CLASSES for what in ("", "_tokens")]
    return values | {
        name: sum(ones) / len(ones) for name, ones in totals.items() if name not in used
    }
