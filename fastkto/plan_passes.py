"""Plans: which sequences stand together in which pass, within a budget of tokens.

Made on the CPU from the lengths alone, before anything runs.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeAlias

from fastkto.data.batch import TokenSequence
from fastkto.out_of_memory import PassFacts

# Sequences share a padded pass only if the shorter one fills this much of its row.
_LEAST_FILL = 0.9
# A group that shares its prompt has at most so many times the tokens of the longest sequence.
_GROUP_OVER_LONGEST = 1.25


class Layout(Enum):
    """How sequences stand in a pass; which of these is exact for a model, `packing` finds out."""

    PACKED = "packed"  # concatenated
    PADDED = "padded"  # in rows
    ALONE = "alone"  # one sequence a pass


# Sequences with one prompt, by their index; a packed pass reads that prompt once.
Group: TypeAlias = list[int]
# The groups of each pass; a pass without any is idle.
Plan: TypeAlias = list[list[Group]]


def plan_passes(
    sequences: Sequence[TokenSequence],
    max_tokens: int,
    layout: Layout,
    *,
    share_prompts: bool = False,
) -> Plan:
    """The passes over the sequences, each of at most `max_tokens` tokens, the largest first.

    What is larger than `max_tokens` by itself is a pass of its own. With `share_prompts` a packed
    pass reads a prompt once for the completions that it holds. Sequences with images are not
    packed, and only such share a pass whose images can be concatenated.
    """
    kinds: dict[tuple[Any, ...] | None, list[int]] = {}
    for index, sequence in enumerate(sequences):
        kind = None if sequence.media is None else sequence.media.kind
        kinds.setdefault(kind, []).append(index)
    check_whole_media(sequences, layout)
    if set(kinds) <= {None}:
        return _plan_alike(sequences, max_tokens, layout, share_prompts)
    plan: Plan = []
    for kind, rows in kinds.items():
        own = [sequences[row] for row in rows]
        if kind is not None and kind[0] == "whole":
            part = [[[item] for item in range(len(own))]]
        else:
            own_layout = layout if kind is None else _without_packing(layout)
            part = _plan_alike(own, max_tokens, own_layout, share_prompts)
        plan += [[[rows[item] for item in group] for group in groups] for groups in part]
    return sorted(plan, key=lambda groups: -computed_tokens(sequences, groups, layout))


def _plan_alike(
    sequences: Sequence[TokenSequence], max_tokens: int, layout: Layout, share_prompts: bool
) -> Plan:
    """`plan_passes` for sequences all without images, or with such as can be concatenated."""
    if layout is Layout.PACKED:
        groups = [[index] for index in range(len(sequences))]
        if share_prompts:
            groups = _group_prompts(sequences, max_tokens)
        tokens = [_group_tokens(sequences, group) for group in groups]
        plan = plan_lengths(tokens, max_tokens, layout)
        return [[groups[item] for item in items] for items in plan]
    plan = plan_lengths([sequence.length for sequence in sequences], max_tokens, layout)
    return [[[row] for row in rows] for rows in plan]


def plan_lengths(lengths: Sequence[int], max_tokens: int, layout: Layout) -> list[list[int]]:
    """`plan_passes` for sequences that share no prompt, by their lengths."""
    if layout is Layout.PACKED:
        return _first_fit(lengths, max_tokens)
    return _equal_lengths(lengths, max_tokens if layout is Layout.PADDED else 0)


def computed_tokens(
    sequences: Sequence[TokenSequence], groups: Sequence[Group], layout: Layout
) -> int:
    """Tokens that the pass over `groups` computes, padding included."""
    if not groups:
        return 1  # of an idle pass
    if layout is Layout.PACKED and not has_images(sequences, groups):
        return sum(_group_tokens(sequences, group) for group in groups)
    return len(groups) * max(sequences[group[0]].length for group in groups)


def check_whole_media(sequences: Sequence[TokenSequence], layout: Layout) -> None:
    """Raise ValueError where sequences have to share a pass and may not."""
    is_whole = any(one.media is not None and one.media.whole is not None for one in sequences)
    if is_whole and layout is Layout.ALONE and len(sequences) > 1:
        raise ValueError(
            "the images, videos or audios of a batch cannot be told apart, so that it has to be "
            "one pass, and this model takes sequences one by one; use batches of one row (with "
            "kl_scope='window')"
        )


def has_images(sequences: Sequence[TokenSequence], groups: Sequence[Group]) -> bool:
    return any(sequences[row].media is not None for group in groups for row in group)


def _without_packing(layout: Layout) -> Layout:
    return Layout.PADDED if layout is Layout.PACKED else layout


def pass_facts(
    name: str, sequences: Sequence[TokenSequence], groups: Sequence[Group], layout: Layout
) -> PassFacts:
    """What an error says of the pass over `groups`."""
    lengths = [sequences[row].length for group in groups for row in group]
    return PassFacts(name, computed_tokens(sequences, groups, layout), lengths)


def _group_tokens(sequences: Sequence[TokenSequence], group: Group) -> int:
    """Tokens of a group: its prompt once, and all of its completions."""
    return len(sequences[group[0]].prompt) + sum(len(sequences[i].completion) for i in group)


def _group_prompts(sequences: Sequence[TokenSequence], max_tokens: int) -> list[Group]:
    """Sequences with equal prompts, in groups of at most `max_tokens` tokens.

    Or of a little more than the longest of them, which is a pass of its own in any case: otherwise
    the longest prompts, of which sharing saves most, would be read for each completion.
    """
    longest = max((sequence.length for sequence in sequences), default=0)
    max_tokens = max(max_tokens, int(_GROUP_OVER_LONGEST * longest))
    groups: list[Group] = []
    open_groups: dict[int, Group] = {}
    for index, sequence in enumerate(sequences):
        group = open_groups.get(sequence.prompt_key)
        has_room = group is not None and _group_tokens(sequences, [*group, index]) <= max_tokens
        if group is not None and has_room and len(sequence.prompt) > 0:
            group.append(index)
            continue
        groups.append([index])
        open_groups[sequence.prompt_key] = groups[-1]
    return groups


def _first_fit(tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items of so many `tokens` in bins of at most `max_tokens`, the fullest first.

    In falling order of size, each item goes to the first bin that has room for it.
    """
    bins: list[list[int]] = []
    filled: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda item: -tokens[item]):
        room = (number for number, size in enumerate(filled) if size + tokens[item] <= max_tokens)
        number = next(room, len(bins))
        if number == len(bins):
            bins.append([])
            filled.append(0)
        bins[number].append(item)
        filled[number] += tokens[item]
    return [bins[number] for number in sorted(range(len(bins)), key=lambda n: -filled[n])]


def _equal_lengths(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Sequences of about one length, in passes of at most `max_tokens` padded tokens.

    None is padded by more than a tenth; the passes with the most tokens come first.
    """
    plan: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = bool(plan) and (len(plan[-1]) + 1) * longest <= max_tokens
        if fits and lengths[row] >= _LEAST_FILL * longest:
            plan[-1].append(row)
        else:
            plan.append([row])
            longest = lengths[row]
    return sorted(plan, key=lambda rows: -len(rows) * lengths[rows[0]])
