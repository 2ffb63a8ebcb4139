"""The pairings against brute force over all permutations, and against each other."""

from collections.abc import Hashable, Sequence
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkto.data.pairing import distinct, pair, rotate

KEYS = st.lists(st.sampled_from("abcdefg"), max_size=40)


def same_prompt_pairs(keys: Sequence[Hashable], partners: Sequence[int | None]) -> int:
    return sum(keys[row] == keys[p] for row, p in enumerate(partners) if p is not None)


def fewest_same_prompt_pairs(keys: Sequence[Hashable]) -> int:
    """Over all permutations that pair no row with itself."""
    return min(
        same_prompt_pairs(keys, order)
        for order in permutations(range(len(keys)))
        if all(row != partner for row, partner in enumerate(order))
    )


def test_rotate_gives_each_row_the_one_before_it() -> None:
    assert rotate(0) == []
    assert rotate(1) == [None]
    assert rotate(2) == [1, 0]
    assert rotate(5) == [4, 0, 1, 2, 3]


@pytest.mark.parametrize("num_rows", range(2, 7))
def test_distinct_has_the_fewest_same_prompt_pairs_there_can_be(num_rows: int) -> None:
    for keys in product(range(min(num_rows, 4)), repeat=num_rows):
        if list(dict.fromkeys(keys)) != sorted(set(keys)):
            continue  # the same but for the names of the keys
        pairs = same_prompt_pairs(keys, distinct(keys))
        assert pairs == fewest_same_prompt_pairs(keys), keys


@given(KEYS)
def test_distinct_meets_the_bound_for_any_number_of_rows(keys: list[str]) -> None:
    largest = max((keys.count(key) for key in set(keys)), default=0)
    wanted = 0 if len(keys) < 2 else max(0, 2 * largest - len(keys))
    assert same_prompt_pairs(keys, distinct(keys)) == wanted


@pytest.mark.parametrize("kl_pairing", ["rotate", "distinct"])
@given(KEYS)
def test_every_completion_is_used_once_and_never_by_its_own_row(
    kl_pairing: str, keys: list[str]
) -> None:
    partners = pair(keys, kl_pairing)
    if len(keys) == 1:
        assert partners == [None]
        return
    assert sorted(p for p in partners if p is not None) == list(range(len(keys)))
    assert all(row != partner for row, partner in enumerate(partners))


@given(st.integers(0, 40))
def test_distinct_is_rotate_where_all_prompts_differ(num_rows: int) -> None:
    assert distinct(range(num_rows)) == rotate(num_rows)


def test_distinct_parts_the_two_answers_of_paired_data() -> None:
    keys = [0, 1, 2, 3, 0, 1, 2, 3]  # desirable answers first, as pairs are split
    assert same_prompt_pairs(keys, distinct(keys)) == 0
    keys = [0, 0, 1, 1, 2, 2]
    assert same_prompt_pairs(keys, rotate(6)) == 3
    assert same_prompt_pairs(keys, distinct(keys)) == 0


def test_another_pairing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_pairing is 'random'; choose from \['rotate', 'dist"):
        pair([1, 2], "random")
