"""Scalar heads: a reward or value network is a trunk with one linear output, params {"trunk": ..., "head": ...}."""

from __future__ import annotations

import dataclasses

import jax

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
