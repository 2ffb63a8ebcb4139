"""Passes: how they are planned, and that loss and gradients do not depend on it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainerCallback

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import TokenSequence, matched_sequences
from fastkto.head import attach_scoring
from fastkto.packing import PackingCheck, choose_layout
from fastkto.passes import build_pass, run_pass, sequence_logprobs
from fastkto.plan_passes import Layout, computed_tokens, plan_lengths, plan_passes
from tests.allocations import measured_peak
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

LENGTH_LISTS = st.lists(st.integers(1, 50), max_size=20)


@given(LENGTH_LISTS, st.integers(1, 120), st.sampled_from(Layout))
def test_plan_holds_each_sequence_once_within_the_budget(
    lengths: list[int], budget: int, layout: Layout
) -> None:
    plan = plan_lengths(lengths, budget, layout)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    sizes = []
    for rows in plan:
        inside = [lengths[row] for row in rows]
        sizes.append(sum(inside) if layout is Layout.PACKED else len(rows) * max(inside))
        assert len(rows) == 1 or sizes[-1] <= budget
        assert layout is not Layout.ALONE or len(rows) == 1
        assert layout is not Layout.PADDED or min(inside) >= 0.9 * max(inside)
    # the largest pass first, so that later ones fit in its memory
    assert sizes == sorted(sizes, reverse=True)


@given(LENGTH_LISTS, st.integers(1, 120))
def test_packed_plans_need_few_passes(lengths: list[int], budget: int) -> None:
    plan = plan_lengths(lengths, budget, Layout.PACKED)
    sizes = [sum(lengths[row] for row in rows) for rows in plan]
    # no two passes that would fit into one, so all but one are half full
    assert all(a + b > budget for a, b in itertools.combinations(sizes, 2))
    assert len(plan) <= first_fit(lengths, budget)


def first_fit(lengths: list[int], budget: int) -> int:
    """Passes of the longest sequences first, each in the first pass with room."""
    sizes: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, size in enumerate(sizes) if size + length <= budget]
        if fitting:
            sizes[fitting[0]] += length
        else:
            sizes.append(length)
    return len(sizes)


@given(LENGTH_LISTS, st.integers(1, 120))
def test_padded_plans_split_sorted_lengths_only_where_they_must(
    lengths: list[int], budget: int
) -> None:
    plan = plan_lengths(lengths, budget, Layout.PADDED)
    parts = sorted(([lengths[row] for row in rows] for rows in plan), reverse=True)
    assert [length for part in parts for length in part] == sorted(lengths, reverse=True)
    for part, following in itertools.pairwise(parts):
        joined = (len(part) + 1) * part[0]
        assert joined > budget or following[0] < 0.9 * part[0]


def sequences_of(
    lengths: list[tuple[int, int]], *, shared: bool = False, seed: int = 0
) -> list[TokenSequence]:
    """Sequences of random tokens; `shared`: those with prompts of one length have one prompt."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(4, 100, (count,), generator=generator)

    prompts = {length: tokens(length) for length, _ in lengths}
    return [
        TokenSequence(prompts[p], tokens(c), p)
        if shared
        else TokenSequence(tokens(p), tokens(c), row)
        for row, (p, c) in enumerate(lengths)
    ]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_shared_prompts_are_read_once_within_the_budget(
    lengths: list[tuple[int, int]], budget: int
) -> None:
    sequences = sequences_of(lengths, shared=True)
    longest = max(sequence.length for sequence in sequences)
    plan = plan_passes(sequences, budget, Layout.PACKED, share_prompts=True)
    assert sorted(row for p in plan for group in p for row in group) == list(range(len(lengths)))
    for groups in plan:
        assert all(len({sequences[row].prompt_key for row in group}) == 1 for group in groups)
        pass_ = build_pass(sequences, groups, Layout.PACKED)
        tokens = computed_tokens(sequences, groups, Layout.PACKED)
        assert pass_.input_ids.numel() == tokens == len(pass_.real_tokens)
        # A group that is a pass of its own may be a quarter longer than the longest sequence.
        assert tokens <= budget or (len(groups) == 1 and tokens <= 1.25 * longest)
    unlimited = plan_passes(sequences, 10**6, Layout.PACKED, share_prompts=True)
    keys = [sequences[group[0]].prompt_key for group in unlimited[0] if group]
    long_keys = [key for key in keys if key > 0]  # an empty prompt has nothing to share
    assert len(long_keys) == len(set(long_keys))


def logits_truth(model: torch.nn.Module, sequences: list[TokenSequence]) -> list[torch.Tensor]:
    """Per-token log-probabilities of each completion, from fp64 logits of lone sequences."""
    model = copy.deepcopy(model)
    if not hasattr(model.config, "num_experts_per_tok"):  # grouped matmuls know no fp64
        model = model.double()
    truth = []
    for prompt, completion, *_ in sequences:
        ids = torch.cat([prompt, completion])
        logprob = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
        logprob = logprob.gather(1, ids[1:, None])[:, 0]
        truth.append(logprob[max(len(prompt) - 1, 0) :].detach())
    return truth


# An empty prompt leaves a completion's first token unscored, as it has nothing to follow. Some
# sequences are longer than the sliding windows of the families that have one.
LENGTHS = [(3, 5), (9, 1), (1, 7), (0, 4), (6, 6), (3, 14), (9, 12), (0, 2), (3, 1)]


def choose(model: torch.nn.Module) -> PackingCheck:
    generator = torch.Generator().manual_seed(9)
    return choose_layout(
        model, [torch.randint(4, 100, (n,), generator=generator) for n in (40, 30)]
    )


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("attention", ["default", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_pass_equals_separate_forwards(family: str, attention: str, shared: bool) -> None:
    kwargs = {} if attention == "default" else {"attn_implementation": attention}
    model = tiny_model(family, seed=1, **kwargs).eval()
    sequences = sequences_of(LENGTHS, shared=shared)
    truth = logits_truth(model, sequences)
    attach_scoring(model)
    best = choose(model).layout
    assert (best is Layout.PACKED) == (family != "falcon_h1")
    for layout in {best, Layout.PADDED}:
        plan = plan_passes(sequences, 10**6, layout, share_prompts=shared)
        for groups in plan:
            with torch.no_grad():
                pass_ = build_pass(sequences, groups, layout)
                scores = run_pass(model, pass_)
            bounds = pass_.offsets.tolist()
            for index, row in enumerate(pass_.rows.tolist()):
                start, end = bounds[index : index + 2]
                assert set(pass_.sequence[start:end].tolist()) <= {index}
                torch.testing.assert_close(
                    scores.logprob[start:end].double(), truth[row], rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("budget", [1, 16, 40, 1000])
def test_sequence_logprobs_do_not_depend_on_the_plan(budget: int, layout: Layout) -> None:
    model = tiny_model("llama", seed=1).eval()
    sequences = sequences_of(LENGTHS, shared=True)
    truth = torch.stack([logprob.sum() for logprob in logits_truth(model, sequences)])
    attach_scoring(model)
    choose(model)
    for share in (False, True):
        plan = plan_passes(sequences, budget, layout, share_prompts=share)
        device = torch.device("cpu")
        actual = sequence_logprobs(model, sequences, plan, layout, device=device)
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-5)


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
    args = KTOConfig(
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
    )
    trainer = KTOTrainer(
        model=copy.deepcopy(model),
        ref_model=None if peft_config else tiny_model(model.config.model_type, seed=8),
        args=args,
        train_dataset=text_rows(12),
        processing_class=tiny_tokenizer(),
        callbacks=[gradients],
        peft_config=copy.deepcopy(peft_config),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    lengths = [sequence.length for sequence in matched_sequences(batch, args.max_length)]
    passes = len(plan_lengths(lengths, budget, Layout.PACKED))
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


# The first three make two passes: the longest row, which is above the bound of 124 tokens, and one
# of 124. The others are of 12 to 62 tokens.
MIXED = [150, 62, 62, *(62 - 7 * n % 51 for n in range(29))]


def memory_trainer(directory: Path, batch_size: int, adapter: bool) -> KTOTrainer:
    """For rows of the lengths `MIXED`, in their order."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    rows = [
        {
            "prompt": "p" * 8 + chr(ord("A") + n),
            "completion": "c" * (length - 10),
            "label": n % 2 == 0,
        }
        for n, length in enumerate(MIXED)
    ]
    trainer = KTOTrainer(
        model=tiny_model("llama", seed=1, **sizes),
        ref_model=None if adapter else tiny_model("llama", seed=8, **sizes),
        args=KTOConfig(
            output_dir=str(directory),
            max_tokens_per_pass=124,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=copy.deepcopy(LORA) if adapter else None,
    )
    assert trainer.train_dataset["length"][:] == MIXED
    return trainer


def step_peaks(trainer: KTOTrainer, *, largest_first: bool = True) -> tuple[int, int]:
    """Bytes saved for backward, and bytes allocated, at most, in a step on the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1

    def step() -> None:
        trainer.model.zero_grad()
        (loss,) = trainer._score([batch])
        if not largest_first:
            loss.plan.reverse()
        trainer.training_step(trainer.model, {**batch, "batch_loss": loss})

    saved = SavedBytes(trainer.model)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda s: s.tensor):
        step()
    assert saved.now == 0
    trainer.model.zero_grad()
    return saved.peak, measured_peak(step)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_memory_follows_the_budget_and_not_the_batch(adapter: bool, tmp_path: Path) -> None:
    """With mixed lengths, against two passes with the same longest row."""
    saved, allocated = step_peaks(memory_trainer(tmp_path, 3, adapter))
    assert saved > 2**20 and allocated > 2**20
    for batch_size in (8, 32):
        more_saved, more_allocated = step_peaks(memory_trainer(tmp_path, batch_size, adapter))
        assert more_saved <= 1.1 * saved
        assert more_allocated <= 1.1 * allocated


def test_the_largest_pass_comes_before_the_gradients(tmp_path: Path) -> None:
    """In another order its activations stand beside the gradients of the passes before."""
    trainer = memory_trainer(tmp_path, 32, adapter=False)
    _, first = step_peaks(trainer)
    _, last = step_peaks(trainer, largest_first=False)
    assert last > 1.05 * first


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
