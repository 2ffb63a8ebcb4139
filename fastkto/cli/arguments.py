"""Arguments of `fastkto train` beside `KTOConfig`, under TRL's names and with its defaults."""

from dataclasses import dataclass, field
from typing import NamedTuple

from fastkto.config import KTOConfig


@dataclass
class ModelArguments:
    """The model and its adapter. Names and defaults are those of TRL 1.16's `ModelConfig`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the model to train.", "aliases": ["--model"]},
    )
    ref_model: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the reference. Default: the initial policy."},
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the hub."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights. 'auto': as they were saved.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: eager, sdpa, flash_attention_2, ... Default: the model's."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by alpha / r."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout before the adapter, unless disable_dropout."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get an adapter, or all-linear. Default: peft's choice."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters that get an adapter, such as experts'."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Layers that are trained whole beside the adapter."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by alpha / sqrt(r)."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Quantise the base model to 8 bits (bitsandbytes)."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base model to 4 bits (bitsandbytes)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "4-bit number format.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the 4-bit scales too."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Type in which 4-bit weights are stored."}
    )


@dataclass
class DataArguments:
    """The data. Names and defaults are those of TRL 1.16's `ScriptArguments`."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training rows: a .jsonl, .json, .csv or .parquet file, a folder, or a hub id.",
            "aliases": ["--data"],
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Name of the configuration, for a data set on the hub."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; may have a slice: train[:1000]."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if eval_strategy is set."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Rows to evaluate on: a file, a folder, or a hub id."}
    )


class Arguments(NamedTuple):
    """Everything that `fastkto train` was told."""

    model: ModelArguments
    data: DataArguments
    training: KTOConfig
