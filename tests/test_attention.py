"""Packed passes of every attention form against separate forwards of each sequence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastkto import attention
from fastkto.attention import (
    _own_eager,
    disable_segments,
    enable_segments,
    is_segmented,
    own_attention,
    segmented,
)
from fastkto.data.batch import TokenSequence
from fastkto.head import _select, attach_scoring
from fastkto.passes import build_pass, run_pass
from fastkto.plan_passes import Layout, plan_passes
from fastkto.segments import Segment, Segments
from tests.attention_forms import (
    ABSENT,
    FLASH,
    FORMS,
    HAVE_BACKWARD,
    model_with,
    use_form,
    varlen_attention,
)
from tests.models import FAMILIES, tiny_model
from tests.scoring import lora

# Families with sliding windows have one of 8 tokens, shorter than most of these sequences.
LENGTHS = [(3, 5), (12, 1), (0, 4), (12, 9), (3, 14), (0, 1)]
PACKED_FAMILIES = sorted(set(FAMILIES) - {"falcon_h1"})
# Windows, a softcap, scales of their own, biases, groups of queries and experts are among them.
FEW_FAMILIES = ["cohere2", "gemma2", "gemma3", "granite", "mistral", "mixtral"]
CASES = [(family, form) for form in ("sdpa", "eager") for family in PACKED_FAMILIES]
CASES += [(family, form) for form in FORMS[2:] for family in FEW_FAMILIES]
BUDGET = 36  # several passes


def sequences_of(lengths: list[tuple[int, int]]) -> list[TokenSequence]:
    """Random tokens; prompts of one length are equal."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> Tensor:
        return torch.randint(4, 100, (count,), generator=generator)

    prompts = {length: tokens(length) for length, _ in lengths}
    return [TokenSequence(prompts[p], tokens(c), p) for p, c in lengths]


def alone(model: nn.Module, sequences: list[TokenSequence]) -> list[Tensor]:
    """Each completion's log-probabilities from the logits of a forward of its own."""
    scores = []
    for prompt, completion, *_ in sequences:
        ids = torch.cat([prompt, completion])
        logprob = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        scores.append(logprob.gather(1, ids[1:, None])[max(len(prompt) - 1, 0) :, 0])
    return scores


def packed(model: nn.Module, sequences: list[TokenSequence], share: bool) -> list[Tensor]:
    """The same from packed passes."""
    plan = plan_passes(sequences, BUDGET, Layout.PACKED, share_prompts=share)
    assert share == any(len(group) > 1 for groups in plan for group in groups)
    scores: dict[int, Tensor] = {}
    for groups in plan:
        pass_ = build_pass(sequences, groups, Layout.PACKED)
        parts = run_pass(model, pass_).logprob.split(pass_.offsets.diff().tolist())
        scores |= dict(zip(pass_.rows.tolist(), parts, strict=True))
    return [scores[row] for row in range(len(sequences))]


def gradients(model: nn.Module, scores: list[Tensor]) -> dict[str, Tensor]:
    """For weights that differ from token to token."""
    model.zero_grad()
    loss = sum((one * torch.linspace(1, -2, len(one))).sum() for one in scores)
    assert isinstance(loss, Tensor)
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def windowed(family: str) -> dict[str, Any]:
    return {"sliding_window": 8} if family in ("mistral", "mixtral") else {}


@pytest.mark.parametrize(("family", "form"), [case for case in CASES if case not in ABSENT])
def test_packed_passes_are_separate_forwards(family: str, form: str) -> None:
    model = model_with(form, family, seed=1, **windowed(family))
    sequences = sequences_of(LENGTHS)
    with_gradient = form in HAVE_BACKWARD
    with use_form(form), torch.set_grad_enabled(with_gradient):
        expected = alone(model, sequences)
        if with_gradient:
            expected_gradients = gradients(model, expected)
        attach_scoring(model)
        enable_segments(model)
        for share in (False, True):
            actual = packed(model, sequences, share)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
            if with_gradient:
                assert_equal_gradients(gradients(model, actual), expected_gradients)


@pytest.mark.parametrize("form", HAVE_BACKWARD)
@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_packed_passes_are_separate_forwards_with_lora_and_checkpointing(
    family: str, form: str
) -> None:
    model: Any = lora(
        model_with(form, family, seed=1, **windowed(family)),
        target_modules=list(FAMILIES[family].lora_targets),
    )
    sequences = sequences_of(LENGTHS)
    with use_form(form):
        expected = alone(model, sequences)
        expected_gradients = gradients(model, expected)
        attach_scoring(model)
        enable_segments(model.get_base_model())
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for share in (False, True):
            actual = packed(model, sequences, share)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
            assert_equal_gradients(gradients(model, actual), expected_gradients)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_long_prompts_are_read_in_parts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkto.segments.MASKED_QUERIES", 3)
    model = model_with(form, "gemma3", seed=1).eval()
    sequences = sequences_of(LENGTHS)
    with torch.no_grad():
        expected = alone(model, sequences)
        attach_scoring(model)
        enable_segments(model)
        for one, other in zip(packed(model, sequences, share=True), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_calls_without_segments_stay_what_they_were(form: str) -> None:
    """Also for padded rows, with their own attention mask."""
    model = model_with(form, "gemma3", seed=1).eval()
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.int64)
    if form not in FLASH:  # they unpad with a kernel's help
        mask[1, :4] = 0
    with use_form(form), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        enable_segments(model)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        own = "sdpa" if form == "varlen" else form
        assert own_attention(model) == own
        disable_segments(model)
        assert model.config._attn_implementation == own
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_function_is_wrapped_once() -> None:
    for _ in range(2):
        enable_segments(tiny_model("llama", attn_implementation="sdpa"))
    wrapped = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert is_segmented(wrapped)
    own = wrapped.__closure__
    assert own is not None
    assert not any(
        callable(cell.cell_contents) and is_segmented(cell.cell_contents) for cell in own
    )


def test_varlen_attention_gets_autocasts_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in fp32 under autocast: rotary embeddings make queries and keys fp32 again."""
    dtypes = []

    def recording(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtypes.extend([query.dtype, key.dtype, value.dtype])
        kwargs.pop("enable_gqa", None)
        kwargs["left"] = kwargs.pop("window_size")[0]
        return varlen_attention(query, key, value, *args, **kwargs)

    model = model_with("varlen", "llama", seed=1).eval()
    attach_scoring(model)
    enable_segments(model)
    sequences = sequences_of(LENGTHS)
    with use_form("varlen"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(attention.varlen, "varlen_attn", recording)
        packed(model, sequences, share=False)
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) >= 6


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"head_dim": 256}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"head_dim": 60}, False),
        ({"head_dim": 264}, False),
        ({"head_dim": 224}, False),
        ({"value_dim": 32}, False),
        ({"dropout": 0.1}, False),
        ({"capability": (7, 5)}, False),
    ],
    ids=str,
)
def test_varlen_attention_is_used_where_it_runs(
    change: dict[str, Any], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {
        "dtype": torch.bfloat16,
        "device": "cuda",
        "head_dim": 64,
        "dropout": 0.0,
        "capability": (8, 0),
        **change,
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])

    def states(head_dim: int) -> Any:
        return SimpleNamespace(
            dtype=case["dtype"], device=torch.device(case["device"]), shape=(1, 4, 9, head_dim)
        )

    value = states(case.get("value_dim", case["head_dim"]))
    assert attention._has_varlen(states(case["head_dim"]), value, case["dropout"]) == runs


def test_masks_may_come_by_name() -> None:
    """As some families pass theirs."""
    module = tiny_model("llama").model.layers[0].self_attn
    states = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    segments = Segments([Segment(0, 2), Segment(2, 6)], torch.device("cpu"))
    for function in (
        segmented(ALL_ATTENTION_FUNCTIONS["sdpa"], "sdpa"),
        segmented(_own_eager, "eager"),
    ):
        output, _ = function(
            module, *states, attention_mask=torch.zeros(1, 1, 1, 1), segments=segments, scaling=0.5
        )
        assert output.shape == (1, 6, 4, 8)
        mask = torch.zeros(1, 1, 6, 6)
        output, _ = function(module, *states, attention_mask=mask, scaling=0.5)
        by_position, _ = function(module, *states, mask, scaling=0.5)
        assert torch.equal(output, by_position)


class FromElsewhere(type(tiny_model("llama").model.layers[0].self_attn)):
    """An attention whose own module has no eager function, as in code from a hub."""


def test_eager_attention_is_found_where_the_forward_is_written() -> None:
    model = tiny_model("llama", seed=1, attn_implementation="eager").eval()
    attach_scoring(model)
    sequences = sequences_of(LENGTHS)
    with torch.no_grad():
        expected = alone(model, sequences)
        for layer in model.model.layers:
            layer.self_attn.__class__ = FromElsewhere
        enable_segments(model)
        for one, other in zip(packed(model, sequences, False), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_an_attention_without_an_eager_function_is_named() -> None:
    class Foreign(nn.Module):
        def forward(self) -> None: ...

    with pytest.raises(NotImplementedError, match="Foreign has no eager_attention_forward beside"):
        _own_eager(Foreign(), *[torch.zeros(1, 1, 1, 1)] * 4)


class Decoder(nn.Module):
    """A model without its head, which `run_pass` can run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model.base_model

    def forward(
        self, score_row: Tensor, score_position: Tensor, score_target: Tensor, **inputs: Any
    ) -> Any:
        del inputs["score_stats"]
        hidden = self.decoder(**inputs).last_hidden_state
        return SimpleNamespace(logprob=_select(hidden, score_row, score_position)[:, 0])


@pytest.mark.skipif(
    not hasattr(modeling_flash_attention_utils, "_flash_with_kvcache_fn"),
    reason="older transformers ask for the autocast of meta tensors, which there is none of",
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_pass_reads_nothing_from_the_device(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meta tensor holds no values, so reading one would raise."""

    def shapes_only(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return query * key.sum()  # the kernels read the offsets, where they are

    monkeypatch.setattr("tests.attention_forms.varlen_attention", shapes_only)
    # It refuses meta tensors, and nothing else here.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *states: None)
    model = model_with(form, family, seed=1, dtype=torch.bfloat16).to("meta")
    enable_segments(model)
    sequences = [
        TokenSequence(prompt.to("meta"), completion.to("meta"), key)
        for prompt, completion, key, _ in sequences_of(LENGTHS)
    ]
    has_backward = form in HAVE_BACKWARD
    with use_form(form), torch.set_grad_enabled(has_backward):
        for share in (False, True):
            for groups in plan_passes(sequences, BUDGET, Layout.PACKED, share_prompts=share):
                pass_ = build_pass(sequences, groups, Layout.PACKED)
                total = run_pass(Decoder(model), pass_).logprob.sum()
                if has_backward:
                    total.backward()
    with pytest.raises(RuntimeError, match="meta"):  # so it would have been seen
        pass_.input_ids.sum().item()
