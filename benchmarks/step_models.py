"""Random models, a tokenizer of numbered words, and rows of exact lengths, without a download."""

from __future__ import annotations

import math
import random

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.step_cases import SEED, SIZES, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Standard deviation of the logits of a random token. The reference's are wider, which makes random
# tokens less likely under it and the KL estimate positive: clamped to zero, it would prove nothing.
POLICY_LOGITS, REFERENCE_LOGITS = 0.4, 0.6
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def build_model(case: Case, *, reference: bool = False) -> PreTrainedModel:
    """The policy, or a reference that differs from it, on `DEVICE`; the same in every process."""
    size = SIZES[case.size]
    logits = REFERENCE_LOGITS if reference else POLICY_LOGITS
    config = AutoConfig.for_model(
        size.model_type,
        **size.config,
        # the head multiplies states that a norm has given a root mean square of 1
        initializer_range=logits / math.sqrt(size.config["hidden_size"]),
        max_position_embeddings=max(4096, case.longest),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(SEED + reference)
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=size.dtype)


def build_adapter(case: Case) -> LoraConfig | None:
    """An adapter that is random from the start, so that policy and reference differ."""
    if case.tuning == "full":
        return None
    return LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)


def build_tokenizer(case: Case) -> PreTrainedTokenizerFast:
    """Words w3, w4, ...: as many tokens in a text as words, and token n is word n."""
    vocabulary = {token: index for index, token in enumerate(_SPECIAL_TOKENS)}
    words = range(len(_SPECIAL_TOKENS), SIZES[case.size].vocabulary)
    tokenizer = Tokenizer(
        WordLevel(vocabulary | {f"w{index}": index for index in words}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_rows(case: Case) -> Dataset:
    """The rows of one optimizer step: text of random words, as both trainers take it."""
    generator = random.Random(SEED)

    def words(count: int) -> str:
        low, high = len(_SPECIAL_TOKENS), SIZES[case.size].vocabulary - 1
        return " ".join(f"w{generator.randint(low, high)}" for _ in range(count))

    return Dataset.from_list(
        [
            # The trainers append the end-of-sequence token.
            {
                "prompt": words(prompt),
                "completion": " " + words(answer - 1),
                "label": index % 2 == 0,
            }
            for index, (prompt, answer) in enumerate(case.lengths())
        ]
    )
