"""accelerate's FSDP2 between processes on a CPU, where it offers DistributedDataParallel only.

FSDP2 itself runs over gloo. accelerate takes up a plugin on GPUs alone, so its state is told to.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

# Of a KTOConfig. Before version 5.20 transformers takes FSDP's first version unless told otherwise.
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}


def allow_fsdp_on_cpu() -> None:
    """From now on a KTOConfig with `FSDP2` means that in several CPU processes too."""
    initialise = AcceleratorState.__init__

    def take_up_plugin(
        state: AcceleratorState,
        *args: Any,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        **kwargs: Any,
    ) -> None:
        is_new = not AcceleratorState._shared_state
        initialise(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_new and fsdp_plugin is not None and state.num_processes > 1:
            state.distributed_type = DistributedType.FSDP
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = state.distributed_type

    AcceleratorState.__init__ = take_up_plugin  # type: ignore[method-assign]
