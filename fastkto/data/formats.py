"""What a row of a user's data set may look like, and what is wrong with one that does not."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

ACCEPTED = (
    "accepted are prompt, completion, label; prompt, chosen, rejected; chosen, rejected (each "
    "beginning with the prompt); and the tokenised prompt_ids, completion_ids, label"
)
LABELS = "write true (desirable) or false (undesirable); 1 and 0 are accepted too"
CONVERSATION = 'a list of messages such as [{"role": "user", "content": "Hello"}]'
SHOWN_ROWS = 10


@dataclass(frozen=True)
class RowFormat:
    """The columns of a data set that are used, and whether they hold text or conversations."""

    kind: Literal["text", "conversation", "tokens"]
    answers: tuple[str, ...]  # ("completion",), ("chosen", "rejected") or ("completion_ids",)
    prompt: str | None  # None: chosen and rejected begin with it

    @property
    def paired(self) -> bool:
        """Whether a row of the user's holds a desirable and an undesirable answer."""
        return len(self.answers) == 2

    @property
    def columns(self) -> list[str]:
        """Columns that are read; the last three may be absent."""
        first = [] if self.prompt is None else [self.prompt]
        own = [] if self.paired else ["label"]
        more = ["row"] if self.kind == "tokens" else ["tools", "chat_template_kwargs"]
        return [*first, *self.answers, *own, *more]


class Problem(NamedTuple):
    """Why a row cannot be used: 'N rows have `what`: ROWS (`expected`)'."""

    what: str
    expected: str
    value: str | None = None


class Example(NamedTuple):
    """One prompt with one answer, before tokenisation."""

    prompt: Any
    completion: Any
    label: bool


def detect_format(columns: Sequence[str], first_row: dict[str, Any], name: str) -> RowFormat:
    """The format of a data set with these columns and this first row.

    Raises ValueError if the columns are none of the accepted formats.
    """
    found = f"the {name} data has the columns {', '.join(columns) or '(none)'}"
    if images := [column for column in ("image", "images") if column in columns]:
        raise ValueError(
            f"{found}; rows with {images[0]} are not supported as tokens: give them to KTOTrainer "
            "as they are, with the processor of a vision-language model as processing_class"
        )
    prompt = "prompt" if "prompt" in columns else None
    answers: tuple[str, ...]
    if {"prompt_ids", "completion_ids"} <= set(columns):
        answers, prompt = ("completion_ids",), "prompt_ids"
    elif {"chosen", "rejected"} <= set(columns):
        answers = ("chosen", "rejected")
    elif {"prompt", "completion"} <= set(columns):
        answers = ("completion",)
    else:
        raise ValueError(f"{found}; {ACCEPTED}")
    if len(answers) == 1 and "label" not in columns:
        raise ValueError(f"{found}, but no label; {LABELS}")
    if prompt == "prompt_ids":
        return RowFormat("tokens", answers, prompt)
    values = [first_row.get(column) for column in (prompt, *answers) if column is not None]
    is_conversation = isinstance(next((v for v in values if v is not None), None), list)
    return RowFormat("conversation" if is_conversation else "text", answers, prompt)


def read_label(value: Any) -> bool | None:
    """`value` as a boolean; None if it is none.

    Accepts booleans, the numbers 0 and 1 (a CSV column with a gap is read as floats), and the
    strings true, false, 0 and 1.
    """
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def check_row(row: dict[str, Any], row_format: RowFormat) -> Problem | None:
    """The first thing that is wrong with a row, or None."""
    for column in (row_format.prompt, *row_format.answers):
        if column is None:
            continue
        problem = _check_value(row.get(column), column, row_format)
        if problem is not None:
            return problem
    if row_format.prompt is None and not extract_prompt(row["chosen"], row["rejected"]):
        return Problem("no shared beginning of chosen and rejected", "add a column prompt")
    if not row_format.paired:
        if row.get("label") is None:
            return Problem("no label", LABELS)
        if read_label(row["label"]) is None:
            return Problem("a label that is no boolean", LABELS, _shorten(row["label"]))
    return _check_template_arguments(row) if row_format.kind == "conversation" else None


def extract_prompt(chosen: Any, rejected: Any) -> Any:
    """The prompt that two answers begin with, as TRL's `extract_prompt` cuts it.

    The longest shared prefix, without the space before the answers; something is always left of
    each answer. Works on text and on lists of messages, which must not be empty.
    """
    end = min(len(chosen), len(rejected)) - 1
    for index in range(end + 1):
        if chosen[index] != rejected[index]:
            end = index - 1 if index > 0 and chosen[index - 1] == " " else index
            break
    return chosen[:end]


def split_row(row: dict[str, Any], row_format: RowFormat) -> list[Example]:
    """The examples in a valid row: one, or the desirable and the undesirable one of a pair."""
    if not row_format.paired:
        prompt, completion = row[row_format.prompt or "prompt"], row[row_format.answers[0]]
        return [Example(prompt, completion, bool(read_label(row["label"])))]
    chosen, rejected = row["chosen"], row["rejected"]
    if row_format.prompt is not None:
        prompt = row["prompt"]
    else:
        prompt = extract_prompt(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return [Example(prompt, chosen, True), Example(prompt, rejected, False)]


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """A row's own arguments of `apply_chat_template`: its tools and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def raise_problems(problems: Iterable[tuple[int, Problem]], name: str) -> None:
    """Raise one ValueError that names every row with a problem; nothing if there is none."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row, problem in problems:
        value = "" if problem.value is None else f" ({problem.value})"
        groups.setdefault(problem[:2], []).append(f"{row}{value}")
    if not groups:
        return
    parts = []
    for (what, expected), rows in groups.items():
        have, word = ("1 row has", "row") if len(rows) == 1 else (f"{len(rows)} rows have", "rows")
        listed = ", ".join(rows[:SHOWN_ROWS])
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        parts.append(f"{have} {what}: {word} {listed}{more} ({expected})")
    raise ValueError(f"in the {name} data, counted from row 0, {'; '.join(parts)}")


def _check_value(value: Any, column: str, row_format: RowFormat) -> Problem | None:
    """What is wrong with a prompt or an answer, or None."""
    if value is None:
        return Problem(f"no {column}", "leave the row out or fill it in")
    is_answer = column in row_format.answers
    empty = Problem(f"an empty {column}", "leave the row out or fill it in")
    if row_format.kind == "tokens":
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            return Problem(f"{column} that are no token ids", "a list of integers", _shorten(value))
        return empty if is_answer and not value else None
    if row_format.kind == "text":
        if not isinstance(value, str):
            expected = "write a string, as in the first row"
            return Problem(f"a {column} that is no text", expected, _shorten(value))
        return empty if is_answer and not value else None
    if not isinstance(value, list) or not all(_is_message(message) for message in value):
        expected = f"write {CONVERSATION}, as in the first row"
        return Problem(f"a {column} that is no conversation", expected, _shorten(value))
    if not value or (is_answer and not any(_says_something(message) for message in value)):
        return empty
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _says_something(message: dict[str, Any]) -> bool:
    """Whether a message has content, tool calls or anything else beside its role."""
    return any(value for key, value in message.items() if key != "role")


def _check_template_arguments(row: dict[str, Any]) -> Problem | None:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            return Problem("tools that are no JSON", "a list of JSON schemas", _shorten(tools))
    if tools is not None and not isinstance(tools, list):
        return Problem("tools that are no list", "a list of JSON schemas", _shorten(tools))
    if kwargs is not None and not isinstance(kwargs, dict):
        return Problem("chat_template_kwargs that are no mapping", "an object", _shorten(kwargs))
    return None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
