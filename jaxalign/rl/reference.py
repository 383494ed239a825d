"""A source that adds the reference model's log-probs to preference pairs."""

from __future__ import annotations

import functools

import jax

from jaxalign import shard
from jaxalign.objectives.preference import pair_logps
from jaxalign.types import Model, Pairs, Source


@functools.partial(jax.jit, static_argnums=0)
def add_reference(model: Model, params, batch: Pairs) -> Pairs:
    """The same pairs with ref_chosen and ref_rejected: sums over the completions, by the training forward."""
    chosen, rejected, *_ = pair_logps(model, params, batch)
    return batch._replace(ref_chosen=chosen, ref_rejected=rejected)


class WithReference:
    """`source` with reference log-probs computed as batches are drawn."""

    def __init__(self, source: Source, model: Model, params, mesh):
        self.source, self.model, self.params, self.mesh = source, model, params, mesh

    def next(self, state):
        return add_reference(self.model, self.params, shard.place(self.source.next(state), self.mesh))

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, d):
        self.source.load_state_dict(d)
