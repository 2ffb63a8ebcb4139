"""Which layout a model gets: exact ones by family, and models that would not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastkto.attention import SEGMENTED_EAGER
from fastkto.head import attach_scoring
from fastkto.packing import PackingCheck, choose_layout, expected_layout
from fastkto.plan_passes import Layout
from tests.models import FAMILIES, tiny_model

ROWS = [torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in (60, 40)]
DTYPES = [torch.float32, torch.bfloat16]


def check(model: Any, rows: list[Tensor] = ROWS) -> PackingCheck:
    attach_scoring(model)
    return choose_layout(model, rows)


def other_model(model_type: str, **config: Any) -> Any:
    """A tiny model of a family that is not among `FAMILIES`."""
    config = AutoConfig.for_model(
        model_type, vocab_size=128, num_hidden_layers=2, pad_token_id=0, **config
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["default", "eager"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"falcon_h1"}))
def test_supported_families_are_packed(family: str, attention: str, dtype: torch.dtype) -> None:
    kwargs = {} if attention == "default" else {"attn_implementation": attention}
    model = tiny_model(family, seed=1, dtype=dtype, **kwargs)
    training = [module.training for module in model.modules()]
    assert check(model) == PackingCheck(Layout.PACKED, "")
    assert [module.training for module in model.modules()] == training


@pytest.mark.parametrize("bad", [[0], [1], [0, 1]], ids=str)
def test_rows_that_are_not_finite_are_no_reason(bad: list[int]) -> None:
    """They tell nothing of the model, and other ranks have other rows."""
    model = tiny_model("llama", seed=1)
    model.get_input_embeddings().weight.data[101] = torch.nan
    token = torch.tensor([101])
    rows = [torch.cat([token, row]) if i in bad else row for i, row in enumerate(ROWS)]
    assert check(model, rows) == PackingCheck(Layout.PACKED, "")


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_rounding_of_autocast_is_no_reason(family: str) -> None:
    """The weights are fp32 then, the errors those of bf16."""
    model = tiny_model(family, seed=1)
    attach_scoring(model)
    own, rounded = model.forward, torch.Generator().manual_seed(0)

    def forward(**kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return own(**kwargs)

    def round_differently(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """As another number of rows makes a GPU do."""
        return output * (1 + 2**-9 * (torch.rand(output.shape, generator=rounded) - 0.5))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda m, i, o: round_differently(m, i, o) if isinstance(o, Tensor) else o
        )
    model.forward = forward
    assert choose_layout(model, ROWS) == PackingCheck(Layout.PACKED, "")
    model.forward = own  # the same errors without a reason
    assert choose_layout(model, ROWS).layout is Layout.ALONE


STATES = {"hidden_size": 32, "state_size": 8, "expand": 2, "conv_kernel": 4}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_model("falcon_h1"), "FalconH1ForCausalLM carries a state from token to"),
        (lambda: other_model("mamba", **STATES), "MambaForCausalLM carries a state from token to"),
        (
            lambda: other_model("mamba2", **STATES, num_heads=8, head_dim=8, n_groups=1),
            "Mamba2ForCausalLM carries a state from token to",
        ),
        (
            lambda: other_model(
                "lfm2",
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                layer_types=["conv", "full_attention"],
            ),
            "Lfm2ForCausalLM has layers of type conv",
        ),
        (
            lambda: other_model("bloom", hidden_size=32, n_head=4),
            "BloomForCausalLM has an attention of its own",
        ),
        (
            lambda: other_model("mpt", d_model=32, n_heads=4, n_layers=2),
            "MptForCausalLM has an attention of its own",
        ),
        (
            lambda: other_model("falcon", hidden_size=32, num_attention_heads=4, alibi=True),
            "FalconForCausalLM has an attention of its own",
        ),
        (
            lambda: other_model(
                "gpt_neo",
                hidden_size=32,
                num_heads=4,
                num_layers=2,
                attention_types=[[["global", "local"], 1]],
                window_size=8,
            ),
            "GPTNeoForCausalLM has an attention of its own",
        ),
        (
            lambda: other_model(
                "stablelm",
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=4,
            ),
            "0 of 2 layers attend through transformers' interface",
        ),
        (
            lambda: other_model(
                "doge",
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
            "2 of 2 layers make a mask of their own",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families_that_cannot_be_packed_are_padded(model: Any, reason: str) -> None:
    result = check(model())
    assert result.layout is not Layout.PACKED and result.reason.startswith(reason)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_rope_that_depends_on_the_length_gets_lone_sequences(kind: str, nested: bool) -> None:
    model = tiny_model("llama")
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    model.config.rope_parameters = {"full_attention": parameters} if nested else parameters
    assert check(model) == PackingCheck(
        Layout.ALONE, f"'{kind}' position embeddings depend on the pass"
    )


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_rope_that_depends_on_positions_alone_is_packed(kind: str) -> None:
    extra = {
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 16},
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }.get(kind, {})
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **extra}
    model = tiny_model("llama", seed=1, rope_parameters=parameters)
    assert check(model).layout is Layout.PACKED


def test_a_learned_prompt_is_not_packed() -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_model("llama", seed=1), prompt)
    assert check(model) == PackingCheck(
        Layout.PADDED, "a learned prompt stands before every sequence"
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "has layers of type chunked_"),
        ({"layer_types": ["linear_attention"] * 2}, "has layers of type linear_attention"),
        ({"index_topk": 64}, "chooses the tokens to attend to over the whole row"),
    ],
)
def test_configs_that_rule_packing_out(fields: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama")
    for name, value in fields.items():
        setattr(model.config, name, value)
    attach_scoring(model)
    expected = expected_layout(model)
    assert expected.layout is Layout.PADDED
    assert expected.reason.startswith(f"LlamaForCausalLM {reason}")


# ---- Models that say nothing and mix tokens all the same ----


class CausalConvolution(nn.Module):
    """Mixes each token with the one before it in the row, whatever segment that is in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states + 0.3 * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1])


class RunningMean(CausalConvolution):
    """Mixes each token with all before it in the row."""

    def forward(self, states: Tensor) -> Tensor:
        count = torch.arange(1, states.shape[1] + 1)[:, None]
        return self.inner(states + 0.3 * (states.float().cumsum(1) / count).to(states.dtype))


class RowMean(CausalConvolution):
    """Mixes each token with all of the row, so that padding changes what it does."""

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states + states.mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mixer", "layout"),
    [
        (CausalConvolution, Layout.PADDED),
        (RunningMean, Layout.PADDED),
        (RowMean, Layout.ALONE),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_mixing_across_segments_is_caught(
    mixer: type[CausalConvolution], layout: Layout, layer: int, dtype: torch.dtype
) -> None:
    model = tiny_model("llama", seed=1)
    model.model.layers[layer].mlp = mixer(model.model.layers[layer].mlp)
    result = check(model.to(dtype))
    assert result.layout is layout
    assert result.reason.startswith("LlamaForCausalLM scores a sequence differently behind anoth")
    assert (", and padding changes its scores by" in result.reason) == (layout is Layout.ALONE)


def test_mixing_of_a_few_tokens_in_a_long_row_is_caught() -> None:
    """In the mean over the row it is less than bf16 rounds."""
    model = tiny_model("llama", seed=1)
    model.model.layers[1].mlp = CausalConvolution(model.model.layers[1].mlp)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 100, (256,), generator=generator) for _ in range(2)]
    assert check(model.bfloat16(), rows).layout is Layout.PADDED


def test_a_layer_that_ignores_restarting_positions_is_caught() -> None:
    model = tiny_model("gpt2", seed=1)
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[-1])[None])
    result = check(model)
    assert result.layout is Layout.PADDED
    assert result.reason.startswith("GPT2LMHeadModel scores a sequence differently behind another")


def test_a_window_that_the_attention_is_not_told_is_caught() -> None:
    """Rows of the check may be shorter than it."""
    model = tiny_model("mistral", seed=1, sliding_window=4096)
    for layer in model.model.layers:
        own = layer.self_attn.forward

        def forward(
            *args: Any, own: Any = own, module: Any = layer.self_attn, **kwargs: Any
        ) -> Any:
            window, module.config.sliding_window = module.config.sliding_window, None
            try:
                return own(*args, **kwargs)
            finally:
                module.config.sliding_window = window

        layer.self_attn.forward = forward
    assert check(model) == PackingCheck(Layout.PADDED, "0 of 2 layers with a sliding window say so")


def test_what_a_model_cannot_run_is_no_reason_to_stop() -> None:
    model = tiny_model("llama", seed=1, attn_implementation="eager")
    own = model.model.forward

    def forward(input_ids: Tensor, use_cache: bool, return_dict: bool) -> Any:
        return own(input_ids=input_ids, use_cache=use_cache, return_dict=return_dict)

    model.model.forward = forward
    result = check(model)
    assert result.layout is Layout.PADDED
    assert result.reason.startswith("LlamaForCausalLM cannot run them (")
    assert model.config._attn_implementation == "eager"  # as it was


def test_only_a_model_that_is_packed_keeps_another_attention() -> None:
    packed = tiny_model("llama", seed=1, attn_implementation="eager")
    assert check(packed).layout is Layout.PACKED
    assert packed.config._attn_implementation == SEGMENTED_EAGER
    padded = tiny_model("llama", seed=1, attn_implementation="eager")
    padded.model.layers[0].mlp = CausalConvolution(padded.model.layers[0].mlp)
    assert check(padded).layout is Layout.PADDED
    assert padded.config._attn_implementation == "eager"


@pytest.mark.parametrize("lengths", [(2, 2), (2, 1), (3, 2), (9, 1), (600, 300), (7,)])
def test_rows_of_any_length_will_do(lengths: tuple[int, ...]) -> None:
    rows = [torch.arange(4, 4 + n) % 100 for n in lengths]
    assert check(tiny_model("llama", seed=1), rows).layout is Layout.PACKED


def test_no_row_to_try_it_on_is_said() -> None:
    assert check(tiny_model("llama"), [torch.tensor([5])]) == PackingCheck(
        Layout.PADDED, "there is no sequence of two tokens to try it on"
    )


def test_a_model_that_is_tried_twice_stays_packed() -> None:
    """Eager attention is put in its place once, and another model's is not touched by it."""
    models = [tiny_model("llama", seed=seed, attn_implementation="eager") for seed in (1, 2)]
    first, second = (check(model) for model in models)
    tokens = torch.arange(10, 30)[None]
    before = models[1](tokens).logits
    again = check(models[0])
    assert [one.layout for one in (first, second, again)] == [Layout.PACKED] * 3
    assert torch.equal(models[1](tokens).logits, before)
