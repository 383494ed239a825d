"""Adam whose moments take a byte each (Dettmers et al. 2021, 2110.02861), as an optax transformation.

Each block of up to 256 numbers of a row shares one f32 scale, its largest magnitude s, so that an outlier costs its block
alone (section 2.1). A number x in it is the code

    first moment    sign(x) sqrt(|x| / s) * 127     in -127 ... 127
    second moment   (x / s)^(1/4) * 255             in    0 ... 255

Where we deviate from the paper:

- Roots in place of its dynamic tree: like that they spend codes on small numbers, down to 6e-5 s and 2e-10 s, and reading
  them is a product, not a look-up. The square root of the second moment, which divides, is then off by at most 2/c of itself
  at code c.
- Codes are rounded up or down by turns. With b2 = 0.999 a moment moves by a thousandth per step, less than half a code, and
  rounded to the nearest it would never fall. Up when the code's fraction exceeds an offset that runs through [0, 1) evenly
  over steps (the golden ratio's multiples): right on average, like random rounding, without randomness.
- A second moment that is not 0 has at least code 1: no small gradient is ever divided by nothing.

Leaves of fewer than 4096 numbers (norms, biases) stay in f32, as the paper has it (section 2.3, of all small tensors in its code).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.types import Tree

BLOCK, SMALL = 256, 4096
GOLDEN = 2654435769  # 2^32 / golden ratio, odd: its multiples mod 2^32 are even over the whole range


class Adam8bitState(NamedTuple):
    """Every tree has the structure of the params; codes their shapes too, so that they are sharded alike."""

    count: jax.Array  # i32[]; updates done
    mu: Tree  # i8, or f32 of small leaves
    nu: Tree  # u8, or f32
    mu_scale: Tree  # f32[..., blocks of a row], or [0]
    nu_scale: Tree


def block(width: int) -> int:
    """The length of the blocks of a row: the largest divisor from 64 to 256, or the whole row where it has none."""
    return next((b for b in range(BLOCK, 63, -1) if width % b == 0), width)


def _blocks(x: jax.Array) -> jax.Array:
    b = block(x.shape[-1])
    return x.reshape(*x.shape[:-1], x.shape[-1] // b, b)


def encode(x: jax.Array, step: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    """f32[..., D] -> (codes i8 or u8[..., D], scales f32[..., blocks]). `step` turns the rounding."""
    blocks = _blocks(x)
    scale = jnp.abs(blocks).max(-1)
    unit = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1)[..., None]
    y = (jnp.sqrt(unit) * 127 if signed else jnp.sqrt(jnp.sqrt(unit)) * 255).reshape(x.shape)
    place = sum((jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * np.uint32(2246822519 + 2 * d) for d in range(x.ndim)), step.astype(jnp.uint32) * np.uint32(GOLDEN))
    code = jnp.floor(y + (place >> 8).astype(jnp.float32) / 2**24)
    code = jnp.minimum(code, 127 if signed else 255)
    return ((jnp.sign(x) * code).astype(jnp.int8) if signed else jnp.where(x > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8)), scale


def decode(code: jax.Array, scale: jax.Array) -> jax.Array:
    """The inverse of `encode`, up to its rounding."""
    signed = code.dtype == jnp.int8
    unit = code.astype(jnp.float32) / (127 if signed else 255)
    power = unit * jnp.abs(unit) if signed else jnp.square(jnp.square(unit))
    return (_blocks(power) * scale[..., None]).reshape(code.shape)


def scale_by_adam8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`; the update is computed in f32 from the moments before they are rounded."""

    def init(params):
        small = lambda p: p.size < SMALL
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32 if small(p) else dtype), params)
        scale = lambda: jax.tree.map(lambda p: jnp.zeros((0,) if small(p) else (*p.shape[:-1], p.shape[-1] // block(p.shape[-1])), jnp.float32), params)
        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8), scale(), scale())

    def update(grads, state, params=None):
        count = state.count + 1

        def moved(code, scale, g, b, signed):
            whole = code.dtype == jnp.float32
            new = b * (code if whole else decode(code, scale)) + (1 - b) * g
            return (new, new, scale) if whole else (new, *encode(new, count, signed))

        def one(g, m, v, ms, vs):
            g = g.astype(jnp.float32)
            mu, m, ms = moved(m, ms, g, b1, True)
            nu, v, vs = moved(v, vs, g * g, b2, False)
            return (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps), m, v, ms, vs

        out = jax.tree.map(one, grads, state.mu, state.nu, state.mu_scale, state.nu_scale)
        step, *rest = (jax.tree.map(lambda _, o: o[i], grads, out) for i in range(5))
        return step, Adam8bitState(count, *rest)

    return optax.GradientTransformation(init, update)
