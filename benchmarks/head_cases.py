"""The cases of the head benchmark: shapes of real models, and what needs a gradient."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Shape(NamedTuple):
    """The head of a model."""

    hidden_size: int
    vocab_size: int
    softcap: float | None = None


SHAPES = {
    "tiny": Shape(32, 1000),
    "small": Shape(256, 32_000),
    "Qwen2.5-0.5B": Shape(896, 151_936),
    "Gemma-2-2B": Shape(2304, 256_000, 30.0),
    "Llama-3.1-8B": Shape(4096, 128_256),
    "Qwen3-8B": Shape(4096, 151_936),
}
MODES = ("no gradient", "frozen head", "trainable head")


@dataclass(frozen=True)
class Case:
    """One call of the operation, with its backward pass where something needs a gradient."""

    model: str
    mode: str
    tokens: int
    dtype: str
    half_prompt: bool = False  # every second position is of a prompt, and has no score

    def __str__(self) -> str:
        """Its name in test ids, without spaces."""
        parts = [self.model, self.mode.replace(" ", "_"), f"{self.tokens}"]
        return "-".join(parts + ["half_prompt"] * self.half_prompt)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def tiny(self) -> Case:
        """For a check that everything works."""
        return replace(self, model="tiny", tokens=24)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | self.shape._asdict()


class Inputs(NamedTuple):
    """hidden [N, D], weight [V, D] and target [N], -100 where there is no score."""

    hidden: Tensor
    weight: Tensor
    target: Tensor


def make_inputs(case: Case) -> Inputs:
    """Logits of a standard deviation of 2; hidden states and weight as in a model."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype, shape = getattr(torch, case.dtype), case.shape

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, shape.hidden_size, generator=generator, device=DEVICE)

    target = torch.randint(shape.vocab_size, (case.tokens,), generator=generator, device=DEVICE)
    if case.half_prompt:
        target[::2] = -100
    return Inputs(
        hidden=normal(case.tokens).to(dtype).requires_grad_(case.mode != "no gradient"),
        weight=normal(shape.vocab_size)
        .mul_(2 / shape.hidden_size**0.5)
        .to(dtype)
        .requires_grad_(case.mode == "trainable head"),
        target=target,
    )


CPU_CASES = [
    Case(model, mode, 2048, "float32", half_prompt)
    for model in ("small", "Qwen2.5-0.5B")
    for half_prompt in (False, True)
    for mode in MODES
]
CUDA_CASES = [
    Case(model, mode, tokens, "bfloat16")
    for model in ("Qwen2.5-0.5B", "Gemma-2-2B", "Llama-3.1-8B", "Qwen3-8B")
    for tokens in (2048, 8192, 32_768, 131_072)
    for mode in MODES
]
CASES = CUDA_CASES if DEVICE.type == "cuda" else CPU_CASES
