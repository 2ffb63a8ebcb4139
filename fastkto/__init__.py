"""fastkto: Kahneman-Tversky Optimization for long contexts and little memory.

The operations import torch and Triton only, so that they serve any training loop; the trainer
and its config (which need transformers) are resolved on first use.
"""

from typing import TYPE_CHECKING, Any

from fastkto.logprob import linear_logprob
from fastkto.loss import kto_loss

if TYPE_CHECKING:
    from fastkto.config import KTOConfig
    from fastkto.trainer import KTOTrainer

__version__ = "0.1.0"
__all__ = ["KTOConfig", "KTOTrainer", "kto_loss", "linear_logprob"]

_LAZY = {"KTOConfig": "fastkto.config", "KTOTrainer": "fastkto.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastkto' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
