"""Scores of rollouts from comparisons: a judge that sees two answers at a time."""

from __future__ import annotations

import itertools
import math
from typing import Callable

import numpy as np

from jaxalign import shard
from jaxalign.rl.rewards import _halved
from jaxalign.types import Prompts, Rollout, UserError

SURE = 1e-6  # a judge that says 0 or 1 is taken to be this unsure: log-odds stay finite


def pairwise(judge: Callable[[str, str, str, dict], float], decode: Callable, mesh, group: int) -> Callable:
    """A scorer from ``judge(prompt, first, second, record) -> P(first is better)`` in [0, 1]; NaN: cannot say.

    `group` consecutive rows answer one prompt; each two are compared once, shown in an order drawn from their ids, because judges
    like what they read first. A row's score is the mean of its log-odds over the group, the least-squares fit of Bradley-Terry:
    of two answers sigma(score - score') is the judge's own probability. Comparisons that cannot say count as even.
    """
    name = getattr(judge, "__qualname__", repr(judge))

    def asked(rollout: Rollout, prompts: Prompts):
        tokens, mask, segments, row = (shard.to_local(getattr(rollout, f)) for f in ("tokens", "mask", "segments", "row"))
        if len(row) % group:
            raise UserError(f"judge {name}: groups of {group} answers lie on several processes; make data.batch_size a multiple of their number")
        out = np.zeros(len(row), np.float32)
        for begin in range(0, len(row), group):
            prompt = decode(tokens[begin][(mask[begin] == 0) & (segments[begin] != 0)])
            texts = [decode(tokens[i][mask[i] > 0]) for i in range(begin, begin + group)]
            record = prompts.records[begin] if prompts.records else {}
            for i, j in itertools.combinations(range(group), 2):
                if texts[i] == texts[j]:
                    continue
                turned = bool(np.random.default_rng([int(row[begin]) + 2**31, i, j]).integers(2))
                first, second = (j, i) if turned else (i, j)
                try:
                    p = judge(prompt, texts[first], texts[second], record)
                    p = float(p)
                except Exception as e:
                    raise UserError(f"judge {name} raised {type(e).__name__}: {e} for prompt {prompt[:80]!r}; it must return the probability that the first answer is better") from e
                if math.isnan(p):
                    continue
                if not 0 <= p <= 1:
                    raise UserError(f"judge {name} returned {p!r} for prompt {prompt[:80]!r}; it must return the probability, 0 to 1, that the first answer is better")
                p = min(max(p, SURE), 1 - SURE)
                odds = math.log(p / (1 - p)) / group
                out[begin + first] += odds
                out[begin + second] -= odds
        return out

    def call(rollout: Rollout, prompts: Prompts):
        return shard.attempt(asked, rollout, prompts)

    def finish(rollout: Rollout, said):
        return shard.place(shard.settled(said, f"judge {name}"), mesh)

    return _halved(call, finish)
