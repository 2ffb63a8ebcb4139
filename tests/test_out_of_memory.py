"""Out-of-memory errors name the pass and the setting, and stay what HF recognises."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import Tensor, nn

from fastkto import KTOConfig, KTOTrainer
from tests.models import tiny_model, tiny_tokenizer

GPU_SAYS = "CUDA out of memory. Tried to allocate 20.00 GiB."
# With the end token, rows of 40, 30, 20 and 10 tokens.
ROWS = Dataset.from_list(
    [
        {"prompt": letter * 5, "completion": "c" * (length - 6), "label": length > 20}
        for letter, length in (("p", 40), ("q", 30), ("r", 20), ("s", 10))
    ]
)


def trainer_of(folder: Path, family: str = "llama", **fields: Any) -> KTOTrainer:
    values = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_tokens_per_pass": 50,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return KTOTrainer(
        model=tiny_model(family, seed=1),
        ref_model=tiny_model(family, seed=2),
        args=KTOConfig(str(folder), **(values | fields)),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )


def fail_at(model: nn.Module, has_gradient: bool, number: int, *, backward: bool = False) -> None:
    """The model's forward or backward of its pass `number`, of those with or without a gradient,
    fails as on a GPU."""
    seen = 0

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(GPU_SAYS)

    def count(_: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal seen
        seen += output.requires_grad == has_gradient
        if seen == number and output.requires_grad == has_gradient:
            output.register_hook(fail) if backward else fail()

    model.get_input_embeddings().register_forward_hook(count)


def skip_checks(trainer: KTOTrainer) -> None:
    """Check the models' heads and layouts, so that what runs next are passes."""
    trainer.evaluate()


def message_of(work: Callable[[], Any]) -> str:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        work()
    error = caught.value
    assert type(error) is torch.OutOfMemoryError and len(error.args) == 1
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert str(error.__cause__) == GPU_SAYS and error.__cause__.__cause__ is None
    assert should_reduce_batch_size(error)
    return str(error)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_a_gradient_pass_of_several_sequences(tmp_path: Path, number: int, backward: bool) -> None:
    trainer = trainer_of(tmp_path)
    skip_checks(trainer)
    fail_at(trainer.model, True, number, backward=backward)  # the last backward is Trainer's
    assert message_of(trainer.train) == (
        f"The gradient pass {number} of 2 (50 tokens in 2 sequences, the longest of "
        f"{(40, 30)[number - 1]}) ran out of memory. Lower max_tokens_per_pass, which is 50. "
        f"{GPU_SAYS}"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_pass_of_one_sequence(tmp_path: Path, checkpointing: bool) -> None:
    fields: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    fields["activation_offloading"] = checkpointing
    fields["checkpoint_passes"] = "auto" if checkpointing else None
    trainer = trainer_of(tmp_path, max_tokens_per_pass=35, **fields)
    skip_checks(trainer)
    fail_at(trainer.model, True, 1)
    message = message_of(trainer.train)
    assert "gradient pass 1 of 3 (one sequence of 40 tokens) ran out of memory. A pass" in message
    assert "lower max_length" in message
    for remedy in ("turn on gradient_checkpointing", "turn on activation_offloading"):
        assert (remedy in message) != checkpointing
    assert ("leave checkpoint_passes out, which may have" in message) == checkpointing


@pytest.mark.parametrize(
    ("of", "number", "expected"),
    [
        ("reference", 1, "pass without gradient 1 of 2 of the reference (90 tokens in 3 sequences"),
        ("policy", 1, "pass without gradient 1 of 2 of the policy (90 tokens in 3 sequences"),
        ("policy", 2, "pass without gradient 2 of 2 of the policy (one sequence of 10 tokens"),
    ],
)
def test_a_pass_without_gradient(tmp_path: Path, of: str, number: int, expected: str) -> None:
    trainer = trainer_of(tmp_path, max_tokens_per_pass=45)
    skip_checks(trainer)
    model = trainer.model if of == "policy" else trainer.reference.model
    assert model is not None
    fail_at(model, False, number)
    message = message_of(trainer.train)
    assert expected in message
    assert ("Lower max_tokens_per_pass; passes without" in message) == ("sequences" in expected)
    assert "checkpointing" not in message


@pytest.mark.parametrize(
    ("number", "size"),
    [
        (1, "50 tokens in 2 sequences, the longest of 40"),
        (2, "50 tokens in 2 sequences, the longest of 30"),
    ],
)
def test_a_pass_that_counts_experts(tmp_path: Path, number: int, size: str) -> None:
    """With the passes of those with gradient; there is no other without one."""
    trainer = trainer_of(
        tmp_path, "mixtral", router_aux_loss_coef=0.5, loss_type="apo_zero_unpaired"
    )
    skip_checks(trainer)
    fail_at(trainer.model, False, number)
    message = message_of(trainer.train)
    assert f"pass without gradient that counts the policy's experts ({size}" in message
    assert "Lower max_tokens_per_pass" in message


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, "1 of 2 of the reference (90 tokens in 3"), (2, "2 of 2 of the reference (one sequence")],
)
def test_a_pass_that_fills_the_cache(tmp_path: Path, number: int, expected: str) -> None:
    """Of the rows of two batches at once, as no step scores them."""
    trainer = trainer_of(
        tmp_path,
        max_tokens_per_pass=45,
        per_device_train_batch_size=2,
        max_steps=2,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=4,
        reference_cache=str(tmp_path / "cache"),
    )
    trainer._get_ready([next(iter(trainer.get_train_dataloader()))])  # nothing is in the cache yet
    assert trainer.reference.model is not None
    fail_at(trainer.reference.model, False, number)
    message = message_of(trainer.train)
    assert f"pass without gradient {expected}" in message
    assert ("lower max_length" if number == 2 else "Lower max_tokens_per_pass") in message


def test_a_pass_of_an_evaluation(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, loss_type="apo_zero_unpaired")
    skip_checks(trainer)
    fail_at(trainer.model, False, 2)
    assert "The evaluation pass 2 of 2 (50 tokens in 2" in message_of(trainer.evaluate)


class OwnLoss(KTOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def test_a_batch_that_is_one_pass_whatever_the_setting(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer = OwnLoss(
        model=tiny_model("llama", seed=1),
        args=trainer.args,
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    trainer._get_ready([next(iter(trainer.get_train_dataloader()))])
    fail_at(trainer.model, True, 1)
    message = message_of(trainer.train)
    assert "gradient pass 1 of 1 (100 tokens in 4 sequences" in message
    assert "Lower the batch size: compute_loss is overridden" in message


def test_what_is_no_pass_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)

    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError(GPU_SAYS)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(GPU_SAYS)) as caught:
        trainer.train()
    assert str(caught.value) == GPU_SAYS


def test_auto_find_batch_size_goes_on_with_a_smaller_batch(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, auto_find_batch_size=True, max_tokens_per_pass=200, max_steps=2)
    most, sizes = 80, []

    def limited(_: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes.append(output.shape[1])
        if output.requires_grad and output.shape[1] > most:
            raise torch.OutOfMemoryError(GPU_SAYS)

    trainer.model.get_input_embeddings().register_forward_hook(limited)
    trainer.train()
    assert max(sizes) > most  # a batch of four rows
    assert trainer._train_batch_size == 2 and trainer.state.global_step == 2
