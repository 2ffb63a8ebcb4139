"""What one pass of a model needs beyond its weights, measured on tensors that hold no data.

Layers, adapters, checkpointing, autocast and the head run as in training, on fake tensors of the
CPU: shapes and lifetimes are those of a real pass, memory and time are not. So there is no table
of model families here. Layers alike are measured a few at a time and counted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from fastkto.attention import own_attention
from fastkto.head_family import read_head
from fastkto.head_scores import own_logits, score_by_logits, score_by_weight
from fastkto.logprob import DEFAULT_HEAD_MEMORY_MIB
from fastkto.memory_fake import (
    ActivationsNowhere,
    LiveBytes,
    fake_copy,
    layer_kinds,
    shortcuts,
    use_linear_attention,
)
from fastkto.packing import reason_not_to_pack
from fastkto.router import balancing_loss

# Scored tokens that are measured with head="logits": the slices behind them need nothing new.
MOST_SLICED = 8192
# Layers of each kind in the smallest model that is measured: a first and a last one.
FEWEST_LAYERS = 2
# Measured as they are, "sdpa" only in models that cannot be packed; every other attention is taken
# to need what FlashAttention needs.
WITH_MASKS = ("eager", "sdpa")


class PassBytes(NamedTuple):
    """Bytes of a pass beyond what was there before it: peaks, `kept`, and parts of others."""

    forward: int
    kept: int  # from the end of the forward to the backward
    weight_copies: int  # of `kept`: low-precision copies of weights, which autocast makes
    scoring: int  # what the head adds in the forward, with what it keeps for the backward
    head: int  # until the head's backward is done, with what is kept
    backward: int  # from then on, with what is kept
    end: int  # from when the embedding's gradient is made
    # Of these three: gradients of the head and the embedding that are not in the weights' yet.
    head_gradients: int
    backward_gradients: int
    end_gradients: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.forward, self.kept, self.head, self.backward, self.end)

    def plus(self, other: PassBytes, *, minus: PassBytes, times: int) -> PassBytes:
        """`self + times * (other - minus)`, field by field."""
        fields = zip(self, other, minus, strict=True)
        return PassBytes(*(mine + times * (more - less) for mine, more, less in fields))


@dataclass(frozen=True)
class ProbeSettings:
    """How a pass runs, as the trainer would run it."""

    autocast: torch.dtype | None = None
    head: str = "auto"
    head_memory_mib: float = DEFAULT_HEAD_MEMORY_MIB
    router_loss: bool = False
    activation_offloading: bool = False
    checkpointing_kwargs: dict[str, Any] = field(default_factory=lambda: {"use_reentrant": False})


class PassProbe:
    """Measures passes of `model`, which may lie on any device, the meta device included."""

    def __init__(self, model: PreTrainedModel | PeftModel, settings: ProbeSettings) -> None:
        self.settings = settings
        self._model = model
        self.kinds = layer_kinds(_decoder(model))
        self._mode = FakeTensorMode()
        self._copies: dict[tuple[int, ...], nn.Module] = {}
        self._measured: dict[tuple[int, int, bool, bool], PassBytes] = {}

    def measure(
        self, rows: int, length: int, *, gradient: bool, checkpointing: bool = False
    ) -> PassBytes:
        """A pass over `rows` sequences of `length` tokens, each of which is scored."""
        key = rows, length, gradient, gradient and checkpointing
        if key not in self._measured:
            self._measured[key] = self._measure(key)
        return self._measured[key]

    def _measure(self, key: tuple[int, int, bool, bool]) -> PassBytes:
        counts = [len(kind) for kind in self.kinds]
        fewest = [min(count, FEWEST_LAYERS) for count in counts]
        base = total = self._measure_layers(fewest, *key)
        for index, count in enumerate(counts):
            if count > fewest[index]:
                more = [few + (index == other) for other, few in enumerate(fewest)]
                one_more = self._measure_layers(more, *key)
                total = total.plus(one_more, minus=base, times=count - fewest[index])
        return total

    def _measure_layers(
        self, counts: Sequence[int], rows: int, length: int, gradient: bool, checkpointing: bool
    ) -> PassBytes:
        with self._mode, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer names that older versions lack
            model: Any = self._copy(tuple(counts))
            model.train(gradient)
            if checkpointing:
                model.gradient_checkpointing_enable(self.settings.checkpointing_kwargs)
            try:
                return _measure_pass(model, (rows, length), gradient, self.settings)
            finally:
                model.zero_grad()
                if checkpointing:
                    model.gradient_checkpointing_disable()

    def _copy(self, counts: tuple[int, ...]) -> nn.Module:
        """The model with the last so many layers of each kind, on fake tensors."""
        if counts not in self._copies:
            chosen = [
                kind[len(kind) - count :] for kind, count in zip(self.kinds, counts, strict=True)
            ]
            kept = {layer for layers in chosen for layer in layers}
            dropped = [layer for kind in self.kinds for layer in kind if layer not in kept]
            model = fake_copy(self._model, dropped)
            causal_lm = _causal_lm(model)
            name = own_attention(causal_lm)
            # Packed passes have masks of a bounded number of queries.
            is_packed = name == "sdpa" and not reason_not_to_pack(model, causal_lm)
            if is_packed or name not in WITH_MASKS:
                use_linear_attention(causal_lm)
            self._copies[counts] = model
        return self._copies[counts]


def _measure_pass(
    model: nn.Module, shape: tuple[int, int], gradient: bool, settings: ProbeSettings
) -> PassBytes:
    known = [*model.parameters(), *model.buffers()]
    if gradient:  # those of earlier passes
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                known.append(parameter.grad)
    peaks: list[tuple[int, int]] = []  # of the backward's parts
    with shortcuts(), LiveBytes(known) as live, torch.set_grad_enabled(gradient):

        def end_part(_: Tensor) -> None:
            peaks.append(live.restart_peak())

        def watch(module: nn.Module, inputs: Any, embedded: Tensor) -> None:
            if embedded.requires_grad:
                embedded.register_hook(end_part)

        with ExitStack() as stack:
            embedding: Any = _causal_lm(model).get_input_embeddings()
            stack.callback(embedding.register_forward_hook(watch).remove)
            if settings.autocast is not None:
                stack.enter_context(torch.autocast("cpu", settings.autocast))
            if settings.activation_offloading:
                stack.enter_context(ActivationsNowhere())
            outputs = _decode(model, shape, settings)
            decoder, decoded = live.restart_peak()[0], live.now
            loss, hidden, unmeasured = _score(model, outputs, settings)
            del outputs
        head_forward, _ = live.restart_peak()
        forward, scoring = max(decoder, head_forward), head_forward - decoded
        kept, weight_copies = live.now, live.weight_copies
        if not gradient:
            return PassBytes(forward, 0, 0, scoring, 0, 0, 0, 0, 0, 0)
        if hidden.requires_grad:  # not where the head alone is trained
            hidden.register_hook(end_part)
        del hidden
        loss.backward()
        peaks.append(live.restart_peak())
    nothing = (0, 0)  # where what the decoder returns, or the embedding, needs no gradient
    (head, backward, end), gradients = zip(*[*peaks, nothing, nothing][:3], strict=True)
    return PassBytes(
        forward, kept, weight_copies, scoring, head + unmeasured, backward, end, *gradients
    )


def _decode(model: nn.Module, shape: tuple[int, int], settings: ProbeSettings) -> Any:
    """What the decoder returns for so many rows and tokens."""
    extra = {"output_router_logits": True} if settings.router_loss else {}
    input_ids = torch.zeros(shape, dtype=torch.int64)
    return _causal_lm(model).base_model(input_ids=input_ids, use_cache=False, **extra)


def _score(model: nn.Module, outputs: Any, settings: ProbeSettings) -> tuple[Tensor, Tensor, int]:
    """(a loss, the hidden states, bytes of the gradient of those that the head has not scored)."""
    causal_lm = _causal_lm(model)
    hidden = outputs.last_hidden_state
    num_tokens = hidden.shape[0] * hidden.shape[1]
    index = torch.zeros(num_tokens, dtype=torch.int64)
    hidden = hidden.reshape(num_tokens, -1).index_select(0, index)
    unmeasured = 0
    if settings.head == "logits":
        scored, target = hidden[:MOST_SLICED], index[:MOST_SLICED]
        unmeasured = (hidden.numel() - scored.numel()) * hidden.element_size()
        forward = functools.partial(type(causal_lm).forward, causal_lm)
        scores = score_by_logits(
            functools.partial(own_logits, causal_lm, forward, type(outputs)),
            scored,
            target,
            stats=True,  # as in evaluation; passes without gradient need a little less
            vocab_size=causal_lm.config.get_text_config().vocab_size,
            head_memory_mib=settings.head_memory_mib,
        )
    else:
        scores = score_by_weight(
            read_head(causal_lm),
            hidden,
            index,
            stats=True,
            backend="torch",
            head_memory_mib=settings.head_memory_mib,
        )
    loss = scores.logprob.sum()
    if settings.router_loss and hidden.requires_grad:
        router_logits = outputs.router_logits
        counts = torch.zeros(router_logits[0].shape[-1])
        loss = loss + balancing_loss(router_logits, index, counts, num_tokens)
    return loss, hidden, unmeasured


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _decoder(model: Any) -> nn.Module:
    return _causal_lm(model).base_model
