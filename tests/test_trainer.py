"""KTOTrainer inside transformers' Trainer: what runs around a step, references, and refusals."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import EarlyStoppingCallback, LlamaForCausalLM, TrainerCallback

from fastkto import KTOConfig, KTOTrainer
from fastkto.data.batch import KTOCollator
from fastkto.head_check import HeadMismatchError
from fastkto.limits import (
    TRL_METHODS,
    check_arguments,
    check_batch_size,
    check_devices,
    check_optimizer,
)
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows


def config(directory: Path, **fields: Any) -> KTOConfig:
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "max_tokens_per_pass": 64,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return KTOConfig(output_dir=str(directory), **{**defaults, **fields})


def trainer(directory: Path, **arguments: Any) -> KTOTrainer:
    """A trainer of a tiny model; arguments that KTOTrainer does not have go to its config."""
    own = (
        "model ref_model train_dataset eval_dataset callbacks peft_config processing_class "
        "compute_metrics data_collator quantization_config"
    ).split()
    given = {name: arguments.pop(name) for name in own if name in arguments}
    given.setdefault("model", tiny_model("llama", seed=1))
    given.setdefault("train_dataset", text_rows(16))
    given.setdefault("processing_class", tiny_tokenizer())
    return KTOTrainer(args=config(directory, **arguments), **given)


def lora(**fields: Any) -> LoraConfig:
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], **fields}
    return LoraConfig(task_type="CAUSAL_LM", **fields)


def test_a_run_begins_with_its_data_and_reference(tmp_path: Path, capsys: Any) -> None:
    rows = text_rows(16)
    long = {"prompt": "rain " * 40, "completion": " a", "label": True}
    run = trainer(tmp_path, train_dataset=Dataset.from_list([*rows, long]), max_length=64)
    run.train()
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(("train data: ", "reference: "))]
    report = run.row_reports["train"]
    assert f"train data: 16 rows: {report.desirable} desirable" in said[0]
    assert "1 dropped, their prompt alone fills max_length=64; 3 cut" in said[0]
    assert said[1] == f"reference: {run.reference.description}"


def test_a_stream_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "rain " * 40, "completion": " a", "label": True}] * 4)
    run = trainer(tmp_path, train_dataset=rows.to_iterable_dataset(), max_length=16, max_steps=2)
    with pytest.raises(ValueError, match="nothing was trained: .* does every prompt fill max_len"):
        run.train()


def test_a_run_that_stops_within_its_first_step_is_none(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    run = trainer(tmp_path, callbacks=[Stop()], gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 0


def test_a_stream_of_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Also through a collator of one's own."""
    rows = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6, 4000], "label": True}] * 4)
    for collator in (None, KTOCollator(64)):
        run = trainer(
            tmp_path,
            train_dataset=rows.to_iterable_dataset(),
            data_collator=collator,
            max_steps=1,
        )
        with pytest.raises(ValueError, match="row 0 has the token 4,000, and the model or its"):
            run.train()


def test_two_adapters_resume_each_with_its_own_weights(tmp_path: Path) -> None:
    def policy(seed: int) -> PeftModel:
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model("llama", seed=1), lora(init_lora_weights=False))
        model.add_adapter("other", lora(init_lora_weights=False))
        model.set_adapter("other")
        return model

    saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, model=policy(0), **saved)
    first.train()
    second = trainer(tmp_path, model=policy(3), **saved | {"max_steps": 3})
    second._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    expected = dict(first.model.named_parameters())
    for name, weight in second.model.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_init_kwargs_beside_a_model_are_ignored_for_its_reference_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    kwargs = {"attn_implementation": "nonsense", "rope_theta": 3.0}
    run = trainer(tmp_path, model=model, model_init_kwargs=kwargs)
    assert "model_init_kwargs is ignored, since model is a LlamaForCausalLM" in caplog.text
    assert run.reference.description.startswith("the initial policy, loaded again")


def test_an_adapter_of_another_name_trains_and_resumes(tmp_path: Path) -> None:
    def run(**fields: Any) -> KTOTrainer:
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model("llama", seed=1), lora(init_lora_weights=False), adapter_name="mine"
        )
        fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **fields}
        return trainer(tmp_path, model=model, **fields)

    whole = run()
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    names = ("loss", "rewards/chosen", "kl", "grad_norm")
    for one, other in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        expected = {name: one[name] for name in names if name in one}
        assert {name: other[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": text_rows(4)}
    with pytest.raises(
        ValueError, match="load_best_model_at_end=True and the adapter is named 'mi"
    ):
        run(load_best_model_at_end=True, **evaluated)


def test_scripts_find_what_they_look_for(tmp_path: Path) -> None:
    run = trainer(tmp_path, beta=0.3, desirable_weight=2.0)
    assert (run.beta, run.desirable_weight, run.undesirable_weight) == (0.3, 2.0, 1.0)
    assert (run.loss_type, run.calculate_KL) == ("kto", True)
    assert run.ref_model is run.reference.model is not None
    assert trainer(tmp_path, peft_config=lora()).ref_model is None


@pytest.mark.parametrize("name", TRL_METHODS)
def test_methods_of_trls_trainer_that_nothing_calls_are_refused(tmp_path: Path, name: str) -> None:
    assert hasattr(trl.KTOTrainer, name)
    kind = type("Own", (KTOTrainer,), {name: lambda self: None})
    with pytest.raises(TypeError, match=f"Own defines {name}, which TRL's trainer calls and this"):
        kind(
            tiny_model("llama"),
            args=config(tmp_path),
            train_dataset=text_rows(8),
            processing_class=tiny_tokenizer(),
        )


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt_ids": [5], "completion_ids": [6, 4000], "label": True}] * 4)
    with pytest.raises(ValueError, match="the train data has the token 4,000, and the model has a"):
        trainer(tmp_path, train_dataset=rows)


def test_several_training_sets_are_refused(tmp_path: Path) -> None:
    rows = DatasetDict(first=text_rows(8), second=text_rows(8))
    with pytest.raises(TypeError, match="train_dataset is a DatasetDict of first, second; pass on"):
        trainer(tmp_path, train_dataset=rows)


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=1)
    run.train()
    half = tmp_path / "checkpoint-2"
    (half / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-2 is not there, or was not written to its en"):
        trainer(tmp_path).train(resume_from_checkpoint=str(half))


# ---- What Trainer does around a step ----


def test_best_model_and_early_stopping_follow_a_kto_metric(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=text_rows(8, seed=3),
        max_steps=20,
        learning_rate=0.0,  # the metric never improves
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    run.train()
    assert run.state.global_step == 3
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    assert run.state.best_metric == run.state.log_history[1]["eval_rewards/margins"]


class OutOfMemoryOnce(TrainerCallback):
    """Fails as a GPU does in the second step of the first try, after the first step was logged."""

    def __init__(self) -> None:
        self.failed = False
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **kwargs: Any) -> None:
        self.logs.append(logs)


def test_auto_find_batch_size_starts_again_with_clean_metrics(tmp_path: Path) -> None:
    callback = OutOfMemoryOnce()
    run = trainer(
        tmp_path,
        per_device_train_batch_size=8,
        auto_find_batch_size=True,
        callbacks=[callback],
        logging_steps=2,
    )
    run.train()
    assert callback.failed
    fewer = run._train_batch_size
    assert 2 <= fewer < 8
    alone = trainer(tmp_path, per_device_train_batch_size=fewer, logging_steps=2)
    # The failed try took one step before it was cut short.
    alone.model.load_state_dict(trained_one_step(tmp_path, batch_size=8))
    alone.train()
    assert callback.logs[0]["num_tokens"] == alone.state.log_history[0]["num_tokens"]
    assert callback.logs[0]["logps/chosen"] == pytest.approx(
        alone.state.log_history[0]["logps/chosen"], rel=1e-4
    )


def trained_one_step(directory: Path, batch_size: int) -> dict[str, torch.Tensor]:
    run = trainer(directory, per_device_train_batch_size=batch_size, logging_steps=2)
    run.add_callback(StopAfter(1))
    run.train()
    return run.model.state_dict()


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def test_batch_size_found_is_never_one(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run._train_batch_size = 1
    with pytest.raises(
        ValueError,
        match="the batch size is 1 and loss_type='kto' estimates",
    ):
        run.get_train_dataloader()


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    run = trainer(tmp_path, include_num_input_tokens_seen="all", max_steps=4)
    run.train()
    tokenizer, rows = tiny_tokenizer(), text_rows(16)
    expected = sum(
        len(tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"])
        for row in rows
    )
    assert run.state.num_input_tokens_seen == expected
    assert run.state.log_history[-2]["num_tokens"] == expected


def test_evaluate_returns_the_metrics_of_each_data_set(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_dataset={"a": text_rows(8, seed=3), "b": text_rows(4, seed=4, label=True)}
    )
    metrics = run.evaluate()
    assert {"eval_a_rewards/margins", "eval_a_kl", "eval_b_logps/chosen"} <= set(metrics)
    assert "eval_b_rewards/rejected" not in metrics  # it has no such row
    assert metrics["eval_kl"] == metrics["eval_b_kl"]  # as in TRL, of the last set


def test_a_log_of_something_else_has_no_metrics_of_an_evaluation(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.predict(text_rows(8, seed=3), metric_key_prefix="eval_x")
    run.log({"mine": 1.0})
    assert "eval_kl" not in run.state.log_history[-1]


def test_a_log_of_exact_metrics_names_its_evaluation_set(tmp_path: Path) -> None:
    sets = {"a": text_rows(8, seed=3), "b": text_rows(4, seed=4)}
    run = trainer(tmp_path, eval_dataset=sets, metrics="exact")
    run.evaluate()
    for name, log in zip(sets, run.state.log_history, strict=True):
        assert f"eval_{name}_kl" in log and "eval_kl" not in log


def test_evaluate_takes_a_data_set_that_is_not_prepared(tmp_path: Path) -> None:
    rows = text_rows(8, seed=3)
    given = trainer(tmp_path, eval_dataset=rows).evaluate()
    passed = trainer(tmp_path).evaluate(rows)
    assert passed["eval_loss"] == given["eval_loss"]


def test_evaluation_before_training_uses_one_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, ref_model=tiny_model("llama", seed=1), bf16=True)
    metrics = run.evaluate(text_rows(8, seed=3))
    assert metrics["eval_kl_raw"] == 0.0 and metrics["eval_rewards/chosen"] == 0.0


def test_predict_takes_a_data_set_that_is_not_prepared(tmp_path: Path) -> None:
    rows = text_rows(8, seed=3)
    run = trainer(tmp_path)
    expected = run.evaluate(rows)["eval_loss"]
    assert run.predict(rows).metrics["test_loss"] == expected


def test_reports_of_data_sets_are_kept_apart(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset={"train": text_rows(8, seed=3)})
    assert run.row_reports["train"].rows == 16 and run.row_reports["eval_train"].rows == 8


def test_head_that_disagrees_is_refused_each_time(tmp_path: Path) -> None:
    class Louder(type(tiny_model("llama"))):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = 1.3 * outputs.logits
            return outputs

    model = tiny_model("llama", seed=1)
    model.__class__ = Louder
    run = trainer(tmp_path, model=model, ref_model=tiny_model("llama", seed=2))
    for _ in range(2):
        with pytest.raises(HeadMismatchError, match='head="logits"'):
            run.train()


def test_rows_of_a_single_token_do_not_stop_the_head_check(tmp_path: Path) -> None:
    row = {"prompt_ids": [], "completion_ids": [5], "label": True}
    rows = [row, row, {**row, "prompt_ids": [6, 7, 8, 9]}, row]
    run = trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_steps=1)
    run.train()
    assert run.state.global_step == 1


class DoubledLoss(KTOTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def test_loss_that_a_subclass_changes_has_one_graph(tmp_path: Path) -> None:
    norms = []
    for kind in (KTOTrainer, DoubledLoss):
        run = kind(
            model=tiny_model("llama", seed=1),
            ref_model=tiny_model("llama", seed=2),
            args=config(tmp_path),
            train_dataset=text_rows(16),
            processing_class=tiny_tokenizer(),
        )
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)


class FlippedLabels(KTOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["label"] = ~inputs["label"]
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_labels_that_a_subclass_changes_are_those_of_the_loss(tmp_path: Path) -> None:
    logs = []
    for kind in (KTOTrainer, FlippedLabels):
        run = kind(
            model=tiny_model("llama", seed=1),
            ref_model=tiny_model("llama", seed=2),
            args=config(tmp_path),
            train_dataset=text_rows(16),
            processing_class=tiny_tokenizer(),
        )
        run.train()
        logs.append(run.state.log_history[0])
    assert logs[1]["rewards/chosen"] == pytest.approx(logs[0]["rewards/rejected"], rel=1e-6)
    assert logs[1]["rewards/margins"] == pytest.approx(-logs[0]["rewards/margins"], rel=1e-6)


class ReplacedTokens(KTOTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs["input_ids"] = inputs["input_ids"] + 1
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_tokens_that_a_subclass_changes_are_refused(tmp_path: Path) -> None:
    run = ReplacedTokens(
        model=tiny_model("llama", seed=1),
        ref_model=tiny_model("llama", seed=2),
        args=config(tmp_path),
        train_dataset=text_rows(16),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(ValueError, match="input_ids of a batch were replaced after"):
        run.train()


def test_optimizer_that_swaps_weights_for_evaluation_swaps_back_before_scores(
    tmp_path: Path,
) -> None:
    """As those of schedule-free optimizers do, in `eval()` and `train()`."""
    logs = []
    for strategy in ("no", "steps"):
        run = trainer(
            tmp_path,
            ref_model=tiny_model("llama", seed=2),
            eval_dataset=text_rows(8, seed=3),
            eval_strategy=strategy,
            eval_steps=1,
            max_steps=3,
        )
        run.create_optimizer()
        swapping = SwappingWeights(list(run.model.parameters()))
        run.optimizer.eval, run.optimizer.train = swapping.eval, swapping.train
        run.train()
        logs.append([log["kl_raw"] for log in run.state.log_history if "loss" in log])
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)


class SwappingWeights:
    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters, self.is_swapped = parameters, False

    def eval(self) -> None:
        self._swap(True)

    def train(self) -> None:
        self._swap(False)

    @torch.no_grad()
    def _swap(self, swapped: bool) -> None:
        if swapped != self.is_swapped:
            for parameter in self.parameters:
                parameter.mul_(2.0 if swapped else 0.5)
        self.is_swapped = swapped


def test_loss_that_a_subclass_changes_needs_rows_that_may_share_a_pass(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=1)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    run = DoubledLoss(
        model=model,
        ref_model=tiny_model("llama", seed=2),
        args=config(tmp_path),
        train_dataset=text_rows(16),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(ValueError, match="the batch of 4 rows in one pass, and this model"):
        run.train()


def test_gradients_are_synchronised_at_the_last_pass_of_the_last_batch_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    synchronised = []
    backward = run.accelerator.backward

    def recording_backward(loss: torch.Tensor, **kwargs: Any) -> None:
        synchronised.append(run.accelerator.sync_gradients)
        backward(loss, **kwargs)

    monkeypatch.setattr(run.accelerator, "backward", recording_backward)
    run.train()
    assert len(synchronised) > 4
    assert synchronised == [False] * (len(synchronised) - 1) + [True]


def test_tokens_are_counted_across_a_checkpoint_between_logs(tmp_path: Path) -> None:
    def start(directory: Path) -> KTOTrainer:
        settings = {"logging_steps": 2, "save_steps": 3, "save_strategy": "steps"}
        return trainer(directory, max_steps=4, **settings)

    whole, part = start(tmp_path / "whole"), start(tmp_path / "part")
    part.add_callback(StopAfter(3))
    whole.train()
    part.train()
    resumed = start(tmp_path / "part")
    resumed.train(resume_from_checkpoint=True)
    counts = [
        [log["num_tokens"] for log in run.state.log_history if "loss" in log]
        for run in (whole, resumed)
    ]
    assert counts[0] == counts[1] and len(counts[0]) == 2


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_rows_may_be_shuffled(strategy: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, train_sampling_strategy=strategy, max_steps=4)
    run.train()
    seen = [row for batch in run.get_train_dataloader() for row in batch["rows"]]
    assert sorted(seen) == list(range(16))
    assert seen != sorted(seen)


def test_streamed_rows_train(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=text_rows(16).to_iterable_dataset(), max_steps=4)
    run.train()
    listed = trainer(tmp_path, max_steps=4)
    listed.train()
    assert run.state.log_history[3]["loss"] == listed.state.log_history[3]["loss"]


def test_a_log_counts_what_a_stream_has_dropped(tmp_path: Path) -> None:
    rows = list(text_rows(16))
    long = {"prompt": "rain " * 40, "completion": " a", "label": True}
    rows[5:5] = [long, long]  # in the second batch
    stream = Dataset.from_list(rows).to_iterable_dataset()
    evaluated = Dataset.from_list([long, *text_rows(4)]).to_iterable_dataset()
    limits = {"max_length": 64, "max_steps": 4}
    run = trainer(tmp_path, train_dataset=stream, eval_dataset=evaluated, **limits)
    run.train()
    dropped = [log.get("dropped_rows") for log in run.state.log_history if "loss" in log]
    assert dropped == [None, 2, None, None]
    assert run.evaluate()["eval_dropped_rows"] == 1
    listed = trainer(tmp_path, **limits)
    listed.train()
    for one, other in zip(run.state.log_history[:4], listed.state.log_history, strict=False):
        assert one["loss"] == other["loss"]


def test_dispatching_batches_is_forced_off(tmp_path: Path) -> None:
    run = trainer(tmp_path, accelerator_config={"dispatch_batches": True})
    assert run.accelerator.dataloader_config.dispatch_batches is False


def test_lone_row_has_no_kl_and_is_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=text_rows(5), num_train_epochs=1, max_steps=-1)
    run.train()
    paired, lone = run.state.log_history[:2]
    assert "kl_lone_rows" not in paired and "kl_raw" in paired
    assert lone["kl_lone_rows"] == 1 and lone["kl"] == 0.0 and "kl_raw" not in lone


def test_bf16_autocast_stays_near_fp32(tmp_path: Path) -> None:
    reference = tiny_model("llama", seed=2)
    exact = trainer(tmp_path, ref_model=copy.deepcopy(reference))
    rounded = trainer(tmp_path, ref_model=reference, bf16=True)
    exact.train()
    rounded.train()
    assert rounded.model.dtype == torch.float32
    for name, bound in (("loss", 0.05), ("logps/chosen", 0.02), ("grad_norm", 0.1)):
        value = exact.state.log_history[0][name]
        assert rounded.state.log_history[0][name] == pytest.approx(value, rel=bound), name
    assert rounded.state.log_history[0]["loss"] != exact.state.log_history[0]["loss"]


def test_generation_is_unchanged_by_training(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    fresh = tiny_model("llama", seed=5).eval()
    fresh.load_state_dict(run.model.state_dict())
    prompt = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}
    options = {"max_new_tokens": 8, "do_sample": False}
    trained = run.model.eval().generate(**prompt, **options)
    assert trained.tolist() == fresh.generate(**prompt, **options).tolist()


def test_saved_model_loads_without_fastkto(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<eos>"


# ---- Numbers that are not finite ----


def test_row_that_is_not_finite_is_named_before_the_optimizer_steps(tmp_path: Path) -> None:
    rows = text_rows(16).to_list()
    rows[6]["completion"] += " ~"  # a token that no other row has
    model = tiny_model("llama", seed=1)
    token = tiny_tokenizer().convert_tokens_to_ids("~")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    run = trainer(
        tmp_path,
        model=model,
        ref_model=tiny_model("llama", seed=2),
        train_dataset=Dataset.from_list(rows),
    )
    # Row 7 is paired with row 6's completion. The first batch holds neither.
    text = r"in step 1, of the policy: rows \[6\]; the policy on another row's completion: rows "
    with pytest.raises(FloatingPointError, match=text + r"\[7\]"):
        run.train()
    written = (tmp_path / "not_finite_step_1.jsonl").read_text().splitlines()
    first, second = map(json.loads, written)
    assert first["row"] == 6 and first["not_finite"] == {"the policy": "nan"}
    assert first["completion_ids"][-2] == token and token not in first["other_completion_ids"]
    assert second["row"] == 7 and token in second["other_completion_ids"]
    assert run.state.global_step == 1
    assert run.model.lm_head.weight.isfinite().all()


# ---- References ----


def test_given_reference_is_used_and_not_trained(tmp_path: Path) -> None:
    reference = tiny_model("llama", seed=2)
    before = copy.deepcopy(reference.state_dict())
    run = trainer(tmp_path, ref_model=reference)
    run.train()
    assert run.reference.description == "the given ref_model"
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_initial_policy_is_loaded_again_only_if_its_weights_are_at_its_path(tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = tiny_model("llama", seed=1)
    model.save_pretrained(path)
    model.config._name_or_path = str(path)
    same = trainer(tmp_path, model=copy.deepcopy(model))
    assert same.reference.description == f"the initial policy, loaded again from {path}"
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    changed = trainer(tmp_path, model=model)
    assert changed.reference.description == "the initial policy, copied"
    changed.train()
    assert changed.state.log_history[0]["kl_raw"] == 0.0
    assert changed.state.log_history[0]["rewards/chosen"] == 0.0


def test_first_kl_of_a_new_adapter_is_exactly_zero(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft_config=lora())
    run.train()
    first, second = run.state.log_history[:2]
    assert first["kl_raw"] == 0.0 and first["rewards/margins"] == 0.0
    assert run.reference.description == "the base model, adapter switched off"
    assert second["kl_raw"] != 0.0


def test_dropout_reaches_only_passes_with_gradient(tmp_path: Path) -> None:
    adapter = lora(lora_dropout=0.5, init_lora_weights=False)
    without = trainer(tmp_path, peft_config=adapter)
    run = trainer(tmp_path, peft_config=adapter, disable_dropout=False)
    without.train()
    run.train()
    assert run.state.log_history[0]["kl_raw"] == without.state.log_history[0]["kl_raw"]
    assert run.state.log_history[0]["loss"] != without.state.log_history[0]["loss"]
    layers = [m for m in run.model.modules() if isinstance(m, nn.Dropout)]
    assert layers and all(layer.p == 0.5 and layer.training for layer in layers)


def test_dropout_is_disabled_by_default(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=1, attention_dropout=0.3)
    run = trainer(tmp_path, model=model, peft_config=lora(lora_dropout=0.5))
    assert all(m.p == 0 for m in run.model.modules() if isinstance(m, nn.Dropout))
    attention = [m for m in run.model.modules() if hasattr(m, "attention_dropout")]
    assert attention and all(m.attention_dropout == 0.0 for m in attention)


def test_trained_adapter_is_its_own_frozen_reference(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", seed=1), lora(init_lora_weights=False))
    run = trainer(tmp_path, model=model)
    before = {n: p.clone() for n, p in run.model.named_parameters() if ".ref." in n}
    run.train()
    parameters = dict(run.model.named_parameters())
    assert before and all(torch.equal(parameters[n], weight) for n, weight in before.items())
    assert run.state.log_history[0]["kl_raw"] == 0.0
    trainable = [n for n, p in parameters.items() if p.requires_grad]
    assert trainable and all(".default." in name for name in trainable)
    assert run.model.active_adapter == "default"


@pytest.mark.parametrize(
    "adapter",
    [
        lora(init_lora_weights=False, target_modules=["q_proj", "embed_tokens"]),
        lora(init_lora_weights=False, use_dora=True),
        lora(init_lora_weights=False, modules_to_save=["lm_head"]),
        lora(init_lora_weights=False, target_modules=["q_proj", "lm_head"]),
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    ],
    ids=["embedding", "dora", "saved head", "head", "ia3"],
)
def test_frozen_copy_is_whole_for_every_kind_of_adapter(adapter: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", seed=1), adapter)
    with torch.no_grad():  # away from every initial value
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    run = trainer(tmp_path, model=model)
    run.train()
    first = run.state.log_history[0]
    assert first["kl_raw"] == 0.0
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("new_adapter", [True, False])
def test_frozen_part_of_an_adapter_stays_frozen(new_adapter: bool, tmp_path: Path) -> None:
    adapter = lora(init_lora_weights=False)
    if new_adapter:
        run = trainer(tmp_path, peft_config=adapter)
    else:
        run = trainer(tmp_path, model=get_peft_model(tiny_model("llama", seed=1), adapter))
    for name, parameter in run.model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = [name for name, p in run.model.named_parameters() if p.requires_grad]
    run.train()
    assert [name for name, p in run.model.named_parameters() if p.requires_grad] == before


def test_reference_has_the_policys_precision(tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = tiny_model("llama", seed=1, dtype=torch.bfloat16)
    model.save_pretrained(path)
    model.config._name_or_path = str(path)
    run = trainer(tmp_path, model=model)
    assert run.reference.description == f"the initial policy, loaded again from {path}"
    assert run.reference.model.dtype == torch.bfloat16


def test_frozen_reference_survives_resuming(tmp_path: Path) -> None:
    def start(directory: Path, **fields: Any) -> KTOTrainer:
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama", seed=1), lora(init_lora_weights=False))
        return trainer(directory, model=model, max_steps=4, save_steps=2, **fields)

    whole = start(tmp_path / "whole", save_strategy="steps")
    whole.train()
    part = start(tmp_path / "part", save_strategy="steps")
    part.add_callback(StopAfter(2))
    part.train()
    resumed = start(tmp_path / "part")
    resumed.train(resume_from_checkpoint=True)
    for expected, actual in zip(
        whole.state.log_history[2:4], resumed.state.log_history[2:4], strict=True
    ):
        for name in ("loss", "kl", "rewards/chosen", "num_tokens"):
            assert actual[name] == expected[name], name


# ---- Refusals ----


def test_same_model_twice_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="model and ref_model are the same object"):
        trainer(tmp_path, model=model, ref_model=model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"per_device_eval_batch_size": 1, "eval_dataset": text_rows(4)},
            "per_device_eval_batch_size is 1",
        ),
        ({"quantization_config": object()}, "quantization_config applies when a model is loaded"),
        ({"router_aux_loss_coef": 0.1}, "LlamaConfig has no router logits"),
    ],
)
def test_argument_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": [{"prompt": "a"}]}, "the train data is a list; pass a datasets.Dataset"),
        ({"model": 3}, "model is a int; pass a path, a hub id or a model"),
        ({"peft_config": {"r": 4}}, "peft_config is a dict; pass a peft.PeftConfig"),
        ({"processing_class": "tokenizer"}, "processing_class is a str; pass a tokenizer"),
    ],
)
def test_argument_of_wrong_type_is_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        trainer(tmp_path, **arguments)


def test_batches_split_to_single_rows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = config(tmp_path, accelerator_config={"split_batches": True})
    monkeypatch.setattr(KTOConfig, "world_size", 4)
    with pytest.raises(ValueError, match="is 4, split over 4 processes, and loss_type='kto'"):
        check_batch_size(args, "per_device_train_batch_size", args.per_device_train_batch_size)


def test_uneven_batches_are_refused_on_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = config(tmp_path, accelerator_config={"even_batches": False})
    check_arguments("path", None, args)
    monkeypatch.setattr(KTOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="even_batches=False, and ranks with fewer batches"):
        check_arguments("path", None, args)


def test_reference_that_shares_weights_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = get_peft_model(base, lora())
    with pytest.raises(ValueError, match="model and ref_model share weights"):
        trainer(tmp_path, model=model, ref_model=base)


def test_policy_without_trainable_weights_is_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), lora()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="needs is_trainable=True"):
        trainer(tmp_path, model=model)


def test_foreign_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is a dict; pass a fastkto.KTOConfig, or any Train"):
        KTOTrainer(model=tiny_model("llama"), args={"output_dir": str(tmp_path)})


def test_second_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), lora())
    with pytest.raises(ValueError, match="model is a PeftModel already"):
        trainer(tmp_path, model=model, peft_config=lora())


def test_foreign_batch_is_refused_by_name(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.zeros(4, 4, dtype=torch.int64)}

    run = trainer(tmp_path, data_collator=collate)
    with pytest.raises(ValueError, match="use fastkto.data.batch.KTOCollator"):
        run.train()


def test_a_last_batch_that_is_left_out_is_named_where_it_is_the_only_one(tmp_path: Path) -> None:
    fields = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(ValueError, match="drop_last=True leaves out batches of fewer than 64 rows"):
        trainer(tmp_path, **fields).train()


def test_processes_that_would_train_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = KTOConfig(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_arguments("model", None, args)  # as a cluster may set it, without a launcher
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="2 processes were started, .* use_cpu=True; set it"):
        check_arguments("model", None, args)


def test_optimizer_that_steps_in_backward_is_refused_with_accumulation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim='lomo' updates .*gradient_accumulation_steps=2"):
        trainer(tmp_path, optim="lomo", gradient_accumulation_steps=2)


def test_optimizer_that_steps_in_backward_needs_a_single_pass() -> None:
    check_optimizer(KTOConfig(optim="adamw_torch"), 3)
    check_optimizer(KTOConfig(optim="galore_adamw_layerwise"), 1)
    for name in ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"):
        with pytest.raises(ValueError, match=f"optim='{name}' updates the weights inside backward"):
            check_optimizer(KTOConfig(optim=name), 2)


def fake_devices(**fields: Any) -> Any:
    accelerator = SimpleNamespace(
        distributed_type=fields.pop("distributed_type", DistributedType.NO),
        is_fsdp2=False,
        parallelism_config=SimpleNamespace(**fields) if "n_gpu" not in fields else None,
    )
    config = fields.pop("deepspeed_config", None)
    plugin = config if config is None else SimpleNamespace(deepspeed_config=config)
    args = SimpleNamespace(
        n_gpu=fields.get("n_gpu", 1),
        device=fields.get("device", torch.device("cpu")),
        deepspeed_plugin=plugin,
    )
    return SimpleNamespace(args=args, accelerator=accelerator)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"n_gpu": 2}, "2 GPUs are visible to one process; start one process for each"),
        ({"tp_size": 2}, "tp_size=2; tensor, context and sequence parallelism"),
        ({"cp_size": 4}, "cp_size=4"),
        ({"sp_size": 2}, "sp_size=2"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP is set up in its first version"),
        ({"device": torch.device("mps"), "n_gpu": 1}, "the device is mps, which has no fp64"),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron-LM is not supported"),
        (
            {"deepspeed_config": {}},
            "accelerate does not use it: it takes DeepSpeed up on",
        ),
        (
            {
                "distributed_type": DistributedType.DEEPSPEED,
                "deepspeed_config": {"tensor_parallel": {"autotp_size": 2}},
            },
            "tensor_parallel.autotp_size=2",
        ),
    ],
)
def test_devices_are_refused(devices: dict[str, Any], message: str) -> None:
    check_devices(fake_devices())
    with pytest.raises(ValueError, match=message):
        check_devices(fake_devices(**devices))


def test_default_of_bf16_follows_the_device(tmp_path: Path) -> None:
    assert KTOConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is False


def test_defaults_are_those_of_trl(tmp_path: Path) -> None:
    import trl

    ours = KTOConfig(output_dir=str(tmp_path), use_cpu=True)
    theirs = trl.KTOConfig(output_dir=str(tmp_path), use_cpu=True)
    own = {"max_tokens_per_pass", "kl_scope", "kl_pairing", "head", "backend", "head_memory_mib"}
    for name in set(ours.__dataclass_fields__) - own - {"logging_dir"}:
        if hasattr(theirs, name) and name != "bf16":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert own.isdisjoint(theirs.__dataclass_fields__)
    assert math.isclose(ours.learning_rate, 1e-6)


def test_collator_is_the_default_one(tmp_path: Path) -> None:
    assert trainer(tmp_path).data_collator == KTOCollator(1024)
    assert trainer(tmp_path, max_length=30).data_collator == KTOCollator(30)
