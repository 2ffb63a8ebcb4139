"""What is said before training: from the trainer's own data, order, passes and weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from fastkto import KTOConfig, KTOTrainer
from fastkto.cli.summary import describe_run, look_at_batches, precision, precision_warnings
from fastkto.plan_passes import Layout, plan_lengths
from tests.models import tiny_model, tiny_tokenizer

BATCH = 4


def rows_of(labels: list[bool], prompt: str = "sum:") -> Dataset:
    rows = [
        {"prompt": prompt, "completion": " in" * (1 + i % 5), "label": label}
        for i, label in enumerate(labels)
    ]
    return Dataset.from_list(rows)


def make_trainer(folder: Path, rows: Dataset, kind: Any = KTOTrainer, **config: Any) -> KTOTrainer:
    defaults = {"per_device_train_batch_size": BATCH, "dataloader_pin_memory": False}
    config = defaults | {"use_cpu": True} | config
    trainer: KTOTrainer = kind(
        model=tiny_model("llama"),
        args=KTOConfig(str(folder), **config),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    return trainer


class Recorder(KTOTrainer):
    """Keeps the labels and lengths of every batch that is trained on."""

    seen: list[tuple[list[bool], list[int]]]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        pairs = zip(inputs["prompt_lengths"], inputs["completion_lengths"], strict=True)
        self.seen.append((inputs["label"].tolist(), [p + c for p, c in pairs]))
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        return loss


@pytest.mark.parametrize("strategy", ["sequential", "random"])
def test_batches_are_those_of_the_run(tmp_path: Path, strategy: str) -> None:
    rows = rows_of([True] * 13 + [False] * 9)
    config = {"train_sampling_strategy": strategy, "num_train_epochs": 1, "max_tokens_per_pass": 20}
    trainer = make_trainer(tmp_path, rows, Recorder, **config)
    assert isinstance(trainer, Recorder)
    trainer.seen = []
    batches = look_at_batches(trainer)
    trainer.train()
    one_class = [len(set(labels)) == 1 for labels, _ in trainer.seen]
    assert batches.per_epoch == batches.looked_at == len(one_class) == 6
    assert batches.one_class == pytest.approx(sum(one_class) / 6)
    assert batches.passes == [
        len(plan_lengths(lengths, 20, Layout.PACKED)) for _, lengths in trainer.seen
    ]
    assert max(batches.passes) >= 3


@pytest.mark.parametrize("strategy", ["sequential", "random", "group_by_length"])
def test_looking_at_batches_leaves_random_numbers_alone(tmp_path: Path, strategy: str) -> None:
    rows = rows_of([True, False] * 10)
    trainer = make_trainer(tmp_path, rows, train_sampling_strategy=strategy)
    state = torch.random.get_rng_state()
    look_at_batches(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    rows = rows_of([True, False] * 8 + [True] * 4)
    too_long = rows_of([False] * 3, prompt="x" * 20)
    rows = Dataset.from_list(rows.to_list() + too_long.to_list())
    trainer = make_trainer(tmp_path, rows, max_length=14, gradient_accumulation_steps=2)
    facts = [f"{name}: {text}" for name, text in describe_run(trainer).facts]
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    report = trainer.row_reports["train"]
    assert report.cut > 0
    assert facts == [
        f"model: LlamaForCausalLM, {total:,} parameters, all trainable",
        "train data: 20 rows: 12 desirable, 8 undesirable",
        ": 3 dropped, their prompt alone fills max_length=14; "
        f"{report.cut} cut at max_length=14; longest sequence 14 tokens",
        "batches: 5 per epoch of 4 rows x 2 accumulation steps, order sequential; "
        "20% with one class only",
        "passes: 1 per batch with gradient, of at most 4,096 tokens (max_tokens_per_pass)",
        "precision: float32 weights, no bfloat16 autocast (no GPU for it)",
        "reference: the initial policy, copied",
        "backend: torch (there is no Triton backend for device 'cpu')",
        "devices: 1 x cpu",
        f"output: {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("labels", "config", "expected"),
    [
        (
            [True] * 20 + [False] * 20,
            {},
            ["100% of the batches hold one class only, and 12% would if rows were shuffled; set "],
        ),
        ([True, False] * 20, {}, []),
        ([True] * 20 + [False] * 20, {"train_sampling_strategy": "random"}, []),
        ([True] * 40, {}, ["all rows of the training data have the same label"]),
        (
            [True] * 38 + [False] * 2,
            {"train_sampling_strategy": "random"},
            ["of the batches hold one class only; raise per_device_train_batch_size"],
        ),
    ],
)
def test_batches_of_one_class_come_with_advice(
    tmp_path: Path, labels: list[bool], config: dict[str, Any], expected: list[str]
) -> None:
    warnings = describe_run(make_trainer(tmp_path, rows_of(labels), **config)).warnings
    assert len(warnings) == len(expected)
    for warning, text in zip(warnings, expected, strict=True):
        assert text in warning


def test_weights_that_autocast_copies_are_warned_about(tmp_path: Path) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    args = KTOConfig(str(tmp_path), bf16=True, use_cpu=True)
    [warning] = precision_warnings(model, args, most_passes=1)
    assert "the frozen weights are float32 and autograd keeps bfloat16 copies" in warning
    assert "load them with dtype=bfloat16" in warning
    assert precision(model, args) == "float32 weights, bfloat16 autocast (asked for)"
    assert precision_warnings(model, KTOConfig(str(tmp_path), bf16=False), most_passes=1) == []
    assert precision_warnings(model.requires_grad_(True), args, most_passes=1) == []


def test_gradients_that_passes_round_are_warned_about(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    args = KTOConfig(str(tmp_path), bf16=False)
    [warning] = precision_warnings(model, args, most_passes=3)
    assert (
        "trainable weights are bfloat16, so their gradients are rounded at every one of" in warning
    )
    assert precision_warnings(model, args, most_passes=1) == []
    assert precision_warnings(model.float(), args, most_passes=3) == []


def test_deepspeed_has_precision_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = KTOConfig(str(tmp_path), bf16=True, use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={})
    assert precision(model, args).startswith("bfloat16 weights and arithmetic, float32 copies")
    [warning] = precision_warnings(model, args, most_passes=3)
    assert "set data_types.grad_accum_dtype to fp32" in warning
    assert precision_warnings(model, args, most_passes=1) == []
    in_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=in_fp32)
    assert precision_warnings(model, args, most_passes=3) == []
