"""`max_tokens_per_pass="auto"`: the largest that fits, found by passes before the first step."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from fastkto.config import DEFAULT_TOKENS, KTOConfig
from fastkto.memory_optimizer import optimizer_bytes
from fastkto.trial_passes import TrialPasses, most_of_ranks, trial_passes

if TYPE_CHECKING:
    from fastkto.trainer import KTOTrainer

logger = logging.getLogger(__name__)

# Of all memory: what fragmentation and the libraries' workspaces may take.
MARGIN = 0.1
# A size is large enough when the next one would be larger by less than this.
GAIN = 0.05
MOST_TRIES = 10
# So many times larger a size is tried at once: what does not grow at first may grow later.
MOST_GROWTH = 4
TOKEN_MULTIPLE = 64
GIB = 2**30


class DeviceMemory(Protocol):
    """Memory of the device that passes run on."""

    def limit(self) -> float:
        """Bytes that a pass may add to what is allocated now."""

    def peak(self, work: Callable[[], None]) -> float:
        """Bytes that `work` adds at most; infinity if it runs out of memory."""


@dataclass(frozen=True)
class CudaMemory:
    """DeviceMemory of a GPU, less `to_come` bytes that will stay and are not there yet."""

    device: torch.device
    to_come: int

    def limit(self) -> float:
        """See `DeviceMemory`; a margin is left for fragmentation."""
        free, _ = torch.cuda.mem_get_info(self.device)
        ours = free + torch.cuda.memory_reserved(self.device)
        return (1 - MARGIN) * ours - torch.cuda.memory_allocated(self.device) - self.to_come

    def peak(self, work: Callable[[], None]) -> float:
        """See `DeviceMemory`."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            work()
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated(self.device) - before


def check_auto(args: KTOConfig, distributed_type: DistributedType) -> None:
    """Refuse what trial passes would leave a trace in."""
    if args.max_tokens_per_pass != "auto":
        return
    reason = ""
    if args.steps_in_backward:
        reason = f"optim={args.optimizer_name!r} updates the weights inside backward"
    elif distributed_type is DistributedType.DEEPSPEED:
        reason = "DeepSpeed keeps gradients where they cannot be dropped"
    if reason:
        raise ValueError(
            f"max_tokens_per_pass is 'auto', which runs passes before the first step, and {reason}"
            "; give a number"
        )


def set_budget(trainer: KTOTrainer, batches: list[dict[str, Any]]) -> None:
    """A number in place of "auto", and a line that says how it was found."""
    if trainer.args.max_tokens_per_pass != "auto":
        return
    memory = trainer._device_memory()
    tokens, reason = DEFAULT_TOKENS, "the default, since passes are measured on CUDA only"
    if trainer._single_pass:
        reason = "the default, since compute_loss is overridden"
    elif memory is not None:
        tokens, reason = measure_budget(trial_passes(trainer, batches), memory, trainer.accelerator)
    trainer.step_settings.args = with_budget(trainer.args, tokens)
    if trainer.is_world_process_zero():
        logger.warning("max_tokens_per_pass is %s: %s.", f"{tokens:,}", reason)


def device_memory(trainer: KTOTrainer) -> DeviceMemory | None:
    """Where passes can be measured: the memory of a GPU."""
    device = trainer.args.device
    if device.type != "cuda":
        return None
    return CudaMemory(device, state_to_come(trainer.model, trainer.args, trainer.optimizer))


def with_budget(args: KTOConfig, tokens: int) -> KTOConfig:
    """A copy of `args` with a number in place of "auto"."""
    args = copy.copy(args)
    args.max_tokens_per_pass = tokens
    return args


def find_budget(
    peak: Callable[[int], float], limit: float, *, least: int, most: int
) -> tuple[int, float]:
    """(the largest budget from `least` to `most` whose `peak` is within `limit`, that peak).

    It is one whose peak was measured, unless not even `least` fits. Peaks of two sizes give the
    next, until the gain is below 5 %; after a peak without a number the step is halved.
    """
    low, low_peak = least, peak(least)
    high = math.inf  # the smallest that was too large
    tokens = min(2 * least, most)
    for _ in range(MOST_TRIES):
        if low_peak > limit or tokens <= low or tokens < min((1 + GAIN) * low, most):
            break
        size = peak(tokens)
        slope = max(size - low_peak, 1.0) / (tokens - low)
        if size <= limit:
            low, low_peak = tokens, size
        else:
            high = tokens
        guess = low + (limit - low_peak) / slope if slope < math.inf else (low + high) / 2
        tokens = int(min(guess, high / (1 + GAIN), MOST_GROWTH * low, most))
        tokens -= tokens % TOKEN_MULTIPLE if tokens < most else 0
    return low, low_peak


def measure_budget(
    passes: TrialPasses, memory: DeviceMemory, accelerator: Accelerator
) -> tuple[int, str]:
    """(the budget, how it was found), equal on all ranks.

    Every rank runs the same passes; the one with the least room counts. A pass of a budget is one
    with gradient, and one without of twice as many tokens (`KTOConfig.no_grad_tokens`).
    """

    def peak(tokens: int) -> float:
        sizes = [
            memory.peak(lambda: passes.with_gradient(tokens)),
            memory.peak(lambda: passes.without_gradient(2 * tokens)),
        ]
        return most_of_ranks(max(sizes), accelerator)

    with passes.leaving_no_trace():
        # Afterwards the gradients are there, as they are for all passes of a step but its first.
        memory.peak(lambda: passes.with_gradient(passes.least))
        limit = -most_of_ranks(-memory.limit(), accelerator)
        budget, size = find_budget(peak, limit, least=passes.least, most=passes.most)
    room = f"{limit / GIB:.2f} GiB that are left for a pass"
    if size > limit:
        return budget, f"the longest sequence, which needs more than the {room}"
    whole = ", and the largest batch has no more" if budget == passes.most else ""
    return budget, f"found by trying: its passes need {size / GIB:.2f} of {room}{whole}"


def state_to_come(model: nn.Module, args: KTOConfig, optimizer: Any) -> int:
    """Bytes of this rank's optimizer state, if the optimizer has not made it yet."""
    if optimizer is None or optimizer.state:
        return 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained)
    return optimizer_bytes(model, args).state * own // max(sum(p.numel() for p in trained), 1)
