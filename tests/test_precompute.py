"""Training runs with cached reference log-probabilities: what is scored, and what is logged."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig

from fastkto import KTOConfig, KTOTrainer
from fastkto.precompute import ReleasedReference
from fastkto.score_store import FILE_NAME
from tests.equal_runs import NOT_COMPARED, check_half_known
from tests.launch import launch
from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

ROWS = 16


class Forwards:
    """Counts forwards of the reference, those of the checks before training left out."""

    def __init__(self, run: KTOTrainer) -> None:
        self.run, self.count = run, 0
        self.model = run.reference.model or run.model
        self.model.register_forward_hook(self.hook)

    def hook(self, *args: Any) -> None:
        layers = (m for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        layer: Any = next(layers, None)
        adapter = self.run.reference.adapter
        if self.run.reference.model is not None:
            is_reference = True
        elif adapter is None:
            is_reference = layer.disable_adapters
        else:
            is_reference = layer.active_adapters == [adapter]
        self.count += self.run._models_are_checked and is_reference


def trainer(directory: Path, **arguments: Any) -> KTOTrainer:
    own = ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config")
    given = {name: arguments.pop(name) for name in own if name in arguments}
    given.setdefault("model", tiny_model("llama", seed=1))
    if "peft_config" not in given and not hasattr(given["model"], "peft_config"):
        given.setdefault("ref_model", tiny_model("llama", seed=2))
    given.setdefault("train_dataset", text_rows(ROWS))
    defaults = {
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "max_tokens_per_pass": 64,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "precompute_ref_log_probs": True,
        "reference_cache": str(directory / "cache"),
    }
    args = KTOConfig(**{**defaults, **arguments})
    return KTOTrainer(args=args, processing_class=tiny_tokenizer(), **given)


def train(directory: Path, **arguments: Any) -> tuple[KTOTrainer, int]:
    """A finished run, and how many forwards its reference took."""
    run = trainer(directory, **arguments)
    forwards = Forwards(run)
    run.train()
    return run, forwards.count


def uncached(directory: Path, **arguments: Any) -> KTOTrainer:
    off = {"precompute_ref_log_probs": False, "reference_cache": None}
    return train(directory, **{**arguments, **off})[0]


def stored(directory: Path) -> int:
    """Log-probabilities in the cache."""
    with sqlite3.connect(directory / "cache" / FILE_NAME) as connection:
        return connection.execute("SELECT count(*) FROM scores").fetchone()[0]


def compared(run: KTOTrainer) -> list[dict[str, float]]:
    return [
        {k: v for k, v in log.items() if not any(part in k for part in NOT_COMPARED)}
        for log in run.state.log_history
    ]


def steps(run: KTOTrainer) -> list[dict[str, float]]:
    return [log for log in run.state.log_history if "loss" in log]


def lora(**fields: Any) -> LoraConfig:
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **fields}
    return LoraConfig(task_type="CAUSAL_LM", **fields)


# ---- Hits ----


@pytest.mark.parametrize(
    "settings",
    [
        {"train_dataset": text_rows(14)},  # the last batch is short
        {"gradient_accumulation_steps": 2, "kl_scope": "window", "max_steps": 3},
        {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random"},
        {"kl_pairing": "dataset", "train_sampling_strategy": "random"},
    ],
    ids=["batch", "window", "apo", "pairs of the data set"],
)
def test_every_sequence_is_scored_before_the_first_step_and_the_numbers_stay(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings | {
        "eval_dataset": {"one": text_rows(6, seed=4), "two": text_rows(5, seed=5)},
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    expected = uncached(tmp_path, **settings)
    run, forwards = train(tmp_path, **settings)
    assert forwards > 0 and compared(run) == compared(expected)  # the same passes: the same bits
    assert not any("ref_cache_hits" in log for log in expected.state.log_history)
    for log in run.state.log_history:
        for prefix in ("", "eval_one_", "eval_two_"):
            if f"{prefix}loss" in log:
                assert log[f"{prefix}ref_cache_misses"] == 0 < log[f"{prefix}ref_cache_hits"]
    assert isinstance(run.reference.model, ReleasedReference)

    again, forwards = train(tmp_path, **settings)
    assert forwards == 0 and compared(again) == compared(expected)


def test_hits_survive_another_learning_rate_and_a_resume(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, save_strategy="steps", save_steps=2)
    assert stored(tmp_path) == 2 * ROWS
    other, forwards = train(tmp_path, learning_rate=0.5, output_dir=str(tmp_path / "other"))
    assert forwards == 0 and steps(other)[-1]["loss"] != steps(whole)[-1]["loss"]

    resumed = trainer(tmp_path)
    forwards = Forwards(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert forwards.count == 0
    assert compared(resumed)[:4] == compared(whole)[:4]
    assert stored(tmp_path) == 2 * ROWS


def test_hits_survive_a_grown_data_set(tmp_path: Path) -> None:
    train(tmp_path)
    grown = concatenate_datasets([text_rows(ROWS), text_rows(4, seed=9)])
    _, forwards = train(tmp_path, train_dataset=grown, max_steps=5)
    assert stored(tmp_path) == 2 * (ROWS + 4)
    assert 0 < forwards <= 8


def test_hits_survive_reshuffling(tmp_path: Path) -> None:
    train(tmp_path)
    settings = {"train_sampling_strategy": "random", "seed": 5, "disable_dropout": False}
    settings["model"] = tiny_model("llama", seed=1, attention_dropout=0.3)
    expected = uncached(tmp_path, **settings)
    settings["model"] = tiny_model("llama", seed=1, attention_dropout=0.3)
    run, _ = train(tmp_path, **settings)
    # A row's own sequence is known; the pairs of a new order are filled as they come.
    assert all(log["ref_cache_hits"] >= 4 >= log["ref_cache_misses"] for log in steps(run))
    assert sum(log["ref_cache_misses"] for log in steps(run)) > 0
    assert not isinstance(run.reference.model, ReleasedReference)
    for log, expected_log in zip(steps(run), steps(expected), strict=True):  # and random numbers
        assert log["loss"] == pytest.approx(expected_log["loss"], rel=1e-5)


def test_stream_fills_the_cache_as_it_goes(tmp_path: Path) -> None:
    stream = text_rows(ROWS).to_iterable_dataset()
    run, forwards = train(tmp_path, train_dataset=stream, max_steps=8)
    assert forwards > 0
    assert [log["ref_cache_misses"] for log in steps(run)] == [8.0] * 4 + [0.0] * 4
    assert [log["ref_cache_hits"] for log in steps(run)] == [0.0] * 4 + [8.0] * 4
    _, forwards = train(tmp_path, train_dataset=text_rows(ROWS))
    assert forwards == 0


def test_another_reference_finds_nothing(tmp_path: Path) -> None:
    train(tmp_path)
    reference = tiny_model("llama", seed=2)
    reference.lm_head.weight.data.view(torch.int32)[3, 5] ^= 1
    _, forwards = train(tmp_path, ref_model=reference)
    assert forwards > 0 and stored(tmp_path) == 4 * ROWS


@pytest.mark.parametrize("new_adapter", [True, False])
def test_adapters_reference_is_cached(new_adapter: bool, tmp_path: Path) -> None:
    def arguments() -> dict[str, Any]:
        torch.manual_seed(0)
        if new_adapter:
            return {"peft_config": lora()}
        return {"model": get_peft_model(tiny_model("llama", seed=1), lora())}

    saving = {"save_strategy": "steps", "save_steps": 2}
    expected = uncached(tmp_path, **arguments())
    run, forwards = train(tmp_path, **arguments(), **saving)
    assert forwards > 0 and compared(run) == compared(expected)
    assert all(log["ref_cache_misses"] == 0 for log in steps(run))
    resumed = trainer(tmp_path, **arguments())
    count = Forwards(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert count.count == 0 and compared(resumed)[:4] == compared(run)[:4]


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_base_is_told_by_its_scales_too(bits: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.1}
    model = tiny_model("llama", seed=1, **sizes)

    def run() -> int:
        model.save_pretrained(tmp_path / "model")
        quantised = {"quantization_config": BitsAndBytesConfig(**{bits: True})}
        loaded = type(model).from_pretrained(tmp_path / "model", **quantised)
        return train(tmp_path, model=loaded, peft_config=lora(), max_steps=2)[1]

    assert run() > 0
    assert run() == 0
    model.model.layers[0].mlp.up_proj.weight.data *= 2  # the same 4 or 8 bits of each weight
    assert run() > 0


# ---- How much is scored, and when the reference goes ----


def test_only_the_steps_of_the_run_are_scored(tmp_path: Path) -> None:
    train(tmp_path, max_steps=2)
    assert stored(tmp_path) == 2 * 8


def test_rows_scored_together_fill_passes_better(tmp_path: Path) -> None:
    expected, forwards = train(tmp_path, max_tokens_per_pass=512)
    directory = tmp_path / "together"
    run, fewer = train(directory, max_tokens_per_pass=512, precompute_ref_batch_size=16)
    assert fewer < forwards
    for log, expected_log in zip(steps(run), steps(expected), strict=True):
        assert log["loss"] == pytest.approx(expected_log["loss"], rel=1e-5)


def test_released_reference_is_missed_only_for_other_rows(tmp_path: Path) -> None:
    rows = text_rows(6, seed=4)
    run, _ = train(tmp_path, eval_dataset=rows)
    assert not any(True for _ in run.reference.model.parameters())
    assert run.evaluate()["eval_ref_cache_misses"] == 0
    assert run.evaluate(rows)["eval_ref_cache_misses"] == 0
    with pytest.raises(ValueError, match="give all rows to evaluate on as eval_dataset"):
        run.evaluate(text_rows(6, seed=5))


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "random"},
        {"auto_find_batch_size": True},
        {"eval_dataset": text_rows(6, seed=4).to_iterable_dataset()},
        {"train_dataset": text_rows(ROWS).to_iterable_dataset()},
    ],
    ids=["random order", "batch size to be found", "evaluation stream", "stream"],
)
def test_reference_stays_while_it_may_be_needed(settings: dict[str, Any], tmp_path: Path) -> None:
    run, _ = train(tmp_path, **settings)
    assert run.evaluate(text_rows(6, seed=5))["eval_ref_cache_misses"] == 12


def test_evaluation_alone_uses_the_cache(tmp_path: Path) -> None:
    rows = text_rows(6, seed=4)
    first = trainer(tmp_path, eval_dataset=rows).evaluate()
    second = trainer(tmp_path, eval_dataset=rows).evaluate()
    assert first["eval_ref_cache_misses"] == second["eval_ref_cache_hits"] == 12
    assert first["eval_loss"] == second["eval_loss"]


# ---- What is seen of it ----


def bar(text: str, name: str) -> list[tuple[int, int]]:
    """(batches done, of how many) of each state of a progress bar in `text`."""
    found = re.findall(rf"reference log-probabilities of the {name} data: .*?(\d+)/(\d+) \[", text)
    return [(int(done), int(total)) for done, total in found]


@pytest.mark.parametrize(
    "settings, total",
    [
        ({}, 4),
        ({"max_steps": 2}, 2),  # of the 4 batches of an epoch
        ({"max_steps": 8}, 4),  # every row is scored once
        ({"gradient_accumulation_steps": 3, "max_steps": 1}, 3),
        ({"precompute_ref_batch_size": 8}, 4),
        ({"train_dataset": text_rows(14)}, 4),  # the last one is short
    ],
    ids=str,
)
def test_progress_bar_runs_to_its_end(
    settings: dict[str, Any],
    total: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"one": text_rows(6, seed=4), "two": text_rows(5, seed=5)}
    train(tmp_path, disable_tqdm=False, eval_dataset=given, **settings)
    text = capsys.readouterr().err
    for name, end in (("train", total), ("one", 2), ("two", 2)):
        states = bar(text, name)
        assert states[0] == (0, end) and states[-1] == (end, end), states
        assert states == sorted(states)


def test_progress_bar_is_the_main_process_s_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, disable_tqdm=False)
    monkeypatch.setattr(run, "is_local_process_zero", lambda: False)
    run.train()
    assert stored(tmp_path) == 2 * ROWS and bar(capsys.readouterr().err, "train") == []


def test_disable_tqdm_hides_the_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, disable_tqdm=True)
    assert "log-probabilities of the train data" not in capsys.readouterr().err


# ---- Two ranks, of which one finds its rows ----


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """What the ranks' models are wrapped in, and the runs of tests/precompute_run.py."""
    directory, wrapping = tmp_path_factory.mktemp("two_ranks"), request.param
    script = Path(__file__).parent / "precompute_run.py"
    launch(script, directory, *(["fsdp"] if wrapping == "fsdp" else []), processes=2, timeout=200)
    return wrapping, torch.load(directory / "runs.pt")


@pytest.mark.slow
def test_only_one_rank_finds_its_rows_to_evaluate(two_ranks: tuple[str, dict[str, Any]]) -> None:
    _, half_known, known, expected = two_ranks[1]["evaluations"]
    assert half_known["eval_ref_cache_hits"] == half_known["eval_ref_cache_misses"] == 8
    assert known["eval_ref_cache_hits"] == expected["eval_ref_cache_misses"] == 16
    for name, value in expected.items():
        if not any(part in name for part in (*NOT_COMPARED, "preparation")):
            assert half_known[name] == pytest.approx(value, rel=1e-5), name
            assert known[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stream", "ahead"])
def test_only_one_rank_finds_its_rows_to_train_on(
    case: str, two_ranks: tuple[str, dict[str, Any]]
) -> None:
    wrapping, runs = two_ranks
    check_half_known(runs, case, in_lockstep=wrapping == "fsdp")


@pytest.mark.slow
def test_ranks_whose_batches_differ_in_size_precompute_together(
    two_ranks: tuple[str, dict[str, Any]],
) -> None:
    expected, actual = (two_ranks[1][name]["logs"] for name in ("uneven uncached", "uneven"))
    for theirs, ours in zip(expected, actual, strict=True):
        for name in ("loss", "kl", "grad_norm", "rewards/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


# ---- Refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size is 0; it must be 1 or more"),
        ({"precompute_ref_log_probs": False}, "reference_cache is '.*', but nothing is cached"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True converts the weights"),
        ({"peft_config": lora(bias="all"), "ref_model": None}, "bias is trained in the policy and"),
    ],
    ids=["batch size", "no cache", "converted weights", "trained biases"],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=tiny_model("qwen2", seed=1), **settings)


def test_rows_that_the_reference_cannot_score_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_ids": [10 + row, 11], "completion_ids": [12, 13, 1], "label": row % 2 == 0}
        for row in range(8)
    ]
    rows[5] |= {"prompt_ids": [120]}  # shorter than those that the models are checked with
    reference = tiny_model("llama", seed=2)
    with torch.no_grad():
        reference.get_input_embeddings().weight[120] = float("nan")
    run = trainer(tmp_path, ref_model=reference, train_dataset=Dataset.from_list(rows))
    with pytest.raises(FloatingPointError, match=r"reference's log-probabilities of rows \[5\]"):
        run.train()
