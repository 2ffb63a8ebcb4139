"""A reference that follows the policy while it trains (TR-DPO, arXiv:2404.09656, equation 8)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastkto.config import KTOConfig
from fastkto.reference import Reference, adapter_pairs

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer

_FOLDER = "reference"  # of a checkpoint


def check_sync(args: KTOConfig, policy: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuse what cannot be mixed exactly."""
    if not args.sync_ref_model:
        return
    alpha = args.ref_model_mixup_alpha
    if isinstance(policy, PeftModel) and alpha < 1:
        raise ValueError(
            f"sync_ref_model=True has ref_model_mixup_alpha={alpha} and the policy is an adapter, "
            "which is a product of matrices: mixing them is not mixing the weights they stand for; "
            "use ref_model_mixup_alpha=1, which copies the adapter, or train the whole model"
        )
    if isinstance(policy, PeftModel) and ref_model is not None:
        raise ValueError(
            "sync_ref_model=True copies the policy's adapter, and ref_model is a model without it; "
            "leave ref_model out"
        )


class SyncReference(TrainerCallback):
    """Moves the reference after every `ref_model_sync_steps` optimizer steps."""

    def __init__(self, trainer: KTOTrainer) -> None:
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "sync_ref_model=True is not supported under DeepSpeed, which cannot save the "
                "changed reference with the checkpoints; use FSDP2 or data parallelism"
            )
        self.trainer = trainer
        steps = trainer.step_settings.args.ref_model_sync_steps
        trainer.reference.description += f", moved towards the policy every {steps} steps"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config = self.trainer.step_settings.args
        if state.global_step % config.ref_model_sync_steps == 0:
            move_reference(self.trainer.reference, self.trainer.model, config.ref_model_mixup_alpha)


@torch.no_grad()
def move_reference(reference: Reference, policy: nn.Module, alpha: float) -> None:
    """`reference = alpha * policy + (1 - alpha) * reference`, parameter by parameter.

    In the reference's dtype, as TRL 1.16 computes it. A frozen adapter becomes a copy.
    """
    if reference.model is None:
        for frozen, trained in adapter_pairs(policy):
            frozen.copy_(trained)
        return
    pairs = zip(reference.model.parameters(), policy.parameters(), strict=True)
    for frozen, trained in pairs:
        frozen.mul_(1.0 - alpha).add_(trained.to(frozen.dtype), alpha=alpha)


def save_reference(trainer: KTOTrainer, checkpoint: str) -> None:
    """Keep what moved of the reference and Trainer does not keep; every rank has to call this."""
    weights = _moved_weights(trainer)
    if weights:
        # What all ranks have goes into one file, so that the first machine's folder is complete.
        planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        with _without_process_group():
            dcp.save(weights, checkpoint_id=Path(checkpoint) / _FOLDER, planner=planner)


def load_reference(trainer: KTOTrainer, checkpoint: str) -> None:
    """Undo what steps after `save_reference` did; every rank has to call this."""
    weights = _moved_weights(trainer)
    if not weights:
        return
    folder = Path(checkpoint) / _FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"{checkpoint} has no folder {_FOLDER!r}, so that the reference which sync_ref_model="
            "True had moved is not known; resume from a checkpoint that such a run has saved, with "
            "save_only_model=False"
        )
    with _without_process_group():
        dcp.load(weights, checkpoint_id=folder)
    if trainer.reference.model is not None:
        set_model_state_dict(trainer.reference.model, weights)


def _moved_weights(trainer: KTOTrainer) -> dict[str, Any]:
    """A reference model's weights, or the parameters of a frozen adapter under FSDP2.

    Without FSDP2 Trainer saves and loads all adapters; with it, the trained one only.
    """
    if not trainer.step_settings.args.sync_ref_model:
        return {}
    if trainer.reference.model is not None:
        return get_model_state_dict(trainer.reference.model)
    if not trainer.accelerator.is_fsdp2:
        return {}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {names[frozen]: frozen for frozen, _ in adapter_pairs(trainer.model)}


@contextmanager
def _without_process_group() -> Iterator[None]:
    """A run of one process need not be told that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
