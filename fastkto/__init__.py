"""fastkto: Kahneman-Tversky Optimization for long contexts and little memory.

The operations import torch and Triton only, so that they serve any training loop; what needs
transformers is resolved on first use: the trainer, its config, and the parts of a step.
"""

from typing import TYPE_CHECKING, Any

from fastkto.logprob import linear_logprob
from fastkto.loss import kto_loss

if TYPE_CHECKING:
    from fastkto.config import KTOConfig
    from fastkto.data.batch import KTOCollator
    from fastkto.data.images import ImageCollator
    from fastkto.data.rows import prepare_rows
    from fastkto.head import attach_scoring
    from fastkto.loop import completion_logprobs, estimate_kl, reward_metrics, score_completions
    from fastkto.trainer import KTOTrainer

__version__ = "0.1.0"
__all__ = [
    "ImageCollator",
    "KTOCollator",
    "KTOConfig",
    "KTOTrainer",
    "attach_scoring",
    "completion_logprobs",
    "estimate_kl",
    "kto_loss",
    "linear_logprob",
    "prepare_rows",
    "reward_metrics",
    "score_completions",
]

_MODULES = {
    "fastkto.config": ["KTOConfig"],
    "fastkto.data.batch": ["KTOCollator"],
    "fastkto.data.images": ["ImageCollator"],
    "fastkto.data.rows": ["prepare_rows"],
    "fastkto.head": ["attach_scoring"],
    "fastkto.loop": ["completion_logprobs", "estimate_kl", "reward_metrics", "score_completions"],
    "fastkto.trainer": ["KTOTrainer"],
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastkto' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
