"""`linear_logprob`: head matmul, log-softmax and pick of the target as one operation.

Dimensions: N tokens, D hidden size, V vocabulary. The logits [N, V] exist as fp32 tiles only; see
`fastkto_kernels.tiles` for the arithmetic.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastkto import logprob_operator

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BYTES_PER_MIB = 2**20
# With 16-bit operands on CUDA a tile of 2048 tokens and 8192 vocabulary entries.
DEFAULT_HEAD_MEMORY_MIB = 96


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
    extra_hidden: Tensor | None = None,  # [N, E]
    extra_weight: Tensor | None = None,  # [V, E]
    factor: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: bool = False,
    backend: str = "auto",
    head_memory_mib: float = DEFAULT_HEAD_MEMORY_MIB,
) -> TokenScores:
    """Log-probability of each target, [N] fp32, without ever holding the logits [N, V].

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature
    logprob = log_softmax(z)[target], 0 with no gradient where target == ignore_index

    Without a softcap there is no tanh. `stats` also returns entropy and mean logit.

    extra_hidden @ extra_weight.T is added to hidden @ weight.T: with scaling * (hidden @ A.T) and B
    it is an unmerged LoRA adapter of the head. `factor` multiplies the sum of both before the bias
    is added: with magnitude / norm of each row of the merged weight it is a DoRA adapter. All
    inputs but the target may need gradients.

    What is multiplied is rounded to one dtype: autocast's where it is on, else the common one of
    all inputs but the factor (fp32 where they differ, as PyTorch promotes them). Products, logits
    and every gradient are accumulated in fp32, and gradients rounded to the dtype of what they
    belong to. fp32 means IEEE products, never TF32.

    If only `hidden` needs a gradient and there is no factor, the forward pass computes its
    direction, [N, D] numbers of the compute dtype's size, which are kept in place of `hidden`: two
    matmuls, none in backward. Else the logits are computed again in backward, once for all
    gradients. Differentiable once and in reverse mode: forward mode and second derivatives see a
    constant.

    head_memory_mib bounds the tiles, whatever N is; `fastkto_kernels.memory` has the formula for
    all that a call needs.

    backend: "triton" (CUDA, ROCm; the CPU with TRITON_INTERPRET=1), "torch" (any device), or
    "auto": triton from compute capability 8.0, else torch; the choice is logged once.

    A target outside [0, V) that is not ignore_index is a ValueError on the CPU. On CUDA reading
    it would stop the stream in every call: the check is `torch._assert_async` there, which fails
    at the next synchronisation.
    """
    optional = {
        "bias": bias,
        "extra_hidden": extra_hidden,
        "extra_weight": extra_weight,
        "factor": factor,
    }
    inputs = {"hidden": hidden, "weight": weight}
    inputs |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_shapes(inputs, target)
    _check_dtypes(inputs, target)
    _check_numbers(logit_scale, softcap, temperature, head_memory_mib)
    needs = {name for name, tensor in inputs.items() if tensor.requires_grad}
    logprob, entropy, mean_logit, *_ = logprob_operator.linear_logprob(
        hidden,
        weight,
        bias,
        extra_hidden,
        extra_weight,
        factor,
        target,
        ignore_index,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        _compute_dtype(inputs),
        stats,
        torch.is_grad_enabled() and needs == {"hidden"} and factor is None,
        backend,
        int(head_memory_mib * BYTES_PER_MIB),
    )
    return TokenScores(logprob, entropy if stats else None, mean_logit if stats else None)


def _compute_dtype(inputs: dict[str, Tensor]) -> torch.dtype:
    """Autocast's dtype when it is on, else what the dtypes of all inputs of matmuls promote to."""
    device_type = inputs["hidden"].device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    dtypes = (tensor.dtype for name, tensor in inputs.items() if name != "factor")
    return functools.reduce(torch.promote_types, dtypes)


def _check_shapes(inputs: dict[str, Tensor], target: Tensor) -> None:
    hidden, weight = inputs["hidden"], inputs["weight"]
    for name, tensor in inputs.items():
        num_dimensions = 1 if name in ("bias", "factor") else 2
        if tensor.ndim != num_dimensions:
            words = "one dimension" if num_dimensions == 1 else "two dimensions"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {words}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden has D={hidden.shape[1]}, weight has D={weight.shape[1]}; pass lm_head.weight "
            "of shape (V, D)"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has V=0; expected at least one vocabulary entry")
    if hidden.shape[1] == 0:
        raise ValueError("hidden has D=0; expected at least one number for each token")
    if ("extra_hidden" in inputs) != ("extra_weight" in inputs):
        raise ValueError("extra_hidden and extra_weight belong together; got one of them")
    expected: dict[str, tuple[int, ...]] = {
        "target": (hidden.shape[0],),
        "bias": (weight.shape[0],),
        "factor": (weight.shape[0],),
    }
    if "extra_hidden" in inputs:
        rank = inputs["extra_hidden"].shape[1]
        expected["extra_hidden"] = (hidden.shape[0], rank)
        expected["extra_weight"] = (weight.shape[0], rank)
    for name, tensor in (inputs | {"target": target}).items():
        if name in expected and tensor.shape != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected[name]}")
        if tensor.device != hidden.device:
            raise ValueError(
                f"hidden is on {hidden.device}, {name} on {tensor.device}; move them to one device"
            )


def _check_dtypes(inputs: dict[str, Tensor], target: Tensor) -> None:
    for name, tensor in inputs.items():
        if tensor.dtype not in COMPUTE_DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; expected float32, float16 or bfloat16"
            )
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; expected int64")


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
