"""The self-check catches what fastkto does not know about a head, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from fastkto.head import attach_scoring
from fastkto.head_check import HeadMismatchError, check_head
from tests.models import FAMILIES, tiny_model

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [torch.randint(3, 100, (length,), generator=GENERATOR) for length in (40, 12)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_AND_FULL = [torch.float32, torch.bfloat16]


def transformed(
    transform: Callable[[Tensor], Tensor], family: str = "llama", **options: Any
) -> PreTrainedModel:
    """A model that does something to its logits that no config field tells."""
    model = tiny_model(family, **options)
    family_class = type(model)

    class Transformed(family_class):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = transform(output.logits)
            return output

    model.__class__ = Transformed
    return model


BIAS = 0.1 * torch.randn(128, generator=GENERATOR)
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "1 % larger": lambda logits: logits * 1.01,
    "1 % smaller": lambda logits: logits * 0.99,
    "divided": lambda logits: logits / 3.7,
    "softcap": lambda logits: 5 * torch.tanh(logits / 5),
    "bias": lambda logits: logits + BIAS.to(logits.dtype),
    "masked tokens": lambda logits: torch.cat([logits[..., :120], logits[..., 120:] - 1e4], -1),
    "shifted by a token": lambda logits: logits.roll(1, -1),
    "shifted by a position": lambda logits: logits.roll(1, -2),
}


LONG_ROWS = list(torch.randint(3, 100, (2, 300), generator=GENERATOR))


def with_common_logit(common_logit: float) -> PreTrainedModel:
    """Logits with a large part in common, as GPT-2 has: bf16 rounds 100 to half a nat."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.lm_head = nn.Linear(32, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
        model.lm_head.bias.fill_(common_logit)
    return model


class TestAgreement:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_false_alarm_in_a_supported_family(self, family: str, dtype: torch.dtype) -> None:
        model = tiny_model(family, dtype=dtype)
        attach_scoring(model)
        check_head(model, ROWS)
        check_head(model, [ROWS[0][:2]])  # one position is the least that there can be

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("factor", [0.0, 8.0])
    def test_no_false_alarm_in_a_flat_or_a_certain_model(
        self, factor: float, dtype: torch.dtype
    ) -> None:
        model = tiny_model("llama", dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        attach_scoring(model)
        check_head(model, ROWS)

    @pytest.mark.parametrize("common_logit", [-100, -400])
    def test_no_false_alarm_where_logits_are_coarse(self, common_logit: float) -> None:
        model = with_common_logit(common_logit)
        attach_scoring(model)
        check_head(model, LONG_ROWS)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
    def test_no_false_alarm_under_autocast_of_a_wrapper(self, family: str) -> None:
        model = tiny_model(family)
        attach_scoring(model)
        try:
            accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
            model = accelerator.prepare_model(model)
            assert model(ROWS[0][None]).logits.dtype == torch.float32  # they were bf16
            check = check_head(model, ROWS)
            assert check.logprob_error > 1e-4
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def test_no_false_alarm_through_peft_and_ddp(self, tmp_path: Path) -> None:
        lora = get_peft_model(
            tiny_model("qwen2"),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        attach_scoring(lora)
        check_head(lora, ROWS)
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            check_head(DistributedDataParallel(lora), ROWS)
        finally:
            dist.destroy_process_group()

    def test_no_false_alarm_with_virtual_tokens(self) -> None:
        config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_model("llama"), config)
        attach_scoring(model)
        check_head(model, ROWS)

    def test_tolerance_follows_the_precision(self) -> None:
        tolerances = []
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model = tiny_model("llama", dtype=dtype)
            attach_scoring(model)
            tolerances.append(check_head(model, ROWS).logprob_tolerance)
        assert tolerances == sorted(tolerances) and tolerances[0] < 2e-3
        model = tiny_model("llama")
        attach_scoring(model)
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            assert check_head(model, ROWS).logprob_tolerance > 2 * tolerances[0]
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


class TestMismatch:
    @pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
    @pytest.mark.parametrize("unknown", UNKNOWN)
    def test_an_unknown_transform_is_caught_and_scored_by_logits(
        self, unknown: str, dtype: torch.dtype
    ) -> None:
        model = transformed(UNKNOWN[unknown], dtype=dtype)
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match='Transformed does: .* set head="logits"'):
            check_head(model, ROWS)

        if unknown == "shifted by a position":
            return  # which no scoring of single positions can follow
        attach_scoring(model, head="logits")
        check_head(model, ROWS)
        tokens = ROWS[0]
        positions = torch.arange(-len(tokens), -1)
        got = model(
            input_ids=tokens[None],
            score_row=torch.zeros_like(positions),
            score_position=positions,
            score_target=tokens[1:],
        ).logprob
        own = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
        own = own.gather(1, tokens[1:, None])[:, 0]
        # bf16 logits of a slice and of a row may round differently
        assert (got - own).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_percent_of_scale_is_caught_in_bf16_in_every_family(self, family: str) -> None:
        model = transformed(lambda logits: logits * 1.01, family, dtype=torch.bfloat16)
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match=r"off by -[01]\.\d+%"):
            check_head(model, ROWS)

    def test_one_percent_shows_beside_a_large_common_logit(self) -> None:
        model = with_common_logit(-100)
        model.config.logit_scale = 0.99  # Llama's forward does not know it
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match=r"off by -[01]\.\d+%"):
            check_head(model, LONG_ROWS)

    def test_one_percent_shows_in_a_certain_model(self) -> None:
        model = transformed(lambda logits: logits * 1.01, dtype=torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match="off by -0.9"):
            check_head(model, ROWS)

    def test_the_message_says_by_how_much_and_on_what(self) -> None:
        model = transformed(lambda logits: logits * 2, dtype=torch.bfloat16)
        attach_scoring(model)
        with pytest.raises(
            HeadMismatchError,
            match=r"on 2 rows of 40, 12 tokens, logits in bfloat16, .* off by -50\.\d+% "
            r"\(allowed: 0\.\d+%\) and log-probabilities by \d\.\d+ nats",
        ):
            check_head(model, ROWS)

    def test_a_model_that_changes_from_call_to_call_is_named_so(self) -> None:
        calls: list[int] = []

        def changing(logits: Tensor) -> Tensor:
            calls.append(1)
            return logits * len(calls)

        model = transformed(changing)
        attach_scoring(model, head="logits")
        with pytest.raises(HeadMismatchError, match="different logits from one call to the next"):
            check_head(model, ROWS)


def with_a_bad_token(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Tensor]]:
    """`model`, whose embedding of a token is NaN, and rows of which the longer one has it."""
    with torch.no_grad():
        model.get_input_embeddings().weight[101] = torch.nan
    return model, [torch.cat([ROWS[0], torch.tensor([101, 5])]), ROWS[1]]


class TestNotFinite:
    @pytest.mark.parametrize("head", ["auto", "logits"])
    def test_a_row_that_is_not_finite_is_left_out(self, head: str) -> None:
        model, rows = with_a_bad_token(tiny_model("llama"))
        attach_scoring(model, head=head)
        assert check_head(model, rows) == check_head(model, ROWS[1:])

    def test_the_other_row_still_shows_a_mismatch(self) -> None:
        model, rows = with_a_bad_token(transformed(lambda logits: logits * 1.01))
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match=r"off by -[01]\.\d+%"):
            check_head(model, rows)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_logits_alone_that_are_not_finite(self, value: float) -> None:
        """What the head makes of finite hidden states is the model's, and fastkto does not see."""

        def spoil(logits: Tensor) -> Tensor:
            return logits.index_fill(-1, ROWS[1][5:6], value)

        model = transformed(spoil)
        attach_scoring(model)
        text = (
            r"Transformed, in float32, are not finite for \d+ tokens of real rows where fastkto's"
        )
        with pytest.raises(HeadMismatchError, match=text + '.*if it masks tokens, set head="logi'):
            check_head(model, ROWS)

    def test_scores_alone_that_are_not_finite(self) -> None:
        model = transformed(lambda logits: logits.nan_to_num(0.5))
        with torch.no_grad():
            model.lm_head.weight[7] = torch.nan
        attach_scoring(model)
        with pytest.raises(HeadMismatchError, match="are finite for .* where fastkto's .* are not"):
            check_head(model, ROWS)

    def test_masked_tokens_do_not_widen_what_is_allowed(self) -> None:
        def mask(logits: Tensor) -> Tensor:
            return logits.index_fill(-1, torch.arange(101, 128), -torch.inf)

        model = transformed(mask)
        attach_scoring(model, head="logits")
        assert check_head(model, ROWS).logprob_tolerance < 2e-3


class TestManners:
    def test_modes_and_random_states_are_left_alone(self) -> None:
        model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        model.transformer.h[1].eval()
        model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
        attach_scoring(model)
        modes = [module.training for module in model.modules()]
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        check_head(model, ROWS)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), str(np.random.get_state())) == states[1:]
        assert model.transformer.wte.weight.grad.sum() == model.transformer.wte.weight.numel()
        assert not model.lm_head._forward_hooks

    def test_it_keeps_no_graph(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        grad_modes: list[bool] = []
        model.model.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
        check_head(model, ROWS)
        assert grad_modes == [False] * 4

    def test_modes_come_back_after_a_mismatch(self) -> None:
        model = transformed(lambda logits: logits * 2)
        attach_scoring(model)
        with pytest.raises(HeadMismatchError):
            check_head(model, ROWS)
        assert all(module.training for module in model.modules())

    def test_it_reads_two_rows_of_512_tokens(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        shapes: list[tuple[int, ...]] = []
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        check_head(model, [[5, 6, 7] * 200, [9, 8, 7], [4, 5, 6]])
        assert shapes == [(1, 512), (1, 512), (1, 3), (1, 3)]


class TestErrors:
    @pytest.mark.parametrize("rows", [[], [[5]]])
    def test_nothing_to_compare(self, rows: list[list[int]]) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        with pytest.raises(ValueError, match="no sequence of two tokens or more"):
            check_head(model, rows)

    def test_no_scoring_attached(self) -> None:
        with pytest.raises(ValueError, match="call attach_scoring.model. first"):
            check_head(tiny_model("llama"), ROWS)

    def test_logits_that_are_not_finite(self) -> None:
        model = tiny_model("llama")
        attach_scoring(model)
        with torch.no_grad():
            model.lm_head.weight[7] = float("nan")
        text = "logits of LlamaForCausalLM, in float32, are not finite on real rows"
        with pytest.raises(ValueError, match=text):
            check_head(model, ROWS)
