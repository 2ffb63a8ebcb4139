"""Each operation in plain PyTorch: the readable truth that tests and benchmarks compare with.

Dimensions: B sequences, N tokens, D hidden size, V vocabulary; a local tensor's name ends with its
shape. Any floating dtype, float64 included; autograd supplies the gradients. Nothing is checked
and all logits are held at once: the operations to train with are in `logprob` and `loss`.
"""

import torch
from torch import Tensor

from fastkto.logprob import TokenScores
from fastkto.loss import KTOLoss


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
) -> TokenScores:
    """Log-probability of each target, [N] in the dtype of hidden; see `logprob.linear_logprob`."""
    logits_NV = hidden @ weight.T
    if extra_hidden is not None and extra_weight is not None:
        logits_NV = logits_NV + extra_hidden @ extra_weight.T
    if factor is not None:
        logits_NV = logits_NV * factor
    if bias is not None:
        logits_NV = logits_NV + bias
    logits_NV = logits_NV * logit_scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV / temperature

    is_scored_N = target != ignore_index
    logprob_NV = logits_NV.log_softmax(-1)
    index_N = torch.where(is_scored_N, target, 0)
    logprob_N = logprob_NV.gather(1, index_N[:, None])[:, 0]
    logprob_N = torch.where(is_scored_N, logprob_N, 0.0)
    if not stats:
        return TokenScores(logprob_N, None, None)
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1).detach()
    mean_logit_N = logits_NV.mean(-1).detach()
    return TokenScores(
        logprob_N,
        torch.where(is_scored_N, entropy_N, 0.0),
        torch.where(is_scored_N, mean_logit_N, 0.0),
    )


def kto_loss(
    logprob: Tensor,  # [N]
    offsets: Tensor,  # [B + 1] int64
    reference_logprob: Tensor,  # [B]
    is_desirable: Tensor,  # [B] bool
    *,
    kl: Tensor | None = None,  # scalar, nats
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    sft_weight: float = 0.0,
    num_rows: int | None = None,
) -> KTOLoss:
    """KTO loss of B sequences, a scalar in float64; see `loss.kto_loss`."""
    rows = [logprob[start:end].double() for start, end in zip(*_bounds(offsets), strict=True)]
    logprob_B = torch.stack([row.sum() for row in rows]) if rows else logprob.double()[:0]
    log_ratio_B = logprob_B - reference_logprob.double()
    if loss_type == "kto":
        assert kl is not None
        kl = kl.double()
        desirable_B = 1 - torch.sigmoid(beta * (log_ratio_B - kl))
        undesirable_B = 1 - torch.sigmoid(beta * (kl - log_ratio_B))
    else:
        desirable_B = 1 - torch.sigmoid(beta * log_ratio_B)
        undesirable_B = torch.sigmoid(beta * log_ratio_B)
    row_loss_B = torch.where(
        is_desirable, desirable_weight * desirable_B, undesirable_weight * undesirable_B
    )
    if sft_weight and rows:
        mean_logprob_B = torch.stack([row.sum() / max(row.numel(), 1) for row in rows])
        row_loss_B = row_loss_B - sft_weight * torch.where(is_desirable, mean_logprob_B, 0.0)
    divisor = max(len(rows), 1) if num_rows is None else num_rows
    return KTOLoss(
        row_loss_B.sum() / divisor, row_loss_B.detach(), logprob_B.detach(), log_ratio_B.detach()
    )


def _bounds(offsets: Tensor) -> tuple[list[int], list[int]]:
    """(starts, ends) of the rows."""
    positions = offsets.tolist()
    return positions[:-1], positions[1:]
