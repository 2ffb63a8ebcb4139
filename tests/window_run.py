"""Windows paired by one process, or by each of several, for tests/test_window.py.

    python tests/window_run.py OUTPUT_DIR
    torchrun --nproc-per-node 2 tests/window_run.py OUTPUT_DIR

Each rank writes its windows to OUTPUT_DIR, one for each case.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator, DataLoaderConfiguration
from datasets import Dataset
from torch.utils.data import DataLoader

from fastkto.data.batch import KTOCollator
from fastkto.data.pairing import KL_PAIRINGS
from fastkto.window import KL_SCOPES, pair_window
from tests.launch import finish

NUM_ROWS = 8
# Rows of each prompt are neighbours, and one prompt has half of the rows.
PROMPTS = [0, 0, 1, 1, 1, 1, 2, 3]
MAX_LENGTH = 12


def row(number: int) -> dict[str, Any]:
    """Rows of different lengths; a completion's tokens tell whose it is."""
    return {
        "prompt_ids": [PROMPTS[number % NUM_ROWS]] * (1 + PROMPTS[number % NUM_ROWS]),
        "completion_ids": [100 + number] * (1 + 3 * number % 7),
        "label": number % 3 == 0,
        "row": number,
    }


class Split(NamedTuple):
    """Rows dealt to micro-batches of ranks: sizes[micro_batch][rank], the first of them counted."""

    sizes: list[list[int]]
    counted: list[list[int]]


def random_splits(world_size: int) -> list[Split]:
    """The same on every rank; a rank may have fewer micro-batches, small ones, or none at all."""
    rng = random.Random(0)
    splits = []
    for _ in range(40):
        steps = rng.randint(1, 4)
        last = [rng.randint(0, steps) for _ in range(world_size)]
        sizes = [
            [rng.randint(1, 4) if step < last[rank] else 0 for rank in range(world_size)]
            for step in range(steps)
        ]
        whole = rng.random() < 0.5
        counted = [[n if whole else rng.randint(0, n) for n in step] for step in sizes]
        splits.append(Split(sizes, counted))
    return splits


def describe(
    accelerator: Accelerator,
    batches: list[dict[str, Any]],
    kl_scope: str,
    kl_pairing: str,
    counted: list[int] | None = None,
) -> dict[str, Any]:
    """A window of this rank as JSON can hold it."""
    window = pair_window(
        batches, kl_scope=kl_scope, kl_pairing=kl_pairing, accelerator=accelerator, counted=counted
    )
    return {
        "rows": [batch["rows"] for batch in batches],
        "partners": [
            [None if partner is None else partner.tolist() for partner in batch.partners]
            for batch in window.batches
        ],
        "lone_rows": [batch.lone_rows for batch in window.batches],
        "same_prompt_pairs": [batch.same_prompt_pairs for batch in window.batches],
        "num_rows": window.num_rows,
    }


def dealt_by_accelerate(
    accelerator: Accelerator, batch_size: int, streamed: bool
) -> list[dict[str, Any]]:
    """This rank's micro-batches of `NUM_ROWS` rows."""
    rows: Any = Dataset.from_list([row(number) for number in range(NUM_ROWS)])
    if streamed:
        rows = rows.to_iterable_dataset()
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=KTOCollator(MAX_LENGTH))
    return list(accelerator.prepare_data_loader(loader))


def own_part(split: Split, rank: int) -> tuple[list[dict[str, Any]], list[int]]:
    """This rank's micro-batches of a split that have any rows, and how many of each count."""
    number, batches, counted = 0, [], []
    for sizes, counts in zip(split.sizes, split.counted, strict=True):
        start = number + sum(sizes[:rank])
        if sizes[rank]:
            rows = [row(start + position) for position in range(sizes[rank])]
            batches.append(KTOCollator(MAX_LENGTH)(rows))
            counted.append(counts[rank])
        number += sum(sizes)
    return batches, counted


def main(directory: Path) -> None:
    config = DataLoaderConfiguration(dispatch_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    results = {}
    for kl_pairing in KL_PAIRINGS:
        for batch_size in (1, 2, 4, 8):
            if batch_size * world_size > NUM_ROWS:
                continue
            for streamed in (False, True):
                batches = dealt_by_accelerate(accelerator, batch_size, streamed)
                kind = "streamed" if streamed else "listed"
                for kl_scope in KL_SCOPES:
                    case = f"{kl_scope} {kl_pairing} {batch_size} {kind}"
                    results[case] = describe(accelerator, batches, kl_scope, kl_pairing)
        for index, split in enumerate(random_splits(world_size)):
            batches, counted = own_part(split, rank)
            results[f"random {kl_pairing} {index}"] = describe(
                accelerator, batches, "window", kl_pairing, counted
            )
    if accelerator.is_main_process:  # nobody else takes part
        batches = dealt_by_accelerate(accelerator, 2, streamed=False)
        results["batch alone"] = describe(accelerator, batches, "batch", "rotate")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"result{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    finish()
