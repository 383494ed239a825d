"""Model FLOPs per token that a stage trains on: what the mathematics asks for.

Not counted: what remat computes again, padding, sampled tokens that no update reads, heads, the adapters' own products. The
formula of one model is its family's (`flops_per_token`: a forward and a backward pass, three times the forward).
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of one token in rows of `length`."""

    model: Any
    length: int

    def forward(self, unembed: bool = True) -> float:
        """One forward pass; without the unembedding where a scalar head stands in its place."""
        c = self.model.config
        return self.model.flops_per_token(self.length) / 3 - (0.0 if unembed else 2.0 * c.vocab * c.dim)

    def training(self, adapted: bool = False, unembed: bool = True) -> float:
        """Forward, and backward to activations and to weights: three times a forward. Under adapters the gradient of the frozen
        weights is nobody's wish: twice."""
        return (2 if adapted else 3) * self.forward(unembed)

    def online(self, adapted: bool, epochs: int, *, critic: bool, rewards: int, reference: bool = True) -> float:
        """Reinforcement learning: every sampled token is trained on `epochs` times, and once sampled, read by the policy for its
        old log-prob, by the reference, by each of `rewards` learned rewards, and by the critic where that is a network of
        its own (which is then trained too)."""
        update = self.training(adapted) + (self.training(adapted, unembed=False) if critic else 0.0)
        once = (2 + reference) * self.forward() + (rewards + critic) * self.forward(unembed=False)
        return update + once / epochs


def of(model: Any, length: int) -> Flops | None:
    """None where the model has no formula."""
    return Flops(model, length) if length and hasattr(model, "flops_per_token") and hasattr(model.config, "dim") else None
