"""Scores of hidden states in a Hugging Face model, by the weight of its head or by its own logits.

Both work by calling a module of the model while its `forward` is another one: the head's, so that
whatever gathers the head's weights when it is called does so here too; the decoder's, so that the
model's own forward turns hidden states that are already there into logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastkto.head_dora import dora_factor
from fastkto.head_family import Head
from fastkto.logprob import BYTES_PER_MIB, TokenScores, linear_logprob

# While a slice's backward runs there are, at most: the model's logits and their gradient, fp32
# logits, log-probabilities and gradients of both, and what a softcap keeps.
_BYTES_PER_LOGIT = 32


@torch.compiler.disable  # swaps a module's forward; the decoder before it is compiled
def score_by_weight(
    head: Head,
    hidden: Tensor,  # [N, D]
    target: Tensor,  # [N] int64
    *,
    stats: bool,
    backend: str,
    head_memory_mib: float,
) -> TokenScores:
    """Scores [N] by `linear_logprob`, on the head's device, in a call of the head's modules."""

    def score(hidden: Tensor, target: Tensor) -> tuple[Tensor | None, ...]:
        weight = _whole(head.module.weight)
        is_autocast = torch.is_autocast_enabled(hidden.device.type)
        if not is_autocast:
            hidden = hidden.to(weight.dtype)  # Mamba's residual stream is fp32 above a bf16 head
        added = _added(head, hidden)
        if not is_autocast:  # peft keeps adapters in fp32 beside a bf16 head
            added = _Added(*(None if part is None else part.to(weight.dtype) for part in added))
        scores = linear_logprob(
            hidden,
            weight,
            target,
            **added._asdict(),
            factor=_factor(head, weight, int(head_memory_mib * BYTES_PER_MIB)),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            stats=stats,
            backend=backend,
            head_memory_mib=head_memory_mib,
        )
        return tuple(scores)  # hooks of FSDP2 and ZeRO look into plain tuples

    device = head.module.weight.device
    if device.type == "meta":
        raise ValueError(
            f"the weight of the output head ({type(head.module).__name__}) is offloaded; keep the "
            'head on a device, or use head="logits"'
        )
    return TokenScores(*_call_inside(head.called, score, hidden.to(device), target.to(device)))


class _Added(NamedTuple):
    """What is added to hidden @ weight.T, by the names that `linear_logprob` has for it."""

    bias: Tensor | None  # [V]
    extra_hidden: Tensor | None = None  # [N, E]
    extra_weight: Tensor | None = None  # [V, E]


def _added(head: Head, hidden: Tensor) -> _Added:
    """The head's bias, and its adapters side by side, as one of the sum of their ranks.

    As in peft each multiplies in its own dtype (autocast's, where it is on), after its own dropout.
    """
    bias: Tensor | None = getattr(head.module, "bias", None)
    bias = None if bias is None else _whole(bias)
    if not head.adapters:
        return _Added(bias)
    hidden_parts, weight_parts = [], []
    for adapter in head.adapters:
        down = _whole(adapter.down.weight)
        dropped = adapter.dropout(hidden.to(down.dtype))
        hidden_parts.append(linear(dropped, down) * adapter.scaling)
        weight_parts.append(_whole(adapter.up.weight))
        if adapter.up.bias is not None:
            up_bias = _whole(adapter.up.bias) * adapter.scaling
            bias = up_bias if bias is None else bias + up_bias
    if len(weight_parts) == 1:  # without a copy
        return _Added(bias, hidden_parts[0], weight_parts[0])
    return _Added(bias, torch.cat(hidden_parts, dim=1), torch.cat(weight_parts, dim=1))


def _factor(head: Head, weight: Tensor, memory_bytes: int) -> Tensor | None:
    """What a DoRA adapter, which is alone then, multiplies all but the head's bias by, [V] fp32.

    It is not rounded with what is added: what it learns is less than bf16 can represent.
    """
    for adapter in head.adapters:
        if adapter.magnitude is not None:
            return dora_factor(
                _whole(adapter.magnitude.weight),
                weight,
                _whole(adapter.down.weight),
                _whole(adapter.up.weight),
                scaling=adapter.scaling,
                memory_bytes=memory_bytes,
            )
    return None


@torch.compiler.disable
def score_by_logits(
    logits_of: Callable[[Tensor], Tensor],  # [n, D] -> [n, V]
    hidden: Tensor,  # [N, D]
    target: Tensor,  # [N] int64, -100 where a token is ignored
    *,
    stats: bool,
    vocab_size: int,
    head_memory_mib: float,
) -> TokenScores:
    """Scores [N] from the model's own logits, a slice of tokens at a time.

    Log-softmax and what follows is in fp32; the logits are what the model makes them. For gradients
    each slice is computed again in backward.
    """
    rows = max(1, int(head_memory_mib * BYTES_PER_MIB) // (_BYTES_PER_LOGIT * vocab_size))
    # an empty batch still makes one (empty) slice, so that it has a graph
    slices = list(zip(hidden.split(rows), target.split(rows), strict=True))
    if torch.is_grad_enabled():
        scores = [
            checkpoint(_score_slice, logits_of, *one, stats, use_reentrant=False) for one in slices
        ]
    else:
        scores = [_score_slice(logits_of, *one, stats) for one in slices]
    logprob, entropy, mean_logit = zip(*scores, strict=True)
    if not stats:
        return TokenScores(torch.cat(logprob), None, None)
    return TokenScores(torch.cat(logprob), torch.cat(entropy), torch.cat(mean_logit))


def _score_slice(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logits = logits_of(hidden).float()  # [n, V], where the head is
    target = target.to(logits.device)
    is_scored = target != -100
    logprob_nV = logits.log_softmax(-1)
    logprob = logprob_nV.gather(1, target.clamp(min=0)[:, None])[:, 0]
    logprob = torch.where(is_scored, logprob, 0.0)
    if not stats:
        return logprob, None, None
    with torch.no_grad():
        entropy = -(logprob_nV.exp() * logprob_nV).sum(-1)
        mean_logit = logits.mean(-1)
        return (
            logprob,
            torch.where(is_scored, entropy, 0.0),
            torch.where(is_scored, mean_logit, 0.0),
        )


def own_logits(
    model: PreTrainedModel,
    forward: Callable[..., Any],  # the model's own
    output_type: type,  # what its decoder returns
    hidden: Tensor,  # [n, D]
) -> Tensor:
    """Logits [n, V] by the model's own forward, around a decoder that returns `hidden`."""
    was_called = False

    def decoder(*args: Any, **kwargs: Any) -> Any:
        nonlocal was_called
        was_called = True
        return output_type(last_hidden_state=hidden[None])

    tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    # without router logits, whose loss would need those of the real decoder
    with replaced_forward(model.base_model, decoder):
        output = forward(
            input_ids=tokens, use_cache=False, return_dict=True, output_router_logits=False
        )
    if not was_called:
        raise ValueError(
            f'head="logits" cannot score {type(model).__name__}: its forward does not call its '
            f"{type(model.base_model).__name__}"
        )
    return output.logits[0]


def _call_inside(
    modules: Sequence[nn.Module], function: Callable[..., tuple[Any, ...]], *inputs: Tensor
) -> tuple[Any, ...]:
    """function(*inputs), within calls of all `modules`, so that their hooks have gathered."""
    if not modules:
        return function(*inputs)
    outer, *inner = modules
    with replaced_forward(outer, lambda *inputs: _call_inside(inner, function, *inputs)):
        return outer(*inputs)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While it is open, calling `module` runs its hooks around `forward`."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _whole(weight: Tensor) -> Tensor:
    """`weight` on every rank, if it is still sharded where the head's hooks did not gather it."""
    if not isinstance(weight, DTensor):
        return weight
    # each rank's gradient is of its own rows: without placements it would stay the rank's own
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
