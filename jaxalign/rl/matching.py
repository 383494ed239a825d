"""A source that weighs answers by how usual their prompts are among those of good ones (`Objective.weights`)."""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.data.sources import Offline, eval_batches
from jaxalign.types import Labelled, Model, Source, Tokens, Tree, UserError

ENOUGH = 4096  # rows that the classifiers learn from, about: every k-th batch of the set
BLOCKS = 8  # pieces of the rows of a kind, by turns of one half and of the other


@functools.partial(jax.jit, static_argnums=0)
def embeddings(model: Model, params: Tree, rows: Tokens) -> jax.Array:
    """f32[B,D]: the mean of a model's hidden states over each row's prompt, which has not seen the answer; of an encoder-decoder the
    state of the token that the decoder starts with. 0 where there is no prompt."""
    x = model.hidden(params, rows.tokens, rows.segments, rows.positions).x.astype(jnp.float32)
    prompt = ((rows.segments > 0) & (jnp.cumsum(rows.mask, 1) == 0)).astype(jnp.float32)
    if getattr(model, "start", None) is not None:
        prompt = prompt * jnp.pad(rows.mask[:, 1:], ((0, 0), (0, 1)))
    return jnp.einsum("btd,bt->bd", x, prompt) / jnp.maximum(prompt.sum(1, keepdims=True), 1)


def halves(good) -> np.ndarray:
    """Which half each row is of, 0 or 1, of good bool[n]: each is weighed by what the other taught, for a classifier of as many dimensions as a
    model has tells the very rows apart that it has learned from, where there is nothing to tell. Good rows and bad ones are cut each for
    themselves, so that both halves have both in a file of any order; in pieces, so that the answers to a prompt mostly stay together."""
    half = np.zeros(len(good), int)
    for kind in (good, ~good):
        n = int(kind.sum())
        half[kind] = np.arange(n) * min(BLOCKS, n) // max(n, 1) % 2
    return half


class Weighted:
    """`source` of `Labelled`, which draws from `items`, with the weights of its rows: 1 of good ones, of bad ones what `fit(embeddings,
    good)`, of the other half of the set, makes of their prompts' `embeddings` by the reference. Computed once, before the first batch, of
    every row of the set; the same after a restart. The reference's weights are let go after that."""

    def __init__(self, source: Source, items: Offline, model: Model, params: Tree, mesh, fit: Callable):
        self.source, self.items, self.model, self.params, self.mesh, self.fit = source, items, model, params, mesh, fit
        self.weights: np.ndarray | None = None  # f32[items]
        self._events: list[dict] = []

    def next(self, state):
        if self.weights is None:
            self.weights, self.params = self._computed(), None
        at = self.items.indices(self.items.state_dict()["batch"])
        return self.source.next(state)._replace(weight=np.where(at < 0, 0, self.weights[at]).astype(np.float32))

    def _computed(self) -> np.ndarray:
        step = max(1, self.items.size // ENOUGH)

        def embedded(batch: Labelled):
            """(embeddings, good) of the rows of a batch."""
            batch = shard.place(batch, self.mesh)
            real = shard.to_host(batch.rows.segments.any(1))
            return shard.to_host(embeddings(self.model, self.params, batch.rows))[real], shard.to_host(batch.label)[real] > 0

        def ratio(x, half):
            return np.where(half == 0, *(f(x) for f in fits))

        with jax.set_mesh(self.mesh):
            kept = {i: embedded(b) for i, b in enumerate(eval_batches(self.items)) if i % step == 0}
            x, good = (np.concatenate(v) for v in zip(*kept.values()))
            if not 2 <= good.sum() <= len(good) - 2:
                raise UserError(f"of the {len(good)} labels {good.sum()} are good: matching the prompts of good and of bad answers needs two of each kind, and better many; take bco, or kto")
            half = halves(good)
            fits = [self.fit(x[half != h], good[half != h]) for h in (0, 1)]
            taught = dict(zip(kept, np.split(half, np.cumsum([len(g) for _, g in kept.values()])[:-1])))
            each = ((i, *(kept.get(i) or embedded(b))) for i, b in enumerate(eval_batches(self.items)))
            parts = [(ratio(x, taught.get(i, 0)), g) for i, x, g in each]  # rows that taught nothing: by either
        found, bad = np.concatenate([r for r, _ in parts]), ~np.concatenate([g for _, g in parts])
        self._events.append({"kind": "matched_prompts", "rows": len(good), "told_apart": float(((ratio(x, half) > 1) == good).mean()), "weight": float(found[bad].mean())})
        return np.where(bad, found, 1.0)

    def events(self) -> list[dict]:
        """The share of rows whose prompt the other half's classifier gives to the right kind of answer, and the mean weight of bad ones; once."""
        own, self._events = self._events, []
        return own

    def state_dict(self) -> dict:
        return self.source.state_dict()

    def load_state_dict(self, d: dict) -> None:
        self.source.load_state_dict(d)
