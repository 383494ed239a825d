"""Held-out loss of whole documents, however long: strided windows, perplexity, bits per byte."""

from __future__ import annotations

import math
from typing import Iterable, Iterator, NamedTuple, Sequence

import jax
import numpy as np

from jaxalign import shard
from jaxalign.rl.experience import token_logps
from jaxalign.types import Model, Tokens, Tree, UserError


class Total(NamedTuple):
    nll: float  # nats, summed
    tokens: int  # that were predicted
    perplexity: float  # exp(nll / tokens), of the corpus: not the mean of its documents'


def windows(ids: Sequence[int], mask: Sequence[int], context: int, stride: int) -> Iterator[tuple[Sequence[int], list[int]]]:
    """(ids, mask) of the windows of `context` tokens that begin every `stride` tokens, of which each scores what none before it
    has: all of the first one's, then the last tokens only, each with context - stride tokens before it at least."""
    if not 1 <= stride < context:
        raise ValueError(f"stride {stride} must be 1 or more, and less than the context of {context}: a window's first token is predicted by nothing")
    seen = 0
    for begin in range(0, max(len(ids) - context + stride, 1), stride):
        end = min(begin + context, len(ids))
        yield ids[begin:end], [int(m and t >= seen and t > begin) for t, m in zip(range(begin, end), mask[begin:end])]
        seen = end


def strided(model: Model, params: Tree, documents: Iterable[tuple[Sequence[int], Sequence[int]]], *, context: int, stride: int, batch: int, mesh) -> Total:
    """The loss on documents (ids, mask) in `windows`; the same on every process, each of which reads all of them.

    batch: windows at a time, a multiple of the devices that share a batch.
    """
    nll, tokens, held = 0.0, 0, []

    def score():
        rows = Tokens(np.zeros((batch, context), np.int32), *(np.zeros((batch, context), t) for t in (np.float32, np.int32, np.int32)))
        for i, (ids, mask) in enumerate(held):
            rows.tokens[i, : len(ids)], rows.mask[i, : len(ids)] = ids, mask
            rows.segments[i, : len(ids)], rows.positions[i, : len(ids)] = 1, np.arange(len(ids))
        index, count = shard.local_rows(mesh, batch)
        own = slice(index * batch // count, (index + 1) * batch // count)
        logp = shard.to_host(token_logps(model, params, shard.place(Tokens(*(x[own] for x in rows)), mesh)).logp)
        held.clear()
        return -float(logp.sum(dtype=np.float64)), int(rows.mask.sum())

    def add(more):
        nonlocal nll, tokens
        nll, tokens = nll + more[0], tokens + more[1]

    with jax.set_mesh(mesh):
        for ids, mask in documents:
            for window in windows(ids, mask, context, stride):
                held.append(window)
                if len(held) == batch:
                    add(score())
        if held:
            add(score())
    return Total(nll, tokens, perplexity(nll, tokens))


def perplexity(nll: float, tokens: int) -> float:
    """exp(nats / tokens); inf where that is too large for a number. UserError for no tokens."""
    if not tokens:
        raise UserError("perplexity: there is no token to predict: each document is one token long, or none of its tokens is trained on; give longer ones")
    return math.exp(nll / tokens) if nll / tokens < 709 else math.inf


def bits_per_byte(nll: float, size: int) -> float:
    """nats / (ln 2 * bytes): compares models whose tokenizers cut texts differently. size: bytes of what was predicted, UTF-8."""
    return nll / (math.log(2) * size)
