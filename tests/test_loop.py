"""The parts of a step, put together by hand, give the trainer's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastkto
from fastkto import (
    KTOCollator,
    attach_scoring,
    completion_logprobs,
    estimate_kl,
    kto_loss,
    reward_metrics,
    score_completions,
)
from tests.test_trainer import trainer
from tests.test_trl_equality import models


def parts(max_length: int | None = None) -> tuple[Any, Any]:
    policy, reference = models().values()
    for model in (policy, reference):
        attach_scoring(model)
    reference.requires_grad_(False).eval()
    return policy, reference


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("kl_pairing", ["rotate", "distinct"])
def test_they_add_up_to_the_trainers_step(
    tmp_path: Path, max_length: int | None, kl_pairing: str
) -> None:
    run = trainer(tmp_path, **models(), max_length=max_length, kl_pairing=kl_pairing, beta=0.2)
    batch = KTOCollator(max_length)([run.train_dataset[index] for index in range(8)])
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    expected = run.training_step(run.model, dict(batch))
    logged, _ = run._train_metrics.collect(lambda table: table)

    policy, reference = parts()
    cut = {"max_length": max_length}
    known = completion_logprobs(reference, batch, **cut)
    kl = estimate_kl(policy, reference, batch, kl_pairing=kl_pairing, max_tokens=64, **cut)
    scores = score_completions(policy, batch, **cut)
    result = kto_loss(*scores, known, batch["label"], kl=kl, beta=0.2)
    result.loss.backward()

    assert kl.item() == pytest.approx(logged["kl"], rel=1e-5) and kl > 0
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    metrics = reward_metrics(result, batch["label"], beta=0.2)
    assert len(metrics) == 5
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=1e-4), name
    for one, other in zip(policy.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_sums_over_ranks_come_before_the_mean() -> None:
    """And before the estimate is clamped."""
    policy, reference = parts()
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8 + i], "label": i % 2 == 0, "row": i}
        for i in range(3)
    ]
    batch = KTOCollator(None)(rows)
    seen: list[torch.Tensor] = []

    def reduce(total: torch.Tensor) -> torch.Tensor:
        seen.append(total)
        return total + torch.tensor([30.0, 2.0])

    kl = estimate_kl(policy, reference, batch, reduce=reduce)
    assert seen[0][1] == 3
    assert kl == pytest.approx(max((seen[0][0].item() + 30) / 5, 0.0))


def test_a_class_without_rows_has_no_metrics() -> None:
    policy, reference = parts()
    row = {"prompt_ids": [5, 6], "completion_ids": [7], "label": True, "row": 0}
    batch = KTOCollator(None)([row])
    assert estimate_kl(policy, reference, batch) == 0  # a lone row has no partner
    known = completion_logprobs(reference, batch)
    zero = torch.zeros(())
    result = kto_loss(*score_completions(policy, batch), known, batch["label"], kl=zero)
    metrics = reward_metrics(result, batch["label"], beta=0.1)
    assert set(metrics) == {"rewards/chosen", "logps/chosen"}


def test_every_public_name_is_there() -> None:
    for name in fastkto.__all__:
        assert callable(getattr(fastkto, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fastkto.nothing
