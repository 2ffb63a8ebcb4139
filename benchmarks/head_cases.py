"""The cases of the head benchmark: shapes of real models, numbers of tokens, and what is computed.

Dimensions: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEED = 0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Half of each is the prompt where a case has prompts.
SEQUENCE_LENGTH = 256
# Standard deviation of the logits, and the length of the component along the target's weight that
# the surest token's hidden state has: probabilities of the target go from 1 / V to almost 1.
LOGITS, CONFIDENCE = 2.5, 9.0


class Shape(NamedTuple):
    """What a model's head multiplies."""

    hidden: int
    vocabulary: int
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def tiny(self) -> Shape:
        """The same head, small enough to be checked in an instant."""
        return self._replace(hidden=32, vocabulary=515)


SHAPES = {
    "small": Shape(256, 8_192),
    "qwen2.5-0.5b": Shape(896, 151_936),
    "gemma-2-2b": Shape(2304, 256_000, softcap=30.0),
    "llama-3.1-8b": Shape(4096, 128_256),
    "qwen3-8b": Shape(4096, 151_936),
}
HEAD_MODES = ("no gradient", "frozen head", "trainable head")
LOSS_MODE = "KTO loss"  # of the policy with a frozen head, and of a reference without gradient
# Matmuls of [N, D] by [D, V] that the result needs at least.
MATMULS = dict(zip(HEAD_MODES, (1, 2, 3), strict=True)) | {LOSS_MODE: 3}
# Relative size of what a reference's hidden states differ by.
REFERENCE_NOISE = 0.02


@dataclass(frozen=True)
class Case:
    """One workload: everything that all contenders are given."""

    model: str
    tokens: int
    mode: str  # of MATMULS
    half_prompt: bool = False  # the targets of the first half of each sequence are -100
    is_tiny: bool = False

    def __str__(self) -> str:
        """Its name in test ids: pytest's -k selects by its parts."""
        parts = [self.model, f"n{self.tokens}", self.mode.replace(" ", "_")]
        return "-".join(parts + ["half_prompt"] * self.half_prompt)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model].tiny if self.is_tiny else SHAPES[self.model]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

    @property
    def tiny(self) -> Case:
        return replace(self, tokens=48, is_tiny=True)

    @property
    def with_all_gradients(self) -> Case:
        """The case whose exact results serve every mode; the loss has its own."""
        return self if self.mode == LOSS_MODE else replace(self, mode="trainable head")

    @property
    def sequence_length(self) -> int:
        return min(SEQUENCE_LENGTH, self.tokens // 2)

    @property
    def scored(self) -> int:
        """Tokens that have a target."""
        return self.tokens // 2 if self.half_prompt else self.tokens

    def as_dict(self) -> dict[str, Any]:
        return (
            asdict(self)
            | self.shape._asdict()
            | {"scored": self.scored, "dtype": str(self.dtype)[6:]}
        )


class Inputs(NamedTuple):
    """What a contender gets."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64, -100 in a prompt
    upstream: Tensor  # [N] fp32, gradient of the log-probabilities
    shape: Shape
    # For the loss alone, whose own incoming gradient is a scalar.
    reference: Tensor | None = None  # [N, D]
    sequence_length: int = 0

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that need a gradient."""
        return tuple(tensor for tensor in self[:2] if tensor.requires_grad)


def make_inputs(case: Case) -> Inputs:
    """The same in every mode, on `DEVICE`."""
    generator = torch.Generator(DEVICE).manual_seed(SEED)
    num_tokens, (hidden_size, vocab_size, *_) = case.tokens, case.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE)

    weight = normal(vocab_size, hidden_size).mul_(LOGITS / hidden_size**0.5).to(case.dtype)
    target = torch.randint(vocab_size, (num_tokens,), generator=generator, device=DEVICE)
    order = torch.randperm(num_tokens, generator=generator, device=DEVICE)
    confidence = torch.linspace(0, CONFIDENCE, num_tokens, device=DEVICE)[order]
    direction = torch.nn.functional.normalize(weight[target].float(), dim=1)
    hidden = normal(num_tokens, hidden_size).addcmul_(direction, confidence[:, None])
    if case.half_prompt:
        length = case.sequence_length
        position = torch.arange(num_tokens, device=DEVICE) % length
        target = torch.where(position < length // 2, -100, target)
    reference, upstream = None, normal(num_tokens) / num_tokens
    if case.mode == LOSS_MODE:
        reference = hidden + REFERENCE_NOISE * normal(num_tokens, hidden_size)
        upstream = torch.ones((), device=DEVICE)
    return Inputs(
        hidden=hidden.to(case.dtype).requires_grad_(case.mode != "no gradient"),
        weight=weight.requires_grad_(case.mode == "trainable head"),
        target=target,
        upstream=upstream,
        shape=case.shape,
        reference=None if reference is None else reference.to(case.dtype),
        sequence_length=case.sequence_length,
    )


def all_modes(model: str, tokens: int, *, half_prompt: bool = False) -> list[Case]:
    return [Case(model, tokens, mode, half_prompt) for mode in HEAD_MODES]


REAL_MODELS = [name for name in SHAPES if name != "small"]
CPU_CASES = [
    case
    for model, tokens in (("small", 1024), ("qwen2.5-0.5b", 2048))
    for half_prompt in (False, True)
    for case in all_modes(model, tokens, half_prompt=half_prompt)
] + [
    Case("small", 1024, LOSS_MODE, half_prompt=True),
    *(replace(case, is_tiny=True) for case in all_modes("gemma-2-2b", 48)),
]
CUDA_CASES = [
    case
    for model in REAL_MODELS
    for tokens in (2048, 8192, 32_768, 131_072)
    for case in all_modes(model, tokens)
] + [case for model in REAL_MODELS for case in all_modes(model, 8192, half_prompt=True)]
CUDA_CASES += [
    Case(model, 8192, LOSS_MODE, half_prompt=True)
    for model in REAL_MODELS
    if SHAPES[model].softcap is None  # Liger's has none
]
CASES = CUDA_CASES if DEVICE.type == "cuda" else CPU_CASES
