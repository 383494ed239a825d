"""KL coefficients: small pure functions of what was observed."""

from __future__ import annotations

import dataclasses

from jaxalign.types import UserError


@dataclasses.dataclass(frozen=True)
class KL:
    """target None: beta stays. Otherwise the adaptive controller of Ziegler et al. 1909.08593, section 2.2."""

    beta: float = 0.05
    target: float | None = None  # nats per sequence
    horizon: float = 10000.0  # episodes

    def __post_init__(self):
        if not (self.beta >= 0 and self.horizon > 0 and (self.target is None or self.target > 0)):
            raise UserError(f"kl needs beta >= 0, horizon > 0 and target > 0 or None, got {self}")

    def update(self, beta: float, observed: float, episodes: int) -> float:
        """beta (1 + clip(observed/target - 1, -0.2, 0.2) episodes / horizon); observed is the mean sequence KL (k1)."""
        if self.target is None:
            return beta
        error = min(max(observed / self.target - 1, -0.2), 0.2)
        return beta * (1 + error * episodes / self.horizon)
