"""Partners over micro-batches and ranks: real processes against the pairing of one list of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st

from fastkto.data.batch import KTOCollator, prompt_key
from fastkto.data.pairing import KL_PAIRINGS, pair
from fastkto.window import PairedBatch, Window, pair_window
from tests.window_run import MAX_LENGTH, NUM_ROWS, Split, random_splits, row

ROOT = Path(__file__).parent.parent
WORLD_SIZES = (1, 2, 3)


def run(world_size: int, directory: Path) -> list[dict[str, Any]]:
    """The windows of each rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if world_size > 1 else []),
            str(ROOT / "tests" / "window_run.py"),
            str(directory),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    files = [directory / f"result{rank}.json" for rank in range(world_size)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """The windows of each rank for each number of processes."""
    directory = tmp_path_factory.mktemp("windows")
    return {world_size: run(world_size, directory / str(world_size)) for world_size in WORLD_SIZES}


def wanted_partners(numbers: list[int], kl_pairing: str) -> dict[int, int | None]:
    """Row numbers in the order of the data set to their partners'."""
    partners = pair([tuple(row(number)["prompt_ids"]) for number in numbers], kl_pairing)
    return {
        number: None if partner is None else numbers[partner]
        for number, partner in zip(numbers, partners, strict=True)
    }


def tokens(number: int | None) -> list[int] | None:
    return None if number is None else row(number)["completion_ids"][:MAX_LENGTH]


@pytest.mark.parametrize("kind", ["listed", "streamed"])
@pytest.mark.parametrize("kl_pairing", KL_PAIRINGS)
@pytest.mark.parametrize(
    "world_size, batch_size", [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1)]
)
def test_a_window_gives_the_same_partners_however_it_is_split(
    world_size: int, batch_size: int, kl_pairing: str, kind: str, runs: Any
) -> None:
    wanted = wanted_partners(list(range(NUM_ROWS)), kl_pairing)
    seen = {}
    for rank in runs[world_size]:
        window = rank[f"window {kl_pairing} {batch_size} {kind}"]
        assert [len(rows) for rows in window["rows"]] == [batch_size] * (
            NUM_ROWS // batch_size // world_size
        )
        assert window["num_rows"] == NUM_ROWS
        assert sum(window["lone_rows"]) == 0
        for rows, partners in zip(window["rows"], window["partners"], strict=True):
            seen |= dict(zip(rows, partners, strict=True))
    assert seen == {number: tokens(partner) for number, partner in wanted.items()}


def same_prompt(number: int, partner: int | None) -> bool:
    return partner is not None and row(partner)["prompt_ids"] == row(number)["prompt_ids"]


@pytest.mark.parametrize("kl_pairing", KL_PAIRINGS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_may_have_any_rows_of_which_any_first_ones_count(
    world_size: int, kl_pairing: str, runs: Any
) -> None:
    crossed = 0
    for index, split in enumerate(random_splits(world_size)):
        wanted = wanted_partners(counted_numbers(split), kl_pairing)
        number = 0
        windows = [rank[f"random {kl_pairing} {index}"] for rank in runs[world_size]]
        taken = [0] * world_size
        for sizes in split.sizes:
            for rank, size in enumerate(sizes):
                if size == 0:
                    continue
                rows = list(range(number, number + size))
                window, step = windows[rank], taken[rank]
                partners = [wanted.get(one) for one in rows]
                assert window["rows"][step] == rows
                assert window["partners"][step] == [tokens(partner) for partner in partners]
                assert window["lone_rows"][step] == sum(
                    one in wanted and wanted[one] is None for one in rows
                )
                assert window["same_prompt_pairs"][step] == sum(map(same_prompt, rows, partners))
                crossed += sum(p is not None and p not in rows for p in partners)
                number += size
                taken[rank] += 1
        assert [len(window["rows"]) for window in windows] == taken
        assert {window["num_rows"] for window in windows} == {len(wanted)}
    assert crossed >= 20


def counted_numbers(split: Split) -> list[int]:
    numbers, number = [], 0
    for sizes, counts in zip(split.sizes, split.counted, strict=True):
        for size, count in zip(sizes, counts, strict=True):
            numbers += range(number, number + count)
            number += size
    return numbers


@pytest.mark.parametrize("kl_pairing", KL_PAIRINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_scope_batch_pairs_inside_each_micro_batch(
    world_size: int, kl_pairing: str, runs: Any
) -> None:
    for rank in runs[world_size]:
        for batch_size in (1, 2, 4):
            window = rank[f"batch {kl_pairing} {batch_size} listed"]
            for i, rows in enumerate(window["rows"]):
                wanted = wanted_partners(rows, kl_pairing)
                assert window["partners"][i] == [tokens(wanted[number]) for number in rows]
                assert window["lone_rows"][i] == (batch_size == 1)
                assert window["same_prompt_pairs"][i] == sum(
                    same_prompt(*pair) for pair in wanted.items()
                )
            assert window["num_rows"] == NUM_ROWS // world_size


def test_the_scope_batch_does_not_wait_for_other_ranks(runs: Any) -> None:
    assert runs[2][0]["batch alone"] == runs[2][0]["batch rotate 2 listed"]
    assert "batch alone" not in runs[2][1]


def collate(*numbers: int) -> dict[str, Any]:
    return KTOCollator(MAX_LENGTH)([row(number) for number in numbers])


def window(batches: list[dict[str, Any]], kl_scope: str, **settings: Any) -> Window:
    settings = {"kl_pairing": "rotate", "accelerator": Accelerator(cpu=True)} | settings
    return pair_window(batches, kl_scope=kl_scope, **settings)


def as_lists(batch: PairedBatch) -> list[list[int] | None]:
    return [None if partner is None else partner.tolist() for partner in batch.partners]


@given(st.lists(st.integers(1, 5), max_size=6), st.sampled_from(KL_PAIRINGS))
def test_any_split_into_micro_batches_gives_one_batchs_partners(
    sizes: list[int], kl_pairing: str
) -> None:
    numbers = iter(range(sum(sizes)))
    batches = [collate(*(next(numbers) for _ in range(size))) for size in sizes]
    split = window(batches, "window", kl_pairing=kl_pairing)
    whole = window([collate(*range(sum(sizes)))], "batch", kl_pairing=kl_pairing)
    assert [ids for batch in split.batches for ids in as_lists(batch)] == as_lists(whole.batches[0])
    for count in ("lone_rows", "same_prompt_pairs"):
        assert sum(getattr(b, count) for b in split.batches) == getattr(whole.batches[0], count)
    assert split.num_rows == whole.num_rows == sum(sizes)


@pytest.mark.parametrize("kl_scope", ["batch", "window"])
@pytest.mark.parametrize("kl_pairing", KL_PAIRINGS)
@pytest.mark.parametrize("count", range(5))
def test_rows_that_count_are_paired_as_if_there_were_no_others(
    count: int, kl_pairing: str, kl_scope: str
) -> None:
    some = window([collate(2, 3, 4, 7)], kl_scope, kl_pairing=kl_pairing, counted=[count])
    alone = window([collate(*(2, 3, 4, 7)[:count])], kl_scope, kl_pairing=kl_pairing)
    partners = as_lists(some.batches[0])
    assert partners == as_lists(alone.batches[0]) + [None] * (4 - count)
    assert some.batches[0][1:] == alone.batches[0][1:]
    assert some.num_rows == count


def test_a_lone_row_has_no_partner() -> None:
    for kl_scope in ("batch", "window"):
        for kl_pairing in KL_PAIRINGS:
            alone = window([collate(5)], kl_scope, kl_pairing=kl_pairing)
            assert alone == Window([PairedBatch([None], 1, 0)], 1)
    apart = [collate(5), collate(6)]
    assert [batch.lone_rows for batch in window(apart, "batch").batches] == [1, 1]
    assert [batch.lone_rows for batch in window(apart, "window").batches] == [0, 0]


def test_distinct_avoids_the_prompt_of_another_micro_batch() -> None:
    batches = [collate(0, 6), collate(1, 7)]  # rows 0 and 1 share their prompt
    assert [b.same_prompt_pairs for b in window(batches, "window").batches] == [0, 0]
    batches = [collate(6, 0), collate(1, 7)]
    assert [b.same_prompt_pairs for b in window(batches, "window").batches] == [0, 1]
    distinct = window(batches, "window", kl_pairing="distinct")
    assert [b.same_prompt_pairs for b in distinct.batches] == [0, 0]


@pytest.mark.parametrize("kl_scope", ["batch", "window"])
def test_partners_are_views_and_keep_their_dtype(kl_scope: str) -> None:
    batches = [collate(0, 1, 2), collate(3, 4)]
    storages = {batch["input_ids"].untyped_storage().data_ptr() for batch in batches}
    for batch in window(batches, kl_scope).batches:
        for partner in batch.partners:
            assert partner is not None
            assert partner.dtype == torch.int64 and partner.ndim == 1
            assert partner.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("kl_scope", ["batch", "window"])
def test_one_process_pairs_without_reading_a_device(kl_scope: str) -> None:
    """A meta tensor holds no values, so reading one would raise."""
    batches = [send_to_device(collate(0, 1, 2), "meta"), send_to_device(collate(3), "meta")]
    lengths = [
        [None if p is None else (len(p), p.device.type) for p in batch.partners]
        for batch in window(batches, kl_scope).batches
    ]
    wanted = {"batch": [[2, 0, 1], [None]], "window": [[3, 0, 1], [2]]}[kl_scope]
    assert lengths == [
        [None if number is None else (len(tokens(number) or []), "meta") for number in numbers]
        for numbers in wanted
    ]


def test_rows_of_the_test_are_cut_and_share_prompts() -> None:
    assert prompt_key(row(0)["prompt_ids"]) == prompt_key(row(1)["prompt_ids"])
    assert len({len(row(number)["completion_ids"]) for number in range(NUM_ROWS)}) > 3


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_scope is 'rank'; choose from \['batch', 'window'\]"):
        window([collate(0, 1)], "rank")


@pytest.mark.parametrize("counted", [[], [1, 2], [3], [-1]])
def test_counts_that_do_not_fit_are_refused(counted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"counted is \[.*for micro-batches of \[2\] rows; give"):
        window([collate(0, 1)], "window", counted=counted)
