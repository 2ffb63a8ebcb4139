"""Tiny models of every supported family and a tiny tokenizer, built without a download.

Every number that could hide a mistake is visible: weights are large enough that the logits are far
from uniform, biases and norms are not at their neutral values, and each family's own scale, softcap
or multiplier is far from 1.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128


@dataclass(frozen=True)
class Family:
    """One architecture: its `model_type` and the config fields that differ from the common ones."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    # Names of the linear layers that LoRA is put on in tests.
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")


_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ATTENTION_ONLY = ("q_proj", "v_proj")  # the experts of these families are no linear layers

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("mistral"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family(
        "gemma2",
        {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "gemma3": Family(
        "gemma3_text",
        {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "cohere": Family("cohere", {"logit_scale": 0.4}),
    "cohere2": Family("cohere2", {"logit_scale": 0.4, "sliding_window": 8}),
    "granite": Family("granite", {"logits_scaling": 2.5}),
    "phi": Family("phi", lora_targets=("q_proj", "v_proj", "fc2")),
    "gpt2": Family(
        "gpt2",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 1024,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        lora_targets=("c_attn", "c_proj"),
    ),
    "falcon_h1": Family(
        "falcon_h1",
        {
            "lm_head_multiplier": 0.4,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "mixtral": Family(
        "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, lora_targets=_ATTENTION_ONLY
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        _EXPERTS | {"shared_expert_intermediate_size": 16},
        lora_targets=_ATTENTION_ONLY,
    ),
    "qwen3_moe": Family("qwen3_moe", _EXPERTS, lora_targets=_ATTENTION_ONLY),
}

# Heads unlike any above, in families that not every supported transformers has.
RARE_FAMILIES: dict[str, Family] = {
    "hyperclovax": Family("hyperclovax", {"logits_scaling": 0.4}),
    "minicpm3": Family(
        "minicpm3",
        {
            "dim_model_base": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {
            "logits_soft_cap": 3.0,
            "lru_width": 32,
            "attention_window_size": 16,
            "num_hidden_layers": 3,
        },
    ),
}


def tiny_model(
    family: str,
    *,
    tied: bool | None = None,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A random causal LM of `family` in train mode, the same for the same `seed`, on the CPU.

    `tied` is None for the family's own default. `overrides` are config fields, for example
    `num_hidden_layers=1` or `attn_implementation="eager"`. Global random state is left alone.
    """
    spec = (FAMILIES | RARE_FAMILIES)[family]
    fields = _COMMON | {"vocab_size": vocab_size} | spec.config | overrides
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    attention = fields.pop("attn_implementation", None)
    config = AutoConfig.for_model(spec.model_type, **fields)
    kwargs = {} if attention is None else {"attn_implementation": attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norms start at 0 or 1, which hides mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).train()


_CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>")
# Some merges cross a word's edge, so that texts tokenised together and apart differ.
_MERGES = [(" ", "t"), ("t", "h"), ("e", "r"), ("i", "n"), ("th", "e"), ("a", "n"), ("o", "r")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters and a few merges: 109 tokens, below VOCAB_SIZE.

    It has pad (0), eos (1), bos (2) and unk (3), adds no special token by itself, and has a chat
    template with roles, tools and a generation prompt.
    """
    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    tokens = [*_SPECIAL_TOKENS, *characters, *(left + right for left, right in _MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=_MERGES, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
