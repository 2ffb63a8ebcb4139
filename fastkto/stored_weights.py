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
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)


def load_renamed(model: object, folder: str | Path) -> bool:
    """Load a model that is saved under other names than its own; False if it is not.

    What the model has beside its class's weights is loaded by its name. Raises ValueError if a
    weight is not there.
    """
    if not isinstance(model, PreTrainedModel):  # adapters have names of their own
        return False
    files, own = _files(Path(folder)), model.state_dict()
    if not files.keys() - own.keys():
        return False
    logger.info("loading the weights in %s through from_pretrained", folder)
    dtypes = {weight.dtype for weight in own.values() if weight.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # rounds none of them
    stored, found = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"the checkpoint {folder} has no {', '.join(sorted(found['missing_keys']))}; resume "
            "from another one"
        )
    weights = stored.state_dict()
    beside = (files.keys() & own.keys()) - weights.keys()
    model.load_state_dict({**weights, **{name: _read(files[name], name) for name in beside}})
    return True


def _files(folder: Path) -> dict[str, Path]:
    """The file of each weight of a whole model, by its name there; empty without any."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        names = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    file = folder / SAFE_WEIGHTS_NAME
    if not file.exists():
        return {}
    with safe_open(file, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), file)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor(name)
