"""Which row's completion each row's prompt is scored with for the KL estimate.

A pairing lists each row's partner, by index, or None. No row is its own partner, and every
completion is used once, so the estimate weighs all rows alike.
"""

from collections.abc import Hashable, Sequence

KL_PAIRINGS = ("rotate", "distinct")  # of the rows at hand
DATASET_PAIRING = "dataset"  # of the rows of a data set, before there are batches
MISMATCHED_COLUMN = "KL_completion_ids"  # TRL's name


def pair(prompt_keys: Sequence[Hashable], kl_pairing: str) -> list[int | None]:
    """Each row's partner by `rotate` or `distinct`; equal prompts have equal keys."""
    if kl_pairing not in KL_PAIRINGS:
        raise ValueError(f"kl_pairing is {kl_pairing!r}; choose from {list(KL_PAIRINGS)}")
    return rotate(len(prompt_keys)) if kl_pairing == "rotate" else distinct(prompt_keys)


def rotate(num_rows: int) -> list[int | None]:
    """Row i's partner is row i - 1, that of row 0 the last row; a lone row has none.

    As TRL 1.16 pairs rows when it maps its data set: `(x_1, y_n), (x_2, y_1), ...`.
    """
    return [None] if num_rows == 1 else [(row - 1) % num_rows for row in range(num_rows)]


def distinct(prompt_keys: Sequence[Hashable]) -> list[int | None]:
    """As few partners of the same prompt as there can be: none, if no prompt has half of the rows.

    Rows of one prompt are put side by side, and that order is rotated by the size `m` of the
    largest such group: nobody's partner is then in its own group unless `2 m` exceeds the number
    of rows, and `2 m - num_rows` pairs are left, which no pairing avoids: the other rows'
    completions are too few. Where all prompts differ this is `rotate`.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(prompt_keys):
        groups.setdefault(key, []).append(row)
    order = [row for group in groups.values() for row in group]
    shift = max(map(len, groups.values()), default=0)
    if shift == len(order):  # one prompt only, and a full turn would pair each row with itself
        return rotate(len(order))
    partners: list[int | None] = [None] * len(order)
    for position, row in enumerate(order):
        partners[row] = order[position - shift]
    return partners
