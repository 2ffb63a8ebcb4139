"""Which models have a table of positions, and how long it is; how many tokens they know."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastkto.embeddings import smallest_vocabulary, vocabulary
from fastkto.positions import fewest_positions, num_positions

_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
_GPT = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4}
WITH_TABLE: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "openai-gpt": _GPT,
    "ctrl": {**_GPT, "dff": 32},
    "opt": {**_SIZES, "max_position_embeddings": 32, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "gpt_neo": {
        "max_position_embeddings": 32,
        "hidden_size": 32,
        "num_layers": 1,
        "attention_types": [[["global"], 1]],
        "num_heads": 4,
    },
    "biogpt": {**_SIZES, "max_position_embeddings": 32, "intermediate_size": 32},
    # positions begin behind the padding token's, 1
    "roberta": {**_SIZES, "max_position_embeddings": 34, "intermediate_size": 32},
    "mpt": {"max_seq_len": 32, "d_model": 32, "n_heads": 4, "n_layers": 1},
}
WITHOUT: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "max_position_embeddings": 32, "intermediate_size": 32},
    "gpt_neox": {**_SIZES, "max_position_embeddings": 32, "intermediate_size": 32},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
}


def model_of(family: str, fields: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(family, vocab_size=64, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


def run(model: Any, length: int) -> None:
    ids = torch.full((1, length), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("family", WITH_TABLE)
def test_a_table_is_found_where_longer_sequences_fail(family: str) -> None:
    model = model_of(family, WITH_TABLE[family])
    assert num_positions(model) == 32
    run(model, 32)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, 33)


@pytest.mark.parametrize("family", WITHOUT)
def test_no_table_is_found_where_longer_sequences_run(family: str) -> None:
    model = model_of(family, WITHOUT[family])
    assert num_positions(model) is None
    run(model, 40)


def test_the_shorter_table_counts() -> None:
    short, long = (model_of("gpt2", {**_GPT, "n_positions": size}) for size in (16, 32))
    assert fewest_positions(None, long, model_of("llama", WITHOUT["llama"]), short) == 16
    assert fewest_positions(None) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["wte", "wpe"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1, 2]}},
    ],
    ids=["LoRA", "saved", "some tokens"],
)
def test_adapters_on_embeddings_change_neither(fields: dict[str, Any]) -> None:
    policy = get_peft_model(model_of("gpt2", _GPT), LoraConfig(task_type="CAUSAL_LM", **fields))
    assert (num_positions(policy), vocabulary(policy)) == (32, 64)
    assert smallest_vocabulary(None, policy) == 64


def test_learned_prompts_take_positions() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    policy = get_peft_model(model_of("gpt2", _GPT), config)
    assert num_positions(policy) == 28
    run(policy, 28)
    with pytest.raises(IndexError):
        run(policy, 29)
    policy.add_adapter("ref", config)  # the frozen copy that is a run's reference
    assert num_positions(policy) == 28
