"""Which checkpoint a run goes on from: a kill may have left the last one half written."""

from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None without any."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {
        int(folder.name.removeprefix(prefix)): folder
        for folder in Path(output_dir).glob(f"{prefix}*")
        if folder.name.removeprefix(prefix).isdecimal() and is_whole(folder)
    }
    return str(steps[max(steps)]) if steps else None


def is_whole(folder: str | Path) -> bool:
    """Whether a checkpoint was written to its end, of which the trainer's state is the last."""
    try:
        TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
    except (OSError, ValueError):
        return False
    return True


def check_whole(folder: str | Path) -> None:
    """Raise ValueError for one of Trainer's checkpoints that was not written to its end."""
    if Path(folder).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and not is_whole(folder):
        raise ValueError(
            f"the checkpoint {folder} is not there, or was not written to its end; resume from an "
            "older one (resume_from_checkpoint=True takes the last whole one), or start anew"
        )
