"""The load-balancing loss of a mixture-of-experts router, in parts that add up over passes.

Source: Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6, as transformers computes it:
`E * sum_e f_e * P_e`, where `f_e` is the mean number of tokens sent to expert `e` (it carries no
gradient) and `P_e` the mean routing probability, both over the tokens and layers of the device
batch. Given `f`, the loss is a sum over tokens, so each pass contributes its own part.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fastkto.config import KTOConfig


class RouterSettings(NamedTuple):
    """What a run needs to know of its policy's router."""

    coefficient: float = 0.0  # the weight of its loss, 0 without a router
    experts_per_token: int = 0


def router_settings(config: PretrainedConfig, args: KTOConfig) -> RouterSettings:
    """Those of a text model's config; raises ValueError where it does not know them."""
    has_router = hasattr(config, "output_router_logits")
    if args.router_aux_loss_coef and not has_router:
        raise ValueError(
            f"router_aux_loss_coef is {args.router_aux_loss_coef}, but {type(config).__name__} has "
            "no router logits; leave it out for a model without experts"
        )
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if not has_router or coefficient == 0.0:
        return RouterSettings()
    if not hasattr(config, "num_experts_per_tok"):
        raise ValueError(
            f"{type(config).__name__} does not say how many experts a token is sent to "
            "(num_experts_per_tok); set router_aux_loss_coef=0 to train without the router's loss"
        )
    return RouterSettings(coefficient, config.num_experts_per_tok)


def expert_counts(router_logits: tuple[Tensor, ...], tokens: Tensor, top_k: int) -> Tensor:
    """How often each expert is chosen, over layers and the given tokens: `[E]` fp32.

    `router_logits` holds one `[b * T, E]` tensor a layer, `tokens` the flat positions `[S]`.
    """
    counts_E = torch.zeros(router_logits[0].shape[-1], device=tokens.device)
    for logits in router_logits:
        probability = _probability(logits, tokens)
        chosen = torch.topk(probability, top_k, dim=-1).indices.flatten()
        counts_E.index_add_(0, chosen, torch.ones_like(chosen, dtype=counts_E.dtype))
    return counts_E


def balancing_loss(
    router_logits: tuple[Tensor, ...], tokens: Tensor, counts_E: Tensor, num_tokens: int
) -> Tensor:
    """This pass's part of the device batch's load-balancing loss: a scalar.

    `counts_E` are the expert counts of the whole device batch, `num_tokens` its real tokens.
    """
    entries = num_tokens * len(router_logits)
    probability_E = sum(
        (_probability(logits, tokens).float().sum(0) for logits in router_logits),
        start=torch.zeros_like(counts_E),
    )
    return counts_E.numel() * torch.sum((counts_E / entries) * (probability_E / entries))


def _probability(logits: Tensor, tokens: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1]).to(tokens.device)
    return torch.softmax(flat.index_select(0, tokens), dim=-1)
