"""The estimated memory is that of real runs on a CPU, as their allocator recorded it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastkto import KTOConfig
from fastkto.memory import Deployment, MemoryEstimator
from fastkto.memory_fake import layer_kinds
from fastkto.memory_optimizer import optimizer_bytes
from fastkto.memory_probe import PassProbe, ProbeSettings
from fastkto.memory_search import MOST_TOKENS, largest
from tests.allocations import measured_peak
from tests.memory_truth import LENGTH, trainer_of
from tests.models import FAMILIES, tiny_model

WITHIN = 0.15
QUICK_RUNS = ("everything", "checkpointed", "LoRA, checkpointed", "LoRA on the head")
RUNS: dict[str, dict[str, Any]] = {
    "everything": {},
    "checkpointed": {"gradient_checkpointing": True},
    "tied head, checkpointed": {"gradient_checkpointing": True, "model": {"tied": True}},
    "LoRA": {"lora": True},
    "LoRA, checkpointed": {"lora": True, "gradient_checkpointing": True},
    "LoRA on the head": {"lora": ["q_proj", "lm_head"]},
    "LoRA on the head, bf16 autocast": {"lora": ["q_proj", "lm_head"], "bf16": True},
    "LoRA on the head alone": {"lora": ["lm_head"], "model": {"hidden_size": 512}},
    "DoRA on the head": {"lora": ["q_proj", "lm_head"], "use_dora": True},
    "bf16 autocast": {"bf16": True},
    "LoRA, bf16 autocast, checkpointed": {
        "lora": True,
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "eager attention": {"model": {"attn_implementation": "eager", "num_hidden_layers": 2}},
    "experts": {"model": {"family": "mixtral"}},
    "bf16 weights": {"model": {"dtype": torch.bfloat16}},
    "several rows in a pass": {
        "max_tokens_per_pass": 2 * LENGTH,
        "per_device_train_batch_size": 4,
    },
}


def estimator_of(trainer: Any) -> MemoryEstimator:
    return MemoryEstimator(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.step_settings.args,
        reference=trainer.reference.model,
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK_RUNS)) for name in RUNS],
)
def test_a_run_needs_what_is_estimated(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(tmp_path, **RUNS[name])
    memory = estimator_of(trainer).run(LENGTH, trainer.step_settings.args.grad_tokens)
    trainer.evaluate()  # the head is checked once, with logits
    peak = measured_peak(trainer.train)
    assert peak > 10 * 2**20
    assert memory.total - memory.weights - memory.reference == pytest.approx(peak, rel=WITHIN)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_pass_without_gradient_needs_what_is_estimated(tmp_path: Path, bf16: bool) -> None:
    trainer = trainer_of(tmp_path, bf16=bf16, model={"hidden_size": 512, "num_hidden_layers": 2})
    estimator, args = estimator_of(trainer), trainer.step_settings.args
    # An evaluation has passes of the loss and larger ones before it, which need less in the head.
    sizes = (args.grad_tokens, args.no_grad_tokens)
    expected = [estimator.pass_bytes(tokens, gradient=False) for tokens in sizes]
    assert all(one.kept == 0 for one in expected)
    trainer.evaluate()  # the head is checked once, with logits
    peak = max(one.peak for one in expected)
    assert measured_peak(trainer.evaluate) == pytest.approx(peak, rel=WITHIN)


def test_layers_alike_are_measured_once_and_counted() -> None:
    model = tiny_model("llama", num_hidden_layers=7, hidden_size=64)
    for index in (1, 4, 5):
        layer = model.model.layers[index]
        layer.mlp.gate_proj = nn.Linear(64, 96, bias=False)
        layer.mlp.up_proj = nn.Linear(64, 96, bias=False)
        layer.mlp.down_proj = nn.Linear(96, 64, bias=False)
    assert [len(kind) for kind in layer_kinds(model.model)] == [4, 3]
    probe, whole = (PassProbe(model, ProbeSettings(head_memory_mib=1)) for _ in range(2))
    whole.kinds = [[layer] for kind in whole.kinds for layer in kind]  # nothing is extrapolated
    for checkpointing in (False, True):
        settings = {"gradient": True, "checkpointing": checkpointing}
        counted, expected = (p.measure(1, 512, **settings).peak for p in (probe, whole))
        assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "falcon_h1"])
def test_every_family_is_measured_on_the_meta_device(family: str) -> None:
    config = tiny_model(family).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    router_loss = hasattr(config, "output_router_logits")
    probe = PassProbe(model, ProbeSettings(head_memory_mib=1, router_loss=router_loss))
    kept = probe.measure(1, 128, gradient=True)
    recomputed = probe.measure(1, 128, gradient=True, checkpointing=True)
    assert 0 < recomputed.kept < kept.kept
    assert 0 < probe.measure(1, 128, gradient=False).peak < kept.peak
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


def test_attention_without_masks_grows_linearly_and_eager_does_not() -> None:
    linear, eager = (
        PassProbe(tiny_model("qwen3", attn_implementation=name), ProbeSettings(head_memory_mib=1))
        for name in ("sdpa", "eager")
    )
    for probe, grows in ((linear, 2), (eager, 4)):
        few, many = (probe.measure(1, tokens, gradient=True).kept for tokens in (2048, 4096))
        assert many / few == pytest.approx(grows, rel=0.05)


def test_frozen_weights_are_kept_as_low_precision_copies() -> None:
    model = tiny_model("llama", hidden_size=64).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # so that every layer has a gradient to pass
    probe = PassProbe(model, ProbeSettings(autocast=torch.bfloat16, head_memory_mib=1))
    linears = [m for layer in model.model.layers for m in layer.modules() if type(m) is nn.Linear]
    copies = probe.measure(1, 64, gradient=True).weight_copies
    assert copies == 2 * sum(linear.weight.numel() for linear in linears)
    assert probe.measure(1, 64, gradient=True, checkpointing=True).weight_copies == 0


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_head_and_embedding_are_counted_apart(tied: bool) -> None:
    model = tiny_model("llama", vocab_size=4000, num_hidden_layers=4, tied=tied)
    size = 4 * model.get_input_embeddings().weight.numel()
    found = PassProbe(model, ProbeSettings(head_memory_mib=1)).measure(1, 64, gradient=True)
    assert found.head_gradients == size
    # a tied head's waits for the embedding's, and autograd adds the two up into a third
    assert found.backward_gradients == tied * size
    assert found.end_gradients == (3 * size if tied else size)
    assert found.kept + found.head_gradients < found.head
    model.get_input_embeddings().weight.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(False)
    found = PassProbe(model, ProbeSettings(head_memory_mib=1)).measure(1, 64, gradient=True)
    assert found.head_gradients == found.backward_gradients == found.end_gradients == 0


def test_a_released_reference_counts_until_its_scores_are_there(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = KTOConfig(str(tmp_path), use_cpu=True, head_memory_mib=1)
    stays, released = (
        MemoryEstimator(model, args, reference=model, deployment=deployment).run(64)
        for deployment in (Deployment(), Deployment(releases_reference=True))
    )
    assert stays.filling == stays.before_training == 0
    assert released.lasting == stays.lasting - stays.reference
    assert released.filling == released.no_gradient_pass.peak
    assert released.before_training == 2 * released.weights + released.filling
    model.requires_grad_(False)  # as under an adapter: the most is there while the cache is filled
    deployment = Deployment(releases_reference=True)
    frozen = MemoryEstimator(model, args, reference=model, deployment=deployment).run(64)
    assert frozen.total == frozen.before_training > frozen.lasting + frozen.working


def test_processes_copy_gradients_and_shards_divide_what_stays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = KTOConfig(str(tmp_path), use_cpu=True, head_memory_mib=1)
    one, copied, sharded = (
        MemoryEstimator(model, args, reference=model, deployment=deployment).run(64)
        for deployment in (Deployment(), Deployment(4), Deployment(4, sharded=True))
    )
    assert one.buckets == one.unpacked == sharded.buckets == 0
    assert copied.buckets == copied.gradients == one.gradients
    assert sharded.weights * 4 == one.weights and sharded.optimizer * 4 == one.optimizer
    assert sharded.gradients * 4 == one.gradients and sharded.reference * 4 == one.reference
    assert sharded.unpacked > 0


def test_quantised_layers_are_counted_packed(tmp_path: Path) -> None:
    model = tiny_model("llama").requires_grad_(False)
    inner = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    args = KTOConfig(str(tmp_path), use_cpu=True, optim="sgd")
    whole = MemoryEstimator(model, args).run(64)
    packed = MemoryEstimator(model, args, deployment=Deployment(bytes_per_quantised=0.5625)).run(64)
    assert whole.weights - packed.weights == pytest.approx(inner * (4 - 0.5625), abs=1)


@pytest.mark.parametrize(
    ("optim", "values"),
    [("adamw_torch", 2), ("adamw_torch_fused", 2), ("sgd", 0), ("adagrad", 1), ("rmsprop", 1)],
)
def test_measured_optimizers_keep_what_real_ones_keep(
    tmp_path: Path, optim: str, values: int
) -> None:
    model = tiny_model("llama")
    state, _ = optimizer_bytes(model, KTOConfig(str(tmp_path), use_cpu=True, optim=optim))
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert state == pytest.approx(4 * values * numel, rel=0.02, abs=1000)


def test_eight_bit_optimizers_keep_embeddings_whole(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=512, tied=False)
    args = KTOConfig(str(tmp_path), use_cpu=True, optim="adamw_8bit")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is embedding or parameter is head)
    expected = 8 * embedding.numel() + 2 * (1 + 4 / 256) * head.numel()
    assert optimizer_bytes(model, args).state == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("quadratic", [0, 3])
@pytest.mark.parametrize("limit", [100_000, 10**7, 10**9, 10**12])
def test_the_largest_that_fits_is_found_in_few_tries(quadratic: int, limit: int) -> None:
    tried = []

    def size(tokens: int) -> int:
        tried.append(tokens)
        return 50_000 + 700 * tokens + quadratic * tokens**2 // 100

    tokens = largest(size, limit)
    if tokens == 0:
        assert size(128) > limit
    else:
        assert size(tokens) <= limit
        assert tokens > 0.98 * MOST_TOKENS or size(int(tokens * 1.02) + 256) > limit
    assert len(tried) <= 16


def test_the_largest_pass_without_gradient_needs_no_more_than_one_with(tmp_path: Path) -> None:
    args = KTOConfig(str(tmp_path), use_cpu=True, head_memory_mib=1)
    estimator = MemoryEstimator(tiny_model("llama"), args)
    budget = estimator.pass_bytes(4096, checkpointing=True).peak
    tokens = estimator.most_tokens(budget, gradient=False)
    assert tokens > 4096
    assert estimator.pass_bytes(tokens, gradient=False).peak <= budget
    kept = estimator.most_tokens(budget, checkpointing=False)
    assert 128 <= kept < 4096


def test_the_largest_budget_fits_and_a_larger_one_does_not(tmp_path: Path) -> None:
    args = KTOConfig(str(tmp_path), use_cpu=True, head_memory_mib=1, per_device_train_batch_size=64)
    estimator = MemoryEstimator(tiny_model("llama"), args)
    limit = estimator.run(512, 5000).total
    tokens = estimator.largest_budget(512, limit)
    assert 4096 <= tokens <= 5000 + 512 and estimator.run(512, tokens).total <= limit
    assert estimator.run(512, int(1.2 * tokens)).total > limit
    assert estimator.largest_budget(512, estimator.run(512).total - 1) == 512
    assert estimator.largest_budget(512, 2**40) == 64 * 512


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    attention = model.config._attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = PassProbe(model, ProbeSettings(head_memory_mib=1))
        probe.measure(1, 64, gradient=True, checkpointing=True)
    assert not model.training and not model.is_gradient_checkpointing
    assert model.config._attn_implementation == attention
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_a_config_alone_is_enough() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=80, hidden_size=8192, vocab_size=1000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    probe = PassProbe(model, ProbeSettings(head_memory_mib=1))
    kept = probe.measure(1, 4096, gradient=True, checkpointing=True).kept
    assert kept == pytest.approx(80 * 4096 * 8192 * 4, rel=0.05)


def test_passes_without_gradient_span_the_accumulated_batches(tmp_path: Path) -> None:
    runs = []
    for steps in (1, 16):
        args = KTOConfig(
            str(tmp_path),
            use_cpu=True,
            head_memory_mib=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
            kl_scope="window",
        )
        runs.append(MemoryEstimator(tiny_model("llama"), args).run(256, 8192))
    one, many = (run.no_gradient_pass.peak for run in runs)
    assert many > 4 * one
    assert runs[0].gradient_pass == runs[1].gradient_pass


def test_sliding_windows_grow_linearly_in_packed_passes() -> None:
    model = tiny_model("gemma3", attn_implementation="sdpa")
    probe = PassProbe(model, ProbeSettings(head_memory_mib=1))
    few, many = (probe.measure(1, tokens, gradient=True).kept for tokens in (2048, 4096))
    assert many / few == pytest.approx(2, rel=0.05)
