"""The weights of a checkpoint under names of the hub, which the model itself does not have.

transformers saves experts one by one, and parts of vision-language models as they were first named;
`from_pretrained` knows. `Trainer` does not: it loads what has a known name and warns of the rest,
so that a run would go on with the weights it began with.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def load_renamed(model: object, folder: str | Path) -> bool:
    """Load a model that is saved under other names than its own; False if it is not."""
    if not isinstance(model, PreTrainedModel):  # adapters have names of their own
        return False
    if not _stored_names(Path(folder)) - set(model.state_dict()):
        return False
    logger.info("loading the weights in %s through from_pretrained", folder)
    dtypes = {weight.dtype for weight in model.state_dict().values() if weight.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # rounds none of them
    stored = type(model).from_pretrained(folder, dtype=dtype)
    model.load_state_dict(stored.state_dict())
    return True


def _stored_names(folder: Path) -> set[str]:
    """Of the weights of a whole model; empty without any."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(json.loads(index.read_text())["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as weights:
        return set(weights.keys())
