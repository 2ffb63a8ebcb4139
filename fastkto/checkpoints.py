"""Which checkpoint a run goes on from: a kill or a full disk may have cut the last one short."""

import json
import logging
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


def last_whole_checkpoint(output_dir: str | Path, before: Path | None = None) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None without any.

    Of those of fewer steps than the checkpoint `before`, if that is one.
    """
    whole = {n: folder for n, folder in _checkpoints(output_dir).items() if is_whole(folder)}
    if before is not None and (number := _number(before)) is not None:
        whole = {n: folder for n, folder in whole.items() if n < number}
    return str(whole[max(whole)]) if whole else None


def is_whole(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end, of which the trainer's state is the last."""
    try:
        return _holds_a_state(Path(folder))
    except (OSError, ValueError):
        return False


def make_way(checkpoint: Path, save_total_limit: int | None, start: str) -> None:
    """Before a checkpoint is saved: none that was cut short may pass for it or outlive it.

    One that is written over would be of both runs for a while. `Trainer` deletes by numbers where
    the times of folders are of no use: it would keep a later one that was cut short, and not this.
    `start` is the model that the run began with, which may be such a folder.
    """
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    others = _checkpoints(checkpoint.parent)
    limit = save_total_limit or 0
    if limit < 1 or len({*others.values(), checkpoint}) <= limit:  # Trainer deletes nothing
        return
    for number, folder in others.items():
        is_later = number > int(checkpoint.name.removeprefix(_PREFIX))
        if is_later and folder.resolve() != Path(start).resolve() and _is_cut_short(folder):
            logger.warning("%s was cut short; it is deleted, and %s saved", folder, checkpoint)
            shutil.rmtree(folder, ignore_errors=True)


def _is_cut_short(folder: Path) -> bool:
    """Other than not `is_whole`, False where that cannot be told."""
    try:
        return not _holds_a_state(folder)
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False


def _holds_a_state(folder: Path) -> bool:
    return isinstance(json.loads((folder / TRAINER_STATE_NAME).read_text()), dict)


def _checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """By their numbers."""
    folders = ((_number(one), one) for one in Path(output_dir).glob(f"{_PREFIX}*"))
    return {number: folder for number, folder in folders if number is not None}


def _number(folder: Path) -> int | None:
    """Steps of a checkpoint; None for a folder of another kind."""
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if number != folder.name and number.isdecimal() else None


def check_whole(folder: str | Path) -> None:
    """Raise ValueError for one of Trainer's checkpoints that was not written to its end."""
    if Path(folder).name.startswith(_PREFIX) and not is_whole(folder):
        raise ValueError(
            f"the checkpoint {folder} is not there, or was not written to its end; resume from an "
            "older one (resume_from_checkpoint=True takes the last whole one), or start anew"
        )
