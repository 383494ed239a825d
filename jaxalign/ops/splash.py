"""Pallas splash attention on TPUs: blocks of scores that never leave the chip, packed segments, windows, soft cap and grouped
heads inside the kernel, and its own backward pass (the kernel is JAX's; FlashAttention-2, Dao 2023, 2307.08691).

Each device runs it on its own rows and heads: a kernel is opaque to XLA, which could not cut it.
"""

from __future__ import annotations

import jax

from jaxalign import shard

# The largest that divides the row. Of 512 x 512 a block of scores is 1 MiB in f32.
BLOCKS = (512, 256, 128)
# The one backward kernel writes a dq per block of keys, to be summed; from here on two kernels are smaller and as fast.
FUSED_BLOCKS = 4


def fits(T: int, S: int, H: int) -> bool:
    """Rows of queries and keys of one length, in lanes of 128; heads of whole sublanes."""
    return shard.platform() == "tpu" and T == S and T % BLOCKS[-1] == 0 and H % 8 == 0


def attend(q, k, v, q_segments, kv_segments, *, causal: bool, window: int | None, softcap: float | None, interpret: bool = False) -> jax.Array:
    """q [B,T,N,H], already scaled, k and v [B,T,K,H], segments i32[B,T] -> [B,T,N,H]. Padding sees padding, which harms nobody."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = q.shape[1]
    size = next(b for b in BLOCKS if T % b == 0)
    fused = T <= FUSED_BLOCKS * size
    blocks = kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, use_fused_bwd_kernel=fused, **({} if fused else {"block_q_dq": size, "block_kv_dq": size})
    )  # fmt: skip
    if window is not None:
        mask = masks.LocalMask((T, T), (window - 1, 0 if causal else None), 0)
    else:
        mask = masks.CausalMask((T, T)) if causal else masks.FullMask((T, T))

    def run(pieces, q, k, v, q_segments, kv_segments):
        many = masks.MultiHeadMask([mask] * q.shape[1])
        one = kernel.make_splash_mha(many, block_sizes=blocks, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap, interpret=interpret)
        return jax.vmap(lambda q, k, v, a, b: one(q, k, v, segment_ids=kernel.SegmentIds(a, b)))(q, k, v, q_segments, kv_segments)

    heads, rows = "batch heads . .", "batch ."
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return shard.local(run, heads, heads, heads, rows, rows, out=heads)(q, k, v, q_segments, kv_segments).swapaxes(1, 2)
