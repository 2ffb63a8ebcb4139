"""The same small run in LLaMA-Factory's trainer and in ours, in LLaMA-Factory's environment."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llamafactory.data import KTODataCollatorWithPadding, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, FinetuningArguments
from llamafactory.hparams.training_args import TrainingArguments
from peft import LoraConfig, get_peft_model

from tests.models import FAMILIES, tiny_model, tiny_tokenizer
from tests.short_run import SHORT_RUN

STEPS = 4


def kto_rows(count: int = 32, seed: int = 0, label: bool | None = None) -> Dataset:
    """Rows as LLaMA-Factory prepares them, of very different lengths."""
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(6, 109) for _ in range(generator.randint(low, high))]

    prompts = [tokens(1, 12) for _ in range(count)]
    answers = [tokens(1, 14) for _ in range(count)]
    rows = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"kto_tags": generator.random() < 0.5 if label is None else label}
        for prefix, answer in (("", answers[index]), ("kl_", answers[index - 1])):
            row[f"{prefix}input_ids"] = prompt + answer
            row[f"{prefix}attention_mask"] = [1] * len(prompt + answer)
            row[f"{prefix}labels"] = [-100] * len(prompt) + answer
        rows.append(row | {"images": None, "videos": None, "audios": None})
    return Dataset.from_list(rows)


def models(
    family: str, *, lora: bool = False, seeds: tuple[int, int] = (1, 2), **config: Any
) -> tuple[Any, Any]:
    """The policy and the reference model, None if the policy without its adapter is that."""
    model = tiny_model(family, seed=seeds[0], **config)
    if not lora:
        return model, tiny_model(family, seed=seeds[1], **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        targets = list(FAMILIES[family].lora_targets)
        peft_config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, peft_config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first, so that nothing would differ from the reference
                parameter.data.normal_(std=0.2)
    return model, None


def collator(
    template: str = "empty", processor: Any = None, model: Any = None
) -> KTODataCollatorWithPadding:
    """LLaMA-Factory's, as its `run_kto` makes it."""
    tokenizer = tiny_tokenizer() if processor is None else processor.tokenizer
    return KTODataCollatorWithPadding(
        template=get_template_and_fix_tokenizer(tokenizer, DataArguments(template=template)),
        model=model,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        tokenizer=tokenizer,
        processor=processor,
    )


def build(
    kind: Any,
    folder: Path,
    policy: Any,
    reference: Any,
    *,
    finetuning: dict[str, Any] | None = None,
    train_rows: Any = None,
    eval_rows: Any = None,
    processor: Any = None,
    data_collator: Any = None,
    **fields: Any,
) -> Any:
    """A trainer of the class `kind` with copies of the models, as LLaMA-Factory's `run_kto`."""
    fields = {
        **SHORT_RUN,
        "max_steps": STEPS,
        "eval_strategy": "no" if eval_rows is None else "steps",
        "eval_steps": 2,
        "remove_unused_columns": False,
        **fields,
    }
    policy = copy.deepcopy(policy)
    return kind(
        model=policy,
        ref_model=policy if reference == "policy" else copy.deepcopy(reference),
        args=TrainingArguments(output_dir=str(folder), **fields),
        finetuning_args=FinetuningArguments(stage="kto", **(finetuning or {})),
        data_collator=collator() if data_collator is None else data_collator,
        train_dataset=kto_rows() if train_rows is None else train_rows,
        eval_dataset=eval_rows,
        tokenizer=tiny_tokenizer(),
        processor=processor,
    )
