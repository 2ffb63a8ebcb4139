"""Errors of a disk that fills while a run prepares data or saves: what is whole, how to go on."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from torch.distributed.checkpoint import CheckpointException

from fastkto.checkpoints import last_whole_checkpoint

# In the text of an error, since safetensors' and distributed checkpoints' have no errno.
_FULL = {
    os.strerror(errno.ENOSPC): "the disk is full",
    os.strerror(errno.EDQUOT): "the disk's quota is used up",
    "Not enough disk space": "the disk is full",  # datasets', before it writes
}
_OF_TORCH_SAVE = ("inline_container.cc", "iostream error")  # it does not say why it cannot write
_MIB = 2**20


class FullDiskError(OSError):
    """The disk filled while a run wrote to it."""


@contextmanager
def explaining_full_disk(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """Have an error from saving to `folder` say that the disk is full, and what is whole.

    `output_dir` holds the run's checkpoints. Errors with another cause stay what they are.
    """
    with _explaining(Path(folder), f"the saving of {folder}", lambda: _way_on(output_dir)):
        yield


@contextmanager
def explaining_full_cache(data: str) -> Iterator[None]:
    """Have an error from preparing `data` say that the disk of the data sets' cache is full."""
    folder = datasets.config.HF_DATASETS_CACHE
    way_on = "Nothing else is lost: make room, or set HF_DATASETS_CACHE to a folder on another disk"
    with _explaining(Path(folder), f"the preparation of {data} in {folder}", lambda: way_on):
        yield


@contextmanager
def _explaining(folder: Path, what: str, way_on: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except FullDiskError:
        raise  # an inner block has explained it
    except (Exception, CheckpointException) as error:
        free = _free_bytes(folder)
        cause = _cause(" ".join(_texts(error)), free)
        if cause is None:
            raise
        raise FullDiskError(
            f"{cause}, which cut {what} short ({free / _MIB:.1f} MiB are free now). {way_on()}"
        ) from error


def _texts(error: BaseException | None) -> Iterator[str]:
    """Of an error and those that it came from."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _cause(text: str, free: int) -> str | None:
    for sign, cause in _FULL.items():
        if sign in text:
            return cause
    if any(sign in text for sign in _OF_TORCH_SAVE):
        return _FULL[os.strerror(errno.ENOSPC)] if free < _MIB else "PyTorch could not write a file"
    return None


def _way_on(output_dir: str | Path) -> str:
    last = last_whole_checkpoint(output_dir)
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
