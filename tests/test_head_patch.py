"""The patch on a model is small, undone on request, and refuses heads that it cannot read."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastkto.head import ScoredOutput, attach_scoring, detach_scoring
from tests.models import tiny_model
from tests.scoring import HEADS, INPUT_IDS, SCORED, SMALL_MIB, assert_close, lora, own_scores, score


class TestPatch:
    @pytest.mark.parametrize("head", HEADS)
    def test_generate_and_forward_are_unchanged(self, head: str) -> None:
        model = tiny_model("qwen2", eos_token_id=127).eval()

        def outputs() -> list[Tensor]:
            torch.manual_seed(3)
            options = {"max_new_tokens": 8, "attention_mask": torch.ones_like(INPUT_IDS)}
            return [
                model.generate(INPUT_IDS, do_sample=False, **options),
                model.generate(INPUT_IDS, do_sample=True, **options),
                model.generate(INPUT_IDS, do_sample=False, num_beams=2, **options),
                model(INPUT_IDS, labels=INPUT_IDS).loss,
            ]

        before = outputs()
        attach_scoring(model, head=head)
        score(model)
        attached = outputs()
        with pytest.raises(ValueError, match="not_an_argument"):
            model.generate(INPUT_IDS, not_an_argument=1)
        detach_scoring(model)
        for wanted, *got in zip(before, attached, outputs(), strict=True):
            assert all(torch.equal(wanted, tensor) for tensor in got)

    def test_signature_stays_the_models_own(self) -> None:
        model = tiny_model("llama")
        before = inspect.signature(model.forward)
        attach_scoring(model)
        assert inspect.signature(model.forward) == before

    def test_detaching_restores_the_instance(self) -> None:
        model = tiny_model("llama")
        before = dict(vars(model))
        detach_scoring(model)  # nothing to do yet
        attach_scoring(model)
        attach_scoring(model, head="logits")
        detach_scoring(model)
        assert vars(model) == before
        assert not isinstance(score(model), ScoredOutput)

    def test_attaching_again_changes_the_settings(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        patched = model.forward
        attach_scoring(model, head="logits", head_memory_mib=SMALL_MIB)
        assert model.forward == patched
        rows: list[int] = []
        model.lm_head.register_forward_hook(
            lambda _, inputs, output: rows.append(output[0].size(0))
        )
        score(model)
        assert rows == [3, 3, 1]

    def test_an_instance_forward_from_before_stays_underneath(self) -> None:
        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                Count.calls += 1
                return args, kwargs

        model = tiny_model("llama")
        add_hook_to_module(model, Count())
        hooked = model.forward
        attach_scoring(model)
        model(INPUT_IDS)
        assert Count.calls == 1
        assert_close(score(model).logprob, own_scores(model).logprob)
        detach_scoring(model)
        assert model.forward is hooked

    @pytest.mark.parametrize("head", HEADS)
    def test_forwards_of_parts_are_put_back(self, head: str) -> None:
        model = tiny_model("llama")
        for part in (model.model, model.lm_head):
            add_hook_to_module(part, ModelHook())
        hooked = model.model.forward, model.lm_head.forward
        attach_scoring(model, head=head)
        score(model).logprob.sum().backward()
        assert (model.model.forward, model.lm_head.forward) == hooked

    @pytest.mark.parametrize("wrap", [lambda model: model, lora])
    @pytest.mark.parametrize("head", HEADS)
    def test_a_deep_copy_scores_with_its_own_weights(
        self, head: str, wrap: Callable[..., nn.Module]
    ) -> None:
        model = tiny_model("llama")
        model = model if wrap is not lora else lora(model, target_modules=["q_proj"])
        attach_scoring(model, head=head)
        before = score(model).logprob
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.5)
        assert_close(score(copied).logprob, own_scores(copied).logprob)
        assert (score(copied).logprob - before).abs().max() > 0.01
        assert torch.equal(score(model).logprob, before)
        detach_scoring(copied)
        assert torch.equal(score(model).logprob, before)

    def test_a_pickled_model_comes_back_without_the_patch(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        loaded = pickle.loads(pickle.dumps(model))
        assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)
        attach_scoring(loaded)
        assert torch.equal(score(loaded).logprob, score(model).logprob)

    def test_an_attached_model_is_saved_as_any_other(self, tmp_path: Path) -> None:
        model = tiny_model("gpt2")
        attach_scoring(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits)

    def test_a_replaced_head_is_used(self) -> None:
        model = tiny_model("llama", tied=False)
        attach_scoring(model)
        model.set_output_embeddings(nn.Linear(32, 200))  # more tokens, and a bias
        assert_close(score(model).logprob, own_scores(model).logprob)

    @pytest.mark.parametrize("head", HEADS)
    def test_mixed_precision_of_accelerate_wraps_and_unwraps(self, head: str) -> None:
        model = tiny_model("llama")
        attach_scoring(model, head=head)
        exact = score(model).logprob
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        try:
            model = accelerator.prepare_model(model)
            output = score(model)
            assert isinstance(output, ScoredOutput) and output.logprob.dtype == torch.float32
            assert 1e-5 < (output.logprob - exact).abs().max() < 0.1  # autocast was on
            copied = copy.deepcopy(model)
            with torch.no_grad():
                copied.lm_head.weight.zero_()
            assert torch.allclose(score(copied).logprob[0], torch.tensor(1 / 128).log())

            detach_scoring(model)  # underneath accelerate's wrapper
            assert not isinstance(score(model), ScoredOutput)
            assert model(INPUT_IDS).logits.dtype == torch.float32
            model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            attach_scoring(model, head=head)
            assert torch.equal(score(model).logprob, exact)
            detach_scoring(model)
            assert "forward" not in vars(model)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


class TestErrors:
    def test_trained_tokens_of_a_tied_head(self) -> None:
        model = lora(
            tiny_model("gemma2"), target_modules=["q_proj"], trainable_token_indices=[5, 6]
        )
        with pytest.raises(ValueError, match="peft adapter .*TrainableTokensWrapper"):
            attach_scoring(model)
        attach_scoring(model, head="logits")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_a_quantised_head(self, dtype: torch.dtype) -> None:
        model = tiny_model("llama")
        weight = model.lm_head.weight.detach().to(dtype)
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=f'quantised .*{dtype}.*use head="logits"'):
            attach_scoring(model)

    def test_an_offloaded_head(self) -> None:
        model = tiny_model("llama", tied=False)
        model.lm_head.to("meta")
        attach_scoring(model)
        with pytest.raises(ValueError, match="offloaded; keep the head on a device"):
            score(model)

    def test_a_head_without_weight(self) -> None:
        model = tiny_model("llama")
        model.lm_head = nn.Identity()
        with pytest.raises(ValueError, match="no output head with a weight .got Identity"):
            attach_scoring(model)

    def test_no_language_model(self) -> None:
        with pytest.raises(TypeError, match="model is a Linear, expected a transformers"):
            attach_scoring(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="LlamaModel is not a decoder with a language"):
            attach_scoring(tiny_model("llama").model)

    def test_an_encoder_decoder(self) -> None:
        config = T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
        with pytest.raises(ValueError, match="AutoModelForCausalLM"):
            attach_scoring(T5ForConditionalGeneration(config))

    def test_an_unknown_way(self) -> None:
        with pytest.raises(ValueError, match="head='fast' is unknown"):
            attach_scoring(tiny_model("llama"), head="fast")

    def test_wrong_arguments_of_the_call(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        with pytest.raises(TypeError, match="pass inputs by name and no labels"):
            score(model, labels=INPUT_IDS)
        with pytest.raises(TypeError, match="pass inputs by name and no labels"):
            model(INPUT_IDS, **SCORED)
        with pytest.raises(TypeError, match="score_target needs score_row and score_position"):
            model(input_ids=INPUT_IDS, score_target=SCORED["score_target"])

    def test_logits_of_a_model_that_goes_around_its_decoder(self) -> None:
        model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["opt"](
                vocab_size=128,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=32,
                num_hidden_layers=1,
                num_attention_heads=4,
            )
        )
        attach_scoring(model, head="logits")
        with pytest.raises(ValueError, match="its forward does not call its OPTModel"):
            score(model)
