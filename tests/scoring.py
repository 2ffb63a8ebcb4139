"""Scores by an attached model beside those from its own logits, for the tests of the head."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fastkto.head import ScoredOutput, attach_scoring, detach_scoring

INPUT_IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
SCORED = {
    "score_row": torch.tensor([0, 0, 0, 1, 1, 1, 1]),
    "score_position": torch.tensor([-9, -5, -1, -3, -2, -3, -2]),
    "score_target": torch.tensor([5, 0, 127, -100, 3, 64, 3]),
}
# A slice of logits is then a few tokens, so that there are several.
SMALL_MIB = 3 * 32 * 128 / 2**20
HEADS = ("auto", "logits")


def score(model: nn.Module, **kwargs: Any) -> ScoredOutput:
    return model(input_ids=INPUT_IDS, use_cache=False, **SCORED, **kwargs)


def own_scores(model: nn.Module) -> ScoredOutput:
    """Scores by autograd through the model's own logits, in fp32 or in its fp64."""
    logits = model(input_ids=INPUT_IDS, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits[SCORED["score_row"], SCORED["score_position"]]  # [N, V]
    is_scored = SCORED["score_target"] >= 0
    logprob = logits.log_softmax(-1)
    return ScoredOutput(
        logprob=logprob.gather(1, SCORED["score_target"].clamp(min=0)[:, None])[:, 0] * is_scored,
        entropy=-(logprob.exp() * logprob).sum(-1) * is_scored,
        mean_logit=logits.mean(-1) * is_scored,
    )


def gradients(model: nn.Module, logprob: Tensor) -> dict[str, Tensor | None]:
    """Gradients of trainable parameters for a different weight on each token."""
    model.zero_grad()
    (logprob * torch.linspace(-1, 2, len(logprob))).sum().backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_close(got: Tensor, expected: Tensor, name: str = "") -> None:
    error = (got - expected).norm() / expected.norm().clamp(min=1e-6)
    assert error < 1e-5, f"{name}: {error:.1e} relative"


def assert_scores_are_own(
    model: nn.Module, head: str, *, backend: str = "auto", truth: nn.Module | None = None
) -> None:
    """Scores, statistics and every gradient, attached against not attached.

    truth: what is not attached, for example the same model in fp64; by default `model`.
    """
    truth = model if truth is None else truth
    expected = own_scores(truth)
    expected_gradients = gradients(truth, expected.logprob)
    attach_scoring(model, head=head, backend=backend, head_memory_mib=SMALL_MIB)
    got = score(model, score_stats=True)
    got_gradients = gradients(model, got.logprob)
    detach_scoring(model)
    for name in ("logprob", "entropy", "mean_logit"):
        assert got[name].dtype == torch.float32
        assert_close(got[name], expected[name], name)
    assert got.logprob[3] == got.entropy[3] == got.mean_logit[3] == 0  # the ignored token
    assert any(gradient is not None for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradient is None) == (got_gradients[name] is None), name
        if gradient is not None:
            assert_close(got_gradients[name], gradient, name)


def lora(model: nn.Module, **config: Any) -> nn.Module:
    """The model with LoRA that changes it."""
    model = get_peft_model(model, LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **config}))
    randomise_lora(model)
    return model


def randomise_lora(model: nn.Module) -> None:
    """Give all adapters weights that change the model, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
