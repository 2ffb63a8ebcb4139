"""Vision-language models: the same run in TRL 1.16 and here, however passes are cut."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from accelerate.utils import DistributedType
from peft import LoraConfig
from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference

import fastkto
from fastkto.ranks import Ranks
from fastkto.vision import check_vision_model, set_vision_defaults
from tests.models import tiny_model
from tests.test_trl_equality import next_token_accuracy
from tests.trl_runs import chat_rows, text_rows
from tests.vision_models import PLACEHOLDERS, image_rows, tiny_processor, tiny_vision_model
from tests.vision_runs import assert_equal_runs, train, trained_weights

SMALL_PASSES = {"max_tokens_per_pass": 60}


def models(family: str) -> dict[str, Any]:
    """A policy and a reference unlike it, for which the KL estimate is above 0."""
    policy, reference = (tiny_vision_model(family, seed=1) for _ in range(2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * parameter.abs().mean() * noise)
        reference.get_output_embeddings().weight.mul_(1.4)
    return {
        "model": policy,
        "ref_model": reference,
        "processing_class": tiny_processor(family),
        "max_length": None,
    }


def both(directory: Path, ours: dict[str, Any] | None = None, **run: Any) -> tuple[Any, Any]:
    """The trainers of TRL and of fastkto after the run; `ours` is for fastkto alone."""
    expected = train(trl, directory, **run)
    return expected, train(fastkto, directory, **{**run, **(ours or {})})


def moved(trainer: Any, start: torch.nn.Module, part: str) -> bool:
    """Whether training has changed the weights with `part` in their names."""
    before = dict(start.named_parameters())
    after = trained_weights(trainer)
    return all(not weight.equal(before[name]) for name, weight in after.items() if part in name)


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_equal_to_trl(family: str, tmp_path: Path) -> None:
    """With text between the images, and however the passes are cut."""
    run = models(family) | {"train_dataset": image_rows(12, sizes=True, without=(1,))}
    expected, actual = both(tmp_path, **run)
    in_small_passes = train(fastkto, tmp_path, **run, **SMALL_PASSES)
    assert_equal_runs(expected, actual)
    assert_equal_runs(expected, in_small_passes)
    kls = [log["kl"] for log in expected.state.log_history if "kl" in log]
    assert min(kls) > 0.1, "zeros would prove nothing"
    assert moved(actual, run["model"], "visual" if "qwen" in family else "projector")


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2_vl", {"gradient_accumulation_steps": 2}),
        ("llava", {"gradient_checkpointing": True}),
        ("gemma3", {"max_length": 70}),
        ("qwen2_5_vl", {"loss_type": "apo_zero_unpaired"}),
    ],
    ids=["accumulation", "checkpointing", "cut rows", "apo"],
)
def test_equal_for_settings(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    run = {**models(family), **config}
    rows = image_rows(16, sizes=True, without=(3,))
    expected, actual = both(tmp_path, SMALL_PASSES, **run, train_dataset=rows)
    assert_equal_runs(expected, actual)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_equal_with_a_new_adapter(family: str, tmp_path: Path) -> None:
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    run = models(family) | {"peft_config": lora, "learning_rate": 0.1}
    del run["ref_model"]
    rows = image_rows(12, without=(1,))
    expected, actual = both(tmp_path, SMALL_PASSES, **run, train_dataset=rows)
    assert_equal_runs(expected, actual)


def test_equal_in_evaluation(tmp_path: Path) -> None:
    rows = {"train_dataset": image_rows(12), "eval_dataset": image_rows(8, seed=3, without=(2,))}
    run = {**models("qwen2_vl"), **rows, "compute_metrics": next_token_accuracy}
    expected, actual = both(tmp_path, SMALL_PASSES, **run)
    theirs, ours = expected.evaluate(), actual.evaluate()
    names = ("loss", "kl", "rewards/margins", "logps/chosen", "accuracy", "logit")
    for name in (f"eval_{name}" for name in names):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.mark.parametrize("workers", [0, 1])
def test_equal_with_a_stream_of_which_rows_are_dropped(workers: int, tmp_path: Path) -> None:
    """The same rows as in a list, whose report has the same count."""
    run = {**models("qwen2_vl"), "max_length": 46, "dataloader_num_workers": workers}
    rows = image_rows(16, sizes=True, without=(3,))
    expected = train(fastkto, tmp_path, **run, train_dataset=rows)
    actual = train(fastkto, tmp_path, **run, train_dataset=rows.to_iterable_dataset())
    assert_equal_runs(expected, actual)
    report = expected.row_reports["train"]
    assert report.dropped == 5 and report.longest == 46
    counted = [log.get("dropped_rows", 0) for log in actual.state.log_history if "kl" in log]
    assert counted == [0, 0, 5]


@pytest.mark.parametrize("rows", [chat_rows(12), text_rows(12)], ids=["chat", "text"])
def test_equal_on_text_alone(rows: Any, tmp_path: Path) -> None:
    """The processor's chat template reads blocks, and text rows may be packed."""
    expected, actual = both(tmp_path, **models("llava"), train_dataset=rows)
    assert_equal_runs(expected, actual)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava_next"])
def test_equal_with_trls_collator(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its batches are cut by their image tokens, or stay one pass, which is said once."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    run = models(family)
    run["train_dataset"] = image_rows(12, sizes=True, without=(0,))
    expected = train(fastkto, tmp_path, **run, **SMALL_PASSES)
    collator = DataCollatorForVisionUnpairedPreference(run["processing_class"])
    actual = train(fastkto, tmp_path, **run, **SMALL_PASSES, data_collator=collator)
    assert_equal_runs(expected, actual)
    batch = actual.data_collator([actual.train_dataset[index] for index in range(4)])
    whole = family == "llava_next"
    assert (batch["media"][1].whole is not None) == whole
    warnings = [record for record in caplog.records if "told apart" in record.message]
    assert len(warnings) == whole


def test_a_subclass_gets_text_and_images_in_one_pass(tmp_path: Path) -> None:
    class Overrides(fastkto.KTOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class Library:
        KTOTrainer, KTOConfig, __name__ = Overrides, fastkto.KTOConfig, "overrides"

    run = models("qwen2_vl") | {"train_dataset": image_rows(12, without=(1,))}
    assert_equal_runs(train(trl, tmp_path, **run), train(Library, tmp_path, **run))


def test_precomputed_scores_are_told_apart_by_their_images(tmp_path: Path) -> None:
    """Two data sets with one text and different images: neither finds the other's scores."""
    rows = image_rows(8)
    turned = rows.map(lambda row: {"images": [image.rotate(90) for image in row["images"]]})
    cache = {"precompute_ref_log_probs": True, "reference_cache": str(tmp_path / "cache")}
    for one in (rows, turned):
        run = models("qwen2_vl") | {"train_dataset": one}
        expected = train(fastkto, tmp_path, **run)
        actual = train(fastkto, tmp_path, **run, **cache)
        assert_equal_runs(expected, actual)
        assert all(log["ref_cache_misses"] == 0 for log in actual.state.log_history[:-1])


def test_a_path_is_loaded_with_its_processor(tmp_path: Path) -> None:
    run = models("llava") | {"train_dataset": image_rows(8)}
    run["model"].save_pretrained(tmp_path / "model")
    run.pop("processing_class").save_pretrained(tmp_path / "model")
    del run["ref_model"]
    trainer = train(fastkto, tmp_path, **{**run, "model": str(tmp_path / "model")})
    assert type(trainer.model) is type(run["model"])
    assert trainer.reference.description.startswith("the initial policy, loaded again")
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "processor_config.json").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, True),
        ({"ddp_find_unused_parameters": False}, False),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, None),
    ],
)
def test_unused_parameters_are_expected(config: dict[str, Any], expected: bool | None) -> None:
    args = fastkto.KTOConfig("unused", use_cpu=True, report_to="none", **config)
    set_vision_defaults(tiny_model("llama"), args)
    assert args.ddp_find_unused_parameters == config.get("ddp_find_unused_parameters")
    set_vision_defaults(tiny_vision_model("llava"), args)
    assert args.ddp_find_unused_parameters is expected


@pytest.mark.parametrize("processes", [1, 2])
def test_ranks_that_wait_for_each_other_refuse_images(processes: int) -> None:
    accelerator: Any = SimpleNamespace(
        distributed_type=DistributedType.FSDP, num_processes=processes
    )
    Ranks(accelerator).check_images(False)
    with pytest.raises(ValueError, match="FSDP") if processes > 1 else nullcontext():
        Ranks(accelerator).check_images(True)


def test_prompts_that_are_read_in_both_directions_are_refused() -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type="paligemma"))
    with pytest.raises(ValueError, match="the model is a PaliGemma, whose tokens of a prompt"):
        check_vision_model(model)
