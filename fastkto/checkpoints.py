"""Which checkpoint a run goes on from: a kill or a full disk may have cut the last one short."""

import shutil
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None without any."""
    whole = {n: folder for n, folder in _checkpoints(output_dir).items() if is_whole(folder)}
    return str(whole[max(whole)]) if whole else None


def is_whole(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end, of which the trainer's state is the last."""
    try:
        TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
    except (OSError, ValueError):
        return False
    return True


def make_way(checkpoint: Path, save_total_limit: int | None) -> None:
    """Before a checkpoint is saved: nothing that another run left may pass for it or outlive it.

    One that is written over would be of both runs for a while. `Trainer` deletes by numbers where
    the times of folders are of no use: it would keep a later one that was cut short, and not this.
    """
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    if save_total_limit:
        for number, folder in _checkpoints(checkpoint.parent).items():
            if number > _number(checkpoint) and not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """By their numbers."""
    return {
        _number(folder): folder
        for folder in Path(output_dir).glob(f"{_PREFIX}*")
        if folder.name.removeprefix(_PREFIX).isdecimal()
    }


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def check_whole(folder: str | Path) -> None:
    """Raise ValueError for one of Trainer's checkpoints that was not written to its end."""
    if Path(folder).name.startswith(_PREFIX) and not is_whole(folder):
        raise ValueError(
            f"the checkpoint {folder} is not there, or was not written to its end; resume from an "
            "older one (resume_from_checkpoint=True takes the last whole one), or start anew"
        )
