"""Fields of a configuration: LLaMA-Factory's `run_exp` with its own trainer, and with ours."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("llamafactory", reason="needs tests/llamafactory_environment.sh")

from llamafactory.hparams import parser
from llamafactory.train import tuner
from safetensors.torch import load_file

from fastkto.integrations.llamafactory import patch, unpatch
from tests.llamafactory_runs import models
from tests.models import tiny_model, tiny_tokenizer
from tests.test_llamafactory import NOT_COMPARED, assert_equal_logs
from tests.test_llamafactory_launch import OURS_ALONE, losses, write_run

COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.2,
    "seed": 3,  # with which hardly any run has a KL estimate of 0 at all steps
    "disable_tqdm": True,
}
LORA = {"finetuning_type": "lora"}
ADAM = {"optim": "adamw_torch", "adam_epsilon": 0.01}  # small gradients stay small steps
# `MODELS` stands for a folder of models and adapters.
RUNS: dict[str, dict[str, Any]] = {
    # Optimizers that no other test runs
    "adam-mini": {"use_adam_mini": True, "learning_rate": 0.003},
    "apollo": {"use_apollo": True, "apollo_target": "all", "apollo_rank": 4, **ADAM},
    "lora+": {
        **LORA,
        "loraplus_lr_ratio": 4.0,
        "loraplus_lr_embedding": 0.01,
        "lora_target": "embed_tokens,q_proj,up_proj",
    },
    # References
    "ref_model": {**LORA, "model_name_or_path": "MODELS/second", "ref_model": "MODELS/first"},
    "ref_model and two adapters": {
        "model_name_or_path": "MODELS/second",
        "ref_model": "MODELS/first",
        "ref_model_adapters": "MODELS/adapter,MODELS/other_adapter",
    },
    "ref_model in 4 bits": {
        **LORA,
        "model_name_or_path": "MODELS/second",
        "ref_model": "MODELS/wide",
        "ref_model_quantization_bit": 4,
    },
    # Adapters
    "two adapters": {**LORA, "adapter_name_or_path": "MODELS/adapter,MODELS/other_adapter"},
    "a new adapter on two": {
        **LORA,
        "adapter_name_or_path": "MODELS/adapter,MODELS/other_adapter",
        "create_new_adapter": True,
        "seed": 42,
    },
    "an adapter is evaluated": {
        **LORA,
        "adapter_name_or_path": "MODELS/adapter",
        "do_train": False,
        "do_eval": True,
        "val_size": 0.3,
    },
    "pissa_convert": {**LORA, "pissa_convert": True},
    "dora": {**LORA, "use_dora": True},
    "rslora": {**LORA, "use_rslora": True, "lora_dropout": 0.5, "lora_rank": 4, "lora_alpha": 2},
    "oft": {"finetuning_type": "oft", "oft_rank": 0, "oft_block_size": 4, "module_dropout": 0.5},
    "additional_target": {**LORA, "additional_target": "norm,lm_head"},
    "tied additional_target": {
        **LORA,
        "model_name_or_path": "MODELS/tied",
        "additional_target": "embed_tokens",
    },
    "resize_vocab": {**LORA, "add_special_tokens": "<one>,<two>", "resize_vocab": True},
    "8 bits": {**LORA, "quantization_bit": 8, "upcast_layernorm": True},
    # Frozen parts
    "freeze": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": -1,
        "freeze_trainable_modules": "mlp,input_layernorm",
        "freeze_extra_modules": "lm_head",
    },
    "llama pro": {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": 2,
        "use_llama_pro": True,
    },
    # Models
    "upcast_layernorm": {**LORA, "bf16": True, "upcast_layernorm": True},
    "pure_bf16": {**LORA, "model_name_or_path": "MODELS/half", "pure_bf16": True},
    "moe_aux_loss_coef": {"model_name_or_path": "MODELS/experts", "moe_aux_loss_coef": 0.1},
    "train_from_scratch": {"train_from_scratch": True, "flash_attn": "disabled"},
    # Around the run
    "stops early": {
        "early_stopping_steps": 1,
        "max_steps": 8,
        "eval_dataset": "rows",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins",
        "greater_is_better": False,
    },
    "eval_on_each_dataset": {
        "eval_dataset": "rows",
        "eval_on_each_dataset": True,
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "plot_loss": True,
    },
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5, "max_samples": 10, "warmup_steps": 1},
    "streaming": {"streaming": True, "dataloader_num_workers": 1, "val_size": 4, "do_eval": True},
    "not used": {
        "packing": True,  # shortens cutoff_len by one
        "include_effective_tokens_per_second": True,
        "compute_accuracy": True,
        "include_num_input_tokens_seen": "non_padding",
        "oft_target": "nothing",
    },
}
ROUNDED = ("upcast_layernorm", "pure_bf16")  # bf16 rounds passes and padded batches differently


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in (
        ("first", tiny_model("llama", seed=1)),
        ("second", tiny_model("llama", seed=2)),
        ("tied", tiny_model("llama", seed=2, tied=True)),
        # bitsandbytes repacks narrower layers wrongly in eval mode on some CPUs
        ("wide", tiny_model("llama", seed=1, hidden_size=128, intermediate_size=256, head_dim=32)),
        ("half", tiny_model("llama", seed=1, dtype=torch.bfloat16)),
        ("experts", tiny_model("mixtral", seed=2)),
    ):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    adapted, _ = models("llama", lora=True)
    adapted.save_pretrained(folder / "adapter")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-0.5)
    adapted.save_pretrained(folder / "other_adapter")
    gc.freeze()  # each run collects garbage, and need not look at all that was imported
    yield folder
    gc.unfreeze()


def run(folder: Path, name: str, **fields: Any) -> Path:
    """What LLaMA-Factory leaves of a run of the given fields, with our trainer if name is ours."""
    config = yaml.safe_load(write_run(folder, name, **{**COMMON, **fields}).read_text())
    if name == "ours":
        patch(max_tokens_per_pass=40)
    try:
        tuner.run_exp(config)
    finally:
        unpatch()
    return folder / name


def logs(folder: Path) -> list[dict[str, Any]]:
    """Those of several evaluation sets under one name, which LLaMA-Factory gives all of them."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{name.replace("eval_rows_", "eval_"): log[name] for name in log} for log in history]


def assert_equal_results(theirs: Path, ours: Path) -> None:
    """The last values of training and of evaluation, as LLaMA-Factory prints them."""
    expected, actual = (
        {name.replace("eval_rows_", "eval_"): value for name, value in results.items()}
        for results in (
            json.loads((folder / "all_results.json").read_text()) for folder in (theirs, ours)
        )
    )
    assert set(actual) - OURS_ALONE == set(expected) - {"kl"}
    for name in set(expected) & set(actual):
        if "logits/" not in name and not any(part in name for part in NOT_COMPARED):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


def assert_equal_files(theirs: Path, ours: Path, atol: float = 1e-5) -> None:
    """The same names, and the same weights in them: of models, adapters and checkpoints."""
    names, own_names = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (theirs, ours)
    )
    assert own_names == names
    for name in names:
        if name.suffix != ".safetensors":
            continue
        expected, actual = load_file(theirs / name), load_file(ours / name)
        assert actual.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(actual[key], weight, rtol=1e-4, atol=atol, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same(tmp_path: Path, saved: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(parser, "is_torch_bf16_gpu_available", lambda: True)  # for pure_bf16
    fields = {
        key: value.replace("MODELS", str(saved)) if isinstance(value, str) else value
        for key, value in RUNS[name].items()
    }
    theirs, ours = (run(tmp_path, one, **fields) for one in ("theirs", "ours"))
    if name in ROUNDED:
        assert losses(ours) == pytest.approx(losses(theirs), abs=2e-2)
        assert_equal_files(theirs, ours, atol=5e-3)
        return
    if fields.get("do_train", True):
        assert_equal_logs(logs(theirs), logs(ours))
    assert_equal_results(theirs, ours)
    assert_equal_files(theirs, ours)


def test_adapters_on_4_bits_are_the_same(tmp_path: Path) -> None:
    theirs, ours = (run(tmp_path, one, **LORA, quantization_bit=4) for one in ("theirs", "ours"))
    assert_equal_logs(logs(theirs), logs(ours))
    assert_equal_files(theirs, ours)


def test_overwriting_does_not_resume(tmp_path: Path) -> None:
    expected = run(tmp_path, "theirs")
    run(tmp_path, "ours", learning_rate=0.1)
    actual = run(tmp_path, "ours", overwrite_output_dir=True)
    assert_equal_logs(logs(expected), logs(actual))
    assert_equal_files(expected, actual)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neat_packing": True}, "`neat_packing` cannot be set as True except SFT"),
        ({"train_on_prompt": True}, "`train_on_prompt` or `mask_history` cannot be set as True"),
        ({"mask_history": True}, "`train_on_prompt` or `mask_history` cannot be set as True"),
        ({"predict_with_generate": True}, "`predict_with_generate` cannot be set as True"),
        ({**LORA, "pissa_init": True}, "Cannot use PiSSA for current training stage"),
        # with transformers 5.6 and LLaMA-Factory's version check off
        ({"shift_attn": True}, "transformers>=4.45.0,<4.48.0 is required"),
        ({"rope_scaling": "yarn", "cutoff_len": 2048}, "'max_position_embeddings' expected int"),
        ({"add_tokens": "<one>"}, "'list' object has no attribute 'split'"),
        ({**LORA, "use_adam_mini": True}, "shape .* is invalid for input of size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_llamafactory_itself_fails(tmp_path: Path, fields: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(tmp_path, "theirs", **fields)
