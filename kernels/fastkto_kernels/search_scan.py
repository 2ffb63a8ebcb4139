"""Measure which form of the pass without gradient is fastest here, and remember it.

    python -m fastkto_kernels.search_scan --hidden-size 896 --vocab-size 151936

Times tiles and the fused kernel, in the configurations for it, on the present CUDA device. Each has
to agree with the tiles first, with a weight in the compute dtype and in fp32. The fastest goes to
the user's table, see `scan_table`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import Operands
from .scan_table import ALIGNMENT, CANDIDATES, Blocks, make_key, save_entry, users_table
from .tiles import LogitTransform, RowState

DTYPES = ("bfloat16", "float16")
MEMORY_BYTES = 96 * 2**20  # of the tiles, as in `fastkto.linear_logprob`
# Between two sums of a few thousand fp32 products in different orders, in nats.
TOLERANCE = 1e-4


class Timing(NamedTuple):
    """One form of the pass."""

    blocks: Blocks | None  # None: tiles
    milliseconds: float  # median; infinite where it cannot be used
    finding: str  # why it cannot be used


def main(arguments: list[str] | None = None) -> int:
    """Run the search; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkto_kernels.search_scan",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the products")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--table", type=Path, help="file of the entry; default: the user's")
    options = parser.parse_args(arguments)
    if min(options.hidden_size, options.vocab_size, options.tokens) < 1:
        parser.error("sizes have to be positive")
    if options.hidden_size % ALIGNMENT:
        parser.error(f"the kernel takes hidden sizes that are multiples of {ALIGNMENT}: tiles run")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, and nothing else can be measured")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = getattr(torch, options.dtype)
    operands = make_operands(options.tokens, options.hidden_size, options.vocab_size, dtype, device)
    timings = []
    for timing in time_forms(operands, candidates_for(torch.cuda.get_device_capability(device))):
        timings.append(timing)
        _write(_line(timing))
    fastest = choose(timings)
    key = make_key(device, options.hidden_size, options.vocab_size, dtype)
    table = options.table or users_table()
    save_entry(table, key, fastest.blocks)
    _write(f"{_name(fastest.blocks)} is written to {table} for {key}")
    return 0


def make_operands(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Operands:
    """Random operands; the logits have a standard deviation of about 3."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    hidden, weight = normal(num_tokens, hidden_size), normal(vocab_size, hidden_size)
    weight *= 3 / hidden_size**0.5
    target = torch.randint(vocab_size, (num_tokens,), generator=generator, device=device)
    transform = LogitTransform(scale=1.0, softcap=None, temperature=1.0)
    return Operands(hidden, weight, None, None, None, target, dtype, transform)


def candidates_for(capability: tuple[int, int]) -> list[Blocks]:
    """The configurations that compile well for a GPU, or for the first of its generation."""
    major, minor = capability
    names = {f"sm_{major}{minor}", f"sm_{major}0"}
    return [blocks for blocks, targets in CANDIDATES.items() if names & set(targets)]


def time_forms(operands: Operands, candidates: Sequence[Blocks]) -> Iterator[Timing]:
    """The tiles' time, then that of each configuration which computes the same."""
    from triton.testing import do_bench

    from .fused_scan import scan_fused

    def time(scan: Callable[[], object]) -> float:
        return float(do_bench(scan, warmup=100, rep=500, return_mode="median"))

    yield Timing(None, time(lambda: scan_tiles(operands)), "")
    for blocks in candidates:
        # A configuration that is too large for this GPU shows when it is launched.
        try:
            finding = disagreement(operands, blocks)
        except Exception as error:
            finding = f"{type(error).__name__}: {error}"
        if finding:
            yield Timing(blocks, math.inf, finding)
            continue
        scan = partial(scan_fused, operands, blocks, stats=False, memory_bytes=MEMORY_BYTES)
        yield Timing(blocks, time(scan), "")


def scan_tiles(operands: Operands, *, stats: bool = False) -> RowState:
    """The state from tiles."""
    from . import tile_steps_triton
    from .scan import scan_logits

    return scan_logits(
        operands, tile_steps_triton, stats=stats, with_direction=False, memory_bytes=MEMORY_BYTES
    ).state


def disagreement(operands: Operands, blocks: Blocks) -> str:
    """Where the fused kernel differs from the tiles, empty if nowhere; in every form of it."""
    from .fused_scan import scan_fused

    vocab_size = operands.weight.shape[0]
    for weight in (operands.weight, operands.weight.float()):
        for softcap, stats in product((None, 30.0), (False, True)):
            transform = LogitTransform(scale=1.0, softcap=softcap, temperature=1.0)
            case = operands._replace(weight=weight, transform=transform)
            ours = scan_fused(case, blocks, stats=stats, memory_bytes=MEMORY_BYTES)
            pairs = zip(
                _comparable(ours, vocab_size),
                _comparable(scan_tiles(case, stats=stats), vocab_size),
                strict=True,
            )
            # max() of PyTorch and not Python's, which may pass a NaN by
            error = torch.stack([(ours - tiles).abs().max() for ours, tiles in pairs]).max().item()
            if not error <= TOLERANCE:
                return f"differs by {error:.1e} nats: weight {weight.dtype}, {softcap=}, {stats=}"
    return ""


def _comparable(state: RowState, vocab_size: int) -> list[Tensor]:
    """What does not depend on the reference that happened to be taken, [N] each, in nats."""
    values = [state.reference + state.other_sum.log(), state.target_logit]
    if state.weighted_sum is not None and state.logit_sum is not None:
        values.append(state.reference + state.weighted_sum / state.other_sum)
        values.append(state.logit_sum / vocab_size)
    return values


def choose(timings: list[Timing]) -> Timing:
    """The fastest form."""
    return min(timings, key=lambda timing: timing.milliseconds)


def _name(blocks: Blocks | None) -> str:
    if blocks is None:
        return "tiles"
    return "fused " + " ".join(f"{name}={value}" for name, value in blocks._asdict().items())


def _line(timing: Timing) -> str:
    result = timing.finding or f"{timing.milliseconds:.3f} ms"
    return f"{_name(timing.blocks):70} {result}"


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
