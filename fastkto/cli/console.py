"""What the command line writes to the terminal, and how a mistake becomes one sentence."""

import argparse
import difflib
import linecache
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

# What fastkto raises for what a user can put right.
DELIBERATE = (ValueError, OSError, FloatingPointError)
# Characters of another library's error; of a longer one only the first line is shown.
LONGEST = 300


class CommandError(Exception):
    """A mistake in what the user asked for: one sentence that says what to do.

    `everywhere` is True if only the process on which it occurred may know of it.
    """

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(text)
        self.everywhere = everywhere


class SentenceParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `CommandError` where others print their usage and exit."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in `ArgumentParser`; an unknown flag comes with the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
            raise CommandError(unknown_flag(unknown, names))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise CommandError(message.removeprefix("argument "))


def unknown_flag(words: Sequence[str], known: Sequence[str]) -> str:
    """What is wrong with the `words` that a parser left over; `known` are flags without dashes."""
    flag = next((word for word in words if word.startswith("-")), None)
    if flag is None:
        return f"{words[0]!r} follows no flag; every argument is given as --name value"
    flag = flag.partition("=")[0]
    return f"there is no flag {flag}; did you mean --{nearest(flag.lstrip('-'), known)}?"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant: an abbreviated one if any, else the most similar."""
    name, known = name.replace("-", "_"), list(known)
    short = [k for k in known if k.startswith(name) or name.startswith(k)]
    initials = [k for k in known if "".join(word[:1] for word in k.split("_")) == name]
    if initials:  # lr is learning_rate rather than lora_r
        return max(initials, key=len)
    return difflib.get_close_matches(name, short or known, n=1, cutoff=0.0)[0]


def rank() -> int:
    """This process among those that `accelerate launch` or torchrun started; 0 if alone."""
    return int(os.environ.get("RANK", "0"))


def say(text: str = "") -> None:
    """Write a line for the user, on the main process only."""
    if rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line to stderr."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")


def warn(text: str) -> None:
    """Write a warning to stderr, on the main process only."""
    if rank() == 0:
        complain(f"warning: {text}")


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two aligned columns, a line for each row."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def show_library_logs() -> None:
    """Send fastkto's own warnings to stderr, each as one line, on the main process only."""
    # Without a GPU it recommends a package whenever it is imported, also by a run without it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logger = logging.getLogger("fastkto")
    for handler in list(logger.handlers):
        if isinstance(handler, _LineHandler):
            logger.removeHandler(handler)
    handler = _LineHandler()
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)


class _LineHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


@contextmanager
def mistakes(*kinds: type[Exception], about: str = "", everywhere: bool = False) -> Iterator[None]:
    """Turn errors of these kinds into a `CommandError`: `about`, then the error's text.

    Whatever the kinds, an error that fastkto raised on purpose becomes one, with its whole text.
    Any other error is a defect and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DELIBERATE) and _raised_by_fastkto(error.__traceback__):
            text = " ".join(str(error).split())
        elif isinstance(error, kinds):
            text = " ".join(str(error).split())
            text = text if len(text) <= LONGEST else str(error).strip().splitlines()[0]
        else:
            raise
        text = f"{about}: {text}" if about else text
        raise CommandError(text, everywhere=everywhere) from error


def _raised_by_fastkto(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is fastkto's and stands at a `raise`."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    line = linecache.getline(frame.f_code.co_filename, traceback.tb_lineno)
    return frame.f_globals["__name__"].startswith("fastkto.") and line.lstrip().startswith("raise")
