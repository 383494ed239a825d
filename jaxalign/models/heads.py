"""Heads on a trunk's features: one number (reward, value), or the Q values of every token with a value beside them (ILQL)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign.ops import nn
from jaxalign.ops.logprob import next_logits
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
    """D -> 2D -> out with a ReLU, as ILQL's authors and trlX have it, drawn with the variance of their Linear layers. Tokens that the
    data never takes keep what Q they were drawn with, but for the conservative loss: it had better be small."""
    draw = lambda n: nn.normal((3 * n) ** -0.5)
    return {
        "up": {"w": Spec((dim, 2 * dim), ("embed", "mlp"), draw(dim)), "b": Spec((2 * dim,), ("mlp",))},
        "down": {"w": Spec((2 * dim, out), ("mlp", "vocab" if out > 1 else None), draw(2 * dim)), "b": Spec((out,), (None,))},
    }


def mlp_specs(dim: int) -> dict:
    """A value head with a hidden layer, D -> 2D -> 1, as trlX's PPO has it; read by `nn.scalar`."""
    return _mlp(dim, 1)


def q_and_v_specs(dim: int, vocab: int, twins: int = 2) -> dict:
    """Specs of `twins` Q heads, whose minimum is taken against overestimation (Fujimoto et al. 2018, 1802.09477), and of a
    value head (Snell et al. 2022, 2206.11871, section 4). Targets are one more tree of the Q heads. twins 0: the value head alone."""
    return {**({"q": {str(i): _mlp(dim, vocab) for i in range(twins)}} if twins else {}), "v": _mlp(dim, 1)}


def _inner(p, x) -> jax.Array:
    return jax.nn.relu(nn.linear(x.astype(nn.wide(x)), p["up"]["w"], p["up"]["b"]))


def q_values(params, x: jax.Array) -> jax.Array:
    """The Q heads' part of the params, f[...,D] -> f32[twins,...,V]: at t, the value of each token as the next. All of the
    vocabulary at once: losses go through `Guided.q` and `ops.logprob` instead."""
    return jnp.stack([nn.linear(_inner(params[k], x), params[k]["down"]["w"], params[k]["down"]["b"]) for k in sorted(params)])


def v_values(params, x: jax.Array) -> jax.Array:
    """The value head's part, f[...,D] -> f32[...]: at t, after the tokens up to and with t."""
    return nn.linear(_inner(params, x), params["down"]["w"], params["down"]["b"])[..., 0]


@dataclasses.dataclass(frozen=True)
class Guided:
    """A policy with Q heads and a value head on its trunk, params {"trunk", "q", "v"}, which draws its tokens from

        softmax(log softmax(logits) + beta min(min_i Q_i - V, clip))

    ("perturbed" decoding, Snell et al. 2022, 2206.11871; clip: the authors' adv_clip). beta 0 is the trunk alone. A
    `types.Model`: whatever samples, samples from it. With twins 0 it has no Q heads, and is the trunk.
    """

    trunk: Model
    twins: int = 2
    beta: float = 1.0
    clip: float | None = None

    @property
    def config(self):
        return self.trunk.config

    @property
    def positions(self):
        return getattr(self.trunk, "positions", None)

    @property
    def start(self):
        return getattr(self.trunk, "start", None)

    def specs(self):
        return {"trunk": self.trunk.specs(), **q_and_v_specs(self.trunk.config.dim, self.trunk.config.vocab, self.twins)}

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        return self.trunk.hidden(params["trunk"], tokens, segments, positions, inputs=inputs, cache=cache, key=key)

    def unembed(self, params):
        """Of the policy that the trunk is, without its heads' advice."""
        return self.trunk.unembed(params["trunk"])

    def init_cache(self, batch, size):
        return self.trunk.init_cache(batch, size)

    def q(self, params, x) -> list[tuple[jax.Array, nn.Unembed]]:
        """The Q heads' part of the params, f[...,D] -> of each, its inner layer f32[...,2D] and what makes Q of it, in the form
        that `ops.logprob` walks over in chunks."""
        return [(_inner(p, x), nn.Unembed(p["down"]["w"].T, p["down"]["b"])) for _, p in sorted(params.items())]

    def v(self, params, x) -> jax.Array:
        return v_values(params, x)

    def next_logits(self, params, x) -> jax.Array:
        """f[B,D] -> f32[V,B]: what the next token is drawn from."""
        z = next_logits(x, self.unembed(params))
        if not self.twins:
            return z
        q = functools.reduce(jnp.minimum, [next_logits(h, u) for h, u in self.q(params["q"], x)])
        advantage = q - self.v(params["v"], x)
        advantage = advantage if self.clip is None else jnp.minimum(advantage, self.clip)
        return z - jax.nn.logsumexp(z, 0) + self.beta * advantage
