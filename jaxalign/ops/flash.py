"""FlashAttention on GPUs with packed segments inside the kernel (JAX's Pallas kernel, lowered through Triton; Dao 2023, 2307.08691).

cuDNN's kernels, through `jax.nn.dot_product_attention`, know rows of one segment each and nothing of packed ones: a mask would
become a bias of T x T. This one reads segment ids. It knows neither windows nor a soft cap, and one key head per query head.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp

from jaxalign import shard

# Queries and keys per block, forward and backward; rows are a multiple of it.
BLOCK = 64


def fits(q, k, window, softcap) -> bool:
    """16-bit rows of queries and keys of one length, in whole blocks; heads of a width that a tile has."""
    T, H = q.shape[1], q.shape[-1]
    return shard.platform() == "gpu" and q.dtype.itemsize == 2 and T == k.shape[1] and T % BLOCK == 0 and H in (16, 32, 64, 128) and window is None and softcap is None


def attend(q, k, v, segments, *, causal: bool, interpret: bool = False) -> jax.Array:
    """q [B,T,N,H], already scaled, k and v [B,T,K,H], segments i32[B,T] of both -> [B,T,N,H]. Padding sees padding, which harms nobody."""
    with warnings.catch_warnings():  # newer releases point to a package whose kernels take no segments
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernel

    b = BLOCK
    blocks = kernel.BlockSizes(block_q=b, block_k=b, block_q_dkv=b, block_kv_dkv=b, block_q_dq=b, block_kv_dq=b)

    def run(pieces, q, k, v, segments):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
        return kernel.mha(q, k, v, segments, 1.0, causal, blocks, interpret=interpret)

    heads = "batch . heads ."
    return shard.local(run, heads, heads, heads, "batch .", out=heads)(q, k, v, segments)
