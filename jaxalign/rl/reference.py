"""Sources that add the reference model's log-probs to preference pairs: as batches are drawn, or all of them once."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from pathlib import Path

import jax
import numpy as np

from jaxalign import shard
from jaxalign.data.sources import Offline, eval_batches
from jaxalign.objectives.preference import pair_logps
from jaxalign.types import Model, Pairs, SharedPairs, Source, Tree


@functools.partial(jax.jit, static_argnums=0)
def add_reference(model: Model, params, batch: Pairs | SharedPairs) -> Pairs | SharedPairs:
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


class Precomputed:
    """`source` with the reference log-probs of all its items, computed in one ordered pass before the first batch; after that
    the reference's weights are let go. In memory, or in `directory` under a name made of `key`: strings that say all that
    decides the numbers (the reference's weights, the model, the items), so that what is found there is what would be computed.
    """

    def __init__(self, source: Offline, model: Model, params: Tree, mesh, directory: str | os.PathLike = "", key: tuple[str, ...] = ()):
        self.source, self.model, self.params, self.mesh = source, model, params, mesh
        self.path = Path(directory) / f"reference-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npz" if directory else None
        self.logps: tuple[np.ndarray, np.ndarray] | None = None  # f32[items] each: chosen, rejected

    def next(self, state):
        if self.logps is None:
            self.logps = self._known() or self._computed()
            self.params = None
        items = self.source.indices(self.source.state_dict()["batch"])
        chosen, rejected = (np.where(items < 0, 0, x[items]).astype(np.float32) for x in self.logps)
        return self.source.next(state)._replace(ref_chosen=chosen, ref_rejected=rejected)

    def _known(self):
        """What the directory has, if every process finds it whole: reading checks the archive's CRC."""
        got = None
        if self.path is not None:
            try:
                with np.load(self.path, allow_pickle=False) as f:
                    got = f["chosen"], f["rejected"]
                if not all(x.shape == (self.source.size,) and np.isfinite(x).all() for x in got):
                    got = None
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            got = got if multihost_utils.process_allgather(np.array(got is not None)).all() else None
        return got

    def _computed(self):
        of = lambda b: add_reference(self.model, self.params, shard.place(b, self.mesh))
        parts = [[shard.to_host(x) for x in (p.ref_chosen, p.ref_rejected)] for p in map(of, eval_batches(self.source))]
        out = tuple(np.concatenate(p)[: self.source.size] for p in zip(*parts))
        if self.path is not None and jax.process_index() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temp = self.path.with_suffix(f".{os.getpid()}.tmp")
            with open(temp, "wb") as f:
                np.savez(f, chosen=out[0], rejected=out[1])
            os.replace(temp, self.path)
        return out

    def state_dict(self):
        return self.source.state_dict()

    def load_state_dict(self, d):
        self.source.load_state_dict(d)
