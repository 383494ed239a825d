"""Sampling more prompts than fit at once: a fixed number of slots, refilled from the queue as rows stop (continuous
batching, Yu et al. 2022, "Orca").

Three compiled programs, with static shapes: one reads a few prompts into free slots, one decodes all slots until enough of
them are free again, one moves the results together. The host only learns how many slots are free. A row is drawn from its
own id, so it comes out as `rollout.generate` has it, whatever slot it was given and whoever its neighbours were.

Every slot writes its keys behind its own last one (`length` of the cache is i32[B] here); what an earlier row left beyond
that is never seen, because a query sees no slot after its own, and is written over.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.ops import kvcache
from jaxalign.rl import rollout, speculative
from jaxalign.rl.rollout import Sampling, draw, ends, for_decoding, grouped, together, uniforms
from jaxalign.types import Model, Prompts, Rollout, Tree, UserError

SMALLEST = 16  # shortest prompt bucket


def generate(model: Model, how: Sampling, params: Tree, prompts: Prompts, key, version=0, *, group: int = 1, draft: tuple[Model, Tree] | None = None) -> Rollout:
    """`rollout.generate` by the means that `how` names: in how.slots slots where there are more rows than these (0: all rows at
    once), or speculatively, with how.draft "ngram" or, loaded as `draft`, a smaller model and its weights.

    Not to be called inside a jit: the host refills the slots. Raises UserError for slots that the mesh does not divide, and for
    models that read an input of their own for every row (encoder-decoders) or that keep no keys.
    """
    if how.draft:
        if draft is None and how.draft != "ngram":
            raise UserError(f"sampling.draft {how.draft!r} was not loaded: here it can only be 'ngram'")
        small, weights = draft or (None, None)
        return speculative.generate(model, how, params, prompts, key, version, group=group, draft=small, draft_params=weights)[0]
    rows = prompts.tokens.shape[0] * group
    if not 0 < how.slots < rows:
        return rollout.generate(model, how, params, prompts, key, version, group=group)
    shards = shard.batch_shards()
    if how.slots % shards:
        raise UserError(f"sampling.slots {how.slots} must be a multiple of data x fsdp x expert, {shards}")
    if getattr(model, "start", None) is not None or not hasattr(model, "family"):
        raise UserError("sampling.slots: slots are refilled in decoder-only models of jaxalign.models; leave it at 0 for this one")
    prompts = _right(grouped(prompts, group) if group > 1 else prompts)
    return _run(model, how, params, prompts, key, version, shards)


def _run(model, how, params, prompts, key, version, shards):
    R, P = prompts.tokens.shape
    B = how.slots
    few = min(B, -(-max(B // 4, 1) // shards) * shards)  # slots that are refilled together: reading prompts one by one would cost more than it wins
    lengths = shard.to_host(jnp.sum(prompts.segments != 0, 1))
    light = for_decoding(model, params)
    c, u = _start(model, how, B, R, P, prompts.row, key)
    waiting = 0  # first row of the queue that has no slot yet
    while True:
        free = np.flatnonzero(shard.to_host(c["done"]))
        while waiting < R and len(free):
            n = B if len(free) == B else few
            rows = np.arange(waiting, min(waiting + n, R, waiting + len(free)))
            slots, free = free[: len(rows)], free[len(rows) :]
            fill = lambda x, empty: np.concatenate([x, np.full(n - len(x), empty)]).astype(np.int32)
            c = _admit(model, how, _bucket(int(lengths[rows].max()), P), params, prompts, c, u, fill(rows, R), fill(slots, B))
            waiting += len(rows)
            if len(free) < few:
                break
        if waiting == R and bool(shard.to_host(c["done"]).all()):
            return _finish(how, prompts, c, version)
        c = _steps(model, how, light, c, u, np.int32(few if waiting < R else B))


@jax.jit
def _right(p: Prompts) -> Prompts:
    """The same prompts, padded on the right."""
    P = p.tokens.shape[1]
    there = p.segments != 0
    length, end = there.sum(1, keepdims=True), P - jnp.argmax(there[:, ::-1], axis=1)[:, None]
    at = jnp.arange(P)
    real = at < length
    tokens = jnp.take_along_axis(p.tokens, jnp.where(real, at + end - length, 0), 1)
    return Prompts(tokens, real.astype(jnp.int32), jnp.where(real, at, 0), p.row)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(model, how, B, R, P, row, key):
    """(all slots free, the uniforms of all rows f32[R,N]). Row R of the results is nobody's: what is written there is dropped."""
    N = how.max_new
    free = {
        "cache": {**model.init_cache(B, P + N), "length": jnp.zeros((B,), jnp.int32)},
        "token": jnp.full((B,), how.pad, jnp.int32),  # the newest, not read yet
        "done": jnp.ones((B,), bool),
        "made": jnp.zeros((B,), jnp.int32),
        "row": jnp.full((B,), R, jnp.int32),
        "out": jnp.full((R, N), how.pad, jnp.int32),
        "logp": jnp.zeros((R, N), jnp.float32),
        "count": jnp.zeros((R,), jnp.int32),
        "stopped": jnp.zeros((R,), bool),
    }
    return free, uniforms(key, row, jnp.arange(N)).T


def _noted(how, c, row, made, token, logp, live):
    """Token number `made` of each live row into the results: (the results, whether the row ends with it)."""
    row = jnp.where(live, row, c["out"].shape[0])
    stopped = ends(how, token, made)
    put = lambda name, at, value: c[name].at[at].set(value, mode="drop")
    new = {"out": put("out", (row, made), token), "logp": put("logp", (row, made), logp), "count": put("count", row, made + 1), "stopped": put("stopped", row, stopped)}
    return new, stopped | (made + 1 >= how.max_new)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _admit(model, how, P, params, prompts, c, u, rows, slots):
    """Reads prompts `rows` i32[n] into `slots` i32[n] and draws the first token of each. A row or a slot past the end stands for none."""
    R = c["out"].shape[0]
    tokens, segments, positions = (jnp.take(x[:, :P], rows, axis=0, mode="fill", fill_value=0) for x in prompts[:3])
    h = model.hidden(params, tokens, segments, positions, cache=model.init_cache(len(rows), P))
    length = segments.sum(1)
    x = jnp.take_along_axis(h.x, jnp.maximum(length - 1, 0)[:, None, None], 1)
    token, logp = draw(model, how, params, x, u[jnp.minimum(rows, R - 1), 0])
    new, done = _noted(how, c, rows, jnp.zeros_like(rows), token, logp, rows < R)

    def place(old, new, axis):
        if axis == 0 and old.ndim == 1:  # lengths
            return old.at[slots].set(length, mode="drop")
        old, new = jnp.moveaxis(old, axis, 0), jnp.moveaxis(new, axis, 0)
        width = [(0, 0)] * new.ndim
        time = 1 if new.ndim == 2 else new.ndim - 2  # [B,S], or rows first and [..., S, H]
        width[time] = (0, old.shape[time] - new.shape[time])
        return jnp.moveaxis(old.at[slots].set(jnp.pad(new, width), mode="drop"), 0, axis)

    cache = kvcache.map_rows(place, c["cache"], {**h.cache, "length": length})
    put = lambda name, value: c[name].at[slots].set(value, mode="drop")
    return {**c, **new, "cache": cache, "token": put("token", token), "done": put("done", done), "made": put("made", jnp.ones_like(rows)), "row": put("row", rows)}


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _steps(model, how, params, c, u, enough):
    """One token for every slot, again and again until `enough` slots are free."""
    R, N = u.shape
    S = c["cache"]["segments"].shape[1]

    def body(c):
        live = ~c["done"]
        length = c["cache"]["length"]
        at = jnp.where(live, length, S)[:, None]  # a free slot writes nothing
        h = model.hidden(params, c["token"][:, None], live[:, None].astype(jnp.int32), length[:, None], cache={**c["cache"], "length": at[:, 0]})
        token, logp = draw(model, how, params, h.x, u[jnp.minimum(c["row"], R - 1), jnp.minimum(c["made"], N - 1)])
        new, done = _noted(how, c, c["row"], c["made"], token, logp, live)
        return {**c, **new, "cache": {**h.cache, "length": length + live}, "token": token, "done": c["done"] | done, "made": c["made"] + live}

    return jax.lax.while_loop(lambda c: c["done"].sum() < enough, body, c)


@functools.partial(jax.jit, static_argnums=0)
def _finish(how, prompts, c, version):
    return together(prompts, how.pad, c["out"], c["logp"], c["count"], c["stopped"], version)


def _bucket(n: int, most: int) -> int:
    return min(max(SMALLEST, 1 << (n - 1).bit_length() if n > 1 else 1), most)
