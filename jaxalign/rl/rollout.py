"""Sampling with a KV cache, one jit: prefill, then one token at a time until every row has stopped.

The cache is written at the same slot for all rows; a prompt shorter than its bucket leaves a hole that the segment mask
hides. The result is moved together, so that rollouts are padded on the right like all other batches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import kvcache, nn, sampling
from jaxalign.ops.logprob import next_logits
from jaxalign.types import Model, Prompts, Rollout, UserError


LONG = 256  # new tokens from which on a second loop, over a larger cache, is worth its compilation


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_new: int
    stop: tuple[int, ...] = ()  # ids that end a completion; they belong to it
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    pad: int = 0
    slots: int = 0  # rows decoded at once where there are more, see `rl.engine`; 0: all
    draft: str = ""  # "ngram", or the directory of a smaller model: speculative decoding, see `rl.speculative`
    draft_tokens: int = 4  # drafted at a time
    stop_after: int = 0  # before this many tokens stop ids end nothing (truncate_after of lm-human-preferences)

    def __post_init__(self):
        if self.slots < 0 or self.draft_tokens < 1:
            raise UserError(f"sampling.slots {self.slots} must be 0 (all rows at once) or more, sampling.draft_tokens {self.draft_tokens} 1 or more")
        if self.slots and self.draft:
            raise UserError("sampling.slots and sampling.draft do not go together: choose one")
        if not 0 <= self.stop_after < max(self.max_new, 1):
            raise UserError(f"sampling.stop_after {self.stop_after} must be 0 or more and below sampling.max_new {self.max_new}")
        if not (self.max_new >= 1 and self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"sampling needs max_new >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {self}")


def check_length(model: Model, length: int, what: str) -> None:
    """Refuses what is longer than a model with learned positions can read or write."""
    limit = getattr(model, "positions", None)
    if limit is not None and length > limit:
        raise UserError(f"{what}: {length} tokens, and the model has {limit} positions (model.max_len); shorten the rows (data.max_len, data.seq_len, max_new) or take a longer model")


def draw(model: Model, how: Sampling, params, x, u):
    """Hidden f[B,1,D] and a uniform per row f32[B] -> (tokens i32[B], log-probs f32[B]). A model with `next_logits` says itself
    what is drawn from (`models.heads.Guided`)."""
    z = model.next_logits(params, x[:, 0]) if hasattr(model, "next_logits") else next_logits(x[:, 0], model.unembed(params))
    return sampling.draw(u, z, how.temperature, how.top_k, how.top_p)


def ends(how: Sampling, token, t):
    """bool like token i32[...]: whether token number t (from 0) of an answer is its last, being a stop token at or after stop_after."""
    stop = (token[..., None] == jnp.asarray(how.stop or (-1,), jnp.int32)).any(-1)
    return stop & (jnp.asarray(t) >= how.stop_after) if how.stop_after else stop


def uniforms(key, row, t):
    """f32[T,B]: what rows i32[B] draw token t i32[T] with, from fold_in(fold_in(key, row), t)."""
    one = lambda row, t: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), t))
    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(row, t)


@functools.partial(jax.jit, static_argnums=0)
def for_decoding(model: Model, params):
    """The weights for a decoding loop that is compiled apart from what comes before it, see `ops.nn.for_decoding`."""
    return nn.for_decoding(params, model.init_cache(1, 1))


def grouped(prompts: Prompts, group: int) -> Prompts:
    """Every prompt G times, side by side, sample g of row r drawing as row r G + g."""
    rows = (prompts.row[:, None] * group + jnp.arange(group, dtype=jnp.int32)).reshape(-1)
    return Prompts(*(jnp.repeat(x, group, 0) for x in prompts[:3]), rows)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("group",))
def generate(model: Model, how: Sampling, params, prompts: Prompts, key, version=0, *, group: int = 1) -> Rollout:
    """Continue right- or left-padded prompts [B,P] -> Rollout with T = P + max_new, of B * group rows: `group` samples of
    each prompt, which is read once. The same as generate(..., grouped(prompts, group), ...).

    Row i draws from fold_in(fold_in(key, row_i), t): neither its neighbours nor its slot matter. Pass
    ``prompts._replace(records=())``: records do not belong on the device.
    """
    h = model.hidden(params, *prompts[:3], cache=model.init_cache(*prompts.tokens.shape))
    cache = h.cache
    if group > 1:
        prompts = grouped(prompts, group)
        cache = kvcache.map_rows(lambda x, axis: jnp.repeat(x, group, axis), cache)
    tokens, segments, _, row = prompts[:4]
    B, P = tokens.shape
    N = how.max_new
    length = segments.astype(bool).sum(1)  # of the prompt; also the position of the first new token

    u = uniforms(key, row, jnp.arange(N))  # at once: a step that makes its own spends more on them than on small layers
    end = P - 1 - jnp.argmax((segments != 0)[:, ::-1], axis=1)  # slot of the last prompt token
    x = jnp.take_along_axis(h.x, end[::group, None, None], 1)
    first, logp = draw(model, how, params, jnp.repeat(x, group, 0) if group > 1 else x, u[0])
    light = nn.for_decoding(params, cache)

    def body(c):
        t = c["t"]
        h = model.hidden(light, c["token"][:, None], (~c["done"]).astype(jnp.int32)[:, None], (length + t - 1)[:, None], cache=c["cache"])
        token, logp = draw(model, how, light, h.x, u[t])
        live = ~c["done"]
        return {
            "t": t + 1,
            "cache": h.cache,
            "token": jnp.where(live, token, how.pad),
            "done": c["done"] | ends(how, token, t),
            "out": c["out"].at[t].set(jnp.where(live, token, how.pad)),
            "logp": c["logp"].at[t].set(jnp.where(live, logp, 0.0)),
            "count": c["count"] + live,
        }

    c = {
        "t": jnp.int32(1),
        "cache": cache,
        "token": first,
        "done": ends(how, first, 0),
        "out": jnp.full((N, B), how.pad, jnp.int32).at[0].set(first),
        "logp": jnp.zeros((N, B), jnp.float32).at[0].set(logp),
        "count": jnp.ones((B,), jnp.int32),
    }
    # A step attends over all slots there are, so a long completion is given the second half of its own when it gets there.
    for n in (N // 2, N) if N >= LONG else (N,):
        c = jax.lax.while_loop(lambda c, n=n: (c["t"] < n) & ~c["done"].all(), body, {**c, "cache": kvcache.grow(c["cache"], P + n)})
    return together(prompts, how.pad, c["out"].T, c["logp"].T, c["count"], c["done"], version)


def together(prompts: Prompts, pad: int, out, logp, count, done, version) -> Rollout:
    """Prompts [B,P] and what follows them, out and logp [B,N] of which count [B] are real, moved together and padded on the right."""
    P, N = prompts.tokens.shape[1], out.shape[1]
    there = prompts.segments != 0
    length, end = there.sum(1), P - 1 - jnp.argmax(there[:, ::-1], axis=1)
    # Slot s of a row is prompt token s, or completion token s - length.
    slots = jnp.arange(P + N)[None]
    since = slots - length[:, None]
    mask = (since >= 0) & (since < count[:, None])
    prompt_slot = jnp.clip(jnp.where(since < 0, slots + (end + 1 - length)[:, None], 0), 0, P - 1)
    pick = lambda a: jnp.take_along_axis(a, jnp.clip(since, 0, N - 1), 1)
    real = mask | (since < 0)
    rows = lambda x: shard.constrain(x, "batch", *(None,) * (x.ndim - 1))  # as prompts are cut, also where slots were in between
    return Rollout(
        tokens=rows(jnp.where(mask, pick(out), jnp.where(since < 0, jnp.take_along_axis(prompts.tokens, prompt_slot, 1), pad))),
        mask=rows(mask.astype(jnp.float32)),
        segments=rows(real.astype(jnp.int32)),
        positions=rows(jnp.where(real, slots, 0)),
        logp=rows(jnp.where(mask, pick(logp), 0.0)),
        row=rows(prompts.row),
        version=jnp.asarray(version, jnp.int32),
        truncated=rows(1.0 - done.astype(jnp.float32)),
    )
