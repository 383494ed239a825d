"""Sampling with a KV cache, one jit: prefill, then one token at a time until every row has stopped.

The cache is written at the same slot for all rows; a prompt shorter than its bucket leaves a hole that the segment mask
hides. The result is moved together, so that rollouts are padded on the right like all other batches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign.ops import nn
from jaxalign.ops.logprob import logits
from jaxalign.ops.sampling import sample
from jaxalign.types import Model, Prompts, Rollout, UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_new: int
    stop: tuple[int, ...] = ()  # ids that end a completion; they belong to it
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    pad: int = 0

    def __post_init__(self):
        if not (self.max_new >= 1 and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"sampling needs max_new >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self}")


def check_length(model: Model, length: int, what: str) -> None:
    """Refuses what is longer than a model with learned positions can read or write."""
    limit = getattr(model, "positions", None)
    if limit is not None and length > limit:
        raise UserError(f"{what}: {length} tokens, and the model has {limit} positions (model.max_len); shorten the rows (data.max_len, data.seq_len, max_new) or take a longer model")


def unembed_last(model: Model, params, x):
    """Hidden f[B,1,D] -> logits f32[B,V]."""
    return logits(x, model.unembed(params))[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def generate(model: Model, how: Sampling, params, prompts: Prompts, key, version=0) -> Rollout:
    """Continue right- or left-padded prompts [B,P] -> Rollout with T = P + max_new.

    Row i draws from fold_in(fold_in(key, row_i), t): neither its neighbours nor its slot matter. Pass
    ``prompts._replace(records=())``: records do not belong on the device.
    """
    tokens, segments, positions, row = prompts.tokens, prompts.segments, prompts.positions, prompts.row
    B, P = tokens.shape
    N = how.max_new
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
    length = segments.astype(bool).sum(1)  # of the prompt; also the position of the first new token
    stop = jnp.asarray(how.stop or (-1,), jnp.int32)

    def draw(x, t):
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, t)
        return sample(keys, unembed_last(model, params, x), how.temperature, how.top_k, how.top_p)

    h = model.hidden(params, tokens, segments, positions, cache=model.init_cache(B, P))
    end = P - 1 - jnp.argmax((segments != 0)[:, ::-1], axis=1)  # slot of the last prompt token
    first, logp = draw(jnp.take_along_axis(h.x, end[:, None, None], 1), 0)

    def alive(c):
        return (c["t"] < N) & ~c["done"].all()

    def body(c):
        t = c["t"]
        h = model.hidden(params, c["token"][:, None], (~c["done"]).astype(jnp.int32)[:, None], (length + t - 1)[:, None], cache=c["cache"])
        token, logp = draw(h.x, t)
        live = ~c["done"]
        return {
            "t": t + 1,
            "cache": h.cache,
            "token": jnp.where(live, token, how.pad),
            "done": c["done"] | (token[:, None] == stop).any(1),
            "out": c["out"].at[:, t].set(jnp.where(live, token, how.pad)),
            "logp": c["logp"].at[:, t].set(jnp.where(live, logp, 0.0)),
            "count": c["count"] + live,
        }

    start = {
        "t": jnp.int32(1),
        "cache": nn.cache_grow(h.cache, P + N),
        "token": first,
        "done": (first[:, None] == stop).any(1),
        "out": jnp.full((B, N), how.pad, jnp.int32).at[:, 0].set(first),
        "logp": jnp.zeros((B, N), jnp.float32).at[:, 0].set(logp),
        "count": jnp.ones((B,), jnp.int32),
    }
    c = jax.lax.while_loop(alive, body, start)

    # Move prompt and completion together: slot s of a row is prompt token s, or completion token s - length.
    slots = jnp.arange(P + N)[None]
    since = slots - length[:, None]
    mask = (since >= 0) & (since < c["count"][:, None])
    prompt_slot = jnp.clip(jnp.where(since < 0, slots + (end + 1 - length)[:, None], 0), 0, P - 1)
    pick = lambda a: jnp.take_along_axis(a, jnp.clip(since, 0, N - 1), 1)
    real = mask | (since < 0)
    return Rollout(
        tokens=jnp.where(mask, pick(c["out"]), jnp.where(since < 0, jnp.take_along_axis(tokens, prompt_slot, 1), how.pad)),
        mask=mask.astype(jnp.float32),
        segments=real.astype(jnp.int32),
        positions=jnp.where(real, slots, 0),
        logp=jnp.where(mask, pick(c["logp"]), 0.0),
        row=row,
        version=jnp.asarray(version, jnp.int32),
        truncated=1.0 - c["done"].astype(jnp.float32),
    )
