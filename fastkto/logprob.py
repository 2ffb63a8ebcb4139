"""`linear_logprob`: head matmul, log-softmax and pick of the target as one operation.

Dimensions: N tokens, D hidden size, V vocabulary. The logits [N, V] exist as fp32 tiles only; see
`fastkto_kernels.tiles` for the arithmetic.
"""

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from fastkto.backend import choose_backend
from fastkto_kernels.loops import logits_gradients, scan_logits
from fastkto_kernels.tiles import LogitTransform, Operands, RowState

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BYTES_PER_MIB = 2**20


class TokenScores(NamedTuple):
    """What `linear_logprob` returns; every tensor is [N] fp32 and zero at ignored rows."""

    logprob: Tensor  # log-probability of the target, nats, differentiable
    entropy: Tensor | None  # of the whole distribution, nats, no gradient
    mean_logit: Tensor | None  # mean of the transformed logits over the vocabulary, no gradient


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: bool = False,
    backend: str = "auto",
    head_memory_mib: float = 256,
) -> TokenScores:
    """Log-probability of each target, [N] fp32, without ever holding the logits [N, V].

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
    logprob = log_softmax(z)[target], 0 with no gradient where target == ignore_index

    Without a softcap there is no tanh. `stats` also returns entropy and mean logit.

    hidden and weight (fp32, fp16 or bf16) are multiplied in their dtype, under autocast in
    autocast's; products, logits and every gradient are accumulated in fp32 and gradients rounded
    once, to the dtype of what they belong to. fp32 means IEEE products, never TF32.

    head_memory_mib bounds the tiles, whatever N is. A conversion of some rows of the weight, where
    dtypes differ, and the fp32 totals of the gradients come on top.

    backend: "triton" (CUDA, ROCm; the CPU with TRITON_INTERPRET=1), "torch" (any device), or
    "auto": triton from compute capability 8.0, else torch; the choice is logged once.

    A target outside [0, V) that is not ignore_index is a ValueError on the CPU. On CUDA reading
    it would stop the stream in every call: the check is `torch._assert_async` there, which fails
    at the next synchronisation.
    """
    _check_tensors(hidden, weight, target, bias)
    _check_numbers(logit_scale, softcap, temperature, head_memory_mib)
    is_scored = target != ignore_index
    _check_target(target, is_scored, weight.shape[0])
    logprob, entropy, mean_logit = _LinearLogprob.apply(
        hidden,
        weight,
        bias,
        torch.where(is_scored, target, -1),
        _Options(
            transform=LogitTransform(float(logit_scale), softcap, float(temperature)),
            compute_dtype=_compute_dtype(hidden, weight, bias),
            stats=stats,
            backend=choose_backend(backend, hidden.device).name,
            memory_bytes=int(head_memory_mib * BYTES_PER_MIB),
        ),
    )
    return TokenScores(logprob, entropy, mean_logit)


class _Options(NamedTuple):
    """What the operation needs besides tensors."""

    transform: LogitTransform
    compute_dtype: torch.dtype
    stats: bool
    backend: str  # "triton" or "torch"
    memory_bytes: int

    @property
    def steps(self) -> ModuleType:
        """The module with the backend's tile steps; Triton is imported only when it is used."""
        name = "linear_logprob" if self.backend == "triton" else "linear_logprob_torch"
        return import_module(f"fastkto_kernels.{name}")


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,  # -1 where ignored
        options: _Options,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        operands = Operands(hidden, weight, bias, target, options.compute_dtype, options.transform)
        # The operands are in the compute dtype already, and autocast would round fp32 operands.
        with torch.autocast(hidden.device.type, enabled=False):
            state = scan_logits(
                operands,
                options.steps.fold_tile,
                stats=options.stats,
                bytes_per_logit=options.steps.BYTES_PER_LOGIT,
                memory_bytes=options.memory_bytes,
            )
            log_odds = (state.other_max - state.target_logit) + state.other_sum.log()
            logprob = torch.where(target < 0, 0.0, logsigmoid(-log_odds))
            entropy = mean_logit = None
            if state.weighted_sum is not None and state.logit_sum is not None:
                entropy = _entropy(log_odds, state.other_sum, state.weighted_sum)
                entropy = torch.where(target < 0, 0.0, entropy)
                mean_logit = torch.where(target < 0, 0.0, state.logit_sum / weight.shape[0])
                ctx.mark_non_differentiable(entropy, mean_logit)
        ctx.save_for_backward(
            hidden, weight, bias, target, log_odds, state.other_max, state.other_sum
        )
        ctx.options = options
        return logprob, entropy, mean_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_odds, other_max, other_sum = ctx.saved_tensors
        options: _Options = ctx.options
        transform = options.transform
        with torch.autocast(hidden.device.type, enabled=False):
            slope = log_odds.sigmoid() * (transform.scale / transform.temperature)
            gradients = logits_gradients(
                Operands(hidden, weight, bias, target, options.compute_dtype, transform),
                options.steps.gradient_tile,
                RowState(other_max, other_sum, log_odds, None, None),
                torch.where(target < 0, 0.0, grad_logprob * slope),
                needs=ctx.needs_input_grad[:3],
                bytes_per_logit=options.steps.BYTES_PER_LOGIT,
                memory_bytes=options.memory_bytes,
            )
        return (*gradients, None, None)


def _entropy(log_odds: Tensor, other_sum: Tensor, weighted_sum: Tensor) -> Tensor:
    """Entropy in nats, [N]: of target against others, plus the others' own, without cancellation.

    H = -p log p - q log q + q * H_others, with q = 1 - p.
    """
    p, q = (-log_odds).sigmoid(), log_odds.sigmoid()
    # A vocabulary of one has no others: their sum is 0, and so is their share q.
    other_sum = other_sum.clamp_min(1.0)
    others_entropy = other_sum.log() - weighted_sum / other_sum
    return -p * logsigmoid(-log_odds) + torch.special.entr(q) + q * others_entropy


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Autocast's dtype when it is on, else the one dtype of all inputs."""
    inputs = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in inputs.items():
        if tensor.dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float32, float16 or bfloat16"
            )
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    for name, tensor in inputs.items():
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"hidden has dtype {hidden.dtype}, {name} has {tensor.dtype}; convert one of them "
                "or run under torch.autocast"
            )
    return hidden.dtype


def _check_tensors(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected two dimensions")
    num_rows, hidden_size = hidden.shape
    if weight.shape[1] != hidden_size:
        raise ValueError(
            f"hidden has D={hidden_size}, weight has D={weight.shape[1]}; pass lm_head.weight of "
            "shape (V, D)"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has V=0; expected at least one vocabulary entry")
    if target.shape != (num_rows,):
        raise ValueError(f"target has shape {tuple(target.shape)}; expected ({num_rows},)")
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; expected int64")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    for name, other in (("weight", weight), ("target", target), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            raise ValueError(
                f"hidden is on {hidden.device}, {name} on {other.device}; move them to one device"
            )


def _check_numbers(
    logit_scale: float, softcap: float | None, temperature: float, head_memory_mib: float
) -> None:
    if not abs(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no cap")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    if not 0 < head_memory_mib < float("inf"):
        raise ValueError(f"head_memory_mib is {head_memory_mib}; expected a positive number")


def _check_target(target: Tensor, is_scored: Tensor, vocab_size: int) -> None:
    is_bad = is_scored & ((target < 0) | (target >= vocab_size))
    if target.device.type == "cuda":
        torch._assert_async(~is_bad.any(), f"target outside [0, {vocab_size}) and not ignore_index")
    elif is_bad.any():
        row = int(is_bad.nonzero()[0, 0])
        raise ValueError(
            f"target[{row}] is {int(target[row])}; expected a value in [0, {vocab_size}) or "
            "ignore_index"
        )
