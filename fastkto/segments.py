"""Segments: which tokens of a packed row, a row of concatenated sequences, attend to which.

A segment's tokens attend to those before them in the segment and, where completions share a prompt,
to that prompt: in the row `x y y'` the first segment is `x y`, and the second one, `y'`, has the
prefix `x`. Positions count from the start of the prefix, so `y'` is where it would be in `x y'`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# Queries that share one mask: the mask of a whole segment would grow with the square of its length.
MASKED_QUERIES = 1024


class Segment(NamedTuple):
    """Tokens start:end of a row; they also attend to the tokens prefix_start:prefix_end."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def prefix(self) -> int:
        """Tokens of the prefix."""
        return self.prefix_end - self.prefix_start


class LayerCall(NamedTuple):
    """What a layer's attention was called with."""

    window: int | None  # of sliding attention, in tokens
    dtype: torch.dtype  # of the values, which is autocast's where that is on
    has_mask: bool  # the layer made a mask, which segments do not know


class Part(NamedTuple):
    """Some queries of a segment, with the keys that any of them attends to.

    Queries and keys are positions in the segment, prefix included: query_start:query_end attend to
    key_start:query_end.
    """

    segment: Segment
    query_start: int
    query_end: int
    key_start: int
    window: int | None
    is_masked: bool  # False: plain causal attention, queries and keys are the same tokens

    def queries(self, states: Tensor) -> Tensor:
        """Those of a row's [1, H, T, D]."""
        shift = self.segment.start - self.segment.prefix
        return states[:, :, self.query_start + shift : self.query_end + shift]

    def keys(self, states: Tensor) -> Tensor:
        """Keys or values of a row's [1, H, T, D]."""
        segment = self.segment
        shift = segment.start - segment.prefix
        own = states[:, :, max(self.key_start, segment.prefix) + shift : self.query_end + shift]
        if self.key_start >= segment.prefix:
            return own
        first = segment.prefix_start + self.key_start
        return torch.cat([states[:, :, first : segment.prefix_end], own], 2)

    def mask(self, device: torch.device) -> Tensor | None:
        """True where a query attends to a key, [1, 1, Q, K]."""
        if not self.is_masked:
            return None
        query = torch.arange(self.query_start, self.query_end, device=device)[:, None]
        key = torch.arange(self.key_start, self.query_end, device=device)
        attends = key <= query
        if self.window is not None:
            attends = attends & (query - key < self.window)
        return attends[None, None]


class Segments:
    """The segments of one packed row of `T` tokens, on the CPU and as kernels want them.

    No dataclass: FSDP2 copies those that pass it, and layers would then share nothing.
    """

    def __init__(self, spans: Sequence[Segment], device: torch.device) -> None:
        """`spans` follow one another without a gap, from token 0 on."""
        queries = [span.end - span.start for span in spans]
        keys = [count + span.prefix for count, span in zip(queries, spans, strict=True)]
        self.spans = list(spans)
        self.queries_before = _cumulative(queries, device)  # [S + 1] int32
        self.keys_before = _cumulative(keys, device)  # [S + 1] int32
        self.most_queries, self.most_keys = max(queries), max(keys)
        # [K] int64, every segment's keys in turn; None: they are the queries
        self.key_index: Tensor | None = None
        if queries != keys:
            ranges = [r for s in spans for r in ((s.prefix_start, s.prefix_end), (s.start, s.end))]
            index = torch.cat([torch.arange(*bounds) for bounds in ranges])
            self.key_index = index.to(device, non_blocking=True)
        self.calls: list[LayerCall] = []  # by the layers, in turn
        self._block_masks: dict[int | None, BlockMask] = {}

    def parts(self, window: int | None, *, always_masked: bool) -> Iterator[Part]:
        """All queries in order, in parts that need no mask or a small one."""
        for span in self.spans:
            start, end = span.prefix, span.prefix + span.end - span.start
            slides = window is not None and end > window
            if not (slides or start > 0 or always_masked):
                yield Part(span, 0, end, 0, None, False)
                continue
            for first in range(start, end, MASKED_QUERIES):
                last = min(first + MASKED_QUERIES, end)
                key_start = max(0, first - window + 1) if slides and window is not None else 0
                yield Part(span, first, last, key_start, window if slides else None, True)

    def gather_keys(self, states: Tensor) -> Tensor:
        """Every segment's keys (or values) in turn, [1, H, K, D], of a row's [1, H, T, D]."""
        return states if self.key_index is None else states.index_select(2, self.key_index)

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """FlexAttention's mask, made once for all layers with the same window."""
        if window not in self._block_masks:
            self._block_masks[window] = self._make_block_mask(window, device)
        return self._block_masks[window]

    def _make_block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        columns = []
        for number, span in enumerate(self.spans):
            tokens = torch.arange(span.start, span.end)
            position = tokens - span.start + span.prefix
            rest = [
                torch.full_like(tokens, n) for n in (number, span.prefix_start, span.prefix_end)
            ]
            columns.append(torch.stack([position, *rest]))
        position, number_, first, last = torch.cat(columns, 1).to(device, non_blocking=True)

        def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_prefix = (first[query] <= key) & (key < last[query])
            seen = (number_[query] == number_[key]) | in_prefix
            seen = seen & (position[key] <= position[query])
            return seen if window is None else seen & (position[query] - position[key] < window)

        length = self.spans[-1].end
        # Without compilation it would hold [T, T] entries.
        compiled = device.type == "cuda"
        return create_block_mask(
            attends, None, None, length, length, device=device, _compile=compiled
        )


def _cumulative(counts: list[int], device: torch.device) -> Tensor:
    total = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return total.to(device, non_blocking=True)
