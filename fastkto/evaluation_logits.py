"""What `compute_metrics` is computed from: full logits, by a forward that nothing else needs."""

from typing import Any

import torch
from torch import Tensor, nn

from fastkto.data.batch import matched_sequences
from fastkto.data.media import join_media
from fastkto.modes import evaluating


def logits_and_tokens(
    model: nn.Module, batch: dict[str, Any], *, max_length: int | None, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """The policy's logits `[B, T, V]` and the tokens `[B, T]` int64, padded on the right, as TRL's.

    Of the matched sequences. All `B * T * V` logits are in memory at once.
    """
    matched = matched_sequences(batch, max_length)
    sequences = [torch.cat([one.prompt, one.completion]) for one in matched]
    input_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(one) for one in sequences], device=input_ids.device)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    attention_mask = (positions < lengths[:, None]).long()
    images = join_media([one.media for one in matched], input_ids.shape[1], input_ids.device)
    with evaluating(model):
        output = model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **images
        )
    return output.logits, input_ids
