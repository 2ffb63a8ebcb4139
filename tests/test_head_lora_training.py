"""A run with a LoRA or DoRA adapter on the output head is that with the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fastkto import KTOConfig, KTOTrainer
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import assert_equal_logs, text_rows

HEAD = "base_model.model.lm_head"


def trained(
    directory: Path, *, frozen_copy: bool, use_dora: bool, **config: Any
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Logs of three steps, and the weights behind them."""
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj", "lm_head"],
        init_lora_weights=False,
        use_rslora=True,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    model = tiny_model("llama", seed=1)
    trainer = KTOTrainer(
        model=get_peft_model(model, adapter) if frozen_copy else model,
        peft_config=None if frozen_copy else adapter,
        args=KTOConfig(
            str(directory),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=4,
            max_steps=3,
            logging_steps=1,
            max_tokens_per_pass=64,
            learning_rate=0.05,
            optim="sgd",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **config,
        ),
        train_dataset=text_rows(12),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("frozen_copy", [False, True], ids=["new adapter", "frozen copy"])
def test_three_steps_equal_those_with_own_logits(
    frozen_copy: bool, use_dora: bool, tmp_path: Path
) -> None:
    kind = {"frozen_copy": frozen_copy, "use_dora": use_dora}
    expected, expected_weights = trained(tmp_path, **kind, head="logits")
    logs, weights = trained(tmp_path, **kind)
    assert len(logs) == 3 and all(log["grad_norm"] > 0.1 for log in logs)
    assert_equal_logs(expected, logs, kl_used=False)
    # The reference is the base model, or what the adapter was at first.
    assert (logs[0]["kl_raw"] == 0.0) == frozen_copy
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-5, msg=name)
    base = tiny_model("llama", seed=1).lm_head.weight
    assert torch.equal(weights[f"{HEAD}.base_layer.weight"], base)
    if frozen_copy:
        for factor in ("lora_A", "lora_B", *["lora_magnitude_vector"] * use_dora):
            frozen, moved = (weights[f"{HEAD}.{factor}.{n}.weight"] for n in ("ref", "default"))
            least = 3e-4 if factor == "lora_magnitude_vector" else 1e-3
            assert (frozen - moved).abs().max() > least
