"""Sampling one sequence token by token, with a cache that outlives the call: what a terminal shows, and a chat keeps.

The tokens are those of `rollout.generate` for the same key, row and sampling settings. Two compiled programs do the work:
one reads a piece of text into the cache and draws the next token, one decodes a few tokens more. Their shapes are powers
of two, so that a conversation that grows compiles again only when it has doubled.

Token i of the sequence lies in slot i. What lies beyond the cache's length is never seen (a query sees no slot after its
own) and is written over, so going back to an earlier point of the sequence costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.ops import kvcache
from jaxalign.rl.rollout import Sampling, check_length, draw, for_decoding, uniforms
from jaxalign.types import Model, Tree, UserError

PIECE = 512  # tokens read at once: scores take PIECE x slots, where a long prompt's square would not fit
SMALLEST = 16
AHEAD = 1024  # new tokens that room is made for at once


def stream(model: Model, how: Sampling, params: Tree, tokens: Sequence[int], key, *, row: int = 0, chunk: int = 8, mesh=None) -> Iterator[int]:
    """Ids that continue `tokens`, as they come; the stop token, if one is drawn, is the last. See `Stream.generate`."""
    return Stream(model, params, mesh).generate(tokens, how, key, row=row, chunk=chunk)


class Stream:
    """A cache over one sequence. `ids` are the tokens it holds; `read` counts those that went through a prefill."""

    def __init__(self, model: Model, params: Tree, mesh=None):
        self.model, self.params, self.mesh = model, params, mesh
        self.ids: list[int] = []
        self.read = 0
        self._light: Tree | None = None  # the weights as the decoding loop reads them, once it has run
        self._cache: Tree | None = None
        self._rows = shard.batch_shards(mesh) if mesh is not None else 1  # the same row on each: a batch of one has no shards

    def generate(self, tokens: Sequence[int], how: Sampling, key, *, row: int = 0, chunk: int = 8) -> Iterator[int]:
        """Ids that continue `tokens`, at most how.max_new, decoded `chunk` at a time. What `tokens` shares with the sequence
        in the cache is not read again.

        May be left off at any point, also by an exception: the next call finds the cache as far as it got, or none. Raises
        UserError for no tokens at all, and for more than the model has positions.
        """
        tokens = [int(i) for i in tokens]
        if not tokens:
            raise UserError("the prompt is empty: there is no token to continue")
        if chunk < 1:
            raise UserError(f"chunk {chunk}: decode at least one token at a time")
        check_length(self.model, len(tokens) + how.max_new, "the prompt with max_new")
        return self._generate(tokens, how, (key, np.int32(row)), chunk)

    def _generate(self, tokens, how, draws, chunk):
        static = dataclasses.replace(how, max_new=1)  # how long it may grow is no reason to compile again
        self._back_to(tokens)
        room = len(tokens) + min(how.max_new, AHEAD)
        while len(self.ids) < len(tokens):
            n = len(self.ids)
            piece = tokens[n:] if _whole(self.model) else tokens[n : n + PIECE]
            width = _bucket(len(piece))
            padded = np.zeros((self._rows, width), np.int32)
            padded[:, : len(piece)] = piece
            token = self._run(_read, static, max(room, n + width), padded, np.int32(len(piece)), draws)[0]
            self.ids += piece
            self.read += len(piece)
        made = 1
        yield (last := int(shard.to_host(token)[0]))
        while last not in how.stop and made < how.max_new:
            steps = min(chunk, how.max_new - made)
            out, count = self._run(_decode, (static, chunk), len(self.ids) + chunk, np.int32(last), np.int32(made), np.int32(steps), draws)
            new = [int(i) for i in shard.to_host(out)[: int(shard.to_host(count))]]
            self.ids += [last, *new[:-1]]  # the newest is drawn, not read
            made, last = made + len(new), new[-1]
            yield from new

    def _back_to(self, tokens: list[int]) -> None:
        """Keep what `tokens` begins with, and of `tokens` leave at least one to be read."""
        same = next((i for i, (a, b) in enumerate(zip(self.ids, tokens)) if a != b), min(len(self.ids), len(tokens)))
        self.ids = self.ids[: min(same, len(tokens) - 1)]
        if _whole(self.model):
            self.ids, self._cache = [], None

    def _run(self, program, static, room: int, *args):
        """Calls a program on the cache, grown to hold `room` tokens. Until it returns there is no cache to find: it is donated."""
        size, at = _bucket(room), np.int32(len(self.ids))
        ids, self.ids = self.ids, []
        cache, self._cache = self._cache, None
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            if cache is None:
                # Copies, because two leaves may share one buffer, and a buffer is donated once.
                cache = jax.tree.map(jnp.copy, self.model.init_cache(self._rows, size))
            elif cache["segments"].shape[1] < size:
                cache = _grown(cache, size)
            if program is _decode and self._light is None:
                self._light = for_decoding(self.model, self.params)
            self._cache, *out = program(self.model, static, self._light if program is _decode else self.params, cache, at, *args)
        self.ids = ids
        return out


@functools.partial(jax.jit, static_argnums=1)
def _grown(cache, size):
    return kvcache.grow(cache, size)


def _opened(cache, at):
    """The cache with the first `at` slots held, and no others."""
    held = jnp.arange(cache["segments"].shape[1]) < at
    return {**cache, "length": at, "segments": jnp.where(held, cache["segments"], 0)}


def _draw(model, how, params, x, draws, t):
    """Token t after the prompt, i32[B], drawn as `rollout.generate` draws it."""
    key, row = draws
    u = uniforms(key, row[None], t[None])[0]
    return draw(model, how, params, x, jnp.broadcast_to(u, x.shape[:1]))[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _read(model, how, params, cache, at, tokens, n, draws):
    """tokens i32[B,T], of which the first n are real, behind the `at` tokens of the cache -> (cache, next token i32[B])."""
    B, T = tokens.shape
    real = jnp.broadcast_to(jnp.arange(T) < n, (B, T))
    h = model.hidden(params, tokens, real.astype(jnp.int32), jnp.where(real, at + jnp.arange(T), 0), cache=_opened(cache, at))
    last = jnp.broadcast_to(n - 1, (B, 1, 1))
    return {**h.cache, "length": at + n}, _draw(model, how, params, jnp.take_along_axis(h.x, last, 1), draws, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(model, static, params, cache, at, last, made, steps, draws):
    """Up to `steps` tokens after `last`, until one is a stop token -> (cache, i32[chunk], how many)."""
    how, chunk = static
    stop, rows = jnp.asarray(how.stop or (-1,), jnp.int32), cache["segments"].shape[0]

    def body(c):
        i = c["i"]
        one = jnp.ones((rows, 1), jnp.int32)
        h = model.hidden(params, c["token"][:, None], one, one * (at + i), cache=c["cache"])
        token = _draw(model, how, params, h.x, draws, made + i)
        return {"i": i + 1, "cache": h.cache, "token": token, "done": (token[0] == stop).any(), "out": c["out"].at[i].set(token[0])}

    start = {
        "i": jnp.int32(0),
        "cache": _opened(cache, at),
        "token": jnp.broadcast_to(last, (rows,)),
        "done": jnp.bool_(False),
        "out": jnp.zeros((chunk,), jnp.int32),
    }
    c = jax.lax.while_loop(lambda c: (c["i"] < steps) & ~c["done"], body, start)
    return c["cache"], c["out"], c["i"]


def _bucket(n: int) -> int:
    return max(SMALLEST, 1 << (n - 1).bit_length())


def _whole(model: Model) -> bool:
    """Whether a longer text is another one from its beginning, to be read anew and in one piece: where an encoder reads both
    ways, and where keys depend on the length of the text ("dynamic" and "longrope" scaling of positions)."""
    scaling = dict(getattr(getattr(model, "config", None), "rope_scaling", ()))
    return getattr(model, "start", None) is not None or scaling.get("rope_type") in ("dynamic", "longrope")
