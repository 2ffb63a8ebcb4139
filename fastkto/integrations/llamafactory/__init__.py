"""LLaMA-Factory 0.9.5 with fastkto's KTO step: a trainer, a patch, and a command.

LLaMA-Factory is imported when it is needed, and is no dependency of fastkto.
"""

from fastkto.integrations.llamafactory.patching import patch, unpatch
from fastkto.integrations.llamafactory.trainer import CustomKTOTrainer

__all__ = ["CustomKTOTrainer", "patch", "unpatch"]
