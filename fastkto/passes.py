"""Passes: forwards of a model over some of a batch's sequences, within a budget of tokens.

A pass holds right-padded sequences and no attention mask: under causal attention a token never
sees what stands to its right, so padding cannot reach a real token, and attention keeps its fast
causal kernel. Which positions are scored is worked out on the CPU from the lengths: there is no
boolean mask and no synchronisation on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkto.loss import sum_completions


class Sequences(NamedTuple):
    """Prompt + completion token sequences, one after the other, without padding."""

    input_ids: Tensor  # [S] int64
    prompt_lengths: list[int]
    completion_lengths: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        pairs = zip(self.prompt_lengths, self.completion_lengths, strict=True)
        return [prompt + completion for prompt, completion in pairs]

    def select(self, rows: Sequence[int], longest: int) -> "Sequences":
        """The sequences `rows`, each cut to `longest` tokens."""
        pieces = torch.split(self.input_ids, self.lengths)
        prompts = [min(self.prompt_lengths[row], longest) for row in rows]
        kept = [min(self.lengths[row], longest) for row in rows]
        return Sequences(
            input_ids=torch.cat(
                [pieces[row][:length] for row, length in zip(rows, kept, strict=True)]
            ),
            prompt_lengths=prompts,
            completion_lengths=[
                length - prompt for length, prompt in zip(kept, prompts, strict=True)
            ],
        )


class Pass(NamedTuple):
    """One forward over `b` sequences padded to `T` tokens, scoring `N` of the positions.

    A padded position repeats its sequence's last token, so no padding token is needed.
    """

    rows: Tensor  # [b] int64, which of the sequences these are
    input_ids: Tensor  # [b, T] int64
    score_row: Tensor  # [N] int64, the sequence of each scored position
    score_position: Tensor  # [N] int64, counted from the end of the padded sequence: -1 is the last
    score_target: Tensor  # [N] int64, the token to be predicted there
    offsets: Tensor  # [b + 1] int64, sequence i owns the scores offsets[i]:offsets[i + 1]
    real_tokens: Tensor  # [S] int64, the flat positions of the tokens that are no padding


def matched_sequences(batch: dict[str, Any]) -> Sequences:
    """Each row's prompt with its own completion."""
    return Sequences(batch["input_ids"], batch["prompt_lengths"], batch["completion_lengths"])


def mismatched_sequences(batch: dict[str, Any]) -> Sequences:
    """Each row's prompt with the completion it is paired with; a row without one is left out."""
    matched = matched_sequences(batch)
    starts = _starts(matched.lengths)
    completions = torch.split(batch["kl_completion_ids"], batch["kl_completion_lengths"])
    pieces, prompts, lengths = [], [], []
    for row, completion_ids in enumerate(completions):
        if batch["kl_completion_lengths"][row] == 0:
            continue
        prompt = batch["prompt_lengths"][row]
        pieces += [batch["input_ids"][starts[row] : starts[row] + prompt], completion_ids]
        prompts.append(prompt)
        lengths.append(batch["kl_completion_lengths"][row])
    input_ids = torch.cat(pieces) if pieces else batch["input_ids"][:0]
    return Sequences(input_ids, prompts, lengths)


def plan_passes(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences into passes of at most `max_tokens` padded tokens, the longest first.

    A sequence longer than `max_tokens` is a pass of its own.
    """
    plan: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if plan and (len(plan[-1]) + 1) * longest <= max_tokens:
            plan[-1].append(row)
        else:
            plan.append([row])
            longest = lengths[row]
    return plan


def build_pass(sequences: Sequences, rows: Sequence[int]) -> Pass:
    """The pass over the sequences `rows`."""
    starts = _starts(sequences.lengths)
    lengths = [sequences.lengths[row] for row in rows]
    longest = max(lengths)
    tokens, score_rows, positions, targets, real, counts = [], [], [], [], [], [0]
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens.append(starts[row] + torch.arange(longest).clamp(max=length - 1))
        # The first token of a sequence has nothing before it to be predicted from.
        scored = torch.arange(max(sequences.prompt_lengths[row], 1), length)
        score_rows.append(torch.full_like(scored, index))
        positions.append(scored - 1 - longest)
        targets.append(starts[row] + scored)
        real.append(index * longest + torch.arange(length))
        counts.append(len(scored))

    ids = sequences.input_ids
    return Pass(
        rows=move_index(torch.tensor(rows), ids),
        input_ids=ids[move_index(torch.stack(tokens), ids)],
        score_row=move_index(torch.cat(score_rows), ids),
        score_position=move_index(torch.cat(positions), ids),
        score_target=ids[move_index(torch.cat(targets), ids)],
        offsets=move_index(torch.tensor(counts).cumsum(0), ids),
        real_tokens=move_index(torch.cat(real), ids),
    )


def move_index(index: Tensor, like: Tensor) -> Tensor:
    """An index made on the CPU, on the device of `like`, without waiting for that device."""
    return index.to(like.device, non_blocking=True)


def run_pass(
    model: nn.Module, pass_: Pass, *, stats: bool = False, router_logits: bool = False
) -> Any:
    """Score a pass with a model prepared by `attach_scoring`: its `ScoredOutput`."""
    extra = {"output_router_logits": True} if router_logits else {}
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
    model: nn.Module, sequences: Sequences, max_tokens: int, *, backend: str = "auto"
) -> Tensor:
    """Log-probability of each completion, in nats: `[B]` fp64, without gradient."""
    logprob_B = torch.zeros(
        len(sequences.prompt_lengths), dtype=torch.float64, device=sequences.input_ids.device
    )
    for rows in plan_passes(sequences.lengths, max_tokens):
        pass_ = build_pass(sequences, rows)
        logprob_N = run_pass(model, pass_).logprob
        logprob_b = sum_completions(logprob_N, pass_.offsets, backend=backend)
        logprob_B.index_copy_(0, pass_.rows, logprob_b.to(logprob_B.device))
    return logprob_B


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts
