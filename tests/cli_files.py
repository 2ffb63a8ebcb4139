"""Files for the tests of the command line: a tiny model's folder and data files."""

import json
from pathlib import Path
from typing import Any

from tests.models import tiny_model, tiny_tokenizer
from tests.trl_runs import text_rows

Row = dict[str, Any]


def save_model(folder: Path, *, seed: int = 0, chat: bool = True) -> str:
    """Save a tiny model with its tokenizer; returns the folder as an argument."""
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[Row] | None = None) -> str:
    """Write JSON Lines, by default 32 good rows; returns the path as an argument."""
    rows = text_rows().to_list() if rows is None else rows
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read_logs(output_dir: Path) -> list[dict[str, float]]:
    """The log history of a finished run or a checkpoint."""
    history: list[dict[str, float]] = json.loads((output_dir / "trainer_state.json").read_text())[
        "log_history"
    ]
    return history
