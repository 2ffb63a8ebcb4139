"""What a KTOConfig takes over from other arguments, and what it refuses of TRL's fields."""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import TrainingArguments

from fastkto import KTOConfig, KTOTrainer
from fastkto.config import DEFAULT_TOKENS
from tests.models import tiny_model, tiny_tokenizer
from tests.test_trainer import trainer
from tests.trl_runs import text_rows


def test_every_field_of_trls_config_is_known() -> None:
    """Names and, but for bf16, defaults."""
    ours = {one.name: one.default for one in fields(KTOConfig)}
    own = {one.name for one in fields(TrainingArguments)}
    for one in fields(trl.KTOConfig):
        if one.name not in own or one.name in ("learning_rate", "logging_steps"):
            assert ours[one.name] == one.default, one.name


def test_trls_config_is_taken_over_whole(tmp_path: Path) -> None:
    given = trl.KTOConfig(
        str(tmp_path), beta=0.3, max_length=77, learning_rate=2e-5, use_cpu=True, bf16=False,
        warmup_steps=3, optim="sgd", desirable_weight=1.5, model_init_kwargs={"revision": "a"},
    )  # fmt: skip
    config = KTOConfig.from_arguments(given)
    assert isinstance(config, KTOConfig)
    for one in fields(trl.KTOConfig):
        assert getattr(config, one.name) == getattr(given, one.name), one.name
    assert config.max_tokens_per_pass == DEFAULT_TOKENS and config.kl_scope == "batch"
    assert type(given) is trl.KTOConfig and not hasattr(given, "kl_scope")


def test_plain_training_arguments_train(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    trainer = KTOTrainer(
        model=tiny_model("llama"),
        args=args,
        train_dataset=text_rows(8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.args.beta == 0.1
    assert not trainer.args.gradient_checkpointing and args.__class__ is TrainingArguments


@dataclass
class OtherArguments(TrainingArguments):
    rpo_alpha: float | None = None


def test_a_field_that_is_not_known_is_not_ignored(tmp_path: Path) -> None:
    KTOConfig.from_arguments(OtherArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="is a OtherArguments with rpo_alpha=0.5, which fastkto"):
        KTOConfig.from_arguments(OtherArguments(str(tmp_path), rpo_alpha=0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of is 8, and passes hold no padding"),
        ({"pad_to_multiple_of": "8"}, "pad_to_multiple_of is 8, and passes hold no padding"),
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0; it must be above 0"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha is 1.5; it must be above 0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps is 0; it must be 1 or more"),
        (
            {"sync_ref_model": True, "precompute_ref_log_probs": True},
            "sync_ref_model=True changes the reference while training",
        ),
        ({"max_tokens_per_pass": "much"}, "max_tokens_per_pass is 'much'; give a number"),
    ],
)
def test_refused_values_say_what_to_do(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTOConfig(str(tmp_path), **given)


def test_numbers_may_be_text_as_a_command_line_gives_them(tmp_path: Path) -> None:
    assert KTOConfig(str(tmp_path), max_tokens_per_pass="512").max_tokens_per_pass == 512
    assert KTOConfig(str(tmp_path), max_tokens_per_pass=None).grad_tokens == DEFAULT_TOKENS
    assert KTOConfig(str(tmp_path), pad_to_multiple_of=None).pad_to_multiple_of is None


def test_the_docs_list_every_field_and_argument() -> None:
    page = (Path(__file__).parent.parent / "docs" / "from-trl.md").read_text()
    arguments = set(inspect.signature(trl.KTOTrainer.__init__).parameters) - {"self"}
    names = {one.name for one in fields(KTOConfig)} | {one.name for one in fields(trl.KTOConfig)}
    missing = [name for name in sorted(names | arguments) if f"`{name}" not in page]
    assert not missing


@pytest.mark.slow
def test_torch_compile_trains_the_same(tmp_path: Path) -> None:
    """With a backend that needs no C compiler."""
    logs = []
    for name, fields_ in (("plain", {}), ("compiled", {"torch_compile": True})):
        if fields_:
            fields_["torch_compile_backend"] = "eager"
        run = trainer(tmp_path / name, max_steps=2, max_tokens_per_pass=4096, **fields_)
        run.train()
        logs.append(run.state.log_history)
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "kl"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-5), key
