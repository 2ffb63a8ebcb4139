"""How much memory a call of `linear_logprob` needs beside its inputs and what it returns.

With N tokens, D hidden size, V vocabulary, and a tile of R x C logits from `tiles.tile_shape`; s is
the bytes of a number in the compute dtype (on a CPU products are fp32, and the tile its own result):

    tile          R * C * bytes per logit                      all passes; within `head_memory_mib`
    conversions   R * D * s  and  C * D * s                    where a dtype is not the products'
    rows          64 * N                                       state and scores of each token
    sweep         R * D * 4 + R * D * (4 + s)                  frozen head: fp32 sums, target's rows
    backward      R * D * (4 + s)                              trainable weight: scaled hidden states
                  4 * R * D, 4 * N * D, 4 * C * D or 4 * V * D  fp32 sums of 16-bit gradients

What is kept from forward to backward comes on top: N * D * s with a frozen head, in place of the
hidden states, which autograd need not keep; nothing with a trainable one, where it keeps them.
"""
