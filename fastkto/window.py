"""The rows of one optimizer step paired for the KL estimate, also across micro-batches and ranks.

Rows are taken in the order of the data set, which accelerate deals out by whole micro-batches:
first every rank's first micro-batch, then every rank's second. So the pairs depend on the window's
rows alone, not on how they are split.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastkto.data.batch import split_rows
from fastkto.data.pairing import DATASET_PAIRING, pair

KL_SCOPES = ("batch", "window")


class PairedBatch(NamedTuple):
    """The partners of one micro-batch's rows, and what there is to log about them."""

    partners: list[Tensor | None]  # each row's partner's completion, int64, not cut; None without
    lone_rows: int  # counted rows without a partner
    same_prompt_pairs: int  # counted rows with a partner of the same prompt


class Window(NamedTuple):
    """The micro-batches of one optimizer step, paired."""

    batches: list[PairedBatch]  # of this rank, as they were given
    num_rows: int  # counted rows of all micro-batches; with kl_scope="window", of all ranks


class RowPlace(NamedTuple):
    """Where a row is; places sort in the order of the data set."""

    micro_batch: int
    rank: int
    position: int


class RowFacts(NamedTuple):
    """What other ranks have to know of a row."""

    prompt_key: int
    completion_length: int


Facts: TypeAlias = dict[RowPlace, RowFacts]
Partners: TypeAlias = dict[RowPlace, RowPlace | None]


def pair_window(
    batches: Sequence[dict[str, Any]],
    *,
    kl_scope: str,
    kl_pairing: str,
    accelerator: Accelerator,
    counted: Sequence[int] | None = None,
) -> Window:
    """Pair the rows of one optimizer step's micro-batches on this rank, batches of `KTOCollator`.

    `kl_scope="batch"` pairs inside each micro-batch. `"window"` pairs over all rows of all
    micro-batches of all ranks; every rank must call this then, and they may have different numbers
    of rows and of micro-batches. `kl_pairing` is one of `fastkto.data.pairing.KL_PAIRINGS`, or
    "dataset" for batches that bring their mismatched sequences: nobody gets a partner then.

    Only the first `counted[i]` rows of micro-batch i count (default: all of them). They are paired
    as if the others did not exist, and those get no partner.

    Completions of this rank's rows are views. Of other ranks' rows only those needed here travel,
    from device to device. Nothing waits for a device but, between several ranks, the exchange of
    prompt keys and lengths.
    """
    if kl_scope not in KL_SCOPES:
        raise ValueError(f"kl_scope is {kl_scope!r}; choose from {list(KL_SCOPES)}")
    across_ranks = kl_scope == "window" and accelerator.num_processes > 1
    rank = accelerator.process_index if across_ranks else 0
    own_facts = _own_facts(batches, counted, rank)
    facts: Facts = dict(gather_object(list(own_facts.items())) if across_ranks else own_facts)
    partners = pair_places(facts, kl_scope, kl_pairing)
    completions = {
        RowPlace(index, rank, position): completion
        for index, batch in enumerate(batches)
        for position, (_, completion) in enumerate(split_rows(batch))
    }
    if across_ranks:
        completions |= _exchange(completions, facts, partners, accelerator)
    return Window(
        batches=[
            _paired_batch(
                [RowPlace(index, rank, position) for position in range(len(batch["rows"]))],
                facts,
                partners,
                completions,
            )
            for index, batch in enumerate(batches)
        ],
        num_rows=len(facts),
    )


def pair_places(facts: Facts, kl_scope: str, kl_pairing: str) -> Partners:
    """Each row's partner, the same on every rank; in the scope "batch" of one rank's rows only."""
    if kl_pairing == DATASET_PAIRING:
        return dict.fromkeys(sorted(facts))
    groups: dict[int, list[RowPlace]] = {}
    for place in sorted(facts):
        groups.setdefault(place.micro_batch if kl_scope == "batch" else 0, []).append(place)
    partners: Partners = {}
    for places in groups.values():
        chosen = pair([facts[place].prompt_key for place in places], kl_pairing)
        for place, index in zip(places, chosen, strict=True):
            partners[place] = None if index is None else places[index]
    return partners


def _own_facts(
    batches: Sequence[dict[str, Any]], counted: Sequence[int] | None, rank: int
) -> Facts:
    sizes = [len(batch["rows"]) for batch in batches]
    counted = sizes if counted is None else counted
    if len(counted) != len(sizes) or any(
        not 0 <= count <= size for count, size in zip(counted, sizes, strict=False)
    ):
        raise ValueError(
            f"counted is {list(counted)} for micro-batches of {sizes} rows; give one number for "
            "each, from 0 to its rows"
        )
    return {
        RowPlace(index, rank, position): RowFacts(
            batch["prompt_keys"][position], batch["completion_lengths"][position]
        )
        for index, (batch, count) in enumerate(zip(batches, counted, strict=True))
        for position in range(count)
    }


def _paired_batch(
    places: list[RowPlace], facts: Facts, partners: Partners, completions: dict[RowPlace, Tensor]
) -> PairedBatch:
    chosen = [partners.get(place) for place in places]  # rows that do not count have none
    return PairedBatch(
        partners=[None if partner is None else completions[partner] for partner in chosen],
        lone_rows=sum(place in facts and partners[place] is None for place in places),
        same_prompt_pairs=sum(
            partner is not None and facts[partner].prompt_key == facts[place].prompt_key
            for place, partner in zip(places, chosen, strict=True)
        ),
    )


def _exchange(
    completions: dict[RowPlace, Tensor], facts: Facts, partners: Partners, accelerator: Accelerator
) -> dict[RowPlace, Tensor]:
    """The completions that rows of this rank need and other ranks have.

    A completion is needed by one row only. Everyone knows all pairs and lengths, so sender and
    receiver agree on the order, and on whether there is anything to exchange at all.
    """
    rank = accelerator.process_index
    sent: list[list[RowPlace]] = [[] for _ in range(accelerator.num_processes)]
    received: list[list[RowPlace]] = [[] for _ in sent]
    nothing_crosses = True
    for place, partner in partners.items():  # in the same order on all ranks
        if partner is None or partner.rank == place.rank:
            continue
        nothing_crosses = False
        if partner.rank == rank:
            sent[place.rank].append(partner)
        if place.rank == rank:
            received[partner.rank].append(partner)
    if nothing_crosses:
        return {}

    def lengths(places: list[RowPlace]) -> list[int]:
        return [facts[place].completion_length for place in places]

    pieces = [completions[place] for places in sent for place in places]
    outgoing = torch.cat([torch.empty(0, dtype=torch.int64, device=accelerator.device), *pieces])
    split_sizes = [sum(lengths(places)) for places in received]
    incoming = outgoing.new_empty(sum(split_sizes))
    torch.distributed.all_to_all_single(
        incoming, outgoing, split_sizes, [sum(lengths(places)) for places in sent]
    )
    places = [place for group in received for place in group]
    return dict(zip(places, torch.split(incoming, lengths(places)), strict=True))
