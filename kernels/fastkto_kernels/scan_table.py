"""Which form of the pass without gradient runs: the fused kernel in some configuration, or tiles.

Which is faster is a matter of measurement, so it is looked up: in a table that is shipped, and in
the user's own, which `python -m fastkto_kernels.search_scan` writes and which comes first. Where
neither has an entry, tiles run. Nothing here needs Triton.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .operands import Operands

SHIPPED_TABLE = Path(__file__).with_name("scan_table.json")
# Elements that the hidden size and the stride of the weight's rows are multiples of.
ALIGNMENT = 16
# Offsets inside a block of up to 256 rows are int32.
MAX_STRIDE = 2**23
NVIDIA = ("sm_80", "sm_90", "sm_120")


class Blocks(NamedTuple):
    """How the fused kernel cuts its work."""

    rows: int
    columns: int
    depth: int  # of the hidden size at a time
    num_warps: int
    num_stages: int


# Configuration -> the GPUs for which it compiles without spills, within their shared memory.
CANDIDATES: dict[Blocks, tuple[str, ...]] = {
    Blocks(rows=64, columns=128, depth=64, num_warps=8, num_stages=3): NVIDIA,
    Blocks(rows=64, columns=128, depth=64, num_warps=8, num_stages=4): ("sm_90",),
    Blocks(rows=128, columns=128, depth=32, num_warps=8, num_stages=3): ("sm_80",),
}


class Key(NamedTuple):
    """What an entry is for. Sizes are rounded up to powers of two."""

    device: str  # `device_name`
    hidden_size: int
    vocab_size: int
    dtype: str  # that the operands are rounded to, "bfloat16" for one


Table = dict[Key, Blocks | None]  # None: tiles are faster


def blocks_for(operands: Operands) -> Blocks | None:
    """The configuration that the tables give for these operands; None: tiles have to do it.

    The kernel takes bf16 and fp16 products (IEEE fp32 ones find no tensor cores), no low-rank
    addition and no factor, and a weight in the dtype of the products or in fp32 that is read 16
    bytes at a time.
    """
    weight, dtype = operands.weight, operands.compute_dtype
    vocab_size, hidden_size = weight.shape
    is_supported = (
        dtype in (torch.float16, torch.bfloat16)
        and operands.extra_hidden is None
        and operands.factor is None
        and weight.dtype in (dtype, torch.float32)
        and weight.stride(1) == 1
        and hidden_size % ALIGNMENT == weight.stride(0) % ALIGNMENT == 0
        and weight.stride(0) < MAX_STRIDE
        and weight.data_ptr() % 16 == 0
    )
    return find_blocks(weight.device, hidden_size, vocab_size, dtype) if is_supported else None


def find_blocks(
    device: torch.device, hidden_size: int, vocab_size: int, dtype: torch.dtype
) -> Blocks | None:
    """The fused kernel's configuration that is fastest here; None: tiles are, or nobody knows."""
    key = make_key(device, hidden_size, vocab_size, dtype)
    users = load_table(users_table())
    return users[key] if key in users else load_table(SHIPPED_TABLE).get(key)


def make_key(device: torch.device, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> Key:
    """The key of a shape on a device."""
    hidden, vocab = (1 << (size - 1).bit_length() for size in (hidden_size, vocab_size))
    return Key(device_name(device), hidden, vocab, str(dtype).removeprefix("torch."))


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name as its driver gives it; "cpu" under Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def users_table() -> Path:
    """Where the user's own table is, whether it exists or not."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastkto" / "scan_table.json"


@cache
def load_table(path: Path) -> Table:
    """The entries of a file, none if there is no file; read once in a process.

    ValueError if it is damaged or names a configuration that this version does not have.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return dict(_entry(record) for record in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of this version: {type(error).__name__}: {error}; delete it, and "
            "measure again with python -m fastkto_kernels.search_scan"
        ) from error


def _entry(record: dict[str, Any]) -> tuple[Key, Blocks | None]:
    values = dict(record)
    chosen = values.pop("blocks")
    blocks = None if chosen is None else Blocks(**chosen)
    if blocks is not None and blocks not in CANDIDATES:
        raise ValueError(f"{blocks} is not among the configurations")
    key = Key(**values)
    for value, kind in zip(key, (str, int, int, str), strict=True):
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind.__name__}")
    return key, blocks


def save_entry(path: Path, key: Key, blocks: Blocks | None) -> None:
    """Add or replace one entry; another process sees the old file or the new one, never half."""
    load_table.cache_clear()
    table = load_table(path) | {key: blocks}
    records = [
        key._asdict() | {"blocks": None if blocks is None else blocks._asdict()}
        for key, blocks in sorted(table.items(), key=lambda entry: entry[0])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    load_table.cache_clear()
