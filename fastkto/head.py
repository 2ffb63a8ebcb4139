"""Token scores from inside a Hugging Face causal language model, without its logits.

`attach_scoring(model)` lets `model(...)` take `score_row`, `score_position` and `score_target` and
return their log-probabilities. The work is done inside the model's own forward, so that the hooks
of DDP, FSDP2 and ZeRO fire and sharded weights are there when they are needed.

What a model family does between its hidden states and its logits is in `fastkto.head_family`; that
this is all of it is what `fastkto.head_check` makes sure of.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastkto.head_family import read_head
from fastkto.head_scores import own_logits, score_by_logits, score_by_weight
from fastkto.logprob import DEFAULT_HEAD_MEMORY_MIB

_STATE = "_fastkto_scoring"


@dataclass
class ScoredOutput(ModelOutput):
    """Scores of N tokens: fp32 tensors [N], and a router's logits if they were asked for."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class Scoring:
    """How a patched model scores, kept on the model itself."""

    head: str  # "auto" or "logits"
    backend: str
    head_memory_mib: float
    patch: Callable[..., Any]  # the function that was put in place of forward
    original: Callable[..., Any] | None  # the instance's own forward before; None: the class's
    active: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Scoring:
        return replace(self, original=copy.deepcopy(self.original, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # A bound method is pickled by its name, so that a pickled model comes back with the forward
        # of its class, and must not look patched.
        return type(None), ()


def attach_scoring(
    model: nn.Module,
    *,
    head: str = "auto",
    backend: str = "auto",
    head_memory_mib: float = DEFAULT_HEAD_MEMORY_MIB,
) -> None:
    """Let `model`'s forward return the scores of chosen tokens; `detach_scoring` undoes it.

    Afterwards, through any wrapper, `model(input_ids=..., score_row=[N], score_position=[N],
    score_target=[N], score_stats=False)` returns a `ScoredOutput`. Score n is that of the token
    `score_target[n]` after the hidden state `[score_row[n], score_position[n]]`, where the position
    counts from the end of the row (-1 is the last), so that virtual tokens in front do not matter.
    A target of -100 scores 0. `output_router_logits=True` is passed to the decoder. Without
    `score_target` the call is what it was. A deep copy of the model scores with its own weights; a
    pickled model comes back without the patch.

    Attaching again changes the settings. A head that cannot be read is a ValueError.

    Args:
        model: a PreTrainedModel with a language-modelling head, or a PeftModel around one.
        head: "auto" computes with the head's weight; "logits" with the model's own logits, in
            slices: slower, and right for whatever stands between hidden states and logits.
        backend: for `linear_logprob`.
        head_memory_mib: scratch memory for logits.
    """
    model = _causal_lm(model)
    if head not in ("auto", "logits"):
        raise ValueError(f'head={head!r} is unknown; use "auto" or "logits"')
    if head == "auto":
        read_head(model)  # refuse here rather than in the first step
    scoring = vars(model).get(_STATE)
    if scoring is None:
        original = vars(model).get("forward")
        patch = _scoring_forward(type(model).forward)
        scoring = Scoring(head, backend, head_memory_mib, patch, original)
        model.forward = MethodType(patch, model)
    else:
        scoring = replace(
            scoring, head=head, backend=backend, head_memory_mib=head_memory_mib, active=True
        )
    setattr(model, _STATE, scoring)


def detach_scoring(model: nn.Module) -> None:
    """Give `model` the forward that it had before `attach_scoring`; nothing if there was none.

    Where something else wraps the patched forward by now (accelerate's mixed precision does), the
    patch stays underneath and only passes calls on.
    """
    model = _causal_lm(model)
    scoring = vars(model).get(_STATE)
    if scoring is None:
        return
    if getattr(vars(model).get("forward"), "__func__", None) is not scoring.patch:
        scoring.active = False
        return
    del model.forward
    delattr(model, _STATE)
    if scoring.original is not None:
        model.forward = scoring.original


def scoring_model(model: nn.Module) -> PreTrainedModel:
    """The model that `attach_scoring` patched, inside whatever wrappers."""
    for module in model.modules():
        scoring = vars(module).get(_STATE)
        if scoring is not None and scoring.active:
            return module
    raise ValueError(f"{type(model).__name__} has no scoring; call attach_scoring(model) first")


def scoring_of(model: PreTrainedModel) -> Scoring:
    """How `model`, which `attach_scoring` patched, scores."""
    return vars(model)[_STATE]


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model is a {type(inner).__name__}, expected a transformers PreTrainedModel or a "
            "PeftModel; attach before wrapping it for distributed training"
        )
    if inner.base_model is inner or inner.config.is_encoder_decoder:
        raise ValueError(
            f"{type(inner).__name__} is not a decoder with a language-modelling head; load the "
            "model with AutoModelForCausalLM"
        )
    return inner


def _scoring_forward(wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """A function for `forward` that knows its model only as `self`, so copies use their own."""

    @functools.wraps(wrapped)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        score_row: Tensor | None = None,
        score_position: Tensor | None = None,
        score_target: Tensor | None = None,
        score_stats: bool = False,
        **kwargs: Any,
    ) -> Any:
        scoring: Scoring = vars(self)[_STATE]
        original = scoring.original or functools.partial(type(self).forward, self)
        if score_target is None or not scoring.active:
            return original(*args, **kwargs)
        if args or kwargs.get("labels") is not None:
            raise TypeError("with score_target, pass inputs by name and no labels")
        if score_row is None or score_position is None:
            raise TypeError("score_target needs score_row and score_position")
        # peft passes None for what it was not given; decoders do not know all of these names
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        outputs = self.base_model(**{"use_cache": False, **inputs, "return_dict": True})
        hidden = _select(outputs.last_hidden_state, score_row, score_position)
        if scoring.head == "logits":
            scores = score_by_logits(
                functools.partial(own_logits, self, original, type(outputs)),
                hidden,
                score_target,
                stats=score_stats,
                vocab_size=self.config.get_text_config().vocab_size,
                head_memory_mib=scoring.head_memory_mib,
            )
        else:
            scores = score_by_weight(
                read_head(self),  # at each call: peft and FSDP2 replace modules and weights
                hidden,
                score_target,
                stats=score_stats,
                backend=scoring.backend,
                head_memory_mib=scoring.head_memory_mib,
            )
        return ScoredOutput(*scores, router_logits=getattr(outputs, "router_logits", None))

    # The visible signature stays the model's own: generate() checks its arguments against it. As
    # __signature__, since accelerate unwraps a model along __wrapped__, past this function.
    forward.__signature__ = inspect.signature(wrapped)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def _select(hidden: Tensor, row: Tensor, position: Tensor) -> Tensor:
    """hidden[row, position], [N, D], of hidden [B, T, D]; positions are negative."""
    length = hidden.shape[1]
    index = row.to(hidden.device) * length + (position.to(hidden.device) + length)
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
