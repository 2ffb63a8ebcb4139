"""Adapters on 4-bit and 8-bit weights, with bitsandbytes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import fastkto
from fastkto import KTOConfig, KTOTrainer
from fastkto.head_family import read_head
from tests.models import tiny_model, tiny_tokenizer
from tests.short_run import SHORT_RUN
from tests.trl_runs import text_rows

QUANTISED: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True},
    "4 bits stored as floats": {"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"},
    "8 bits": {"load_in_8bit": True},
}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.1}


@pytest.mark.parametrize("bits", list(QUANTISED))
def test_adapter_on_quantised_weights_learns_before_and_after_an_evaluation(
    bits: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    tiny_model("llama", seed=1, **SIZES).save_pretrained(path)
    trainer = KTOTrainer(
        model=str(path),
        args=KTOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        ),
        train_dataset=text_rows(16),
        eval_dataset=text_rows(8, seed=3),
        processing_class=tiny_tokenizer(),
        quantization_config=BitsAndBytesConfig(**QUANTISED[bits]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    assert getattr(trainer.model, f"is_loaded_in_{bits[0]}bit")
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["grad_norm"] > 0 for log in steps] == [True, True]
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations[0]["eval_loss"] != evaluations[1]["eval_loss"]


@pytest.mark.parametrize("bits", list(QUANTISED))
def test_losses_are_trls(bits: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    tiny_model("llama", seed=1, **SIZES).save_pretrained(path)
    settings = SHORT_RUN | {"max_steps": 3, "gradient_checkpointing": False, "bf16": False}

    def logs(library: Any) -> list[dict[str, float]]:
        trainer = library.KTOTrainer(
            model=str(path),
            args=library.KTOConfig(output_dir=str(tmp_path / library.__name__), **settings),
            train_dataset=text_rows(16),
            processing_class=tiny_tokenizer(),
            quantization_config=BitsAndBytesConfig(**QUANTISED[bits]),
            peft_config=LoraConfig(
                r=4,
                target_modules=["q_proj", "v_proj"],
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            ),
        )
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    for theirs, ours in zip(logs(trl), logs(fastkto), strict=True):
        for name in theirs.keys() & {"loss", "kl", "rewards/chosen", "logps/rejected"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("bits", list(QUANTISED))
def test_quantised_head_is_refused(bits: str, tmp_path: Path) -> None:
    tiny_model("llama", seed=1, tied=False, **SIZES).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**QUANTISED[bits], llm_int8_skip_modules=["model.norm"])
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="the output head of LlamaForCausalLM is quantised"):
        read_head(model)
