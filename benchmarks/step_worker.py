"""A library in a process of its own, which takes a training step whenever it is told to.

So two libraries can take turns on the same machine, and neither's memory is in the other's peak.
"""

from __future__ import annotations

import multiprocessing
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from benchmarks.step_cases import Case
from benchmarks.step_run import Step, run_steps

_SPAWN = multiprocessing.get_context("spawn")


class RefusedError(ValueError):
    """The library does not train this case; the message is its own."""


class OutOfMemoryError(RuntimeError):
    """The device's memory does not hold this case."""


class Worker:
    """`library` training `case` in another process; a context manager."""

    def __init__(self, case: Case, library: str) -> None:
        self.case, self.library = case, library
        self._connection, child = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(child, case, library), daemon=True)

    def __enter__(self) -> Worker:
        self._process.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()  # the worker's wait ends
        self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def step(self) -> Step:
        """One optimizer step there. RefusedError or RuntimeError with what went wrong there."""
        with suppress(BrokenPipeError):  # it has ended, and said why
            self._connection.send("step")
        while not self._connection.poll(timeout=1):
            if not self._process.is_alive() and not self._connection.poll():
                raise RuntimeError(
                    f"{self.library}'s process ended with exit code {self._process.exitcode} in "
                    f"{self.case}; -9 usually means that memory ran out"
                )
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result


def _serve(connection: Connection, case: Case, library: str) -> None:
    try:
        run_steps(case, library, go_on=lambda: _is_asked(connection), report=connection.send)
    except ValueError as error:
        connection.send(RefusedError(str(error)))
    except torch.OutOfMemoryError as error:
        connection.send(OutOfMemoryError(str(error)))
    except Exception:
        connection.send(RuntimeError(f"{library} failed in {case}:\n{traceback.format_exc()}"))


def _is_asked(connection: Connection) -> bool:
    try:
        return connection.recv() == "step"
    except EOFError:  # the parent is done
        return False
