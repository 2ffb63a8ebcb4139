"""Bad settings, rows, models and tokenizers, each through Python and the command line.

Each has a sentence of its own. No weights are loaded before the sentence comes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, T5Config

from fastkto import KTOConfig, KTOTrainer
from fastkto.cli import main
from tests.cli_files import save_model, write_rows
from tests.models import tiny_model, tiny_tokenizer
from tests.row_data import assistant, user
from tests.trl_runs import text_rows


class Bad(NamedTuple):
    """Settings, or rows, and the beginning of what is said about them."""

    sentence: str
    settings: dict[str, Any] = {}
    rows: list[dict[str, Any]] | None = None
    on_the_command_line: str | None = None  # where it is another sentence
    model: Callable[[Path], Any] | None = None  # writes one, or what is not one, to a folder


def choice(name: str, value: str) -> Bad:
    return Bad(f"{name} is {value!r}", {name: value}, None, f"--{name}: {value!r} is none of")


def row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a:", "completion": " b", "label": True, **changes}


def of_rows(sentence: str, *rows: dict[str, Any]) -> Bad:
    return Bad(f"in the train data, counted from row 0, {sentence}", rows=list(rows))


GOOD, PAIR = row(), {"prompt": "p", "chosen": "a", "rejected": "b"}
TOKENS = {"prompt_ids": [1], "completion_ids": [2], "label": True}
CHAT = {"prompt": user("q"), "completion": assistant("a"), "label": True}
SETTINGS = [
    Bad("beta is -1.0; it must be 0 or more", {"beta": -1.0}),
    Bad("beta is nan; it must be 0 or more", {"beta": float("nan")}),
    Bad("beta is inf; it must be 0 or more", {"beta": float("inf")}),
    Bad("beta is 0, so that nothing would be learned", {"beta": 0.0}),
    Bad(
        "desirable_weight and undesirable_weight are both 0",
        {"desirable_weight": 0.0, "undesirable_weight": 0.0},
    ),
    Bad("learning_rate is -0.1; it must be 0", {"learning_rate": -0.1}),
    Bad("learning_rate is nan; it must be 0", {"learning_rate": float("nan")}),
    Bad("desirable_weight is -2.0; it must be", {"desirable_weight": -2.0}),
    Bad("undesirable_weight is -3.0; it must be", {"undesirable_weight": -3.0}),
    Bad(
        "max_tokens_per_pass is 'many'; give a number",
        {"max_tokens_per_pass": "many"},
        on_the_command_line="--max_tokens_per_pass: 'many' is neither a number nor auto",
    ),
    Bad("router_aux_loss_coef is -1.0; it must be 0", {"router_aux_loss_coef": -1.0}),
    Bad("max_tokens_per_pass is 0; it must be 1", {"max_tokens_per_pass": 0}),
    Bad("head_memory_mib is 0; it must be 1", {"head_memory_mib": 0}),
    Bad("max_length is 0; it must be 1", {"max_length": 0}),
    Bad(
        "precompute_ref_batch_size is 0; it must be 1",
        {"precompute_ref_batch_size": 0, "precompute_ref_log_probs": True},
    ),
    Bad("ref_model_sync_steps is 0; it must be 1", {"ref_model_sync_steps": 0}),
    Bad("gradient_accumulation_steps is 0; it must", {"gradient_accumulation_steps": 0}),
    Bad("per_device_train_batch_size is 0; it must", {"per_device_train_batch_size": 0}),
    Bad("per_device_eval_batch_size is 0; it must", {"per_device_eval_batch_size": 0}),
    Bad(
        "per_device_train_batch_size is 1 and loss_type='kto' estimates",
        {"per_device_train_batch_size": 1},
    ),
    Bad(
        "reference_cache is 'somewhere', but nothing is cached",
        {"reference_cache": "somewhere"},
    ),
    Bad("ref_model_mixup_alpha is 0.0; it must be", {"ref_model_mixup_alpha": 0.0}),
    Bad("ref_model_mixup_alpha is 2.0; it must be", {"ref_model_mixup_alpha": 2.0}),
    Bad(
        "sync_ref_model=True changes the reference while training",
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
    ),
    Bad("pad_to_multiple_of is 8, and passes hold no padding", {"pad_to_multiple_of": 8}),
    choice("loss_type", "dpo"),
    choice("kl_scope", "epoch"),
    choice("kl_pairing", "random"),
    Bad(
        "kl_pairing is 'dataset', which pairs rows in blocks",
        {"kl_pairing": "dataset", "kl_scope": "window", "per_device_train_batch_size": 1},
    ),
    choice("metrics", "best"),
    choice("nonfinite", "ignore"),
    choice("truncation_mode", "keep_middle"),
    choice("head", "fast"),
    choice("backend", "cuda"),
    choice("train_sampling_strategy", "sorted"),
    choice("checkpoint_passes", "never"),
    Bad(
        "nonfinite='nanmean' leaves rows out of their batch's mean",
        {"nonfinite": "nanmean", "kl_scope": "window"},
    ),
    Bad(
        "checkpoint_passes is 'auto', which decides",
        {"checkpoint_passes": "auto", "gradient_checkpointing": False},
    ),
    Bad(
        "activation_offloading is on and gradient_checkpointing_kwargs has",
        {"activation_offloading": True, "gradient_checkpointing_kwargs": {"offload": True}},
    ),
    Bad("neftune_noise_alpha is 5.0, whose noise is divided", {"neftune_noise_alpha": 5.0}),
    Bad("include_for_metrics has 'inputs', which are", {"include_for_metrics": ["inputs"]}),
    Bad("label_smoothing_factor is 0.1, and KTO has no", {"label_smoothing_factor": 0.1}),
    Bad("use_liger_kernel=True replaces the model's", {"use_liger_kernel": True}),
    Bad(
        "bf16_full_eval=True converts the weights",
        {"bf16_full_eval": True, "precompute_ref_log_probs": True},
    ),
    Bad(
        "optim='lomo' updates the weights inside backward",
        {"optim": "lomo", "gradient_accumulation_steps": 2},
    ),
    Bad("dtype is 'int3'; choose from", {"model_init_kwargs": {"dtype": "int3"}}),
]
ROWS = [
    of_rows("1 row has no label: row 1", GOOD, row(label=None)),
    of_rows("1 row has a label that is no boolean: row 0 (7)", row(label=7)),
    of_rows("1 row has an empty completion: row 1", GOOD, row(completion="")),
    of_rows("1 row has no prompt: row 1", GOOD, row(prompt=None)),
    of_rows("1 row has no completion: row 1", GOOD, row(completion=None)),
    of_rows("1 row has a completion that is no text: row 0 (7)", row(completion=7)),
    of_rows("1 row has a prompt that is no conversation", row(prompt=["p"], completion=["c"])),
    of_rows("1 row has a completion that is no conversation", CHAT | {"completion": "text"}),
    of_rows("1 row has an empty completion: row 0", CHAT | {"completion": assistant("")}),
    of_rows("1 row has tools that are no JSON: row 0", CHAT | {"tools": "{"}),
    of_rows("1 row has tools that are no list: row 0", CHAT | {"tools": "{}"}),
    of_rows("1 row has chat_template_kwargs that are", CHAT | {"chat_template_kwargs": 3}),
    of_rows("1 row has an empty chosen: row 0", PAIR | {"chosen": ""}),
    of_rows("1 row has an empty rejected: row 0", PAIR | {"rejected": ""}),
    of_rows(
        "1 row has no shared beginning of chosen and rejected",
        {"chosen": "pa", "rejected": "pb"},
        {"chosen": "no", "rejected": "yes"},
    ),
    of_rows("1 row has an empty completion_ids: row 0", TOKENS | {"completion_ids": []}),
    of_rows("1 row has completion_ids that are no token", TOKENS | {"completion_ids": [-1]}),
    Bad("the train data has the columns question, answer", rows=[{"question": "a", "answer": "b"}]),
    Bad("prompt, completion, but no label", rows=[{"prompt": "a", "completion": "b"}]),
    Bad("all 3 rows of the train data are too", {"max_length": 8}, [row(prompt="long" * 9)] * 3),
]


def another_kind(folder: Path) -> None:
    T5Config(num_layers=1, d_model=8, num_heads=1, d_ff=8).save_pretrained(folder)


def a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def changed_tokenizer(folder: Path, **fields: Any) -> None:
    tokenizer = tiny_tokenizer()
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)


MODELS = [
    Bad("there is no folder /", model=shutil.rmtree),
    Bad("is not a valid JSON file", model=a_damaged_config),
    Bad("holds a model of the type 't5', which transformers has no causal", model=another_kind),
    Bad(
        "the tokenizer has no end-of-sequence token",
        model=partial(changed_tokenizer, eos_token=None),
    ),
    Bad(
        "the train data holds conversations, but the tokenizer has no chat template",
        rows=[CHAT, CHAT],
        model=partial(changed_tokenizer, chat_template=None),
    ),
]
# A command line reads numbers as they are meant, or says that they are none.
KINDS = [
    Bad("beta is '0.1', a str; pass a number", {"beta": "0.1"}),
    Bad("beta is None, a NoneType; pass a number", {"beta": None}),
    Bad("learning_rate is '1e-5', a str; pass a number", {"learning_rate": "1e-5"}),
    Bad("router_aux_loss_coef is 'x', a str; pass a number, or", {"router_aux_loss_coef": "x"}),
    Bad("ref_model_mixup_alpha is '1', a str; pass", {"ref_model_mixup_alpha": "1"}),
    Bad("max_length is '64', a str; pass an integer, or None", {"max_length": "64"}),
    Bad("max_length is 64.0, a float; pass an integer", {"max_length": 64.0}),
    Bad("max_length is True, a bool; pass an integer", {"max_length": True}),
    Bad("head_memory_mib is '96', a str; pass an integer", {"head_memory_mib": "96"}),
    Bad("max_tokens_per_pass is 2.5, a float; pass", {"max_tokens_per_pass": 2.5}),
    Bad(
        "per_device_train_batch_size is 2.5, a float; pass an integer",
        {"per_device_train_batch_size": 2.5},
    ),
    Bad(
        "gradient_accumulation_steps is 1.5, a float; pass an integer",
        {"gradient_accumulation_steps": 1.5},
    ),
]
if "ddp_static_graph" in KTOConfig.__dataclass_fields__:  # in newer transformers
    SETTINGS.append(
        Bad("ddp_static_graph=True promises that all steps", {"ddp_static_graph": True})
    )
TABLE = [*SETTINGS, *ROWS, *MODELS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(autouse=True)
def no_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded before the mistake was named")

    monkeypatch.setattr("fastkto.model_class.AutoModelForCausalLM.from_pretrained", load)


def test_there_are_sixty_different_sentences() -> None:
    assert len({bad.sentence for bad in TABLE}) == len(TABLE) >= 60


def as_flag(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value)
    return " ".join(value) if isinstance(value, list) else value


def model_of(bad: Bad, folder: Path, good: str) -> str:
    """A copy of the good one, changed."""
    if bad.model is None:
        return good
    shutil.copytree(good, folder / "model")
    bad.model(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("bad", [*TABLE, *KINDS], ids=lambda bad: bad.sentence[:60])
def test_from_python(tmp_path: Path, model: str, bad: Bad) -> None:
    rows = text_rows() if bad.rows is None else Dataset.from_list(bad.rows)
    model = model_of(bad, tmp_path, model)
    is_changed = isinstance(bad.model, partial)
    tokenizer = AutoTokenizer.from_pretrained(model) if is_changed else tiny_tokenizer()
    settings = {"use_cpu": True, "report_to": "none"} | bad.settings
    with pytest.raises((ValueError, TypeError, OSError), match=re.escape(bad.sentence)):
        KTOTrainer(
            model=model,
            args=KTOConfig(str(tmp_path), **settings),
            train_dataset=rows,
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.sentence[:60])
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, bad: Bad
) -> None:
    path = data if bad.rows is None else write_rows(tmp_path / "rows.jsonl", bad.rows)
    model = model_of(bad, tmp_path, model)
    flags = [f"--{name}={as_flag(value)}" for name, value in bad.settings.items()]
    argv = ["train", "--model", model, "--data", path, f"--output_dir={tmp_path}", *flags]
    assert main([*argv, "--use_cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert (bad.on_the_command_line or bad.sentence) in error


# ---- Arguments that the command line does not have ----


def gpt2() -> Any:
    return tiny_model("gpt2", n_positions=32, max_position_embeddings=32)


def long_row() -> Dataset:
    return Dataset.from_list([row(), row(prompt="long" * 9 + ":")] * 2)


ARGUMENTS: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    (
        "ref_model is a str, 'some/path'; pass a loaded model",
        lambda: {"ref_model": "some/path"},
    ),
    (
        "processing_class is missing, and model has no path",
        lambda: {"processing_class": None},
    ),
    (
        "eval_dataset has None under 'a'; pass a datasets.Dataset",
        lambda: {"eval_dataset": {"a": None}},
    ),
    (
        "and the ref_model has a vocabulary of 64; use the model's own tokenizer",
        lambda: {"ref_model": tiny_model("llama", vocab_size=64)},
    ),
    (
        "the train data has a row of 40 tokens; the model or its reference has 32 positions: set",
        lambda: {"model": gpt2(), "train_dataset": long_row()},
    ),
    (
        "the eval_a data has a row of 40 tokens; the model or its reference has 32 positions",
        lambda: {"ref_model": gpt2(), "eval_dataset": {"a": long_row()}},
    ),
    (
        "the train data has a transform (set_transform or with_transform), which rows that are",
        lambda: {"train_dataset": long_row().with_transform(dict)},
    ),
    (
        "ref_model is a OptimizedModule; pass a loaded model",
        lambda: {"ref_model": torch.compile(tiny_model("llama"))},
    ),
]


@pytest.mark.parametrize(
    ("sentence", "arguments"), ARGUMENTS, ids=[one[:60] for one, _ in ARGUMENTS]
)
def test_arguments_of_python(
    tmp_path: Path, sentence: str, arguments: Callable[[], dict[str, Any]]
) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)):
        python_run(tmp_path, **arguments())


def python_run(folder: Path, **arguments: Any) -> KTOTrainer:
    given = {
        "model": tiny_model("llama"),
        "train_dataset": Dataset.from_list([row()] * 4),
        "processing_class": tiny_tokenizer(),
    }
    args = KTOConfig(
        str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
        max_steps=1,
        save_strategy="no",
    )
    return KTOTrainer(args=args, **(given | arguments))


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_tokens_of_a_stream_that_a_model_does_not_have_name_the_row(
    tmp_path: Path, name: str
) -> None:
    tokens = [{**TOKENS, "completion_ids": [2, 3 + 70 * (index == 2)]} for index in range(4)]
    stream = Dataset.from_list(tokens).to_iterable_dataset()
    small = {name: tiny_model("llama", vocab_size=64)}
    run = python_run(tmp_path, train_dataset=stream, **small)
    with pytest.raises(ValueError, match="row 2 has the token 73, and the model or its reference"):
        run.train()


def test_pairs_longer_than_a_table_of_positions_name_the_row(tmp_path: Path) -> None:
    """A long prompt and a long completion that are fine with their own and not with each other."""
    tokens = [
        {"prompt_ids": [1] * 20, "completion_ids": [2] * 4, "label": True},
        {"prompt_ids": [1] * 4, "completion_ids": [2] * 20, "label": False},
    ]
    run = python_run(tmp_path, model=gpt2(), train_dataset=Dataset.from_list(tokens * 2))
    with pytest.raises(ValueError, match="row . has 40 tokens, with its own completion or with"):
        run.train()
