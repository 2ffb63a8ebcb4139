"""A rank of a run with max_tokens_per_pass="auto": what it found, and with how many passes.

The argument is "ddp" or "fsdp".
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule

import fastkto.trainer
from fastkto import KTOTrainer
from tests.fsdp_on_cpu import FSDP2, allow_fsdp_on_cpu
from tests.launch import finish
from tests.test_pass_budget import LONGEST, MIB, found, trainer_of


class SavedMemory:
    """Counts what autograd saves, and knows no other memory."""

    def limit(self) -> float:
        return (6 if rank == 0 else 60) * MIB

    def peak(self, work: Callable[[], None]) -> float:
        sizes = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            work()
        return sum(sizes)


torch.set_num_threads(1)
rank = int(os.environ["RANK"])
is_sharded = sys.argv[1] == "fsdp"
sharding = FSDP2 if is_sharded else {}
if is_sharded:
    allow_fsdp_on_cpu()
with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_of(Path(folder), "auto", max_steps=1, **sharding)
    trainer._device_memory = SavedMemory
    passes = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    find = fastkto.trainer.set_budget

    def counted(trainer: KTOTrainer, batches: list) -> None:
        passes.clear()
        find(trainer, batches)
        print(f"budget {found(trainer)} {len(passes)};", flush=True)  # noqa: T201

    fastkto.trainer.set_budget = counted
    trainer.train()
    assert isinstance(trainer.model, FSDPModule) == is_sharded
    assert LONGEST < found(trainer) < 6 * LONGEST, found(trainer)
finish()
