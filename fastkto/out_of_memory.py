"""Out-of-memory errors that say which pass was too large, and which setting makes it smaller."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastkto.config import KTOConfig


class PassFacts(NamedTuple):
    """What an error has to say of a pass."""

    name: str  # "gradient pass 3 of 7"
    tokens: int  # that it computes
    lengths: list[int]  # of its sequences, in tokens
    args: KTOConfig | None = None  # of a pass of the loss


@contextmanager
def naming_pass(facts: Callable[[], PassFacts]) -> Iterator[None]:
    """Have a `torch.OutOfMemoryError` from within say what `facts` returns, and what to do.

    It stays what HF's `auto_find_batch_size` recognises: of the same class, with one argument that
    has " out of memory." in it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise  # an inner block has named it
        raise torch.OutOfMemoryError(f"{_describe(facts())}. {error}") from error


def _describe(facts: PassFacts) -> str:
    number, longest = len(facts.lengths), max(facts.lengths, default=0)
    size = f"{facts.tokens:,} tokens in {number:,} sequences, the longest of {longest:,}"
    if number == 1:
        size = f"one sequence of {longest:,} tokens"
    if number == 0:
        size = "an idle one, while other ranks are at work"
    return f"The {facts.name} ({size}) ran out of memory. {_advice(facts)}"


def _advice(facts: PassFacts) -> str:
    args = facts.args
    if len(facts.lengths) > 1:
        if args is None:
            return "Lower max_tokens_per_pass; passes without gradient hold up to twice as many"
        if facts.tokens > args.grad_tokens:
            return (
                "Lower the batch size: compute_loss is overridden, so a batch is one pass whatever "
                "max_tokens_per_pass is"
            )
        return f"Lower max_tokens_per_pass, which is {args.grad_tokens:,}"
    remedies = ["lower max_length"]
    for name in ("gradient_checkpointing", "activation_offloading"):
        if args is not None and not getattr(args, name):
            remedies.append(f"turn on {name}")
    if args is not None and args.checkpoint_passes == "auto":
        remedies.append("leave checkpoint_passes out, which may have turned checkpointing off")
    return f"A pass holds at least one whole sequence: {' or '.join(remedies)}"
