"""accelerate's DeepSpeed between processes on a CPU, where it offers DistributedDataParallel only.

DeepSpeed itself runs over gloo. accelerate takes up a plugin on GPUs alone, so its state is told
to. The one thing left out is a faster reduction for inference, which DeepSpeed would compile first.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType


def allow_deepspeed_on_cpu() -> None:
    """From now on `KTOConfig(deepspeed=...)` means DeepSpeed in several CPU processes too."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    initialise = AcceleratorState.__init__

    def take_up_plugin(
        state: AcceleratorState,
        *args: Any,
        deepspeed_plugin: DeepSpeedPlugin | None = None,
        **kwargs: Any,
    ) -> None:
        is_new = not AcceleratorState._shared_state
        initialise(state, *args, deepspeed_plugin=deepspeed_plugin, **kwargs)
        if is_new and deepspeed_plugin is not None:
            state.distributed_type = DistributedType.DEEPSPEED
            PartialState._shared_state["distributed_type"] = state.distributed_type
            deepspeed_plugin.set_mixed_precision(state._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            state.deepspeed_plugins = deepspeed_plugin
            state._mixed_precision = "no"  # DeepSpeed does it

    AcceleratorState.__init__ = take_up_plugin  # type: ignore[method-assign]
