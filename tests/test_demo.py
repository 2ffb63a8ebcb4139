"""The demo: KTO on the checker's labels improves the model, and on shuffled labels it does not."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkto import demo, demo_model, demo_task
from fastkto.demo import DemoResult, Taught

SEEDS = (0, 1, 2)


class Runs(NamedTuple):
    """One taught model, KTO with the checker's labels, and KTO with shuffled ones."""

    taught: Taught
    result: DemoResult
    control: DemoResult
    said: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Runs]:
    folder = tmp_path_factory.mktemp("demo")
    all_runs = []
    for seed in SEEDS:
        said: list[str] = []
        taught = demo.prepare(seed, said.append)
        result = demo.improve(
            taught, folder / f"true-{seed}", seed=seed, shuffle_labels=False, say=said.append
        )
        control = demo.improve(
            taught, folder / f"shuffled-{seed}", seed=seed, shuffle_labels=True, say=_silent
        )
        all_runs.append(Runs(taught, result, control, said))
    return all_runs


def _silent(text: str) -> None:
    pass


def read_rows(result: DemoResult) -> list[dict]:
    return [json.loads(line) for line in result.paths["rows"].read_text().splitlines()]


# ---- The task ----


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("abcd", True),
        ("dcba", False),
        ("abc", False),
        ("abcdd", False),
        ("abdc", False),
        ("", False),
    ],
)
def test_checker_accepts_the_sorted_letters_only(answer: str, right: bool) -> None:
    assert demo_task.is_right("dbac=", answer) is right


def test_success_rate_is_the_share_of_right_answers() -> None:
    answers = [["ab", "ba"], ["cd", "cd"]]
    assert demo_task.success_rate(["ba=", "dc="], answers) == 0.75


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_prompts_and_their_letters_are_in_no_training_data(seed: int) -> None:
    prompts = demo_task.held_out_prompts()
    held_out = {frozenset(prompt) for prompt in prompts}
    lessons = [prompt for prompt, _ in demo_task.make_lessons(demo.LESSONS, seed)]
    questions = demo_task.training_prompts(demo.ANSWERS, seed)
    assert held_out.isdisjoint(frozenset(prompt) for prompt in lessons + questions)
    assert prompts == demo_task.held_out_prompts()
    assert len(set(prompts)) > 0.9 * len(prompts)


def test_half_of_the_lessons_are_backwards_and_the_others_right() -> None:
    lessons = demo_task.make_lessons(4_000, seed=0)
    right = [demo_task.is_right(prompt, answer) for prompt, answer in lessons]
    assert mean(right) == pytest.approx(demo_task.RIGHT_LESSONS, abs=0.03)
    for (prompt, answer), is_right in zip(lessons, right, strict=True):
        assert is_right or demo_task.is_right(prompt, answer[::-1])


# ---- The model ----


def test_tokenizer_gives_a_token_for_each_character_and_the_text_back() -> None:
    tokenizer = demo_model.build_tokenizer()
    ids = tokenizer("dbac=")["input_ids"]
    assert len(ids) == 5 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "dbac="


def test_a_lesson_teaches_the_answer_and_its_end_but_not_the_prompt() -> None:
    tokenizer = demo_model.build_tokenizer()
    lessons = [("dbac=", "abcd"), ("fedcba=", "abcdef")]
    batch = demo_model._lesson_batch(tokenizer, lessons, torch.device("cpu"))
    for labels, (_, answer) in zip(batch["labels"], lessons, strict=True):
        assert tokenizer.decode(labels[labels != -100]) == f"{answer}<eos>"
    assert batch["attention_mask"].sum(1).tolist() == [10, 14]


def test_sampling_repeats_for_a_seed_and_leaves_the_random_state_alone() -> None:
    tokenizer = demo_model.build_tokenizer()
    model = demo_model.build_model(tokenizer, seed=0)
    state = torch.random.get_rng_state()

    def sample(seed: int) -> list[list[str]]:
        prompts = ["dbac=", "fedcba="]
        return demo_model.sample_answers(model, tokenizer, prompts, samples=3, seed=seed)

    assert [len(answers) for answers in sample(0)] == [3, 3]
    assert sample(0) == sample(0) != sample(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampled_answers_follow_the_models_probabilities() -> None:
    tokenizer = demo_model.build_tokenizer()
    model = demo_model.build_model(tokenizer, seed=0)
    with torch.no_grad():  # a model that has something to say
        model.lm_head.weight.mul_(40.0)
    prompts = ["dbac=", "fedcba="]
    samples = demo_model.sample_answers(model, tokenizer, prompts, samples=2_000, seed=0)
    for prompt, answers in zip(prompts, samples, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        with torch.no_grad():
            probability = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        for letter in demo_task.LETTERS:
            expected = probability[tokenizer.convert_tokens_to_ids(letter)].item()
            share = mean(answer.startswith(letter) for answer in answers)
            assert share == pytest.approx(expected, abs=5 * (0.25 / 2_000) ** 0.5)


# ---- The whole demonstration ----


def test_shuffling_permutes_the_labels_and_nothing_else() -> None:
    rows = [{"prompt": f"{i}=", "completion": "a", "label": i % 2 == 0} for i in range(100)]
    shuffled = demo.with_shuffled_labels(rows, seed=0)
    assert [row["prompt"] for row in shuffled] == [row["prompt"] for row in rows]
    assert sum(row["label"] for row in shuffled) == 50
    assert 30 < sum(a["label"] == b["label"] for a, b in zip(rows, shuffled, strict=True)) < 70


@pytest.mark.slow
def test_kto_on_the_checkers_labels_gains_15_points(runs: list[Runs]) -> None:
    gains = [run.result.after - run.result.before for run in runs]
    assert mean(gains) >= 0.15, gains


@pytest.mark.slow
def test_kto_on_shuffled_labels_changes_3_points_at_most(runs: list[Runs]) -> None:
    changes = [run.control.after - run.control.before for run in runs]
    assert mean(abs(change) for change in changes) <= 0.03, changes


@pytest.mark.slow
def test_the_taught_model_is_imperfect_and_not_changed_by_kto(runs: list[Runs]) -> None:
    run = runs[0]
    assert 0.3 < run.result.before < 0.7
    assert run.result.before == run.control.before
    answers = demo.answer_held_out(run.taught.model, run.taught.tokenizer)
    assert answers == run.taught.held_out_answers


@pytest.mark.slow
def test_rows_are_balanced_and_carry_the_checkers_labels(runs: list[Runs]) -> None:
    for run in runs:
        rows = read_rows(run.result)
        assert len(rows) > demo.ANSWERS / 2
        assert sum(row["label"] for row in rows) * 2 == len(rows)
        for row in rows:
            assert row["label"] is demo_task.is_right(row["prompt"], row["completion"])
            assert row["completion"]
        # No class is left alone in the last batches, where nothing could be compared.
        assert 0 < sum(row["label"] for row in rows[-demo.KTO_BATCH :]) < demo.KTO_BATCH


@pytest.mark.slow
def test_saved_model_scores_what_was_reported(runs: list[Runs]) -> None:
    result = runs[0].result
    model = AutoModelForCausalLM.from_pretrained(result.paths["after"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result.paths["after"])
    model.to(runs[0].taught.model.device)
    answers = demo.answer_held_out(model, tokenizer)
    assert demo_task.success_rate(demo_task.held_out_prompts(), answers) == result.after
    metrics = json.loads(result.paths["metrics"].read_text())
    assert (metrics["before"], metrics["after"]) == (result.before, result.after)


@pytest.mark.slow
def test_user_sees_rates_examples_and_files(runs: list[Runs]) -> None:
    result, text = runs[0].result, "\n".join(runs[0].said)
    for rate in (result.before, result.after):
        assert f"{100 * rate:.1f}%" in text
    assert len(result.examples) == demo.EXAMPLES
    for prompt, before, after in result.examples:
        line = next(line for line in text.splitlines() if line.startswith(f"   {prompt}"))
        marks = ["right" if demo_task.is_right(prompt, a) else "wrong" for a in (before, after)]
        assert line.split()[1:] == [before, marks[0], after, marks[1]]
    for path in result.paths.values():
        assert path.exists() and str(path) in text
    assert not list(result.paths["rows"].parent.glob(".*"))


def test_run_demo_replaces_an_earlier_run_and_needs_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LESSONS", 8_192)
    monkeypatch.setattr(demo, "ANSWERS", 512)
    monkeypatch.setattr(demo, "SAMPLES_PER_PROMPT", 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    (tmp_path / "rows.jsonl").write_text("from an earlier run")
    (tmp_path / "model-after").mkdir()
    (tmp_path / "model-after" / "old").touch()
    (tmp_path / ".model-after.partial").mkdir()
    result = demo.run_demo(tmp_path, seed=7, shuffle_labels=True, say=said.append)
    names = {"rows.jsonl", "model-before", "model-after", "metrics.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not (tmp_path / "model-after" / "old").exists()
    assert "pip install matplotlib" in "\n".join(said)
    assert set(result.paths) == {"rows", "before", "after", "metrics"}
    metrics = json.loads(result.paths["metrics"].read_text())
    assert metrics["shuffle_labels"] is True and metrics["seed"] == 7
    rows = read_rows(result)
    agree = mean(
        row["label"] == demo_task.is_right(row["prompt"], row["completion"]) for row in rows
    )
    assert 0.3 < agree < 0.7


# ---- Mistakes ----


def _file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file"


def _folder_of_others(folder: Path) -> Path:
    (folder / "thesis.txt").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("make", "seed", "message"),
    [
        (_file, 0, "is a file; give a folder"),
        (_folder_of_others, 0, "holds files that are not from a demo.*give a new folder"),
        (lambda folder: folder, -1, "seed is -1; it must be at least 0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    tmp_path: Path, make: Callable[[Path], Path], seed: int, message: str
) -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=message):
        demo.run_demo(make(tmp_path), seed=seed, say=said.append)
    assert not said
