"""Which layout of a pass is exact for a model? Asked once, before anything is trained.

A packed row is right only if every layer that mixes tokens heeds the segments and nothing else does
mix them. What a config says rules some models out; real rows show the rest: a sequence must score
as it does alone, in a packed row with others as well as in a padded pass, and must not notice what
stands before it.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkto.attention import disable_segments, enable_segments
from fastkto.data.batch import TokenSequence
from fastkto.head import scoring_model
from fastkto.head_check import unit_rounding
from fastkto.modes import evaluating
from fastkto.passes import build_pass, run_pass
from fastkto.plan_passes import Group, Layout
from fastkto.ranks import Ranks
from fastkto.segments import Segments

logger = logging.getLogger(__name__)

MAX_TOKENS = 256  # of each row
# What mixes neighbours changes the first tokens behind another sequence most.
_FIRST_TOKENS = 8
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
    if expected.layout is Layout.ALONE:
        return expected
    first, second = [row[:MAX_TOKENS] for row in (rows[-1], rows[0])]
    if len(second) < 2:
        return PackingCheck(Layout.PADDED, "there is no sequence of two tokens to try it on")
    trial = _Trial(model, first, second)
    # Whatever comes out, all ranks run the same forwards of a sharded model.
    with evaluating(model):
        alone = trial.alone()
        padded_error = trial.padded_error(alone)
        reason = expected.reason or trial.reason_not_to_pack(alone)
    if not reason:
        return PackingCheck(Layout.PACKED, "")
    if padded_error <= trial.tolerance(alone):
        return PackingCheck(Layout.PADDED, reason)
    return PackingCheck(
        Layout.ALONE, f"{reason}, and padding changes its scores by {padded_error:.2g} nats a token"
    )


def agree_on_layout(model: nn.Module, name: str, rows: Sequence[Tensor], ranks: Ranks) -> Layout:
    """`choose_layout` on all ranks, and the best that is exact on each; says what is in its way."""
    check = choose_layout(model, rows)
    layouts = list(Layout)  # each exact wherever one before it is
    inexact = [float(layouts.index(check.layout) > index) for index in range(len(layouts))]
    found = ranks.sum(torch.tensor(inexact, device=ranks.accelerator.device))
    agreed = layouts[sum(count > 0 for count in found.tolist())]
    if agreed is not check.layout:
        check = PackingCheck(agreed, "another rank found it inexact")
    if check.reason:
        logger.warning("Passes of the %s are not packed: %s.", name, check.reason)
    return agreed


def expected_layout(model: nn.Module) -> PackingCheck:
    """What the classes and configs of `model` say, before anything has run."""
    inner = scoring_model(model)
    if rope := _length_dependent_rope(inner.config.get_text_config()):
        return PackingCheck(Layout.ALONE, f"{rope!r} position embeddings depend on the pass")
    reason = reason_not_to_pack(model, inner)
    return PackingCheck(Layout.PADDED if reason else Layout.PACKED, reason)


def _length_dependent_rope(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return None
    # some families have one set of parameters for each type of layer
    sets = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    types = [entry.get("rope_type", entry.get("type")) for entry in sets]
    return next((name for name in types if name in _LENGTH_DEPENDENT_ROPE), None)


def reason_not_to_pack(model: nn.Module, inner: PreTrainedModel) -> str:
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


class _Trial:
    """A few sequences scored in every layout: the rows, and two completions of one prompt."""

    def __init__(self, model: nn.Module, first: Tensor, second: Tensor) -> None:
        self.model, self.inner = model, scoring_model(model)
        self.rounding = unit_rounding(self.inner.dtype)
        middle = len(second) // 2
        prompt, completion = second[:middle], second[middle:]
        other = completion.flip(0)[: (len(completion) + 1) // 2]
        changed = first.flip(0) if not torch.equal(first, first.flip(0)) else first.roll(1)
        self.sequences = [
            TokenSequence(first[:1], first[1:], 0),
            TokenSequence(changed[:1], changed[1:], 1),
            TokenSequence(second[:1], second[1:], 2),
            TokenSequence(prompt, completion, 3),
            TokenSequence(prompt, other, 3),
        ]

    def alone(self) -> list[Tensor]:
        """Scores [T - 1] of the second row and [t] of the other completion."""
        return [self._scores([[row]], Layout.PADDED)[0] for row in (2, 4)]

    def padded_error(self, alone: list[Tensor]) -> float:
        """Mean error of the worse sequence, in nats a token, in one padded pass."""
        return _worst(self._scores([[2], [4]], Layout.PADDED), alone)

    def reason_not_to_pack(self, alone: list[Tensor]) -> str:
        """Why packed passes are not exact; "" if they are. Leaves segments enabled if so."""
        enable_segments(self.inner)
        try:
            reason = self._compare(alone)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model that knows no segments makes of them
            reason = f"{type(self.inner).__name__} cannot run them ({error})"
        if reason:
            disable_segments(self.inner)
        return reason

    def _compare(self, alone: list[Tensor]) -> str:
        second, other = alone
        _, behind, *shared = self._scores([[0], [2], [3, 4]], Layout.PACKED)
        _, behind_changed, *_ = self._scores([[1], [2], [3, 4]], Layout.PACKED)
        if self.unheeded:
            return self.unheeded
        leak = _worst([behind[:_FIRST_TOKENS]], [behind_changed[:_FIRST_TOKENS]])
        error = _worst([behind, *shared], [second, second[-len(shared[0]) :], other])
        if max(leak, error) <= self.tolerance(alone):
            return ""
        return (
            f"{type(self.inner).__name__} scores a sequence differently behind another one, by "
            f"{max(leak, error):.2g} nats a token"
        )

    def tolerance(self, alone: list[Tensor]) -> float:
        """What rounding explains of a mean error, in nats a token."""
        largest = max(scores.nan_to_num(0, 0, 0).abs().max().item() for scores in alone)
        return 1e-4 + self.rounding * largest

    def _scores(self, groups: list[Group], layout: Layout) -> list[Tensor]:
        """Scores of each sequence in a pass, in the order of `groups`."""
        pass_ = build_pass(self.sequences, groups, layout)
        scores = run_pass(self.model, pass_).logprob
        if pass_.segments is not None:
            self.unheeded = _unheeded(self.inner, pass_.segments)
            # Under autocast the weights do not tell how much is rounded.
            dtypes = {call.dtype for call in pass_.segments.calls}
            self.rounding = max(self.rounding, *map(unit_rounding, dtypes), 0.0)
        return list(scores.split(pass_.offsets.diff().tolist()))


def _worst(scores: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest mean error of a sequence; NaN counts as infinite.

    Nothing can be told where the expected score is not finite: 0 if none of them is.
    """
    pairs = [(a - b)[b.isfinite()] for a, b in zip(scores, expected, strict=True)]
    errors = [pair.abs().mean() for pair in pairs if len(pair) > 0]
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item() if errors else 0.0


def _unheeded(inner: PreTrainedModel, segments: Segments) -> str:
    """Which attention layers did not heed the segments, or their windows; "" if all did."""
    config: Any = inner.config.get_text_config()
    expected, called = config.num_hidden_layers, len(segments.calls)
    if called != expected:
        return f"{called} of {expected} layers attend through transformers' interface"
    if masked := sum(call.has_mask for call in segments.calls):
        return f"{masked} of {expected} layers make a mask of their own"
    kinds = getattr(config, "layer_types", None)
    sliding = expected if kinds is None and getattr(config, "sliding_window", None) else 0
    if kinds is not None:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    heeded = sum(call.window is not None for call in segments.calls)
    if heeded != sliding:
        return f"{heeded} of {sliding} layers with a sliding window say so"
    return ""
