"""Trainers whose runs on a CPU are compared with what was estimated for them."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from fastkto import KTOConfig, KTOTrainer
from tests.models import tiny_model, tiny_tokenizer

LENGTH = 256
HEAD_MIB = 8


def trainer_of(
    folder: Path,
    *,
    lora: bool | list[str] = False,
    use_dora: bool = False,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> KTOTrainer:
    """A trainer of 6 million parameters whose rows have LENGTH tokens, a pass to each row.

    model: arguments of `tiny_model` that differ.
    lora: an adapter, on all linear layers but the head or on those that are named.
    """
    tokenizer = tiny_tokenizer()
    rows = [
        {"prompt": "p" * 32, "completion": "c" * LENGTH, "label": index % 2 == 0}
        for index in range(4)
    ]
    defaults: dict[str, Any] = {"family": "llama", "vocab_size": 8000, "tied": False}
    defaults |= {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "head_dim": 64,
    }
    values: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False, "report_to": "none"}
    values |= {"max_tokens_per_pass": LENGTH, "per_device_train_batch_size": 2, **fields}
    args = KTOConfig(
        str(folder),
        use_cpu=True,
        per_device_eval_batch_size=2,
        max_length=LENGTH,
        head_memory_mib=HEAD_MIB,
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **values,
    )
    dataset = Dataset.from_list(rows)
    return KTOTrainer(
        model=tiny_model(**defaults | (model or {})),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            target_modules="all-linear" if lora is True else lora,
            r=8,
            use_dora=use_dora,
        )
        if lora
        else None,
    )
