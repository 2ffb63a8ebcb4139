"""Averages of metrics over batches of different sizes and classes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastkto.metrics import FIELDS, METRICS, Metrics
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


@pytest.mark.parametrize("averaging", METRICS)
def test_a_log_is_one_reduction(averaging: str) -> None:
    """Whatever the number of micro-batches and of metrics."""
    metrics, tables = Metrics(averaging), []
    for rows in (4, 3, 2):
        metrics.add(dict.fromkeys(FIELDS, float(rows)), torch.device("cpu"))

    def reduce(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return table

    logs, _ = metrics.collect(reduce)
    assert [table.shape for table in tables] == [(3, len(FIELDS))]
    assert set(NAMES) | {"kl", "kl_raw", "aux_loss"} <= set(logs)
    assert metrics.collect(reduce) == ({}, None) and len(tables) == 1


def test_a_run_reduces_its_metrics_once_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps with several passes and micro-batches; what else is reduced is no metric."""
    run = trainer(
        tmp_path,
        **models(),
        eval_dataset=text_rows(11, seed=3),
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    shapes: list[tuple[int, ...]] = []
    own = run.accelerator.reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return own(tensor, *args, **kwargs)

    monkeypatch.setattr(run.accelerator, "reduce", counting)
    run.train()
    tables = [shape for shape in shapes if shape[-1:] == (len(FIELDS),)]
    # two logs of two steps each, and an evaluation of three batches; none is left for the summary
    assert tables == [(4, len(FIELDS)), (4, len(FIELDS)), (3, len(FIELDS))]


def test_the_exact_kl_is_the_mean_of_what_the_losses_used() -> None:
    """Clamped in each batch, and weighted by its rows."""
    metrics = Metrics("exact")
    for kl_sum, rows in ((6.0, 3), (-4.0, 1)):
        metrics.add({"kl_sum": kl_sum, "kl_rows": rows, "rows": rows}, torch.device("cpu"))
    logs, _ = metrics.collect(lambda table: table)
    assert logs["kl"] == 2.0 * 3 / 4 and logs["kl_raw"] == (6 - 4) / 4
    assert set(logs) <= {"kl", "kl_raw"} and "kl_sum" in FIELDS
