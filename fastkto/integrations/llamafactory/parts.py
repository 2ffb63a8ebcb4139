"""Where LLaMA-Factory's runs differ a little: in the model, the reference, and rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastkto.reference import Reference
from fastkto.repeats import RepeatedRows


def remove_upcast(policy: nn.Module) -> None:
    """Take off the hook of upcast_lmhead_output, which every call of the head would have to suit.

    Scores are formed in fp32 without it.
    """
    for module in policy.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "_fp32_forward_post_hook":
                del module._forward_hooks[key]


class PolicyItself(Reference):
    """The policy as its own reference, in evaluation."""

    @contextmanager
    def scoring(self, policy: Any) -> Iterator[nn.Module]:
        """Yield the policy as it is."""
        yield policy


class RowsWithoutNumbers(RepeatedRows):
    """Rows of a stream cannot be told from those that repeat them, so all of them count."""

    def _count_in_stream(self, batch: dict[str, Any]) -> int:
        return 0
