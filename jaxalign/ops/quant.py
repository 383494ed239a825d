"""Frozen weights in 8 or 4 bits: `quantise` once, `dequantise` where the weight meets activations (`ops.nn`).

A weight f[..., D, O] (D in, O out, any stacked dimensions before) becomes a small dict in its place, with the same leading
dimensions, so that scan, sharding and checkpoints treat it like any other part of the tree:

    int8   {"int8" i8[..., D, O], "scale" f32[..., O]}                symmetric, one scale per output
    nf4    {"nf4" u8[..., D/2, O], "absmax" f32[..., D/block, O]}     QLoRA's 4-bit NormalFloat; rows 2i (high nibble), 2i+1

Blocks run along the input of one output, as in bitsandbytes where D is a multiple of the block; they never straddle two
outputs, so every shape is known from the arrays. Absmax stays f32 (QLoRA's second quantisation of it is not implemented).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import UserError

KINDS = ("bfloat16", "int8", "nf4")
BLOCK = 64

# Dettmers et al. 2023 (2305.14314), appendix E: the quantiles of N(0, 1) that give both signs as many levels as there is
# room for and 0 one of its own, divided by the largest. The test derives them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def block(inputs: int) -> int:
    """Weights per absmax: 64, or the largest divisor of D below it."""
    return next(n for n in range(min(BLOCK, inputs), 0, -1) if inputs % n == 0)


def is_quantised(w) -> bool:
    return isinstance(w, dict) and ("int8" in w or "nf4" in w)


def quantise(w: jax.Array, kind: str):
    """f[..., D, O] -> the node above; "bfloat16" is a cast. Raises UserError for an unknown kind and for nf4 with odd D."""
    if kind == "bfloat16":
        return w.astype(jnp.bfloat16)
    f = w.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.abs(f).max(-2) / 127
        return {"int8": jnp.round(_ratio(f, scale[..., None, :])).astype(jnp.int8), "scale": scale}
    if kind != "nf4":
        raise UserError(f"a base is quantised to {', '.join(KINDS)}, not to {kind!r}")
    *lead, D, O = w.shape
    if D % 2:
        raise UserError(f"nf4 packs two inputs in a byte, and this weight has {D}; use int8 or leave it out")
    n = block(D)
    f = f.reshape(*lead, D // n, n, O)
    absmax = jnp.abs(f).max(-2)
    levels = jnp.asarray(NF4, jnp.float32)
    # The nearest level: how many midpoints between neighbours lie below. Unrolled, so that nothing 15 times the weight exists.
    x, code = _ratio(f, absmax[..., None, :]), jnp.zeros(f.shape, jnp.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:
        code += x > middle
    pairs = code.reshape(*lead, D // 2, 2, O)
    return {"nf4": pairs[..., 0, :] << 4 | pairs[..., 1, :], "absmax": absmax}


def _ratio(x, scale):
    """x / scale; all zeros, which have scale 0, stay zeros."""
    return x / jnp.where(scale > 0, scale, 1)


def shape(w) -> tuple[int, ...]:
    """[..., D, O] of the weight that a node (or an array, or a Spec) stands for."""
    if not is_quantised(w):
        return tuple(w.shape)
    *lead, D, O = (w["int8"] if "int8" in w else w["nf4"]).shape
    return (*lead, D if "int8" in w else 2 * D, O)


def dequantise(w) -> jax.Array:
    """The node's weight, f32[..., D, O]; an array is returned as it is."""
    if not is_quantised(w):
        return w
    if "int8" in w:
        return w["int8"].astype(jnp.float32) * w["scale"][..., None, :]
    *lead, D, O = shape(w)
    codes = jnp.stack([w["nf4"] >> 4, w["nf4"] & 15], -2).reshape(*lead, D, O)
    x = jnp.take(jnp.asarray(NF4, jnp.float32), codes.astype(jnp.int32), mode="clip")
    blocks = w["absmax"].shape[-2]
    return (x.reshape(*lead, blocks, D // blocks, O) * w["absmax"][..., None, :]).reshape(*lead, D, O)
