"""Heads on a trunk's features: one number (reward, value), or the Q values of every token with a value beside them (ILQL)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign.ops import nn
from jaxalign.ops.nn import Spec
from jaxalign.types import Model


def specs(dim: int, zero: bool = False):
    """A head on D features. Rewards start at N(0, 1/(D+1)) (Ziegler et al. 1909.08593, code), values at 0."""
    return {"weight": Spec((dim,), (None,), nn.zeros if zero else nn.normal((dim + 1) ** -0.5)), "bias": Spec((), ())}


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A network that gives one number per position. `scores` are unshifted: at t it has read tokens up to and with t."""

    trunk: Model
    zero: bool = False  # start the head at 0 (value networks)

    @property
    def config(self):
        return self.trunk.config

    def specs(self):
        return {"trunk": self.trunk.specs(), "head": specs(self.trunk.config.dim, self.zero)}

    def scores(self, params, tokens, segments, positions) -> jax.Array:
        """i32[B,T] -> f32[B,T]."""
        return nn.scalar(params["head"], self.trunk.hidden(params["trunk"], tokens, segments, positions).x)

    def reward(self, params, tokens, segments, positions) -> jax.Array:
        """The score of whole rows, read at the last token, or where the family's `pool` looks (BERT: the first). -> f32[B]"""
        if pool := getattr(getattr(self.trunk, "family", None), "pool", None):
            x = self.trunk.hidden(params["trunk"], tokens, segments, positions).x
            return nn.scalar(params["head"], pool(self.trunk.config, params["trunk"], x, segments))
        return nn.last(self.scores(params, tokens, segments, positions), segments)


# -- Q and V heads of ILQL ------------------------------------------------------------------------------------------


def _mlp(dim: int, out: int) -> dict:
    """D -> 2D -> out with a ReLU, as ILQL's authors and trlX have it."""
    draw = lambda n: nn.normal(n**-0.5)
    return {
        "up": {"w": Spec((dim, 2 * dim), ("embed", "mlp"), draw(dim)), "b": Spec((2 * dim,), ("mlp",))},
        "down": {"w": Spec((2 * dim, out), ("mlp", "vocab" if out > 1 else None), draw(2 * dim)), "b": Spec((out,), (None,))},
    }


def q_and_v_specs(dim: int, vocab: int, twins: int = 2) -> dict:
    """Specs of `twins` Q heads, whose minimum is taken against overestimation (Fujimoto et al. 2018, 1802.09477), and of a
    value head (Snell et al. 2022, 2206.11871, section 4). Targets are one more tree of the Q heads."""
    return {"q": {str(i): _mlp(dim, vocab) for i in range(twins)}, "v": _mlp(dim, 1)}


def _out(p, x) -> jax.Array:
    h = jax.nn.relu(nn.linear(x.astype(nn.wide(x)), p["up"]["w"], p["up"]["b"]))
    return nn.linear(h, p["down"]["w"], p["down"]["b"])


def q_values(params, x: jax.Array) -> jax.Array:
    """The Q heads' part of the params, f[...,D] -> f32[twins,...,V]: at t, the value of each token as the next."""
    return jnp.stack([_out(params[k], x) for k in sorted(params)])


def v_values(params, x: jax.Array) -> jax.Array:
    """The value head's part, f[...,D] -> f32[...]: at t, after the tokens up to and with t."""
    return _out(params, x)[..., 0]


def polyak(target, online, rate: float):
    """target + rate (online - target), leaf by leaf: how the target Q heads follow."""
    return jax.tree.map(lambda t, o: t + rate * (o - t), target, online)
