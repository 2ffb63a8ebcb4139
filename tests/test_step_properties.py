"""One optimizer step against a naive one: each sequence alone, from the model's own logits."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto import KTOConfig, KTOTrainer, eager, window_scores
from fastkto.attention import enable_segments
from fastkto.data.batch import KTOCollator
from fastkto.data.pairing import KL_PAIRINGS, pair
from fastkto.loss import LOSS_TYPES
from fastkto.metrics import Metrics
from fastkto.plan_passes import Layout
from tests.attention_forms import HAVE_BACKWARD, attend_by, use_form
from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.scoring import lora

MAX_LENGTH = 20
BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT, ROUTER_COEF = 0.7, 1.3, 0.6, 0.5


@dataclass
class Row:
    """Prompts are drawn from a few, so that some are equal."""

    prompt: int
    completion: int
    label: bool


ROWS = st.lists(
    st.builds(
        Row,
        prompt=st.sampled_from([0, 1, 2, 7, 7, 12]),
        completion=st.one_of(st.just(1), st.integers(1, 16)),
        label=st.booleans(),
    ),
    min_size=2,
    max_size=6,
)


def tokenised(rows: list[Row], seed: int) -> list[dict[str, Any]]:
    """Rows as `prepare_rows` gives them; prompts of one length are equal."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, 100, (count,), generator=generator).tolist()

    prompts = {length: tokens(length) for length in sorted({row.prompt for row in rows})}
    return [
        {
            "prompt_ids": prompts[row.prompt],
            "completion_ids": tokens(row.completion),
            "label": row.label,
            "row": index,
        }
        for index, row in enumerate(rows)
    ]


# ---- The naive step ----


@dataclass
class Scores:
    """Of one completion, T tokens scored; the first without a prompt is not."""

    logprob_T: Tensor
    entropy_T: Tensor
    mean_logit_T: Tensor
    router_logits: Any = None


def score(model: nn.Module, prompt: list[int], completion: list[int], router: bool) -> Scores:
    """From a forward of the sequence alone."""
    ids = torch.tensor([prompt + completion[: MAX_LENGTH - len(prompt)]])
    extra = {"output_router_logits": True} if router else {}
    output = model(input_ids=ids, use_cache=False, **extra)
    logits = output.logits[0, max(len(prompt) - 1, 0) : -1].float()
    logprob = logits.log_softmax(-1)
    return Scores(
        logprob.gather(1, ids[0, len(ids[0]) - len(logits) :, None])[:, 0],
        -(logprob.exp() * logprob).sum(-1).detach(),
        logits.mean(-1).detach(),
        output.router_logits if router else None,
    )


def naive_step(
    policy: nn.Module, reference: Any, rows: list[dict[str, Any]], args: KTOConfig, router: bool
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, gradients) of the rows as one batch."""
    prompts, completions = (
        [row[f"{kind}_ids"] for row in rows] for kind in ("prompt", "completion")
    )
    partners = pair([tuple(prompt) for prompt in prompts], args.kl_pairing)
    mismatched = [completions[partner] for partner in partners if partner is not None]

    def scores_of(model: nn.Module, given: list[list[int]], router: bool = False) -> list[Scores]:
        return [score(model, *both, router) for both in zip(prompts, given, strict=True)]

    @torch.no_grad()
    def sums(model: nn.Module, given: list[list[int]]) -> Tensor:
        return torch.stack([one.logprob_T.double().sum() for one in scores_of(model, given)])

    kl_raw = (sums(policy, mismatched) - sums(reference, mismatched)).mean()
    kl = kl_raw.clamp(min=0) if args.loss_type == "kto" else torch.tensor(0.0)
    scores = scores_of(policy, completions, router)
    counts = torch.tensor([0] + [len(one.logprob_T) for one in scores])
    label = torch.tensor([row["label"] for row in rows])
    result = eager.kto_loss(
        torch.cat([one.logprob_T for one in scores]),
        counts.cumsum(0),
        sums(reference, completions),
        label,
        kl=kl,
        beta=BETA,
        desirable_weight=DESIRABLE_WEIGHT,
        undesirable_weight=UNDESIRABLE_WEIGHT,
        loss_type=args.loss_type,
    )
    loss = result.loss
    metrics = {"kl": kl.item(), **row_metrics(scores, result, label)}
    if args.loss_type == "kto":
        metrics["kl_raw"] = kl_raw.item()
        same = sum(prompts[row] == prompts[partner] for row, partner in enumerate(partners))
        metrics |= {"kl_same_prompt_rows": float(same)} if same else {}
    if router:
        auxiliary = load_balancing(policy, [one.router_logits for one in scores])
        metrics["aux_loss"] = auxiliary.item()
        loss = loss + ROUTER_COEF * auxiliary
    metrics["loss"] = loss.item()
    return metrics, gradients_of(policy, loss)


def gradients_of(model: nn.Module, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Those that are there, or those of a loss."""
    if loss is not None:
        model.zero_grad()
        loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def row_metrics(scores: list[Scores], result: Any, label: Tensor) -> dict[str, float]:
    metrics = {}
    tokens = sum(len(one.entropy_T) for one in scores)
    if tokens:
        metrics["entropy"] = (sum(one.entropy_T.sum() for one in scores) / tokens).item()
    for name, wanted in (("chosen", True), ("rejected", False)):
        rows = [index for index, value in enumerate(label.tolist()) if value is wanted]
        if not rows:
            continue
        metrics[f"rewards/{name}"] = (BETA * result.log_ratio[rows]).mean().item()
        metrics[f"logps/{name}"] = result.logprob[rows].mean().item()
        mean_logits = torch.cat([scores[row].mean_logit_T for row in rows])
        if len(mean_logits):
            metrics[f"logits/{name}"] = mean_logits.mean().item()
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def load_balancing(model: Any, router_logits: list[tuple[Tensor, ...]]) -> Tensor:
    """transformers' own, of all rows' tokens without padding."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = tuple(torch.cat(of_layer) for of_layer in zip(*router_logits, strict=True))
    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return load_balancing_loss_func(layers, experts, config.num_experts_per_tok)


# ---- fastkto's step ----

FIELDS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 6}}
ROUTED = ("mixtral", "qwen3_moe")


@dataclass
class Way:
    """How a step is computed, which its result must not show."""

    layout: Layout
    budget: int
    form: str  # of attention
    long_prompt: int  # prompts of so many tokens are read once without a gradient


class Run:
    """A trainer whose way and loss change from step to step, and a naive copy."""

    def __init__(self, family: str, adapter: bool, precision: str = "fp32") -> None:
        fields = FIELDS.get(family, {})
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        policy: Any = tiny_model(family, seed=1, dtype=dtype, **fields)
        if adapter:
            policy = lora(policy, target_modules=list(FAMILIES[family].lora_targets))
        reference = tiny_model(family, seed=8, dtype=dtype, **fields).eval()
        self.router, self.precision = family in ROUTED, precision
        self.policy, self.reference = copy.deepcopy(policy), copy.deepcopy(reference)
        with tempfile.TemporaryDirectory() as directory:
            self.trainer = KTOTrainer(
                model=policy,
                ref_model=reference,
                args=KTOConfig(
                    output_dir=directory,
                    gradient_checkpointing=False,
                    max_length=MAX_LENGTH,
                    beta=BETA,
                    desirable_weight=DESIRABLE_WEIGHT,
                    undesirable_weight=UNDESIRABLE_WEIGHT,
                    router_aux_loss_coef=ROUTER_COEF if self.router else None,
                    bf16=precision == "autocast",
                    report_to="none",
                    use_cpu=True,
                ),
                train_dataset=Dataset.from_list(tokenised([Row(7, 9, True), Row(2, 5, False)], 0)),
                processing_class=tiny_tokenizer(),
            )
        if precision == "autocast":  # the trainer's own are wrapped by it, the policy in `train`
            for model in (self.trainer.model, self.policy, self.reference):
                self.trainer.accelerator.prepare_model(model)
        self.trainer.model.train()
        self.trainer._get_ready([next(iter(self.trainer.get_train_dataloader()))])
        assert self.trainer.step_settings.policy_layout is Layout.PACKED

    def step(
        self, rows: list[dict[str, Any]], way: Way, batch_size: int | None = None, **config: str
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """(metrics, gradients) of the rows as micro-batches of one optimizer step."""
        trainer, settings, size = self.trainer, self.trainer.step_settings, batch_size or len(rows)
        settings.policy_layout = settings.reference_layout = way.layout
        settings.args.max_tokens_per_pass = way.budget
        for name, value in config.items():
            setattr(settings.args, name, value)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        batches = [KTOCollator(MAX_LENGTH)(part) for part in parts]
        # The naive step's are means over all rows.
        trainer._train_metrics = Metrics("exact" if len(batches) > 1 else "trl")
        trainer.current_gradient_accumulation_steps = len(batches)
        trainer.model.zero_grad()
        loss = 0.0
        models = trainer.model, trainer.reference.model
        with attending(way.form, *models), pytest.MonkeyPatch.context() as patch:
            patch.setattr(window_scores, "_LONG_PROMPT", way.long_prompt)
            for model in models:
                enable_segments(base_model(model))
            for batch, batch_loss in zip(batches, trainer._score(batches), strict=True):
                inputs = {**batch, "batch_loss": batch_loss}
                loss += trainer.training_step(trainer.model, inputs).item()
        metrics, _ = trainer._train_metrics.collect(lambda table: table)
        return metrics | {"loss": loss}, gradients_of(trainer.model)

    def compare(self, rows: list[dict[str, Any]], way: Way, *size: int, **config: str) -> Errors:
        """How far a step is from the naive one, of all rows as one batch."""
        metrics, gradients = self.step(rows, way, *size, **config)
        args = self.trainer.step_settings.args
        models = self.policy, self.reference
        with attending(self.naive_form(way.form), *models):
            expected, expected_gradients = naive_step(*models, rows, args, self.router)
        assert metrics.keys() - {"pass_efficiency"} == expected.keys()
        assert gradients.keys() == expected_gradients.keys()
        return Errors.of(metrics, expected, gradients, expected_gradients)

    def naive_form(self, form: str) -> str:
        """The same for all in fp32; in bf16 attentions differ by more than a step's rounding."""
        return "sdpa" if self.precision == "fp32" else form


@contextmanager
def attending(form: str, *models: Any) -> Iterator[None]:
    """Within, the models attend by `form`."""
    for model in models:
        attend_by(form, base_model(model))
    with use_form(form):
        yield


def base_model(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


@dataclass
class Errors:
    """How far a step is from the naive one."""

    loss: float
    metric: float  # the largest of any metric, relative to it or, if larger, to 1
    gradient: float  # norm of the difference over the norm

    @classmethod
    def of(
        cls,
        metrics: dict[str, float],
        expected: dict[str, float],
        gradients: dict[str, Tensor],
        expected_gradients: dict[str, Tensor],
    ) -> Errors:
        relative = [
            abs(metrics[name] - value) / max(abs(value), 1.0) for name, value in expected.items()
        ]
        difference = [
            (gradients[name].double() - value.double()).norm()
            for name, value in expected_gradients.items()
        ]
        norm = [value.double().norm() for value in expected_gradients.values()]
        size = torch.stack(norm).norm().item()
        return cls(
            abs(metrics["loss"] - expected["loss"]),
            max(relative),
            torch.stack(difference).norm().item() / size if size else 0.0,
        )


runs = functools.cache(Run)


@pytest.fixture(autouse=True)
def fresh_runs() -> None:
    """accelerate's state is not kept from test to test."""
    runs.cache_clear()


# Separate forwards never attend by varlen_attn.
BF16_FORMS = tuple(form for form in HAVE_BACKWARD if form != "varlen")
# A step takes too long to shrink what fails.
STEPS = settings(deadline=None, derandomize=True, phases=[Phase.generate])
STEP = {
    "rows": ROWS,
    "seed": st.integers(0, 99),
    "way": st.builds(
        Way,
        layout=st.sampled_from(Layout),
        budget=st.sampled_from([1, 8, 16, 30, 60, 1000]),
        form=st.sampled_from(HAVE_BACKWARD),
        long_prompt=st.sampled_from([128, 1]),
    ),
    "loss_type": st.sampled_from(LOSS_TYPES),
    "kl_pairing": st.sampled_from(KL_PAIRINGS),
}


def assert_equal(errors: Errors) -> None:
    """The bounds of docs/step.md in fp32."""
    assert errors.loss < 1e-5 and errors.metric < 2e-5 and errors.gradient < 1e-4


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("gemma3", True),
        ("mixtral", False),
        ("qwen3_moe", False),
        ("qwen3_moe", True),
    ],
)
@settings(STEPS, max_examples=8)
@given(**STEP)
def test_a_step_is_the_naive_one(
    family: str, adapter: bool, rows: list[Row], seed: int, way: Way, **config: str
) -> None:
    assert_equal(runs(family, adapter).compare(tokenised(rows, seed), way, **config))


@settings(STEPS, max_examples=6)
@given(**STEP)
def test_a_step_is_the_naive_one_with_every_attention(
    rows: list[Row], seed: int, way: Way, **config: str
) -> None:
    """Packed, since other passes attend by the model's own function."""
    for form in HAVE_BACKWARD:
        one = replace(way, layout=Layout.PACKED, form=form)
        assert_equal(runs("mistral", True).compare(tokenised(rows, seed), one, **config))


@settings(STEPS, max_examples=8)
@given(batch_size=st.integers(1, 3), **STEP)
def test_a_window_of_micro_batches_is_the_naive_step_of_its_rows(
    batch_size: int, rows: list[Row], seed: int, way: Way, **config: str
) -> None:
    config["kl_scope"] = "window"
    run = runs("llama", False)
    assert_equal(run.compare(tokenised(rows, seed), way, batch_size, **config))


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("adapter", [False, True])
@settings(STEPS, max_examples=4)
@given(**STEP)
def test_a_bf16_step_is_the_naive_one_within_the_stated_bound(
    adapter: bool, precision: str, rows: list[Row], seed: int, way: Way, **config: str
) -> None:
    """The bounds of docs/step.md, for bf16 weights and for fp32 ones under autocast."""
    run = runs("llama", adapter, precision)
    for form in BF16_FORMS:
        errors = run.compare(tokenised(rows, seed), replace(way, form=form), **config)
        assert errors.loss < 1e-2 and errors.metric < 5e-2 and errors.gradient < 5e-2
