"""The cases of the step benchmark: length mixes, model sizes, and which of them are combined.

Lengths are the quantiles of a log-normal distribution, in an order given by a seed: every batch
size sees the whole distribution, and no result hangs on a lucky draw.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import torch

SEED = 0
WINDOW_ROWS = 8  # rows of an optimizer step whose device batches hold one row each


@dataclass(frozen=True)
class Lengths:
    """Tokens: log-normal around `median`, within [shortest, longest]."""

    shortest: int
    median: int
    longest: int
    sigma: float  # standard deviation of the logarithm

    def quantiles(self, count: int) -> list[int]:
        """`count` lengths that stand for equal shares of the distribution, ascending."""
        scores = (NormalDist().inv_cdf((index + 0.5) / count) for index in range(count))
        lengths = (round(self.median * math.exp(self.sigma * score)) for score in scores)
        return [min(max(length, self.shortest), self.longest) for length in lengths]

    def divided(self, factor: int) -> Lengths:
        """The same distribution with shorter lengths, of two tokens and more."""
        bounds = (self.shortest, self.median, self.longest)
        shortest, median, longest = (max(bound // factor, 2) for bound in bounds)
        return Lengths(shortest, median, longest, self.sigma)


@dataclass(frozen=True)
class Mix:
    """Lengths of prompts and of answers, the end-of-sequence token of an answer included."""

    prompt: Lengths
    answer: Lengths


MIXES = {
    "chat": Mix(Lengths(50, 180, 600, 0.7), Lengths(30, 120, 400, 0.7)),
    "long prompts": Mix(Lengths(1000, 1900, 3500, 0.35), Lengths(20, 50, 120, 0.5)),
    "long answers": Mix(Lengths(50, 120, 300, 0.5), Lengths(300, 900, 2500, 0.65)),
}


@dataclass(frozen=True)
class Size:
    """A model: its config, and by how much the mixes' lengths are divided for it."""

    model_type: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    lengths_divided_by: int = 1

    @property
    def vocabulary(self) -> int:
        return self.config["vocab_size"]


SIZES = {
    # Only for the check that losses agree, when nothing is timed.
    "tiny": Size(
        "qwen2",
        {
            "vocab_size": 512,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        lengths_divided_by=16,
    ),
    "30m": Size(
        "qwen2",
        {
            "vocab_size": 50_000,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    # The shape of Llama 3.1 8B.
    "8b": Size(
        "llama",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "tie_word_embeddings": False,
        },
        dtype=torch.bfloat16,
    ),
}


@dataclass(frozen=True)
class Case:
    """One workload: everything that both libraries are given."""

    mix: str
    size: str
    batch: int = 8  # rows of a device batch
    tuning: str = "full"  # or "lora"
    reference: str = "model"  # or "precomputed"; with LoRA the model is the base model
    checkpointing: bool = False  # gradient checkpointing
    offloading: bool = False  # of activations to the host
    answer_length: int | None = None  # instead of the mix's answers: all rows have this many tokens

    def __str__(self) -> str:
        """Its name in test ids, without spaces: pytest's -k selects by its parts."""
        parts = [self.mix.replace(" ", "_"), f"batch{self.batch}", self.tuning, self.reference]
        return "-".join(parts + ["checkpointing"] * self.checkpointing)

    @property
    def accumulation(self) -> int:
        """Device batches of an optimizer step: batches of one row share a window."""
        return WINDOW_ROWS if self.batch == 1 else 1

    @property
    def tiny(self) -> Case:
        return replace(self, size="tiny")

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, answer) tokens of each row of an optimizer step."""
        rows, mix = self.batch * self.accumulation, MIXES[self.mix]
        divided_by = SIZES[self.size].lengths_divided_by
        prompts = mix.prompt.divided(divided_by).quantiles(rows)
        answers = mix.answer.divided(divided_by).quantiles(rows)
        if self.answer_length is not None:
            answers = [self.answer_length] * rows
        generator = random.Random(SEED)
        generator.shuffle(prompts)
        generator.shuffle(answers)
        return list(zip(prompts, answers, strict=True))

    @property
    def longest(self) -> int:
        """The most tokens that a prompt and any answer of the step have together."""
        prompts, answers = zip(*self.lengths(), strict=True)
        return max(prompts) + max(answers)

    @property
    def real_tokens(self) -> int:
        """Tokens of all sequences that the loss is a function of, each counted once.

        Policy and reference on matched and mismatched sequences; with a precomputed reference the
        policy alone. Pairing only permutes answers, so both sets are equally long.
        """
        models = 2 if self.reference == "model" else 1
        return models * 2 * sum(prompt + answer for prompt, answer in self.lengths())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def headline_cases(size: str, tuning: str, batches: tuple[int, ...]) -> list[Case]:
    """Every mix at batch 8, then what differs from it in one thing."""
    cases = [Case(mix, size, tuning=tuning) for mix in MIXES]
    cases += [replace(case, checkpointing=True) for case in cases]
    cases += [Case(mix, size, batch, tuning) for mix in MIXES for batch in batches if batch != 8]
    return cases


CPU_CASES = [
    *headline_cases("30m", "full", (1, 2, 4, 16)),
    *(Case(mix, "30m", tuning="lora") for mix in MIXES),
    *(Case(mix, "30m", reference="precomputed") for mix in MIXES),
]
# Gradient checkpointing throughout: without it TRL's batches of an 8B model do not fit.
CUDA_CASES = [
    replace(case, checkpointing=True)
    for case in (
        *(Case(mix, "8b", tuning="lora") for mix in MIXES),
        *(Case("chat", "8b", batch, "lora") for batch in (1, 2, 4, 16)),
        Case("chat", "8b", tuning="lora", reference="precomputed"),
    )
]
CASES = CUDA_CASES if torch.cuda.is_available() else CPU_CASES
