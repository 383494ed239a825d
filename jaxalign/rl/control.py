"""KL coefficients and scales of scores: small pure functions of what was observed."""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.types import UserError


def ziegler(beta: float, error: float, episodes: int, horizon: float) -> float:
    """beta (1 + error episodes / horizon) (1909.08593, section 2.2, and lm-human-preferences).

    An error of -0.2 at five horizons of episodes or more would make that zero or negative, a reward for going away; so many are a
    UserError, whatever the error is. Deviation: lm-human-preferences does not look.
    """
    if beta and episodes >= 5 * horizon:
        raise UserError(f"rl.horizon {horizon:g}: a rollout of {episodes} episodes is five horizons or more, and rl.beta could turn negative; set rl.horizon above {episodes / 5:g}, or a smaller data.batch_size")
    return beta * (1 + error * episodes / horizon)


def rl4lms(beta: float, error: float, episodes: int, horizon: float) -> float:
    """beta (1 + 0.1 error), once a rollout whatever its size (RL4LMs, 2210.01241)."""
    return beta * (1 + 0.1 * error)


# name -> (what is compared with the target, what its error does to beta)
CONTROLLERS: dict[str, tuple[str, Callable]] = {
    "ziegler": ("objective/kl", ziegler),  # of a sequence, k1
    "trlx": ("objective/kl_k3", ziegler),  # of a sequence, k3
    "rl4lms": ("objective/kl_per_token", rl4lms),
}


@dataclasses.dataclass(frozen=True)
class KL:
    """target None: beta stays. Otherwise it follows a controller, a key of CONTROLLERS, which `target` is in the units of."""

    beta: float = 0.05
    target: float | None = None  # nats, per sequence (rl4lms: per token)
    horizon: float = 10000.0  # episodes, more than a fifth of a rollout's
    controller: str = "ziegler"

    def __post_init__(self):
        if not (self.beta >= 0 and self.horizon > 0 and (self.target is None or self.target > 0)):
            raise UserError(f"kl needs beta >= 0, horizon > 0 and target > 0 or None, got {self}")
        if self.controller not in CONTROLLERS:
            raise UserError(f"rl.controller {self.controller!r} is unknown; it is one of {', '.join(CONTROLLERS)}")

    def observed(self, metrics: Mapping[str, float]) -> float:
        """Of a rollout's metrics the one that the target is compared with."""
        return metrics.get(CONTROLLERS[self.controller][0], 0.0)

    def update(self, beta: float, observed: float, episodes: int) -> float:
        """beta after a rollout: its controller's, of clip(observed / target - 1, -0.2, 0.2)."""
        if self.target is None:
            return beta
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        return CONTROLLERS[self.controller][1](beta, error, episodes, self.horizon)


# -- scores divided by how much they vary ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of all that was seen (Chan et al. 1979; trlX and TRL start with a count of 1e-24, so that the first
    batch alone decides)."""

    mean: float = 0.0
    var: float = 1.0  # of the population
    count: float = 1e-24

    def update(self, mean: float, var: float, n: float) -> Moments:
        """With n more of these moments."""
        delta, total = mean - self.mean, self.count + n
        square = self.var * self.count + var * n + delta**2 * self.count * n / total
        return Moments(self.mean + delta * n / total, square / total, total)

    @property
    def std(self) -> float:
        """Bessel-corrected."""
        return math.sqrt(self.var * self.count / (self.count - 1)) if self.count > 1 else 0.0


@jax.jit
def _seen(scores):
    ok = ~jnp.isnan(scores)
    n = ok.sum()
    mean = jnp.where(ok, scores, 0).sum() / jnp.maximum(n, 1)
    return mean, (jnp.where(ok, scores - mean, 0) ** 2).sum() / jnp.maximum(n, 1), n


SCORE_SCALES = ("none", "running", "first")


class ScoreScale:
    """What the scores of a rollout are divided by (trlX's scale_reward): "running", the standard deviation of all scores up to
    and with this rollout's; "first", that of the first rollout. 1 where scores do not vary.

    `adjust(scores, truncated)` is done to scores before they are counted: they are clipped first, then scaled.
    """

    def __init__(self, kind: str, adjust: Callable = lambda scores, truncated: scores):
        if kind not in SCORE_SCALES[1:]:
            raise UserError(f"rl.scale_score {kind!r} is unknown; it is one of {', '.join(SCORE_SCALES)}")
        self.kind, self.adjust, self.moments = kind, adjust, Moments()

    def __call__(self, scores: jax.Array, truncated: jax.Array) -> float:
        if self.kind == "running" or self.moments.count < 1:
            mean, var, n = (float(shard.to_host(x)) for x in _seen(self.adjust(scores, truncated)))
            self.moments = self.moments.update(mean, var, n)
        return self.moments.std if self.moments.std > 1e-8 else 1.0

    def state_dict(self) -> dict:
        return dataclasses.asdict(self.moments)

    def load_state_dict(self, d: dict) -> None:
        self.moments = Moments(**d)
