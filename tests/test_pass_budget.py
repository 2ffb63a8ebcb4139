"""max_tokens_per_pass="auto" finds the largest that fits, and leaves no trace."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel

from fastkto import KTOConfig, KTOTrainer
from fastkto.cli.parser import TrainParser
from fastkto.cli.summary import describe_run
from fastkto.config import DEFAULT_TOKENS
from fastkto.data.batch import matched_sequences
from fastkto.pass_budget import check_auto, find_budget, state_to_come
from fastkto.trial_passes import trial_passes
from tests.allocations import measured_peak
from tests.launch import launch
from tests.models import tiny_model, tiny_tokenizer

MIB = 2**20
LONGEST = 120


class RecordedMemory:
    """DeviceMemory with a limit of the test's, and peaks from the allocator's record."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def limit(self) -> float:
        return self._limit

    def peak(self, work: Callable[[], None]) -> float:
        return measured_peak(work)


class Limited(KTOTrainer):
    """Has `limit` bytes for a pass."""

    limit: float

    def _device_memory(self) -> Any:
        return RecordedMemory(self.limit)


def rows(count: int) -> Dataset:
    """`count` rows of 20 to LONGEST tokens; the longest is the third."""
    lengths = [LONGEST if i == 2 else 20 + 37 * i % 90 for i in range(count)]
    return Dataset.from_list(
        [
            {"prompt": chr(97 + i) * 5, "completion": "c" * (n - 6), "label": i % 2 == 0}
            for i, n in enumerate(lengths)
        ]
    )


def sized_model(**sizes: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32} | sizes
    return tiny_model("llama", seed=1, vocab_size=512, **sizes)


def trainer_of(folder: Path, budget: Any, limit: float = 0.0, **fields: Any) -> Limited:
    own = ("train_dataset", "peft_config", "ref_model")
    given = {k: fields.pop(k) for k in own if k in fields}
    values = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "gradient_checkpointing": False,
        "head_memory_mib": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    trainer = Limited(
        model=sized_model(),
        args=KTOConfig(str(folder), max_tokens_per_pass=budget, **(values | fields)),
        processing_class=tiny_tokenizer(),
        **({"train_dataset": rows(16)} | given),
    )
    trainer.limit = limit
    return trainer


def found(trainer: KTOTrainer) -> Any:
    return trainer.step_settings.args.max_tokens_per_pass


def pass_peaks(trainer: KTOTrainer, tokens: int) -> tuple[float, float]:
    """Bytes added by real passes of at most `tokens` tokens over the training data: those of
    a step's losses, with gradients there already, and those without gradient."""
    trainer.train()  # the optimizer's state and the checks are behind us
    trainer.step_settings.args.max_tokens_per_pass = tokens
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    batch = trainer._prepare_inputs(batch)
    losses = []
    without = measured_peak(lambda: losses.extend(trainer._score([batch])))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch["batch_loss"] = losses[0]
    return measured_peak(lambda: trainer.training_step(trainer.model_wrapped, batch)), without


@pytest.mark.parametrize("large_reference", [False, True])
def test_the_found_number_fits_and_a_larger_one_does_not(
    tmp_path: Path, large_reference: bool
) -> None:
    """Either the gradient pass is what needs the most, or the reference's pass."""

    def start(budget: Any) -> KTOTrainer:
        reference = sized_model(intermediate_size=2048) if large_reference else None
        fields = {"ref_model": reference, "gradient_checkpointing": large_reference}
        return trainer_of(tmp_path, budget, limit, **fields)

    limit = 14 * MIB
    trainer = start("auto")
    trainer.train()
    tokens = found(trainer)
    assert LONGEST < tokens < trial_passes_of(trainer).most
    gradient, without = pass_peaks(start(100), tokens)
    assert (without > gradient) == large_reference
    assert max(gradient, without) <= 1.02 * limit
    assert max(pass_peaks(start(100), int(1.3 * tokens))) > limit


def trial_passes_of(trainer: KTOTrainer) -> Any:
    batch = next(iter(trainer.get_train_dataloader()))
    return trial_passes(trainer, [batch])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_is_that_of_the_number_found(
    tmp_path: Path, dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=dropout)
    settings: dict[str, Any] = {"disable_dropout": dropout == 0, "peft_config": adapter}
    auto = trainer_of(tmp_path, "auto", 6 * MIB, **settings)
    auto.train()
    tokens = found(auto)
    assert LONGEST < tokens < 8 * LONGEST and auto.args.max_tokens_per_pass == "auto"
    (line,) = [r.message for r in caplog.records if "max_tokens_per_pass is" in r.message]
    assert f"is {tokens:,}: found by trying: its passes need 0.0" in line
    number = trainer_of(tmp_path, tokens, **settings)
    number.train()
    for ours, expected in zip(auto.state.log_history, number.state.log_history, strict=True):
        timeless = {k for k in expected if "runtime" not in k and "_per_second" not in k}
        assert {k: ours[k] for k in timeless} == {k: expected[k] for k in timeless}
    weights = auto.model.state_dict()
    assert all(torch.equal(weights[n], w) for n, w in number.model.state_dict().items())


def test_trial_passes_leave_no_trace(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 100, disable_dropout=False)
    trainer.train()
    passes = trial_passes_of(trainer)
    trainer.model.eval()
    trainer.model.model.layers[0].train()
    modes = [module.training for module in trainer.model.modules()]
    state = torch.random.get_rng_state()
    with passes.leaving_no_trace():
        passes.with_gradient(300)
        assert all(p.grad is not None for p in trainer.model.parameters())
        passes.without_gradient(300)
        torch.rand(1)
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_trial_passes_have_the_size_asked_for(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 100)
    trainer.train()
    passes = trial_passes_of(trainer)
    lengths = sorted(trainer.train_dataset["length"], reverse=True)
    assert passes.least == lengths[0] == LONGEST and passes.most == sum(lengths[:8])
    seen = []
    trainer.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].shape[1], output.requires_grad))
    )
    for tokens in (LONGEST, 301, 2000):
        passes.with_gradient(tokens)
        passes.without_gradient(2 * tokens)
    # without gradient the policy alone; the reference is another model
    assert seen == [(n, g) for t in (LONGEST, 301, 2000) for n, g in ((t, True), (2 * t, False))]


def test_streamed_rows_are_taken_to_be_of_max_length(tmp_path: Path) -> None:
    stream = rows(16).to_iterable_dataset()
    trainer = trainer_of(tmp_path, 100, train_dataset=stream, max_length=200)
    passes = trial_passes_of(trainer)
    assert passes.least == 200 and passes.most == 8 * 200
    trainer = trainer_of(tmp_path, 100, train_dataset=stream, max_length=None)
    batch = next(iter(trainer.get_train_dataloader()))
    longest = max(one.length for one in matched_sequences(batch, None))
    assert trial_passes_of(trainer).least == longest


@pytest.mark.parametrize("limit", [1 * MIB, 1000 * MIB])
def test_the_longest_sequence_and_the_largest_batch_bound_it(
    tmp_path: Path, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, "auto", limit, max_steps=1)
    trainer.train()
    passes = trial_passes_of(trainer)
    assert found(trainer) == (passes.least if limit == MIB else passes.most)
    text = "needs more than the 0.00 GiB" if limit == MIB else "the largest batch has no more"
    assert text in caplog.text


@pytest.mark.parametrize(
    ("fixed", "slopes", "most"),
    [
        (0, [(0, 10.0)], 10**6),
        (50_000, [(0, 10.0)], 10**6),
        (90_000, [(0, 1.0), (1000, 40.0)], 10**6),  # the head's tiles hide what grows
        (0, [(0, 10.0), (5000, math.inf)], 10**6),  # and then out of memory without a number
        (0, [(0, 10.0)], 3000),
        (200_000, [(0, 10.0)], 10**6),
        (1, [(0, 0.0)], 10**6),
    ],
)
def test_the_search_finds_the_largest_in_few_tries(
    fixed: int, slopes: list[tuple[int, float]], most: int
) -> None:
    tried = []
    limit, least = 100_000.0, 500

    def peak(tokens: int) -> float:
        tried.append(tokens)
        return max(fixed, *(s * (tokens - a) for a, s in slopes if tokens > a))

    tokens, size = find_budget(peak, limit, least=least, most=most)
    assert len(tried) <= 11 and size == peak(tokens)
    if peak(least) > limit:
        assert tokens == least and len(tried) == 3
    else:
        assert size <= limit and tokens in tried
        assert tokens == most or peak(int(1.12 * tokens)) > limit


def test_on_a_cpu_it_is_the_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, "auto", max_steps=1)
    trainer._device_memory = lambda: KTOTrainer._device_memory(trainer)  # type: ignore
    assert trainer.step_settings.args.grad_tokens == DEFAULT_TOKENS  # for an evaluation before
    trainer.train()
    assert found(trainer) == DEFAULT_TOKENS
    assert trainer.step_settings.args.no_grad_tokens == 2 * DEFAULT_TOKENS
    assert "max_tokens_per_pass is 4,096: the default, since passes are measured on" in caplog.text


def test_the_summary_says_that_it_will_be_found(tmp_path: Path) -> None:
    facts = dict(describe_run(trainer_of(tmp_path, "auto")).facts)
    assert facts["passes"].startswith("as large as fits, which is found before the first step")


def test_the_optimizers_state_is_counted_until_it_is_there(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, 100, optim="adamw_torch", max_steps=1)
    trainer.create_optimizer()
    size = sum(p.numel() for p in trainer.model.parameters())
    to_come = state_to_come(trainer.model, trainer.args, trainer.optimizer)
    assert to_come == pytest.approx(8 * size, rel=0.01)
    trainer.train()
    assert state_to_come(trainer.model, trainer.args, trainer.optimizer) == 0


def test_what_would_leave_a_trace_is_refused(tmp_path: Path) -> None:
    args = KTOConfig(str(tmp_path), use_cpu=True, max_tokens_per_pass="auto")
    check_auto(args, DistributedType.NO)
    with pytest.raises(ValueError, match="DeepSpeed keeps gradients where they cannot be dropped"):
        check_auto(args, DistributedType.DEEPSPEED)
    args.optim = "galore_adamw_layerwise"
    with pytest.raises(ValueError, match="optim='galore_adamw_layerwise' updates the weights"):
        check_auto(args, DistributedType.NO)
    args.max_tokens_per_pass = 100
    check_auto(args, DistributedType.DEEPSPEED)


def test_only_a_number_or_auto_is_taken(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_pass is 'most'; give a number, or 'auto'"):
        KTOConfig(str(tmp_path), use_cpu=True, max_tokens_per_pass="most")
    path = tmp_path / "run.yaml"
    for text, expected in (("auto", "auto"), ("4096", 4096)):
        path.write_text(f"max_tokens_per_pass: {text}\noutput_dir: {tmp_path}\nuse_cpu: true\n")
        for argv in (["--config", str(path)], ["--max_tokens_per_pass", text, "--use_cpu"]):
            assert TrainParser().parse(argv).training.max_tokens_per_pass == expected
    assert "--max_tokens_per_pass NUMBER|auto" in TrainParser().format_help()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_agree_and_the_least_room_counts(kind: str) -> None:
    output = launch(Path(__file__).parent / "budget_run.py", kind, processes=2)
    budgets = re.findall(r"budget (\d+) (\d+);", output)  # the ranks' lines may run together
    assert len(budgets) == 2 and budgets[0] == budgets[1]
