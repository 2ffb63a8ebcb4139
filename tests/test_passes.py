"""Passes: how they are planned, and that loss and gradients do not depend on it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainerCallback

from fastkto import KTOConfig, KTOTrainer
from fastkto.head import attach_scoring
from fastkto.passes import (
    Sequences,
    build_pass,
    matched_sequences,
    mismatched_sequences,
    plan_passes,
    run_pass,
    sequence_logprobs,
)
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_plan_holds_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_passes(lengths, budget)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    for rows in plan:
        longest = max(lengths[row] for row in rows)
        assert len(rows) == 1 or len(rows) * longest <= budget
    firsts = [lengths[rows[0]] for rows in plan]
    assert firsts == sorted(firsts, reverse=True)


def test_plan_of_nothing_is_empty() -> None:
    assert plan_passes([], 100) == []


def ragged(lengths: list[tuple[int, int]], seed: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    total = sum(prompt + completion for prompt, completion in lengths)
    return Sequences(
        input_ids=torch.randint(4, 100, (total,), generator=generator),
        prompt_lengths=[prompt for prompt, _ in lengths],
        completion_lengths=[completion for _, completion in lengths],
    )


def logits_truth(model: torch.nn.Module, sequences: Sequences) -> list[torch.Tensor]:
    """Per-token log-probabilities of each completion, from fp64 logits of unpadded sequences."""
    model = copy.deepcopy(model)
    if not hasattr(model.config, "num_experts_per_tok"):  # grouped matmuls know no fp64
        model = model.double()
    truth = []
    pieces = torch.split(sequences.input_ids, sequences.lengths)
    for ids, prompt in zip(pieces, sequences.prompt_lengths, strict=True):
        logprob = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        logprob = logprob.gather(1, ids[1:, None])[:, 0]
        truth.append(logprob[max(prompt - 1, 0) :].detach())
    return truth


# An empty prompt leaves a completion's first token unscored, as it has nothing to follow.
LENGTHS = [(3, 5), (9, 1), (1, 7), (0, 4), (6, 6), (2, 14)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padded_pass_equals_separate_forwards(family: str) -> None:
    model = tiny_model(family, seed=1).eval()
    sequences = ragged(LENGTHS)
    truth = logits_truth(model, sequences)
    attach_scoring(model)
    with torch.no_grad():
        pass_ = build_pass(sequences, range(len(LENGTHS)))
        scores = run_pass(model, pass_)
    for row, (start, end) in enumerate(zip(pass_.offsets[:-1], pass_.offsets[1:], strict=True)):
        torch.testing.assert_close(
            scores.logprob[start:end].double(), truth[row], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("budget", [1, 16, 40, 1000])
def test_sequence_logprobs_do_not_depend_on_the_budget(budget: int) -> None:
    model = tiny_model("llama", seed=1).eval()
    sequences = ragged(LENGTHS)
    truth = torch.stack([logprob.sum() for logprob in logits_truth(model, sequences)])
    attach_scoring(model)
    actual = sequence_logprobs(model, sequences, budget)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


def test_mismatched_sequences_join_prompt_and_paired_completion() -> None:
    batch = {
        "input_ids": torch.tensor([1, 2, 3, 4, 5, 6]),
        "prompt_lengths": [2, 1],
        "completion_lengths": [1, 2],
        "kl_completion_ids": torch.tensor([5, 6, 3]),
        "kl_completion_lengths": [2, 1],
    }
    assert matched_sequences(batch).lengths == [3, 3]
    mismatched = mismatched_sequences(batch)
    assert mismatched.input_ids.tolist() == [1, 2, 5, 6, 4, 3]
    assert mismatched.prompt_lengths == [2, 1]
    assert mismatched.completion_lengths == [2, 1]


def test_lone_row_has_no_mismatched_sequence() -> None:
    batch = {
        "input_ids": torch.tensor([1, 2, 3]),
        "prompt_lengths": [2],
        "completion_lengths": [1],
        "kl_completion_ids": torch.tensor([], dtype=torch.int64),
        "kl_completion_lengths": [0],
    }
    assert mismatched_sequences(batch).lengths == []


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, before they are clipped."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values = {
            name: parameter.grad.clone()
            for name, parameter in kwargs["model"].named_parameters()
            if parameter.requires_grad
        }


def one_step(directory: Path, budget: int, model: Any, **config: Any) -> tuple[dict, dict, int]:
    """Gradients and log of one optimizer step, and how many passes its first batch took."""
    gradients = Gradients()
    peft_config = config.pop("peft_config", None)
    config.setdefault("gradient_checkpointing", False)
    trainer = KTOTrainer(
        model=copy.deepcopy(model),
        ref_model=None if peft_config else tiny_model(model.config.model_type, seed=8),
        args=KTOConfig(
            output_dir=str(directory),
            max_tokens_per_pass=budget,
            per_device_train_batch_size=6,
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            **config,
        ),
        train_dataset=text_rows(12),
        processing_class=tiny_tokenizer(),
        callbacks=[gradients],
        peft_config=copy.deepcopy(peft_config),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    passes = len(plan_passes(matched_sequences(batch).lengths, budget))
    trainer.train()
    return gradients.values, trainer.state.log_history[0], passes


LORA = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"loss_type": "apo_zero_unpaired"}),
        ("llama", {"tied": True, "gradient_accumulation_steps": 2}),
        ("llama", {"peft_config": LORA}),
        ("llama", {"peft_config": LORA, "gradient_checkpointing": True}),
        ("mixtral", {"router_aux_loss_coef": 0.5}),
        ("qwen3_moe", {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2}),
    ],
    ids=["full", "apo", "tied", "lora", "lora checkpointed", "mixtral", "qwen3_moe"],
)
def test_gradients_do_not_depend_on_the_budget(family: str, config: dict, tmp_path: Path) -> None:
    config = dict(config)
    model = tiny_model(family, seed=1, tied=config.pop("tied", False))
    whole, log, passes = one_step(tmp_path, 10_000, model, **config)
    assert passes == 1
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    for budget in (100, 10):  # the second is below the longest row, and most others
        parts, log_parts, passes = one_step(tmp_path, budget, model, **config)
        assert passes >= 3
        assert log_parts["loss"] == pytest.approx(log["loss"], rel=1e-5)
        scale = max(gradient.abs().max() for gradient in whole.values())
        for name, gradient in whole.items():
            torch.testing.assert_close(
                parts[name], gradient, rtol=1e-3, atol=1e-5 * float(scale), msg=name
            )


class SavedBytes:
    """Bytes that autograd keeps for backward, besides the weights: now, and at most."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> SavedTensor:
        is_weight = tensor.untyped_storage().data_ptr() in self.weights
        saved = SavedTensor(self, tensor, 0 if is_weight else tensor.nbytes)
        self.now += saved.size
        self.peak = max(self.peak, self.now)
        return saved


class SavedTensor:
    def __init__(self, count: SavedBytes, tensor: torch.Tensor, size: int) -> None:
        self.count, self.tensor, self.size = count, tensor, size

    def __del__(self) -> None:
        self.count.now -= self.size


@pytest.mark.parametrize("batch_size", [8, 32])
def test_activations_follow_the_budget_and_not_the_batch(batch_size: int, tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        trainer = KTOTrainer(
            model=tiny_model("llama", seed=1),
            ref_model=tiny_model("llama", seed=8),
            args=KTOConfig(
                output_dir=str(tmp_path),
                max_tokens_per_pass=120,
                per_device_train_batch_size=rows,
                gradient_checkpointing=False,
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=text_rows(8).select([0, 1, 2, 3, 4, 5, 6, 7] * 4),
            processing_class=tiny_tokenizer(),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        saved = SavedBytes(trainer.model)
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda s: s.tensor)
        with hooks:
            trainer.training_step(trainer.model, batch)
        assert saved.now == 0
        return saved.peak

    smallest = peak(4)  # it holds the longest row, and takes more than one pass already
    assert peak(batch_size) <= 1.1 * smallest


@pytest.mark.parametrize(("passes", "error"), [(1, 1.7e-3), (8, 4.0e-3), (64, 9.8e-3)])
def test_bf16_parameters_round_their_gradient_as_documented(passes: int, error: float) -> None:
    """The relative errors that docs/step.md states."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(512, 512, dtype=torch.bfloat16))
    inputs, upstream = (torch.randn(4096, 512, generator=generator).bfloat16() for _ in range(2))
    for part, gradient in zip(inputs.chunk(passes), upstream.chunk(passes), strict=True):
        torch.nn.functional.linear(part, weight).backward(gradient)
    exact = upstream.double().T @ inputs.double()
    actual = (weight.grad.double() - exact).norm() / exact.norm()
    assert float(actual) == pytest.approx(error, rel=0.05)
