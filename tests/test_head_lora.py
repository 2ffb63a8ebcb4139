"""A LoRA or DoRA adapter on the output head is scored without being merged, or refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastkto.head import attach_scoring, detach_scoring
from fastkto.head_check import HeadMismatchError, check_head
from fastkto.head_family import read_head
from fastkto.head_scores import score_by_weight
from fastkto.policy import disable_dropout
from tests.conftest import HAS_TRITON
from tests.largest_tensor import LargestTensor
from tests.models import tiny_model
from tests.scoring import (
    SMALL_MIB,
    assert_close,
    assert_scores_are_own,
    gradients,
    lora,
    own_scores,
    randomise_lora,
    score,
)

HEAD = {"target_modules": ["q_proj", "lm_head"]}
BACKENDS = ["torch"] + ["triton"] * (HAS_TRITON and not torch.cuda.is_available())
ROWS = [torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(0))]


def head_of(model: nn.Module) -> LoraLinear:
    return model.get_base_model().get_output_embeddings()


def two_adapters() -> nn.Module:
    model = lora(tiny_model("llama"), **HEAD, lora_alpha=3)
    model.add_adapter("second", LoraConfig(r=3, **HEAD, use_rslora=True))
    randomise_lora(model)
    model.base_model.set_adapter(["default", "second"])
    return model


def everything_trained(**config: Any) -> nn.Module:
    return lora(tiny_model("phi"), target_modules=["lm_head"], **config).requires_grad_(True)


def dora(family: str, **config: Any) -> nn.Module:
    """With magnitudes that are not the norms, some of them negative."""
    return lora(tiny_model(family), **HEAD, use_dora=True, **config)


def dora_with_dropout_off() -> nn.Module:
    """As `disable_dropout=True` leaves it; peft multiplies by the weight once more then."""
    model = dora("phi", lora_dropout=0.5)
    disable_dropout(model)
    return model


MODELS = {
    "plain": lambda: lora(tiny_model("llama"), **HEAD),
    "rsLoRA": lambda: lora(tiny_model("llama"), **HEAD, r=4, lora_alpha=3, use_rslora=True),
    "rank 1": lambda: lora(tiny_model("llama"), **HEAD, r=1, lora_alpha=1),
    "head alone": lambda: lora(tiny_model("llama"), target_modules=["lm_head"]),
    "bias": lambda: lora(tiny_model("phi"), **HEAD),
    "bias of the adapter": lambda: lora(tiny_model("llama"), **HEAD, lora_bias=True),
    "both biases": lambda: lora(tiny_model("phi"), **HEAD, lora_bias=True),
    "scale": lambda: lora(tiny_model("granite"), **HEAD),
    "softcap and tied": lambda: lora(tiny_model("gemma2"), **HEAD),
    "two adapters": two_adapters,
    "everything trained": everything_trained,
    "DoRA": lambda: dora("llama"),
    "DoRA, rank-stabilised": lambda: dora("llama", r=4, lora_alpha=3, use_rslora=True),
    "DoRA, bias": lambda: dora("phi"),
    "DoRA, scale": lambda: dora("granite"),
    "DoRA, softcap and tied": lambda: dora("gemma2"),
    "DoRA, dropout off": dora_with_dropout_off,
    "DoRA, everything trained": lambda: everything_trained(use_dora=True),
}


def bf16_errors(precision: str, head: str, seed: int, *, use_dora: bool) -> dict[str, float]:
    """Relative errors of the log-probabilities and of each gradient, against fp64."""
    dtype = torch.float32 if precision == "autocast" else torch.bfloat16
    model = tiny_model("llama", seed=seed, dtype=dtype)
    model = lora(model, **HEAD, use_rslora=True, use_dora=use_dora)
    if precision == "bf16":
        model.to(torch.bfloat16)
    assert head_of(model).lora_A["default"].weight.dtype == (
        torch.bfloat16 if precision == "bf16" else torch.float32
    )
    truth = copy.deepcopy(model).double()
    true_logprob = own_scores(truth).logprob
    true_gradients = gradients(truth, true_logprob)
    attach_scoring(model, head=head)
    is_autocast = precision == "autocast"
    with torch.autocast("cpu", torch.bfloat16) if is_autocast else nullcontext():
        logprob = score(model).logprob
    pairs = {"logprob": (logprob.detach(), true_logprob.detach())}
    for name, gradient in gradients(model, logprob).items():
        assert gradient.dtype == model.get_parameter(name).dtype
        pairs[name] = gradient, true_gradients[name]
    return {n: float((a - b).norm() / b.norm()) for n, (a, b) in pairs.items()}


class TestScores:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_scores_and_gradients_are_those_of_fp64(self, name: str, backend: str) -> None:
        model = MODELS[name]()
        truth = copy.deepcopy(model).double()
        assert_scores_are_own(model, "auto", backend=backend, truth=truth)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    def test_factors_that_are_those_of_the_embedding(self, use_dora: bool) -> None:
        model = lora(
            tiny_model("llama", tied=True),
            target_modules=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
            use_dora=use_dora,
        )
        embedding, head = model.get_base_model().get_input_embeddings(), head_of(model)
        factor = embedding.lora_embedding_A["default"]
        if head.lora_B["default"].weight.data_ptr() != factor.data_ptr():
            pytest.skip("this peft does not tie adapters")
        assert_scores_are_own(model, "auto")

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    @pytest.mark.parametrize("merged", [False, True])
    def test_without_the_adapter_it_is_the_base_model(self, merged: bool, use_dora: bool) -> None:
        model = lora(tiny_model("llama", tied=False), **HEAD, use_dora=use_dora)
        base = own_scores(tiny_model("llama", tied=False)).logprob
        attach_scoring(model)
        if merged:  # which peft undoes when adapters are switched off
            model.merge_adapter()
        adapted = score(model).logprob
        with model.disable_adapter():
            assert_close(score(model).logprob, base)
        assert (adapted - base).abs().max() > 0.1
        assert_close(score(model).logprob, adapted)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    def test_merged_into_the_weight_it_is_not_added_again(self, use_dora: bool) -> None:
        model = lora(tiny_model("llama", tied=False), **HEAD, use_dora=use_dora)
        adapted = own_scores(model).logprob
        model.merge_adapter()
        attach_scoring(model)
        assert_close(score(model).logprob, adapted)

    def test_another_adapter_is_used_when_it_is_active(self) -> None:
        model = two_adapters()
        attach_scoring(model)
        scores = []
        for name in ("default", "second"):
            model.set_adapter(name)
            scores.append(score(model).logprob)
            assert_close(scores[-1], own_scores(model).logprob)
        assert (scores[0] - scores[1]).abs().max() > 0.1

    def test_dropout_is_that_of_the_models_own_logits(self) -> None:
        model = lora(tiny_model("llama"), **HEAD, lora_dropout=0.5)
        undropped = own_scores(copy.deepcopy(model).eval()).logprob

        def scored(head: str, **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
            attach_scoring(model, head=head, **options)
            torch.manual_seed(5)
            logprob = score(model).logprob
            return logprob.detach(), gradients(model, logprob)

        expected, expected_gradients = scored("logits")  # in one slice, so one mask
        got, got_gradients = scored("auto", head_memory_mib=SMALL_MIB)
        assert (got - undropped).abs().max() > 0.05
        assert_close(got, expected)
        for name, gradient in expected_gradients.items():
            assert_close(got_gradients[name], gradient, name)
        assert_close(score(model.eval()).logprob, undropped)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    @pytest.mark.parametrize("precision", ["autocast", "bf16", "bf16 below fp32 adapters"])
    def test_bf16_is_no_less_exact_than_the_models_own_logits(
        self, precision: str, use_dora: bool
    ) -> None:
        """RMS over models: in a single one, errors depend on how the CPU adds up products."""
        own, ours = [], []
        for seed in range(8):
            own.append(bf16_errors(precision, "logits", seed, use_dora=use_dora))
            ours.append(bf16_errors(precision, "auto", seed, use_dora=use_dora))
        for name in own[0]:
            expected, error = (
                sum(one[name] ** 2 for one in errors) ** 0.5 / len(errors) ** 0.5
                for errors in (own, ours)
            )
            assert expected < 0.3  # else nothing would be compared
            assert error < 1.2 * expected + 2e-3, name

    def test_a_factor_is_not_rounded_beside_a_bf16_head(self) -> None:
        """Scores follow a change of the magnitudes that bf16 could not represent."""
        model = lora(tiny_model("llama", dtype=torch.bfloat16), **HEAD, use_dora=True)
        magnitude = head_of(model).lora_magnitude_vector["default"].weight
        magnitude.data *= 20  # so that fp32 scores show what fp32 magnitudes do
        attach_scoring(model)
        logprob = score(model).logprob.sum()
        (gradient,) = torch.autograd.grad(logprob, magnitude)
        expected = 2**-10 * float((gradient * magnitude).sum())
        with torch.no_grad():
            magnitude *= 1 + 2**-10
            moved = float(score(model).logprob.sum() - logprob)
        assert moved == pytest.approx(expected, rel=0.05)

    @pytest.mark.parametrize("config", [{"lora_bias": True}, {"use_dora": True}], ids=str)
    def test_sharded_factors_are_gathered(self, tmp_path: Path, config: dict[str, bool]) -> None:
        model = lora(tiny_model("phi"), **HEAD, **config)
        expected = own_scores(model)
        expected_gradients = gradients(model, expected.logprob)
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            for module in head_of(model).modules():
                for name, whole in list(module.named_parameters(recurse=False)):
                    sharded = distribute_tensor(whole.detach(), mesh, [Shard(0)])
                    module.register_parameter(name, nn.Parameter(sharded, whole.requires_grad))
            attach_scoring(model)
            logprob = score(model).logprob
            assert_close(logprob, expected.logprob)
            got = gradients(model, logprob)
            names = [name for name in got if "lm_head" in name]
            assert len(names) == 3
            for name in names:
                assert_close(got[name].full_tensor(), expected_gradients[name], name)
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    def test_hooks_of_all_its_modules_run_around_the_work(self, use_dora: bool) -> None:
        model = lora(tiny_model("llama"), target_modules=["lm_head"], use_dora=use_dora)
        layer = head_of(model)
        weights = [layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]]
        weights += [*layer.lora_magnitude_vector.values()]
        expected = own_scores(model).logprob
        events: list[str] = []

        def gather(module: Any, *_: Any) -> None:
            events.append("gather")
            module.weight.data = module.gathered

        def release(module: Any, *_: Any) -> None:
            events.append("release")
            module.weight.data = module.gathered.new_full((), float("nan")).expand_as(module.weight)

        for module in weights:  # as ZeRO-3 does
            module.gathered = module.weight.data
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
        attach_scoring(model)
        with torch.no_grad():
            assert_close(score(model).logprob, expected)
        assert events == ["gather"] * len(weights) + ["release"] * len(weights)

    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    @pytest.mark.parametrize("trained", [True, False])
    def test_neither_a_merged_weight_nor_logits_exist(self, trained: bool, use_dora: bool) -> None:
        vocab_size, num_tokens = 8000, 2048
        model = lora(
            tiny_model("llama", vocab_size=vocab_size, tied=False),
            target_modules=["lm_head"],
            use_dora=use_dora,
        )
        model.requires_grad_(False)
        if trained:
            head_of(model).lora_A.requires_grad_(True)
            head_of(model).lora_B.requires_grad_(True)
            head_of(model).lora_magnitude_vector.requires_grad_(True)
        hidden = torch.randn(num_tokens, 32, requires_grad=True)
        target = torch.arange(num_tokens)
        with LargestTensor() as largest:
            scores = score_by_weight(
                read_head(model.get_base_model()),
                hidden,
                target,
                stats=True,
                backend="torch",
                head_memory_mib=0.5,
            )
            scores.logprob.sum().backward()
        assert hidden.grad is not None and hidden.grad.abs().max() > 0
        assert num_tokens * 32 * 4 <= largest.num_bytes <= 2**19 < vocab_size * 32 * 4


class TestCheck:
    @pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("factor", [1.0, 6.0])
    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    def test_no_false_alarm(
        self, dtype: torch.dtype, adapter_dtype: torch.dtype, factor: float, use_dora: bool
    ) -> None:
        model = lora(tiny_model("llama", dtype=dtype), **HEAD, use_dora=use_dora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
                if "lora_B" in name:
                    parameter.data *= factor
        attach_scoring(model)
        check_head(model, ROWS)
        with model.disable_adapter():
            check_head(model, ROWS)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_layer_that_does_something_else_is_caught(self, dtype: torch.dtype) -> None:
        model = lora(tiny_model("llama", dtype=dtype), **HEAD)
        layer = head_of(model)
        attach_scoring(model)
        check_head(model, ROWS)
        layer.forward = lambda hidden: LoraLinear.forward(layer, hidden) + layer.base_layer(hidden)
        with pytest.raises(HeadMismatchError, match='set head="logits"'):
            check_head(model, ROWS)
        attach_scoring(model, head="logits")
        check_head(model, ROWS)


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "kind"),
        [
            (
                LoraConfig(target_modules=["lm_head"], use_dora=True, lora_dropout=0.1),
                "DoRA adapter 'default' has dropout.* set lora_dropout=0",
            ),
            (
                LoraConfig(
                    target_modules=["lm_head"],
                    alora_invocation_tokens=[5],
                    task_type="CAUSAL_LM",
                ),
                "ALoraLinearVariant of adapter 'default'",
            ),
            (
                IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
                "peft.tuners.ia3.layer.Linear",
            ),
            (LoHaConfig(target_modules=["lm_head"]), "peft.tuners.loha.layer.Linear"),
        ],
        ids=["DoRA with dropout", "aLoRA", "IA3", "LoHa"],
    )
    def test_what_is_more_than_lora_and_dora(self, config: Any, kind: str) -> None:
        model = get_peft_model(tiny_model("llama"), config)
        with pytest.raises(ValueError, match=f'{kind}.*; drop the head .*use head="logits"'):
            attach_scoring(model)
        attach_scoring(model, head="logits")

    def test_dora_among_others(self) -> None:
        model = lora(tiny_model("llama"), **HEAD)
        model.add_adapter("second", LoraConfig(r=3, **HEAD, use_dora=True))
        attach_scoring(model)
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="DoRA adapter 'second' is active among others"):
            score(model)
        attach_scoring(model, head="logits")
        score(model)

    def test_an_adapter_that_is_switched_off_is_not_refused(self) -> None:
        model = dora("llama", lora_dropout=0.1)
        with model.disable_adapter():
            assert_scores_are_own_logprob(model)

    def test_lora_on_a_quantised_head(self) -> None:
        model = lora(tiny_model("llama"), target_modules=["lm_head"])
        base = head_of(model).base_layer
        base.weight = nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match='quantised .*int8.*use head="logits"'):
            attach_scoring(model)


def assert_scores_are_own_logprob(model: nn.Module) -> None:
    attach_scoring(model)
    got = score(model).logprob
    detach_scoring(model)
    assert_close(got, own_scores(model).logprob)
