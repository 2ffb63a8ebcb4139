"""Errors of a disk that fills while a run saves: what is whole, and how to go on."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from fastkto.checkpoints import last_whole_checkpoint

# In the text of an error, since safetensors' and distributed checkpoints' have no errno.
_FULL = {
    os.strerror(errno.ENOSPC): "the disk is full",
    os.strerror(errno.EDQUOT): "the disk's quota is used up",
}
_OF_TORCH_SAVE = ("inline_container.cc", "iostream error")  # it does not say why it cannot write
_MIB = 2**20


class FullDiskError(OSError):
    """The disk filled while a run saved."""


@contextmanager
def explaining_full_disk(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """Have an error from saving to `folder` say that the disk is full, and what is whole.

    `output_dir` holds the run's checkpoints. Errors with another cause stay what they are.
    """
    try:
        yield
    except FullDiskError:
        raise  # an inner block has explained it
    except (Exception, CheckpointException) as error:
        free = _free_bytes(Path(folder))
        cause = _cause(str(error), free)
        if cause is None:
            raise
        raise FullDiskError(
            f"{cause}, which cut the saving of {folder} short ({free / _MIB:.1f} MiB are free "
            f"now). {_way_on(output_dir)}"
        ) from error


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
