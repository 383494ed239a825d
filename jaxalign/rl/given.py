"""Sampled answers and given ones in turns: an online source that for some of its batches reads a file instead (GKD, Agarwal et al.
2023, 2306.13649, algorithm 1)."""

from __future__ import annotations

import zlib

import numpy as np

from jaxalign import shard
from jaxalign.rl.online import OnlineSource
from jaxalign.types import Source


def sampled(seed: int, turn: int, share: float) -> bool:
    """Whether a run's batch number `turn` is one that the policy samples: with probability `share`, drawn for each batch as a whole.
    0: never, 1: always."""
    return bool(np.random.default_rng([zlib.crc32(b"on_policy"), seed, turn]).random() < share)


class InTurns(OnlineSource):
    """As `OnlineSource`, but a batch is one of its own only with probability `on_policy`, else the next of `given`, which holds batches
    of the same kind. Nothing is sampled for those, and whatever of a rollout is left to train on waits for its turn.

    Its state is also how many batches there were, and the position of `given`.
    """

    def __init__(self, *args, given: Source, on_policy: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.given, self.on_policy, self.turn = given, on_policy, 0

    def next(self, state):
        own = sampled(self.seed, self.turn, self.on_policy)
        self.turn += 1
        if own:
            batch = super().next(state)
        else:
            batch, self._metrics, self._samples, self.collected = shard.place(self.given.next(state), self.mesh), {}, [], False
        self._metrics = {**self._metrics, "on_policy": float(own)}
        return batch

    def state_dict(self) -> dict:
        return {**super().state_dict(), "given": self.given.state_dict(), "turn": self.turn}

    def load_state_dict(self, d: dict) -> None:
        super().load_state_dict(d)
        self.given.load_state_dict(d["given"])
        self.turn = d["turn"]
