"""Rows of every format for the tests of data, made from a seed, and rows that are simply valid."""

import json
import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset

MAX_LENGTH = 80
TOOLS = [{"name": "weather"}]
# Prompts that end inside a token of the whole text are among them: " " and "t" merge.
WORDS = ["the ", "other ", "a", "then", " in", "or ", "t", " ", "answer. ", "42\n"]


def say(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "be kind"}, {"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def text_row(rng: random.Random) -> dict[str, Any]:
    return {"prompt": say(rng, 36), "completion": say(rng, 24), "label": rng.random() < 0.6}


def text_row_with_eos(rng: random.Random) -> dict[str, Any]:
    return text_row(rng) | {"completion": say(rng, 5) + rng.choice(["", "<eos>"])}


def conversation_row(rng: random.Random) -> dict[str, Any]:
    row = text_row(rng)
    answer = assistant(row["completion"])
    if rng.random() < 0.3:  # a completion of several turns
        answer = [*answer, {"role": "user", "content": "t"}, *assistant("in")]
    return row | {"prompt": user(row["prompt"])[rng.randint(0, 1) :], "completion": answer}


def tools_row(rng: random.Random) -> dict[str, Any]:
    return conversation_row(rng) | {"tools": json.dumps(TOOLS) if rng.random() < 0.5 else None}


def tools_list_row(rng: random.Random) -> dict[str, Any]:
    return conversation_row(rng) | {"tools": TOOLS}


def template_row(rng: random.Random) -> dict[str, Any]:
    template = "{{ messages[0]['content'] }}{% if shout %}!!{% endif %}" + (
        "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    )
    kwargs = {"shout": rng.random() < 0.5, "chat_template": template}
    return conversation_row(rng) | {"chat_template_kwargs": kwargs}


def paired_row(rng: random.Random) -> dict[str, Any]:
    return {"prompt": say(rng, 36), "chosen": say(rng, 20), "rejected": say(rng, 9), "id": 3}


def paired_conversation_row(rng: random.Random) -> dict[str, Any]:
    row = paired_row(rng)
    return {"prompt": user(row["prompt"])} | {k: assistant(row[k]) for k in ("chosen", "rejected")}


def implicit_row(rng: random.Random) -> dict[str, Any]:
    prompt = "say " + say(rng, 36)
    return {"chosen": prompt + say(rng, 20), "rejected": prompt + " " + say(rng, 9)}


def implicit_conversation_row(rng: random.Random) -> dict[str, Any]:
    row = paired_conversation_row(rng)
    return {k: row["prompt"] + row[k] for k in ("chosen", "rejected")}


ROWS: list[Callable[[random.Random], dict[str, Any]]] = [
    text_row,
    text_row_with_eos,
    conversation_row,
    tools_row,
    tools_list_row,
    template_row,
    paired_row,
    paired_conversation_row,
    implicit_row,
    implicit_conversation_row,
]


def make(row: Callable[[random.Random], dict[str, Any]], count: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    return Dataset.from_list([row(rng) for _ in range(count)])


def text_data(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Valid text rows, changed at some indices: `completion={4: ""}`."""
    rows = [{"prompt": f"q{i}", "completion": "yes", "label": i % 2 == 0} for i in range(count)]
    for column, values in changes.items():
        for index, value in values.items():
            rows[index][column] = value
    return rows


def stream_of(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))
