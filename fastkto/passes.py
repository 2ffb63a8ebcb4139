"""Passes: forwards of a model over some sequences, within a budget of tokens.

A *packed* pass is one row of concatenated sequences whose positions restart, with `Segments` that
say which tokens attend to which: no padding, and a prompt that several completions share is read
once. A *padded* pass, for models that cannot be packed, holds right-padded sequences and no
attention mask: under causal attention a token never sees what stands to its right.

What is scored where is worked out on the CPU from the lengths: there are no boolean masks and no
synchronisation on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkto.data.batch import TokenSequence
from fastkto.data.media import join_media
from fastkto.loss import sum_completions
from fastkto.out_of_memory import naming_pass
from fastkto.plan_passes import Group, Layout, Plan, has_images, pass_facts
from fastkto.segments import Segment, Segments


class Pass(NamedTuple):
    """One forward, scoring `N` tokens of `b` sequences in order.

    In a padded pass a padded position repeats its sequence's last token, so no padding token is
    needed.
    """

    rows: Tensor  # [b] int64, which of the sequences these are
    input_ids: Tensor  # [1, T] packed, else [b, T]; int64
    position_ids: Tensor | None  # [1, T] int64, packed only
    segments: Segments | None  # packed only
    score_row: Tensor  # [N] int64, the row of `input_ids` with the token before the scored one
    score_position: Tensor  # [N] int64, that token's position from the end of its row, -1 the last
    score_target: Tensor  # [N] int64, the token to be predicted there
    offsets: Tensor  # [b + 1] int64, sequence i owns the scores offsets[i]:offsets[i + 1]
    sequence: Tensor  # [N] int64, 0 to b - 1, the sequence of each scored token
    real_tokens: Tensor  # [S] int64, flat positions of the tokens that are no padding
    media: dict[str, Tensor] | None = None  # model inputs with the images, padded only


def build_pass(
    sequences: Sequence[TokenSequence],
    groups: Sequence[Group],
    layout: Layout,
    device: torch.device | None = None,
) -> Pass:
    """The pass over one entry of a plan, on the sequences' device; an idle one on `device`."""
    if not groups:
        return _build_idle(device)
    if layout is Layout.PACKED and not has_images(sequences, groups):
        return _build_packed(sequences, groups)
    return _build_padded(sequences, [row for group in groups for row in group])


def _build_packed(sequences: Sequence[TokenSequence], groups: Sequence[Group]) -> Pass:
    """One row with all `groups`: of each the prompt, then its completions one after the other."""
    tokens, positions, spans, before, order = [], [], [], [], []
    end = 0
    for group in groups:
        prompt = sequences[group[0]].prompt
        start, behind = end, end + len(prompt)  # the prompt is start:behind
        tokens.append(prompt)
        positions.append(torch.arange(len(prompt)))
        end = behind
        for index in group:
            completion = sequences[index].completion
            first, end = end, end + len(completion)
            tokens.append(completion)
            positions.append(torch.arange(len(prompt), len(prompt) + len(completion)))
            spans.append(
                Segment(start, end) if first == behind else Segment(first, end, start, behind)
            )
            before.append(_tokens_before(behind - 1 if len(prompt) else None, first, end))
            order.append(index)
    input_ids = torch.cat(tokens)[None]
    device = input_ids.device
    return _scored_pass(sequences, order, input_ids, before)._replace(
        position_ids=move_index(torch.cat(positions)[None], input_ids),
        segments=Segments(spans, device),
        real_tokens=torch.arange(end, device=device),
    )


def _build_padded(sequences: Sequence[TokenSequence], rows: Sequence[int]) -> Pass:
    """A row for each of the sequences, as long as the longest of them."""
    longest = max(sequences[row].length for row in rows)
    tokens, before, real = [], [], []
    for index, row in enumerate(rows):
        prompt, completion = sequences[row].prompt, sequences[row].completion
        start, length = index * longest, sequences[row].length
        last = completion[-1:] if len(completion) else prompt[-1:]
        tokens += [prompt, completion, last.expand(longest - length)]
        first = start + len(prompt)
        before.append(_tokens_before(first - 1 if len(prompt) else None, first, start + length))
        real.append(torch.arange(start, start + length))
    input_ids = torch.cat(tokens).view(len(rows), longest)
    return _scored_pass(sequences, list(rows), input_ids, before)._replace(
        real_tokens=move_index(torch.cat(real), input_ids),
        media=join_media([sequences[row].media for row in rows], longest, input_ids.device),
    )


def _build_idle(device: torch.device | None) -> Pass:
    """One token that nothing is predicted from: ranks in lockstep take part in others' passes."""
    input_ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    nothing = input_ids.new_empty(0)
    return Pass(
        rows=nothing,
        input_ids=input_ids,
        position_ids=None,
        segments=None,
        score_row=nothing,
        score_position=nothing,
        score_target=nothing,
        offsets=input_ids[0],
        sequence=nothing,
        real_tokens=nothing,
    )


def _tokens_before(prompt_end: int | None, first: int, end: int) -> Tensor:
    """Positions of the tokens from which the completion first:end is predicted.

    Without a prompt nothing stands before its first token, which is then not scored.
    """
    before = torch.arange(first - 1, end - 1)
    if prompt_end is None:
        return before[1:]
    before[:1] = prompt_end
    return before


def _scored_pass(
    sequences: Sequence[TokenSequence],
    order: list[int],
    input_ids: Tensor,  # [b, T]
    before: Sequence[Tensor],  # of each sequence in `order`: flat positions in input_ids
) -> Pass:
    flat = torch.cat(list(before))
    counts = torch.tensor([len(positions) for positions in before])
    length = input_ids.shape[1]
    targets = [
        sequences[index].completion[len(sequences[index].completion) - len(positions) :]
        for index, positions in zip(order, before, strict=True)
    ]
    return Pass(
        rows=move_index(torch.tensor(order), input_ids),
        input_ids=input_ids,
        position_ids=None,
        segments=None,
        score_row=move_index(flat // length, input_ids),
        score_position=move_index(flat % length - length, input_ids),
        score_target=torch.cat(targets),
        offsets=move_index(torch.cat([torch.zeros(1), counts.cumsum(0)]).long(), input_ids),
        sequence=move_index(torch.arange(len(order)).repeat_interleave(counts), input_ids),
        real_tokens=input_ids.new_empty(0),
    )


def move_index(index: Tensor, like: Tensor) -> Tensor:
    """An index made on the CPU, on the device of `like`, without waiting for that device."""
    return index.to(like.device, non_blocking=True)


def run_pass(
    model: nn.Module, pass_: Pass, *, stats: bool = False, router_logits: bool = False
) -> Any:
    """Score a pass with a model prepared by `attach_scoring`: its `ScoredOutput`."""
    extra: dict[str, Any] = dict(pass_.media or {})
    if router_logits:
        extra["output_router_logits"] = True
    if pass_.segments is not None:
        # A mask of four dimensions is taken as ready: without one transformers would read the
        # positions back from the device, and make a mask of [T, T].
        ready = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=pass_.input_ids.device)
        extra |= {
            "position_ids": pass_.position_ids,
            "segments": pass_.segments,
            "attention_mask": ready,
        }
    return model(
        input_ids=pass_.input_ids,
        use_cache=False,
        score_row=pass_.score_row,
        score_position=pass_.score_position,
        score_target=pass_.score_target,
        score_stats=stats,
        **extra,
    )


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    plan: Plan,
    layout: Layout,
    *,
    device: torch.device,
    of: str = "model",
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each completion, in nats: `[B]` fp64 on `device`, without gradient.

    `of` is whose they are, for errors.
    """
    logprob_B = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    for number, groups in enumerate(plan, 1):
        name = f"pass without gradient {number} of {len(plan)} of the {of}"
        with naming_pass(partial(pass_facts, name, sequences, groups, layout)):
            pass_ = build_pass(sequences, groups, layout, device)
            logprob_N = run_pass(model, pass_).logprob
        logprob_b = sum_completions(logprob_N, pass_.offsets, backend=backend)
        logprob_B.index_copy_(0, pass_.rows, logprob_b.to(device))
    return logprob_B
