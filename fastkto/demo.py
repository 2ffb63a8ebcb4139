"""`fastkto demo`: from an imperfect model to a better one with KTO, without a download or a GPU.

A tiny decoder is taught to sort letters on a mixture of right answers and answers in the opposite
order, so that it can sort but often sorts the wrong way round. A checker labels answers that the
model gives, KTO trains on these rows, and held-out prompts show what that was worth.
"""

import copy
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastkto.config import KTOConfig
from fastkto.demo_model import build_model, build_tokenizer, sample_answers, teach
from fastkto.demo_task import (
    HELD_OUT_PROMPTS,
    RIGHT_LESSONS,
    held_out_prompts,
    is_right,
    make_lessons,
    success_rate,
    training_prompts,
)
from fastkto.plot import plot_training
from fastkto.trainer import KTOTrainer

LESSONS = 16_384

ANSWERS = 4_096
KTO_BATCH = 64
# Plain SGD moves the model as far as the labels agree with each other. The steps of AdamW are as
# large for shuffled labels as for true ones; with it, shuffled labels moved the model twice as far.
KTO_OPTIMIZER = "sgd"
KTO_LEARNING_RATE = 5e-3
KTO_BETA = 0.5

SAMPLES_PER_PROMPT = 8
EXAMPLES = 6

ROWS = "rows.jsonl"
WHAT_IS = {
    "rows": "rows, one per line",
    "before": "model before KTO",
    "after": "model after KTO",
    "plot": "training curves",
    "metrics": "results",
}

Say = Callable[[str], None]
Row = dict[str, Any]


class Example(NamedTuple):
    """A held-out prompt with one sampled answer before and one after KTO."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoResult:
    """What a run measured and where its files are. Success rates are fractions in [0, 1]."""

    before: float
    after: float
    examples: list[Example]
    paths: dict[str, Path]
    seconds: float


class Taught(NamedTuple):
    """An imperfect model, its labelled answers to training prompts, and its held-out answers."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    rows: list[Row]
    held_out_answers: list[list[str]]
    seconds: float


def run_demo(
    output_dir: Path, *, seed: int = 0, shuffle_labels: bool = False, say: Say
) -> DemoResult:
    """The whole demonstration: teach, label, train with KTO, compare on held-out prompts.

    Args:
        output_dir: receives the models before and after, the rows, the metrics and a plot.
        seed: of the weights, the lessons, the rows and the training. The task, the held-out prompts
            and the random numbers with which answers to them are sampled are always the same.
        shuffle_labels: permute the labels among the rows, so that there is nothing to learn.
        say: shows a line to the user. Progress bars go to stderr.

    Raises:
        ValueError: the seed is out of range, or `output_dir` holds something else.
    """
    _check(output_dir, seed)
    return improve(
        prepare(seed, say), output_dir, seed=seed, shuffle_labels=shuffle_labels, say=say
    )


def _check(output_dir: Path, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**32")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file; give a folder")
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / ROWS).exists():
        raise ValueError(
            f"output_dir {output_dir} holds files that are not from a demo and might be "
            "overwritten; give a new folder"
        )
    output_dir.mkdir(parents=True, exist_ok=True)


def prepare(seed: int, say: Say) -> Taught:
    """Build a model, teach it imperfectly, and have its answers labelled."""
    started = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    say('The task: sort the letters of a word, "dbac=" to "abcd".')
    say(
        f"\n1. Teaching a model of {model.num_parameters():,} parameters on {LESSONS:,} examples, "
        f"{1 - RIGHT_LESSONS:.0%} of them sorted backwards"
    )
    with _one_thread():
        teach(model, tokenizer, make_lessons(LESSONS, seed))
        say(f"\n2. Collecting {ANSWERS:,} of its answers and checking each one")
        rows = collect_rows(model, tokenizer, seed)
        held_out_answers = answer_held_out(model, tokenizer)
    say(f"   KTO rows: {len(rows) // 2:,} right and {len(rows) // 2:,} wrong answers")
    return Taught(model, tokenizer, rows, held_out_answers, time.monotonic() - started)


def improve(
    taught: Taught, output_dir: Path, *, seed: int, shuffle_labels: bool, say: Say
) -> DemoResult:
    """Train with KTO from the taught model, measure again, save and show everything."""
    started = time.monotonic()
    rows = with_shuffled_labels(taught.rows, seed) if shuffle_labels else taught.rows
    say(f"\n3. KTO on these rows{', with shuffled labels' if shuffle_labels else ''}")
    trainer = train_kto(taught, rows, output_dir, seed)
    with _one_thread():
        answers = answer_held_out(trainer.model, taught.tokenizer)
    prompts = held_out_prompts()
    result = DemoResult(
        before=success_rate(prompts, taught.held_out_answers),
        after=success_rate(prompts, answers),
        examples=[
            Example(prompt, before[0], after[0])
            for prompt, before, after in zip(
                prompts[:EXAMPLES], taught.held_out_answers, answers, strict=False
            )
        ],
        paths=save_files(taught, trainer, rows, output_dir, say),
        seconds=taught.seconds + time.monotonic() - started,
    )
    result.paths["metrics"] = output_dir / "metrics.json"
    settings = {"seed": seed, "shuffle_labels": shuffle_labels, "rows": len(rows)}
    results = {name: getattr(result, name) for name in ("before", "after", "seconds")}
    _write(result.paths["metrics"], json.dumps(settings | results, indent=2) + "\n")
    _show(result, say)
    return result


def answer_held_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    return sample_answers(model, tokenizer, held_out_prompts(), samples=SAMPLES_PER_PROMPT, seed=0)


def collect_rows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[Row]:
    """KTO rows: the model's answers to training prompts, with the checker's labels.

    As many right answers as wrong ones are kept, so that no class weights are needed. Empty answers
    cannot be trained on and are left out.
    """
    prompts = training_prompts(ANSWERS, seed)
    sampled = sample_answers(model, tokenizer, prompts, samples=1, seed=seed)
    rows = [
        {"prompt": prompt, "completion": answer, "label": is_right(prompt, answer)}
        for prompt, (answer,) in zip(prompts, sampled, strict=True)
        if answer
    ]
    right = [i for i, row in enumerate(rows) if row["label"]]
    wrong = [i for i, row in enumerate(rows) if not row["label"]]
    rng, count = random.Random(f"classes {seed}"), min(len(right), len(wrong))
    return [rows[i] for i in sorted(rng.sample(right, count) + rng.sample(wrong, count))]


def with_shuffled_labels(rows: list[Row], seed: int) -> list[Row]:
    """The same rows with their labels permuted."""
    labels = [row["label"] for row in rows]
    random.Random(f"labels {seed}").shuffle(labels)
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def train_kto(taught: Taught, rows: list[Row], output_dir: Path, seed: int) -> KTOTrainer:
    """KTO on a copy of the taught model; `trainer.model` is the result, in evaluation mode."""
    args = KTOConfig(
        output_dir=str(output_dir),
        beta=KTO_BETA,
        optim=KTO_OPTIMIZER,
        learning_rate=KTO_LEARNING_RATE,
        per_device_train_batch_size=KTO_BATCH,
        num_train_epochs=1,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        seed=seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=taught.model.device.type == "cpu",
        dataloader_pin_memory=taught.model.device.type == "cuda",
    )
    args._n_gpu = min(args.n_gpu, 1)  # Trainer would spread the model over all GPUs it sees
    trainer = KTOTrainer(
        model=copy.deepcopy(taught.model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=taught.tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress)
    with _one_thread():
        trainer.train()
    trainer.model.eval()
    return trainer


def save_files(
    taught: Taught, trainer: KTOTrainer, rows: list[Row], output_dir: Path, say: Say
) -> dict[str, Path]:
    """Write the rows, both models, and the plot if matplotlib is installed; returns the paths.

    Each is written under another name and then renamed, so that none is ever half there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {"rows": output_dir / ROWS}
    _write(paths["rows"], "".join(json.dumps(row) + "\n" for row in rows))
    for name, model in (("before", taught.model), ("after", trainer.model)):
        paths[name] = output_dir / f"model-{name}"
        partial = output_dir / f".model-{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        taught.tokenizer.save_pretrained(partial)
        shutil.rmtree(paths[name], ignore_errors=True)
        os.replace(partial, paths[name])
    try:
        paths["plot"] = plot_training(trainer.state.log_history, output_dir / "training.png")
    except ImportError as error:
        say(f"   There is no plot: {error}.")
    return paths


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _show(result: DemoResult, say: Say) -> None:
    """The comparison, the examples and the files, for the user."""
    change = 100 * (result.after - result.before)
    many = f"{HELD_OUT_PROMPTS:,} held-out prompts, {SAMPLES_PER_PROMPT} samples each"
    say(f"\nRight answers to {many}")
    say(f"   before KTO  {result.before:6.1%}")
    say(f"   after KTO   {result.after:6.1%}   ({change:+.1f} points)")
    say(f"\n   {'prompt':<10}{'before':<17}{'after'}")
    for prompt, before, after in result.examples:
        marks = [f"{a:<8}{'right' if is_right(prompt, a) else 'wrong'}" for a in (before, after)]
        say(f"   {prompt:<10}{marks[0]:<17}{marks[1]}")
    say("\nFiles")
    for name, path in result.paths.items():
        say(f"   {WHAT_IS[name]:<22}{path}")
    say(f"Done in {result.seconds:.0f} s.")


class _Progress(ProgressCallback):
    """Trainer's progress bar with the reward margin on it, in place of a line for each log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("KTO")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "rewards/margins" in logs:
            self.training_bar.set_postfix(margin=f"{float(logs['rewards/margins']):+.4f}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread on the CPU: matrices this small gain nothing from more, and results repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
