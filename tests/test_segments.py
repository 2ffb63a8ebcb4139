"""Segments against one boolean mask over the whole row, written from their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from fastkto import segments as segments_module
from fastkto.segments import Segment, Segments
from tests.attention_forms import attends_at_bottom_right

CPU = torch.device("cpu")


@st.composite
def spans(draw: st.DrawFn) -> list[Segment]:
    """Groups of completions behind a prompt, which may be empty; and segments without a prefix."""
    spans: list[Segment] = []
    end = 0
    for prompt, completions in draw(
        st.lists(
            st.tuples(st.integers(0, 6), st.lists(st.integers(1, 7), min_size=1, max_size=3)),
            min_size=1,
            max_size=4,
        )
    ):
        start, behind = end, end + prompt
        for number, length in enumerate(completions if prompt else completions[:1]):
            first = behind if number == 0 else end
            end = first + length
            spans.append(Segment(start, end) if number == 0 else Segment(first, end, start, behind))
    return spans


WINDOWS = st.one_of(st.none(), st.integers(1, 15))


def naive_mask(spans: list[Segment], window: int | None) -> Tensor:
    """[T, T]: True where the row's token t attends to its token u."""
    length = spans[-1].end
    mask = torch.zeros(length, length, dtype=torch.bool)
    for span in spans:
        tokens = [*range(span.prefix_start, span.prefix_end), *range(span.start, span.end)]
        for position, token in enumerate(tokens):
            if token < span.start:
                continue  # of the prefix, which is a query of another segment
            for other, attended in enumerate(tokens[: position + 1]):
                mask[token, attended] = window is None or position - other < window
    return mask


def row_of(length: int) -> Tensor:
    """Each token's number, as states of one head and one dimension."""
    return torch.arange(length)[None, None, :, None]


@settings(deadline=None, max_examples=50)
@given(spans(), WINDOWS, st.booleans(), st.integers(1, 9))
def test_parts_are_the_naive_mask(
    spans: list[Segment], window: int | None, always_masked: bool, masked_queries: int
) -> None:
    length = spans[-1].end
    mask = torch.zeros(length, length, dtype=torch.bool)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "MASKED_QUERIES", masked_queries)
        for part in Segments(spans, CPU).parts(window, always_masked=always_masked):
            queries, keys = (f(row_of(length)).flatten() for f in (part.queries, part.keys))
            seen += queries.tolist()
            attends = part.mask(CPU)
            if attends is None:
                assert not always_masked and torch.equal(queries, keys)
                attends = torch.ones(len(queries), len(queries)).tril().bool()
            else:
                assert len(queries) <= masked_queries
                if window is not None:  # no key that no query attends to
                    assert len(keys) <= len(queries) + window - 1
                attends = attends[0, 0]
            mask[queries[:, None], keys] = attends
    assert seen == list(range(length))
    assert torch.equal(mask, naive_mask(spans, window))


@settings(deadline=None, max_examples=50)
@given(spans(), WINDOWS)
def test_offsets_and_gathered_keys_are_the_naive_mask(
    spans: list[Segment], window: int | None
) -> None:
    """As variable-length kernels read them: causal, the last query at the last key."""
    segments, length = Segments(spans, CPU), spans[-1].end
    keys = segments.gather_keys(row_of(length)).flatten()
    assert segments.queries_before.dtype == segments.keys_before.dtype == torch.int32
    query_counts, key_counts = segments.queries_before.diff(), segments.keys_before.diff()
    assert segments.most_queries == query_counts.max() and segments.most_keys == key_counts.max()
    mask = torch.zeros(length, length, dtype=torch.bool)
    queries = torch.arange(length).split(query_counts.tolist())
    for own, attended in zip(queries, keys.split(key_counts.tolist()), strict=True):
        mask[own[:, None], attended] = attends_at_bottom_right(len(own), len(attended), window)
    assert torch.equal(mask, naive_mask(spans, window))
    assert (segments.key_index is None) == all(span.prefix == 0 for span in spans)


@settings(deadline=None, max_examples=10)
@given(spans(), WINDOWS)
def test_flex_attentions_mask_is_the_naive_mask(spans: list[Segment], window: int | None) -> None:
    block_mask = Segments(spans, CPU).block_mask(window, CPU)
    length = spans[-1].end
    assert block_mask.seq_lengths == (length, length)
    mask = create_mask(block_mask.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(mask[0, 0], naive_mask(spans, window))


@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_computes_all_blocks_that_have_a_true_entry(window: int | None) -> None:
    spans = [Segment(0, 200), Segment(200, 390, 0, 150), Segment(390, 600)]
    block_mask = Segments(spans, CPU).block_mask(window, CPU)
    size = block_mask.BLOCK_SIZE[0]
    blocks = -(-600 // size)
    padded = torch.zeros(blocks * size, blocks * size, dtype=torch.bool)
    padded[:600, :600] = naive_mask(spans, window)
    needed = padded.view(blocks, size, blocks, size).any(3).any(1)
    assert torch.equal(block_mask.to_dense()[0, 0].bool(), needed)
    assert not needed.all()


def test_a_block_mask_is_made_once_for_each_window() -> None:
    segments = Segments([Segment(0, 5), Segment(5, 9)], CPU)
    assert segments.block_mask(None, CPU) is segments.block_mask(None, CPU)
    assert segments.block_mask(3, CPU) is not segments.block_mask(None, CPU)


def test_long_segments_need_no_square_mask() -> None:
    """Queries in parts: what one of them needs grows with its keys, not with their square."""
    length, window = 5000, 100
    (whole,) = Segments([Segment(0, length)], CPU).parts(None, always_masked=False)
    assert whole.mask(CPU) is None
    for options in ({"always_masked": True}, {"always_masked": False}):
        for part in Segments([Segment(0, length)], CPU).parts(window, **options):
            mask: Any = part.mask(CPU)
            assert mask.shape[2] <= segments_module.MASKED_QUERIES
            assert mask.shape[3] < segments_module.MASKED_QUERIES + window
