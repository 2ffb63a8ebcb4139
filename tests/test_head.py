"""Scores from inside a model equal those from its own logits, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastkto.head import attach_scoring, detach_scoring
from tests.models import FAMILIES, RARE_FAMILIES, tiny_model
from tests.scoring import (
    HEADS,
    INPUT_IDS,
    SMALL_MIB,
    assert_close,
    assert_scores_are_own,
    gradients,
    lora,
    own_scores,
    score,
)


class TestScores:
    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_family_scores_as_its_own_logits(self, family: str, tied: bool, head: str) -> None:
        model = tiny_model(family, tied=tied)
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embedding.weight is output.weight) == tied
        assert_scores_are_own(model, head)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_family_with_lora_scores_as_its_own_logits(self, family: str, head: str) -> None:
        model = lora(tiny_model(family), target_modules=list(FAMILIES[family].lora_targets))
        assert_scores_are_own(model, head)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("family", RARE_FAMILIES)
    def test_rare_family_scores_as_its_own_logits(self, family: str, head: str) -> None:
        if RARE_FAMILIES[family].model_type not in CONFIG_MAPPING:
            pytest.skip(f"this transformers has no {family}")
        assert_scores_are_own(tiny_model(family), head)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("num_virtual_tokens", [3])
    @pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
    def test_virtual_tokens_do_not_shift_positions(
        self, config: type, num_virtual_tokens: int, head: str
    ) -> None:
        model = get_peft_model(
            tiny_model("llama"),
            config(num_virtual_tokens=num_virtual_tokens, task_type="CAUSAL_LM"),
        )
        assert_scores_are_own(model, head)

    @pytest.mark.parametrize("head", HEADS)
    def test_a_fully_trained_head_beside_lora_is_used(self, head: str) -> None:
        model = lora(tiny_model("phi"), target_modules=["q_proj"], modules_to_save=["lm_head"])
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
        assert_scores_are_own(model, head)
        with model.disable_adapter():
            attach_scoring(model, head=head)
            got = score(model).logprob
            detach_scoring(model)
            assert_close(got, own_scores(model).logprob)

    def test_lora_on_the_head_is_scored_by_logits(self) -> None:
        assert_scores_are_own(lora(tiny_model("llama"), target_modules=["lm_head"]), "logits")

    @pytest.mark.parametrize("head", HEADS)
    def test_gradient_checkpointing_of_the_model_changes_nothing(self, head: str) -> None:
        model = tiny_model("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_scores_are_own(model, head)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    def test_router_logits_come_out_when_asked_for(self, family: str, head: str) -> None:
        model = tiny_model(family)
        expected = model(input_ids=INPUT_IDS, output_router_logits=True).router_logits
        attach_scoring(model, head=head)
        assert score(model).router_logits is None
        output = score(model, output_router_logits=True)
        assert len(output.router_logits) == len(expected) == 2
        for got, wanted in zip(output.router_logits, expected, strict=True):
            assert_close(got, wanted)
        model.config.output_router_logits = True  # as the model's own forward follows it
        assert score(model).router_logits is not None
        assert_close(score(model).logprob, output.logprob)

    @pytest.mark.parametrize("head", HEADS)
    def test_no_tokens_to_score_give_empty_scores_with_a_graph(self, head: str) -> None:
        model = tiny_model("llama")
        attach_scoring(model, head=head)
        empty = torch.zeros(0, dtype=torch.int64)
        output = model(
            input_ids=INPUT_IDS, score_row=empty, score_position=empty, score_target=empty
        )
        output.logprob.sum().backward()
        assert output.logprob.shape == (0,)
        assert model.lm_head.weight.grad.abs().sum() == 0

    def test_logits_are_sliced_and_the_decoder_runs_once(self) -> None:
        model = tiny_model("gemma2")
        rows: list[int] = []
        layers: list[int] = []
        model.lm_head.register_forward_hook(
            lambda _, inputs, output: rows.append(output[0].size(0))
        )
        model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
        attach_scoring(model, head="logits", head_memory_mib=SMALL_MIB)
        logprob = score(model).logprob
        assert (rows, layers) == ([3, 3, 1], [1])
        logprob.sum().backward()
        assert (sorted(rows), layers) == ([1, 1, 3, 3, 3, 3], [1])  # slices again, decoder not

    def test_a_compiled_model_scores_the_same(self) -> None:
        model = tiny_model("llama", num_hidden_layers=1)
        expected = own_scores(model)
        attach_scoring(model)
        compiled = torch.compile(model, backend="eager")
        assert_close(score(compiled).logprob, expected.logprob)

    def test_a_sharded_weight_is_gathered(self, tmp_path: Path) -> None:
        model = tiny_model("phi")
        expected = own_scores(model)
        expected_gradients = gradients(model, expected.logprob)
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            for name in ("weight", "bias"):
                whole = getattr(model.lm_head, name).detach()
                sharded = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
                setattr(model.lm_head, name, sharded)
            attach_scoring(model)
            logprob = score(model).logprob
            assert_close(logprob, expected.logprob)
            got = gradients(model, logprob)
            for name in ("lm_head.weight", "lm_head.bias"):
                assert_close(got[name].full_tensor(), expected_gradients[name])
        finally:
            dist.destroy_process_group()
