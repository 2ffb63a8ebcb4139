"""Errors of a disk that fills while a run prepares data or saves: what is whole, how to go on."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from fastkto.checkpoints import last_whole_checkpoint

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk's quota is used up"}
# Errors that have no errno, but the text of one, or what datasets says before it writes.
_WITH_TEXT = (SafetensorError, CheckpointException, OSError)
_TEXTS = {os.strerror(number): cause for number, cause in _FULL.items()}
_TEXTS["Not enough disk space"] = _FULL[errno.ENOSPC]
_OF_TORCH_SAVE = ("inline_container.cc", "iostream error")  # it does not say why it cannot write
_MIB = 2**20


class WriteError(OSError):
    """What a run wrote was cut short, as a rule because the disk is full."""


@contextmanager
def explaining_full_disk(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """Have an error from saving to `folder` say that the disk is full, and what is whole.

    `output_dir` holds the run's checkpoints. Errors with another cause stay what they are.
    """
    with _explaining(Path(folder), f"the saving of {folder}", lambda: _way_on(folder, output_dir)):
        yield


@contextmanager
def explaining_full_cache(data: str, dataset: Any = None) -> Iterator[None]:
    """Have an error from preparing `data` say that the disk of the data sets' cache is full.

    What is made of a `dataset` with files is written beside them.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    files = getattr(dataset, "cache_files", None)
    folder = Path(files[0]["filename"]).parent if files else cache
    elsewhere = (
        "set HF_DATASETS_CACHE to a folder on another disk"
        if folder.is_relative_to(cache)
        else "move the data to another disk"
    )
    way_on = f"Nothing else is lost: make room, or {elsewhere}"
    with _explaining(folder, f"the preparation of {data} in {folder}", lambda: way_on):
        yield


@contextmanager
def _explaining(folder: Path, what: str, way_on: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except WriteError:
        raise  # an inner block has explained it
    except (Exception, CheckpointException) as error:
        free = _free_bytes(folder)
        cause = next(filter(None, (_cause(one, free) for one in _chain(error))), None)
        if cause is None:
            raise
        raise WriteError(
            f"{cause}, which cut {what} short ({free / _MIB:.1f} MiB are free now). {way_on()}"
        ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context


def _cause(error: BaseException, free: int) -> str | None:
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _FULL.get(error.errno)
    if isinstance(error, _WITH_TEXT):
        return next((cause for sign, cause in _TEXTS.items() if sign in text), None)
    is_of_save = any(sign in text for sign in _OF_TORCH_SAVE) and "StreamReader" not in text
    if isinstance(error, RuntimeError) and is_of_save:
        return _FULL[errno.ENOSPC] if free < _MIB else "PyTorch could not write a file"
    return None


def _way_on(folder: str | Path, output_dir: str | Path) -> str:
    last = last_whole_checkpoint(output_dir, before=Path(folder))
    if last is None:
        return f"{output_dir} has no whole checkpoint: make room and start from the beginning"
    return (
        f"{last} is whole: make room and resume from it (resume_from_checkpoint=True, or "
        "--resume_from_checkpoint on the command line)"
    )


def _free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or would be: it may not have been made."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free
