"""Episodes with their rewards: what offline reinforcement learning reads."""

from __future__ import annotations

import math
from typing import Callable, Iterable

import numpy as np

from jaxalign.data.corpus import encode
from jaxalign.data.examples import Trajectory
from jaxalign.data.packing import fill
from jaxalign.data.rows import Rows
from jaxalign.data.sources import Offline, _offline, _padded
from jaxalign.data.templates import PLAIN, Template
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import Trajectories, UserError


def trajectories_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    max_len: int | None,
    batch_size: int,
    seed: int,
    top: float = 1.0,
    standardise: bool | tuple[float, float] = False,
    template: Template = PLAIN,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    format: str | Callable | None = None,
    max_drop: float = 0.5,
    vocab_size: int | None = None,
) -> Offline:
    """`Trajectories` [B,T], T = max_len (None: the longest of the set), one episode a row, never packed or cut. A turn's reward
    lies at its last token, the stop token.

    top: the share of the episodes that is kept, those of the highest return; among equals the earlier rows. standardise: affine
    in the return, so that those kept have mean 0 and std 1 (unbiased, + the f32 epsilon), as trlX: rewards are divided by the std,
    and the last one of each episode takes the mean off. Returns that are all equal become 0: their rewards are divided by 1. Or (mean, std) of other episodes, by which held-out ones stay comparable: those that
    the report of the training set has. Longer episodes are dropped and counted: their end is what they earn.
    """
    if not 0 < top <= 1:
        raise UserError(f"data.top {top}: the share of the episodes to keep, above 0 and at most 1")
    at, value, first, terminal = [], [], [0], []

    def admit(example, group, counts):
        (ids, mask), = group
        if max_len is not None and len(ids) > max_len:
            return "too_long"
        if not any(mask):
            return "no_target"
        ends = [t for t, (m, after) in enumerate(zip(mask, [*mask[1:], 0])) if m and not after]
        if len(ends) != len(example.rewards):
            raise UserError(f"the template writes {len(ends)} trained spans for {len(example.rewards)} turns, so that nobody knows which earned what; use a template that separates turns")
        at.extend(ends)
        value.extend(example.rewards)
        first.append(len(at))
        terminal.append(float(example.terminal))
        return group

    corpus = encode(rows, tokenizer, template, (Trajectory,), admit, format, max_drop, vocab_size)
    at, value, first, terminal = np.array(at, np.int64), np.array(value, np.float64), np.array(first, np.int64), np.array(terminal, np.float32)
    returns = np.add.reduceat(value, first[:-1])
    kept = np.sort(np.argsort(-returns, kind="stable")[: math.ceil(top * len(returns))])
    mean, std = returns[kept].mean(), returns[kept].std(ddof=1) if len(kept) > 1 else 0.0
    corpus.counts.update(return_mean=float(mean), return_std=float(std), below_top=len(returns) - len(kept))
    if standardise:
        mean, std = (mean, std) if standardise is True else standardise
        eps = np.finfo(np.float32).eps
        scale = std + eps if std > eps * max(1.0, abs(mean)) else 1.0  # less is the rounding of sums, and would blow up what the turns of an episode earn
        value = value / scale
        value[first[1:] - 1] -= mean / scale
    length, layout = _padded(corpus.docs, max_len)

    def make(item, draw):
        doc = np.where(item < 0, -1, kept[item])
        count = np.where(doc < 0, 0, first[doc + 1] - first[doc])
        event = np.repeat(first[doc], count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        rewards = np.zeros((len(item), length), np.float32)
        rewards[np.repeat(np.arange(len(item)), count), at[event]] = value[event]
        return Trajectories(*fill(corpus.docs, layout, doc, tokenizer.pad_id), rewards, np.where(doc < 0, 1, terminal[doc]).astype(np.float32))

    options = dict(kind="trajectories", max_len=max_len, top=top, standardise=standardise)
    return _offline(make, len(kept), corpus, options, batch_size, seed, shuffle, epochs, shard)
