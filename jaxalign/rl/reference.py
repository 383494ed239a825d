"""Sources that add the reference model's log-probs to pairs, labels and rankings: as batches are drawn, or all of them once."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Callable

import jax
import numpy as np

from jaxalign import shard
from jaxalign.data.sources import Offline, eval_batches
from jaxalign.objectives.preference import pair_logps, sequence_logps
from jaxalign.objectives.ranked import ranking_logps
from jaxalign.types import Labelled, Model, Rankings, Source, Tree


def fields(batch) -> tuple[str, ...]:
    """Where a batch keeps reference log-probs."""
    if isinstance(batch, Rankings):
        return ("ref",)
    if isinstance(batch, Labelled):
        return ("ref",) if batch.mismatched is None else ("ref", "ref_mismatched")
    return "ref_chosen", "ref_rejected"


@functools.partial(jax.jit, static_argnums=(0, 3))
def add_reference(model: Model, params, batch, of_pairs: Callable = pair_logps):
    """The same batch with the log-probs of `fields`: sums over the completions, by the training forward. of_pairs: another way to
    sum those of pairs (`Objective.reference`)."""
    if isinstance(batch, Rankings):
        found = ranking_logps(model, params, batch)[:1]
    elif isinstance(batch, Labelled):
        found = [sequence_logps(model, params, rows)[0] for rows in (batch.rows, batch.mismatched) if rows is not None]
    else:
        found = of_pairs(model, params, batch)[:2]
    return batch._replace(**dict(zip(fields(batch), found)))


class WithReference:
    """`source` with reference log-probs computed as batches are drawn."""

    def __init__(self, source: Source, model: Model, params, mesh, of_pairs: Callable = pair_logps):
        self.source, self.model, self.params, self.mesh, self.of_pairs = source, model, params, mesh, of_pairs

    def next(self, state):
        return add_reference(self.model, self.params, shard.place(self.source.next(state), self.mesh), self.of_pairs)

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, d):
        self.source.load_state_dict(d)


class Precomputed:
    """`source` with the reference log-probs of all its items, computed in one ordered pass before the first batch; after that
    the reference's weights are let go. In memory, or in `directory` under a name made of `key`: strings that say all that
    decides the numbers (the reference's weights, the model, the items), so that what is found there is what would be computed.
    """

    def __init__(self, source: Offline, model: Model, params: Tree, mesh, directory: str | os.PathLike = "", key: tuple[str, ...] = (), of_pairs: Callable = pair_logps):
        self.source, self.model, self.params, self.mesh, self.of_pairs = source, model, params, mesh, of_pairs
        self.path = Path(directory) / f"reference-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz" if directory else None
        self.names = fields(next(eval_batches(source)))
        self.logps: tuple[np.ndarray, ...] | None = None  # f32[items] or [items,K] each, as names

    def next(self, state):
        if self.logps is None:
            self.logps = self._known() or self._computed()
            self.params = None
        items = self.source.indices(self.source.state_dict()["batch"])
        empty = (items < 0).nonzero()
        found = {}
        for name, x in zip(self.names, self.logps):
            found[name] = x[items].astype(np.float32)
            found[name][empty] = 0
        return self.source.next(state)._replace(**found)

    def _known(self):
        """What the directory has, if every process finds it whole: reading checks the archive's CRC."""
        got = None
        if self.path is not None:
            try:
                with np.load(self.path, allow_pickle=False) as f:
                    got = tuple(f[k] for k in self.names)
                if not all(len(x) == self.source.size and np.isfinite(x).all() for x in got):
                    got = None
            except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
                pass
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            got = got if multihost_utils.process_allgather(np.array(got is not None)).all() else None
        return got

    def _computed(self):
        of = lambda b: add_reference(self.model, self.params, shard.place(b, self.mesh), self.of_pairs)
        parts = [[shard.to_host(getattr(p, k)) for k in self.names] for p in map(of, eval_batches(self.source))]
        out = tuple(np.concatenate(p)[: self.source.size] for p in zip(*parts))
        if self.path is not None and jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temp = self.path.with_suffix(f".{os.getpid()}.tmp")
            with open(temp, "wb") as f:
                np.savez(f, **dict(zip(self.names, out)))
            os.replace(temp, self.path)
        return out

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, d):
        self.source.load_state_dict(d)
