"""Which layout of a pass is exact for a model? Asked once, before anything is trained.

A packed row is right only if every layer that mixes tokens heeds the segments and nothing else does
mix them. What a config says rules some models out; two real rows show the rest: scored in one row,
a sequence must score as it does alone, and must not notice what stands before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.attention import enable_segments
from fastkto.data.batch import TokenSequence
from fastkto.head import scoring_model
from fastkto.head_check import evaluating, unit_rounding
from fastkto.passes import Layout, Pass, build_pass, plan_passes, run_pass

MAX_TOKENS = 256  # of each row
# Rotary embeddings whose frequencies depend on the longest position of the whole call.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class PackingCheck(NamedTuple):
    """The layout for a model, and why it is not a better one ("" where it is packed)."""

    layout: Layout
    reason: str


def choose_layout(model: nn.Module, rows: Sequence[Tensor]) -> PackingCheck:
    """The best layout that is exact for `model`, which `attach_scoring` has prepared.

    Runs a few forwards in eval mode without gradient, and enables segments in the attention of a
    model that may be packed.

    Args:
        model: in whatever wrappers; with a sharded one, every rank has to call this.
        rows: one or two real sequences of token ids, [T], the longest first; each is cut to 256
            tokens.
    """
    expected = expected_layout(model)
    if expected.layout is not Layout.PACKED:
        return expected
    inner = scoring_model(model)
    enable_segments(inner)
    first, second = [row[:MAX_TOKENS] for row in (rows[-1], rows[0])]
    if len(second) < 2:
        return PackingCheck(Layout.PADDED, "there is no sequence of two tokens to try it on")
    reason = _reason_from_scores(model, inner, first, second)
    return PackingCheck(Layout.PADDED if reason else Layout.PACKED, reason)


def expected_layout(model: nn.Module) -> PackingCheck:
    """What the classes and configs of `model` say, before anything has run."""
    inner = scoring_model(model)
    if rope := _length_dependent_rope(inner.config.get_text_config()):
        return PackingCheck(Layout.ALONE, f"{rope!r} position embeddings depend on the pass")
    reason = _reason_from_config(model, inner)
    return PackingCheck(Layout.PADDED if reason else Layout.PACKED, reason)


def _length_dependent_rope(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return None
    # some families have one set of parameters for each type of layer
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    types = [entry.get("rope_type", entry.get("type")) for entry in sets]
    return next((name for name in types if name in _LENGTH_DEPENDENT_ROPE), None)


def _reason_from_config(model: nn.Module, inner: PreTrainedModel) -> str:
    """Why `inner` cannot be packed, as far as its class and config say; "" if they do not."""
    config: Any = inner.config.get_text_config()
    name = type(inner).__name__
    if any(isinstance(m, PeftModel) and _learns_a_prompt(m) for m in model.modules()):
        return "a learned prompt stands before every sequence"
    if getattr(inner, "_is_stateful", False):
        return f"{name} carries a state from token to token"
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        return f"{name} has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "index_topk", None):
        return f"{name} chooses the tokens to attend to over the whole row"
    if not inner._can_set_attn_implementation():
        return f"{name} has an attention of its own"
    return ""


def _learns_a_prompt(model: PeftModel) -> bool:
    return any(config.is_prompt_learning for config in model.peft_config.values())


def _reason_from_scores(
    model: nn.Module, inner: PreTrainedModel, first: Tensor, second: Tensor
) -> str:
    other = first.flip(0) if not torch.equal(first, first.flip(0)) else first.roll(1)
    with evaluating(model):
        alone = run_pass(model, _pass_over([second], Layout.PADDED)).logprob
        packed = _pass_over([first, second], Layout.PACKED)
        behind = run_pass(model, packed).logprob[-len(alone) :]
        behind_other = run_pass(model, _pass_over([other, second], Layout.PACKED)).logprob
    if reason := _unheeded(inner, packed):
        return reason
    tolerance = 1e-5 + unit_rounding(inner.dtype) * alone.abs().amax()
    worst = torch.stack([behind - alone, behind - behind_other[-len(alone) :]]).abs().mean(1).amax()
    if worst <= tolerance:
        return ""
    return (
        f"{type(inner).__name__} scores a sequence differently behind another one, by {worst:.2g} "
        "nats a token"
    )


def _unheeded(inner: PreTrainedModel, pass_: Pass) -> str:
    """Which attention layers did not heed the segments, or their windows; "" if all did."""
    config: Any = inner.config.get_text_config()
    assert pass_.segments is not None
    windows = pass_.segments.windows_seen
    expected = config.num_hidden_layers
    if len(windows) != expected:
        return f"{len(windows)} of {expected} layers attend through transformers' interface"
    kinds = getattr(config, "layer_types", None)
    sliding = expected if kinds is None and getattr(config, "sliding_window", None) else 0
    if kinds is not None:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    heeded = sum(window is not None for window in windows)
    if heeded != sliding:
        return f"{heeded} of {sliding} layers with a sliding window say so"
    return ""


def _pass_over(rows: Sequence[Tensor], layout: Layout) -> Pass:
    """The pass in which all tokens of `rows` but each first one are scored."""
    sequences = [TokenSequence(row[:1], row[1:], index) for index, row in enumerate(rows)]
    (groups,) = plan_passes(sequences, sum(map(len, rows)), layout)
    # in the order of the rows, whichever is longer
    return build_pass(sequences, sorted(groups), layout)
