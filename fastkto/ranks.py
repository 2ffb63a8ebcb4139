"""The processes of a run: sums over them, and what they have to do together.

Under DistributedDataParallel only the last backward of an optimizer step talks to other ranks.
Under FSDP2 and DeepSpeed weights are gathered in every forward, or gradients reduced in every
backward: there all ranks run the same passes, and one that has fewer takes part with idle ones.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from fastkto.plan_passes import Plan


class Ranks:
    """All ranks of `accelerator`, as seen from this one; each has to make the same calls."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def in_lockstep(self) -> bool:
        """Whether ranks wait for each other in every pass."""
        kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return self.accelerator.distributed_type in kinds

    def check_images(self, has_images: bool) -> None:
        """Refuse images where ranks wait for each other: one without would not gather the tower."""
        if has_images and self.in_lockstep and self.accelerator.num_processes > 1:
            raise ValueError(
                "rows with images are trained on several processes with FSDP or DeepSpeed, which "
                "wait for each other in a vision tower that passes without images leave out; use "
                "data parallelism alone (torchrun without FSDP and DeepSpeed), or one process"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, on all of them."""
        return self.accelerator.reduce(tensor, "sum")

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank."""
        missing = torch.tensor(float(not flag), device=self.accelerator.device)
        return self.sum(missing).item() == 0

    def first_text(self, text: str) -> str:
        """`text` of the first rank where it is not empty, on all of them; "" if there is none."""
        return next(filter(None, gather_object([text])), "")

    def level(self, plans: Sequence[Plan]) -> list[Plan]:
        """`plans` with idle passes behind them, so that each is as long as on any rank.

        Every rank has to give equally many plans. Nothing is exchanged where no rank waits for
        another.
        """
        if not self.in_lockstep:
            return list(plans)
        counts = torch.tensor([len(plan) for plan in plans], device=self.accelerator.device)
        most = self.accelerator.gather(counts).view(-1, len(plans)).amax(0).tolist()
        return [
            [*plan, *([] for _ in range(count - len(plan)))]
            for plan, count in zip(plans, most, strict=True)
        ]
