"""Activations go to host memory and come back: the same loss, the same gradients, no weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from fastkto import KTOConfig, activation_offloading
from fastkto.activation_offloading import ActivationsOnHost, is_activation
from fastkto.memory import MemoryEstimator
from tests.allocations import measured_peak
from tests.memory_truth import LENGTH, trainer_of
from tests.models import tiny_model


def gradients_of(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of the first batch and the gradients, which the optimizer does not use."""
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.args.max_steps = 1
    trainer.train()
    return trainer.state.log_history[-1]["train_loss"], keep.found


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.found[name] = parameter.grad.clone()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is moved to the host."""
    moved: list[Tensor] = []
    to_host = activation_offloading.to_host

    def recording(tensor: Tensor) -> Tensor:
        moved.append(tensor)
        return to_host(tensor)

    monkeypatch.setattr(activation_offloading, "to_host", recording)
    return moved


NON_REENTRANT: dict[str, Any] = {"gradient_checkpointing": True}
REENTRANT = NON_REENTRANT | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "logits"},
        {"lora": True},
        {"lora": ["q_proj", "lm_head"]},
        NON_REENTRANT | {"lora": True, "head": "logits"},
        REENTRANT,
        REENTRANT | {"lora": True},
    ],
    ids=str,
)
def test_loss_and_gradients_are_the_same(
    tmp_path: Path, packed: list[Tensor], settings: dict[str, Any]
) -> None:
    settings = settings | {"desirable_weight": 2.0}  # or the gradients of equal rows cancel
    loss, gradients = gradients_of(trainer_of(tmp_path, **settings))
    assert not packed
    moved_loss, moved_gradients = gradients_of(
        trainer_of(tmp_path, activation_offloading=True, **settings)
    )
    assert packed
    assert moved_loss == loss and moved_gradients.keys() == gradients.keys()
    assert all(torch.equal(moved_gradients[name], gradients[name]) for name in gradients)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.01


def test_no_weight_is_moved_and_nothing_twice(tmp_path: Path, packed: list[Tensor]) -> None:
    trainer = trainer_of(tmp_path, activation_offloading=True)
    gradients_of(trainer)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in packed)
    places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape) for t in packed]
    assert len(set(places)) == len(places)  # `packed` keeps all of them alive


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_checkpointed_layer_moves_is_its_input(
    tmp_path: Path, packed: list[Tensor], frozen: bool
) -> None:
    trainer = trainer_of(
        tmp_path, activation_offloading=True, gradient_checkpointing=True, lora=frozen
    )
    gradients_of(trainer)
    config = trainer.model.config
    inputs = [t for t in packed if t.shape == (1, LENGTH, config.hidden_size)]
    passes = 2  # a row each
    # The inputs of the layers, and what the last norm keeps: its input, for its own gradient also
    # what its weight is multiplied with.
    assert len(inputs) == passes * (config.num_hidden_layers + (1 if frozen else 2))
    rest = [t for t in packed if t.shape != (1, LENGTH, config.hidden_size)]
    scored = LENGTH - 32
    assert {tuple(t.shape) for t in rest} == {(scored, config.hidden_size)}  # the head's
    assert len(rest) == passes


def test_views_of_weights_small_and_expanded_tensors_stay() -> None:
    weight = nn.Parameter(torch.zeros(512, 512))
    assert not any(map(is_activation, (weight, weight.t(), weight[1:].t())))
    frozen = nn.Parameter(torch.zeros(512, 512), requires_grad=False)
    assert not is_activation(frozen) and not is_activation(frozen.t())
    assert is_activation(torch.zeros(2**14)) and not is_activation(torch.zeros(2**14 - 1))
    assert not is_activation(torch.zeros(1, 2**13).expand(2**6, -1))
    assert is_activation(torch.zeros(2, 2**14)[1])


def test_an_address_used_again_is_another_tensor() -> None:
    weight = nn.Parameter(torch.ones(2**14))
    total = torch.zeros(())
    with ActivationsOnHost():
        for factor in range(1, 6):
            activation = torch.full((2**14,), float(factor))
            total = total + (weight * activation).sum()
            del activation
            changed = torch.full((2**14,), float(factor))
            total = total + (weight * changed).sum()
            total = total + (weight * changed.add_(1)).sum()  # at the same place
    total.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((2**14,), float(3 * sum(range(1, 6)) + 5)))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_weights_that_fsdp2_gathers_are_not_moved(packed: list[Tensor], one_process: None) -> None:
    def run(offloads: bool) -> list[Tensor]:
        model = tiny_model("llama", hidden_size=256, intermediate_size=512, tied=False)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        tokens = torch.arange(128)[None]
        with ActivationsOnHost() if offloads else torch.enable_grad():
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        return [p.grad.to_local() for p in model.parameters()]

    expected, actual = run(False), run(True)
    assert packed and all(map(torch.equal, actual, expected))
    weights = {(256, 512), (512, 256), (256, 256), (256, 128), (256, 32), (32, 256), (16, 256)}
    assert not weights & {tuple(tensor.shape) for tensor in packed}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_pass_is_what_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    def to_numpy(tensor: Tensor) -> Tensor:  # which the allocator's record does not hold
        return torch.from_numpy(numpy.array(tensor.detach().numpy()))

    monkeypatch.setattr(activation_offloading, "to_host", to_numpy)
    monkeypatch.setattr(activation_offloading, "to_device", lambda host, _: host.clone())
    trainer = trainer_of(
        tmp_path,
        lora=True,
        gradient_checkpointing=checkpointing,
        activation_offloading=True,
        model={"num_hidden_layers": 6},
    )
    estimator = MemoryEstimator(trainer.model, trainer.step_settings.args)
    memory = estimator.run(LENGTH, LENGTH)
    trainer.evaluate()  # the head is checked once, with logits
    peak = measured_peak(trainer.train)
    assert memory.total - memory.weights == pytest.approx(peak, rel=0.15)
    trainer.step_settings.args.activation_offloading = False
    kept = MemoryEstimator(trainer.model, trainer.step_settings.args).run(LENGTH, LENGTH)
    # with checkpointing 6 inputs of layers more, which are not all there at the peak
    assert peak < (0.97 if checkpointing else 0.5) * (kept.total - kept.weights)


def test_offloading_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has offload=True, which both move the same"):
        KTOConfig(
            str(tmp_path),
            use_cpu=True,
            activation_offloading=True,
            gradient_checkpointing_kwargs={"offload": True},
        )
