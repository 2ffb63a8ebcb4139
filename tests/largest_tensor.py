"""The largest tensor that a computation makes, to see what it never makes."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkto.logprob_operator import IMPLEMENTATIONS


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that any operator returns, ours inside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in IMPLEMENTATIONS:
            with self:
                result = IMPLEMENTATIONS[function](*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.num_bytes = max(self.num_bytes, value.numel() * value.element_size())
        return result
