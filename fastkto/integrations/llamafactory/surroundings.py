"""What LLaMA-Factory's trainer does around a step: optimizers, schedulers, callbacks."""

import logging
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from transformers import Trainer

logger = logging.getLogger(__name__)

_HAS_LLAMAFACTORY = find_spec("llamafactory") is not None
_OPTIMIZERS = (
    "use_galore",
    "use_apollo",
    "loraplus_lr_ratio",
    "use_badam",
    "use_adam_mini",
    "use_muon",
)


class Surroundings(Trainer):
    """LLaMA-Factory's own functions, in the places where its trainer calls them."""

    finetuning_args: Any
    optimizer: Any
    _single_pass: bool

    def _add_surroundings(self, finetuning_args: Any, processor: Any) -> None:
        """What LLaMA-Factory's trainer adds to a run beside the loss."""
        asked = [name for name in _OPTIMIZERS if getattr(finetuning_args, name, None)]
        if asked and not _HAS_LLAMAFACTORY:
            raise ValueError(
                f"finetuning_args has {asked[0]}, an optimizer of LLaMA-Factory's, which is not "
                "installed; pip install llamafactory==0.9.5, or leave it out"
            )
        for name in ("galore", "apollo"):
            if f"use_{name}" in asked and getattr(finetuning_args, f"{name}_layerwise"):
                # It updates the weights inside backward, so a second pass would see others.
                self._single_pass = True
                logger.warning("%s_layerwise is on, so each batch is one pass", name)
        if processor is not None:
            from llamafactory.train.callbacks import SaveProcessorCallback

            self.add_callback(SaveProcessorCallback(processor))
        if "use_badam" in asked:
            from badam import BAdamCallback, clip_grad_norm_old_version

            self.accelerator.clip_grad_norm_ = MethodType(
                clip_grad_norm_old_version, self.accelerator
            )
            self.add_callback(BAdamCallback)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in `Trainer`, with the optimizers that `finetuning_args` asks for."""
        if self.optimizer is None and _HAS_LLAMAFACTORY:
            from llamafactory.train.trainer_utils import create_custom_optimizer

            self.optimizer = create_custom_optimizer(self.model, self.args, self.finetuning_args)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in `Trainer`, with what LLaMA-Factory's schedulers need."""
        if _HAS_LLAMAFACTORY:
            from llamafactory.train.trainer_utils import create_custom_scheduler

            create_custom_scheduler(self.args, num_training_steps, optimizer)
        return super().create_scheduler(num_training_steps, optimizer)
