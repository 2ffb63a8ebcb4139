"""`checkpoint_passes="auto"`: no gradient checkpointing where a run fits without it."""

import logging
from typing import Any, NamedTuple

import psutil
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer

from fastkto.config import KTOConfig
from fastkto.memory import Deployment, MemoryEstimator, model_bytes
from fastkto.trial_passes import most_of_ranks

logger = logging.getLogger(__name__)

# What an estimate may be wrong by, see docs/plan.md.
MARGIN = 0.15
GIB = 2**30


class WithoutCheckpointing(NamedTuple):
    """What a run needs without gradient checkpointing, and what it has, in bytes."""

    total: int
    memory: int

    @property
    def fits(self) -> bool:
        """Whether it fits also if the estimate is too low by the margin."""
        return (1 + MARGIN) * self.total <= self.memory


def without_checkpointing(
    estimator: MemoryEstimator, max_length: int, max_tokens_per_pass: int | None, memory: int
) -> WithoutCheckpointing:
    """For a run as in `MemoryEstimator.run` on a device with `memory` bytes for it."""
    run = estimator.run(max_length, max_tokens_per_pass, checkpointing=False)
    return WithoutCheckpointing(run.total, memory)


def forward_equivalents(policy: nn.Module, args: KTOConfig) -> int:
    """The work of an optimizer step with gradient checkpointing, in forwards of its rows.

    Without gradient: the policy on the mismatched sequences, if the loss needs them, and the
    reference on all of them, unless it is precomputed. With gradient: a forward, the recomputation,
    which is what checkpointing costs, and a backward, of two where the gradients of all weights are
    needed and of one behind frozen ones.
    """
    mismatched = int(args.needs_kl)
    reference = 0 if args.precompute_ref_log_probs else 1 + mismatched
    backward = 1 if isinstance(policy, PeftModel) else 2
    return mismatched + reference + 1 + 1 + backward


def saving(policy: nn.Module, args: KTOConfig) -> str:
    """What a step without checkpointing saves, in words."""
    return f"1 of about {forward_equivalents(policy, args)} forwards' work of an optimizer step"


def needs_checkpointing(trainer: Trainer) -> bool:
    """Whether a run needs gradient checkpointing on any rank; says so in one line of the log.

    Asked before anything is sharded. Where passes have no fixed number of tokens yet, for passes of
    one sequence.
    """
    args, accelerator = trainer.args, trainer.accelerator
    policy, reference = trainer.model, trainer.reference.model
    for model in filter(None, (policy, reference)):
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                "checkpoint_passes is 'auto', and the memory of a quantised model cannot be "
                "estimated once it is loaded; leave it out, and turn gradient_checkpointing off "
                "if `fastkto plan` says that the run fits without"
            )
    data = trainer.train_dataset
    length = max(trainer._row_lengths(data)) if isinstance(data, Dataset) else args.max_length
    if length is None:
        logger.warning("Gradient checkpointing stays on: without max_length no length is known.")
        return True
    estimator = MemoryEstimator(
        policy,
        args,
        reference=reference,
        deployment=Deployment(
            args.world_size, accelerator.distributed_type is DistributedType.FSDP
        ),
    )
    memory = device_memory(args.device, [policy, reference])
    least = int(-most_of_ranks(-memory, accelerator))
    found = without_checkpointing(estimator, length, args.given_tokens, least)
    if trainer.is_world_process_zero():
        logger.warning(
            "Gradient checkpointing %s: without it the run needs %.2f GiB, and there are %.2f%s.",
            "is turned off" if found.fits else "stays on",
            found.total / GIB,
            found.memory / GIB,
            f". This saves {saving(policy, args)}" if found.fits else "",
        )
    return not found.fits


def turn_off_checkpointing(model: Any) -> None:
    """Under the name that this transformers has for it."""
    newer = getattr(model, "activation_checkpointing_disable", None)
    (newer or model.gradient_checkpointing_disable)()


def device_memory(device: torch.device, models: list[Any]) -> int:
    """Bytes for a run whose `models` are loaded already: what is free, and what it holds."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + sum(map(model_bytes, filter(None, models)))
