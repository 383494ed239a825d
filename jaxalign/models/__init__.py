"""A family is a module (Config, specs, hidden, unembed, init_cache); a model is a family at a config."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign.ops import nn


@dataclasses.dataclass(frozen=True)
class FamilyModel:
    """`types.Model` made of a family module and its config. Equal configs are equal models: no recompilation."""

    family: Any
    config: Any

    @property
    def positions(self) -> int | None:
        """How many positions it knows; None where they are not learned."""
        return getattr(self.family, "positions", lambda config: None)(self.config)

    def specs(self):
        return self.family.specs(self.config)

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        return self.family.hidden(self.config, params, tokens, segments, positions, inputs=inputs, cache=cache, key=key)

    def unembed(self, params):
        """An adapted or quantised unembedding is made dense here: `ops.logprob` reads its rows many times."""
        u = self.family.unembed(self.config, params)
        return u.replace(weight=nn.weight(u.weight))

    def init_cache(self, batch, size):
        return self.family.init_cache(self.config, batch, size)

    def flops_per_token(self, length):
        return self.family.flops_per_token(self.config, length)

