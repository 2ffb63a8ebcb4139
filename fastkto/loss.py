"""`kto_loss` and its variants: from per-token log-probabilities to the loss and its gradient.

Dimensions: B sequences, N tokens of all of them, one sequence after the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkto import loss_operator

LOSS_TYPES = ("kto", "apo_zero_unpaired")


class KTOLoss(NamedTuple):
    """What `kto_loss` returns; log-probabilities in nats."""

    loss: Tensor  # scalar fp32, differentiable in logprob
    row_loss: Tensor  # [B] fp32, weighted, no gradient
    logprob: Tensor  # [B] fp64, sum over the row's tokens, no gradient
    log_ratio: Tensor  # [B] fp64, logprob - reference_logprob, no gradient


def kto_loss(
    logprob: Tensor,  # [N] fp32
    offsets: Tensor,  # [B + 1] int64
    reference_logprob: Tensor,  # [B] fp64 or fp32
    is_desirable: Tensor,  # [B] bool
    *,
    kl: Tensor | None = None,  # scalar, nats
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    sft_weight: float = 0.0,
    num_rows: float | None = None,
    backend: str = "auto",
) -> KTOLoss:
    """KTO loss of B sequences: scalar fp32, the sum of the rows' losses over num_rows.

    With r the row's log-ratio, sum of its logprob[offsets[i]:offsets[i + 1]] minus its reference:
    kto:               desirable   w_d * (1 - sigmoid(beta * (r - kl)))
                       undesirable w_u * (1 - sigmoid(beta * (kl - r)))
    apo_zero_unpaired: desirable   w_d * (1 - sigmoid(beta * r))
                       undesirable w_u * sigmoid(beta * r)
    and sft_weight * (-mean token log-probability) on desirable rows.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306; D'Oosterlinck et al. 2024, arXiv:2408.06266.

    num_rows defaults to B; for a part of a batch it is the batch's number of rows. `kl` is the
    estimate for the whole batch, clamped at zero already; apo_zero_unpaired has no use for it.
    Only `logprob` gets a gradient, once and in reverse mode: forward mode and second derivatives
    see a constant. Sums over tokens are formed in fp64, in an order that depends on the row alone.
    A row without tokens has the sum 0, and the mean 0.

    Offsets that do not rise from 0 to N are a ValueError on the CPU; on CUDA the check is
    `torch._assert_async`, which does not synchronise and fails at the next synchronisation.
    """
    _check_rows(logprob, offsets, reference_logprob, is_desirable)
    _check_numbers(beta, desirable_weight, undesirable_weight, sft_weight, num_rows)
    kl = _check_kl(kl, loss_type, logprob.device)
    loss, row_loss, row_logprob, log_ratio, _ = loss_operator.kto_loss(
        logprob,
        offsets,
        reference_logprob.detach().double(),
        is_desirable,
        kl,
        float(beta),
        float(desirable_weight),
        float(undesirable_weight),
        float(sft_weight),
        None if num_rows is None else float(num_rows),
        backend,
    )
    return KTOLoss(loss, row_loss, row_logprob, log_ratio)


def sum_completions(
    logprob: Tensor,  # [N] fp32
    offsets: Tensor,  # [B + 1] int64
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum of each row's logprob[offsets[i]:offsets[i + 1]], [B] fp64, in nats; no gradient.

    The additions are those of `kto_loss` in the same order, so equal tokens give equal sums.
    """
    _check_tokens(logprob, offsets)
    return loss_operator.sum_completions(logprob.detach(), offsets, backend)


def _check_tokens(logprob: Tensor, offsets: Tensor) -> None:
    if logprob.ndim != 1:
        raise ValueError(f"logprob has shape {tuple(logprob.shape)}; expected one dimension, (N,)")
    if logprob.dtype != torch.float32:
        raise TypeError(f"logprob has dtype {logprob.dtype}; expected float32")
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets has shape {tuple(offsets.shape)}; expected (B + 1,)")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets has dtype {offsets.dtype}; expected int64")
    if offsets.device != logprob.device:
        raise ValueError(
            f"logprob is on {logprob.device}, offsets on {offsets.device}; move them to one device"
        )


def _check_rows(
    logprob: Tensor, offsets: Tensor, reference_logprob: Tensor, is_desirable: Tensor
) -> None:
    _check_tokens(logprob, offsets)
    num_sequences = offsets.shape[0] - 1
    for name, tensor in (
        ("reference_logprob", reference_logprob),
        ("is_desirable", is_desirable),
    ):
        if tensor.shape != (num_sequences,):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected ({num_sequences},), one entry "
                "for each row that offsets describes"
            )
        if tensor.device != logprob.device:
            raise ValueError(
                f"logprob is on {logprob.device}, {name} on {tensor.device}; move them to one "
                "device"
            )
    if reference_logprob.dtype not in (torch.float64, torch.float32):
        raise TypeError(
            f"reference_logprob has dtype {reference_logprob.dtype}; expected float64 or float32: "
            "sums over a completion do not fit 16 bits"
        )
    if is_desirable.dtype != torch.bool:
        raise TypeError(f"is_desirable has dtype {is_desirable.dtype}; expected bool")


def _check_numbers(
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    sft_weight: float,
    num_rows: float | None,
) -> None:
    for name, value in (
        ("beta", beta),
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
        ("sft_weight", sft_weight),
    ):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; expected a finite number, zero or more")
    if num_rows is not None and not 0 < num_rows < float("inf"):
        raise ValueError(f"num_rows is {num_rows}; expected a positive number")


def _check_kl(kl: Tensor | None, loss_type: str, device: torch.device) -> Tensor:
    """The KL estimate to subtract, fp64: apo_zero_unpaired is kto with an estimate of 0."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}; expected one of {', '.join(LOSS_TYPES)}")
    if loss_type == "apo_zero_unpaired":
        return torch.zeros((), dtype=torch.float64, device=device)
    if kl is None:
        raise ValueError('kl is None; loss_type="kto" needs the KL estimate, a scalar tensor')
    if not isinstance(kl, Tensor):
        raise TypeError(f"kl is a {type(kl).__name__}; pass a tensor, such as torch.tensor(0.0)")
    if kl.ndim != 0 or not kl.is_floating_point():
        raise ValueError(
            f"kl has shape {tuple(kl.shape)} and dtype {kl.dtype}; expected a floating-point scalar"
        )
    if kl.device != device:
        raise ValueError(f"logprob is on {device}, kl on {kl.device}; move them to one device")
    return kl.detach().double()
