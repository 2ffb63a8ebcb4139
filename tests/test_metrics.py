"""Averages of metrics over batches of different sizes and classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastkto.metrics import FIELDS, Metrics
from tests.test_trainer import trainer
from tests.test_trl_equality import models
from tests.trl_runs import text_rows

NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
NAMES += ("logits/chosen", "logits/rejected", "entropy")


def evaluation(folder: Path, batch_size: int, metrics: str) -> dict[str, Any]:
    run = trainer(
        folder,
        **models(),
        eval_dataset=text_rows(11, seed=3),
        per_device_eval_batch_size=batch_size,
        metrics=metrics,
    )
    return run.evaluate()


def test_exact_metrics_do_not_depend_on_the_batches(tmp_path: Path) -> None:
    """Eleven rows as one batch, and in batches of four, four and three."""
    whole = evaluation(tmp_path / "whole", 11, "exact")
    parts = evaluation(tmp_path / "parts", 4, "exact")
    means = evaluation(tmp_path / "means", 4, "trl")
    for name in NAMES:
        assert parts[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5), name
    assert means["eval_logps/chosen"] != pytest.approx(whole["eval_logps/chosen"], rel=1e-3)


def test_the_exact_kl_is_the_mean_of_what_the_losses_used() -> None:
    """Clamped in each batch, and weighted by its rows."""
    metrics = Metrics("exact")
    for kl_sum, rows in ((6.0, 3), (-4.0, 1)):
        metrics.add({"kl_sum": kl_sum, "kl_rows": rows, "rows": rows}, torch.device("cpu"))
    logs, _ = metrics.collect(lambda table: table)
    assert logs["kl"] == 2.0 * 3 / 4 and logs["kl_raw"] == (6 - 4) / 4
    assert set(logs) <= {"kl", "kl_raw"} and "kl_sum" in FIELDS
