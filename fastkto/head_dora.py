"""What a DoRA adapter on the output head multiplies each logit by, without a merged weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkto_kernels.tiles import spans


def dora_factor(
    magnitude: Tensor,  # [V]
    weight: Tensor,  # [V, D]
    down: Tensor,  # [E, D]
    up: Tensor,  # [V, E]
    *,
    scaling: float,
    memory_bytes: int,
) -> Tensor:
    """magnitude / |weight + scaling * up @ down|, [V] fp32, with the Euclidean norm of each row.

    The norm is a constant, as in peft: gradients reach the magnitude alone (arXiv:2402.09353,
    section 4.3). It is of fp32 numbers, for some rows at a time within memory_bytes.
    """
    device_type = weight.device.type
    norm = torch.empty_like(magnitude, dtype=torch.float32, requires_grad=False)
    rows_at_once = max(memory_bytes // (8 * weight.shape[1]), 1)  # widened, and merged
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        down = down.float()
        for start, end in spans(weight.shape[0], rows_at_once):
            merged = torch.addmm(
                weight[start:end].float(), up[start:end].float(), down, alpha=scaling
            )
            torch.linalg.vector_norm(merged, dim=1, out=norm[start:end])
    return magnitude.float() / norm
