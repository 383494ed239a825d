"""Speculative decoding: k tokens are drafted cheaply and read by the model in one forward, which keeps as many of them as
the model itself would have said (Leviathan et al. 2022, 2211.17192; Chen et al. 2023, 2302.01318).

Token d drafted with probability q(d) is kept with probability min(1, p(d) / q(d)); at the first that is not, the row takes a
token from max(p - q, 0), normalised; if all are kept, one more from p (2211.17192, algorithm 1). What comes out is
distributed exactly as p, whatever q is; a bad draft costs time only. Greedy decoding keeps a draft that is the argmax.

Two drafts: a smaller model with the same vocabulary, or no model at all, but what followed the same two tokens (else the
same one) when they were last written in this row ("prompt lookup": q is 1 on one token).

Rows go on at lengths of their own. Going back is a smaller length: no query sees a slot after its own.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.ops import kvcache, nn, rope, sampling
from jaxalign.ops.logprob import next_logits
from jaxalign.rl.rollout import Sampling, ends, grouped, together
from jaxalign.types import Model, Prompts, Tree, UserError


def check(model: Model, draft: Model | None) -> None:
    """Refuses what cannot be decoded like this."""
    if draft is not None and draft.config.vocab != model.config.vocab:
        raise UserError(f"sampling.draft: the draft has a vocabulary of {draft.config.vocab}, the model one of {model.config.vocab}; both need the same tokenizer")
    for m in filter(None, (model, draft)):
        if getattr(m, "start", None) is not None or not hasattr(m, "family"):
            raise UserError("sampling.draft: only decoder-only models of jaxalign.models keep a cache that can go back")
        if dict(getattr(m.config, "rope_scaling", ())).get("rope_type") in rope.BY_LENGTH:
            raise UserError("sampling.draft: the angles of this model depend on the length of the text, and drafted tokens would count; leave it empty")


def generate(model: Model, how: Sampling, params: Tree, prompts: Prompts, key, version=0, *, group: int = 1, draft: Model | None = None, draft_params: Tree | None = None):
    """(Rollout, metrics): as `rollout.generate`, how.draft_tokens drafted at a time by `draft` (None: by n-grams of the row).

    metrics f32[]: speculative/acceptance (kept of drafted tokens), speculative/tokens_per_call (of a row, per forward).
    Greedy: the tokens of `rollout.generate`. Else the same distribution by other draws: token t of a row draws from
    fold_in(fold_in(key, row), t), the draft and the acceptance from streams folded from it.
    """
    check(model, draft)
    return _generate(model, draft, how, group, params, draft_params, prompts, key, version)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model, draft, how, group, params, draft_params, prompts, key, version):
    prompts = grouped(prompts, group) if group > 1 else prompts
    B, P = prompts.tokens.shape
    N, k = how.max_new, how.draft_tokens
    S = P + N + k + 1  # a draft may run past the last token that is kept
    there = prompts.segments != 0
    length = there.sum(1)
    slots, rows = jnp.arange(S), jnp.arange(B)
    first = jnp.argmax(there, axis=1)[:, None]
    moved = jnp.take_along_axis(prompts.tokens, jnp.minimum(first + jnp.arange(P), P - 1), 1)
    text = jnp.where(slots < length[:, None], jnp.pad(moved, ((0, 0), (0, S - P))), how.pad)
    own, accept, drafting = _streams(key, prompts.row, N + k + 1)

    def prefill(m, p):
        """All of the prompt but its last token, which the first round reads. (weights for decoding, cache)"""
        real = jnp.arange(P) < length[:, None] - 1
        c = m.hidden(p, text[:, :P], real.astype(jnp.int32), jnp.where(real, jnp.arange(P), 0), cache=m.init_cache(B, P)).cache
        return nn.for_decoding(p, c), kvcache.grow({**c, "length": length - 1}, S)

    def forward(m, p, cache, tokens, live, at):
        """Hidden states of tokens [B,T] at slots from at i32[B] on."""
        T = tokens.shape[1]
        segments = jnp.broadcast_to(live[:, None], (B, T)).astype(jnp.int32)
        return m.hidden(p, tokens, segments, at[:, None] + jnp.arange(T), cache={**cache, "length": jnp.where(live, at, S)})

    light, cache = prefill(model, params)
    small, aside = prefill(draft, draft_params) if draft is not None else (None, None)

    def lookup(text, n):
        """i32[B,k]: what followed the last two tokens of text[:n], or the last one, the last time; nothing found: the last token."""
        last, one = (jnp.take_along_axis(text, jnp.maximum(n - i, 0)[:, None], 1) for i in (1, 2))
        single = (text == last) & (slots < n[:, None] - 1)
        double = single & (jnp.pad(text, ((0, 0), (1, 0)))[:, :-1] == one) & (slots > 0)
        best = jnp.where(double, S + slots, jnp.where(single, slots, -1)).max(1)
        begin = jnp.where(best < 0, n - 1, best % S + 1)
        back = jnp.maximum(n - begin, 1)  # past the end it goes round: a text that repeats itself is one that goes on
        return jnp.take_along_axis(text, begin[:, None] + jnp.arange(k) % back[:, None], 1)

    def propose(c, last, live, made):
        """(i32[B,k], their log-distributions [k,V,B] or None, the draft's cache)"""
        if draft is None:
            return lookup(c["text"], c["n"]), None, None

        def step(carry, i):
            cache, token = carry
            h = forward(draft, small, cache, token[:, None], live, c["n"] - 1 + i)
            z = _scaled(next_logits(h.x[:, 0], draft.unembed(small)), how)
            drawn = jnp.argmax(z, 0).astype(jnp.int32) if how.temperature == 0 else sampling.inverse_cdf(drafting[made + i, rows], z)
            return (h.cache, drawn), (drawn, z - jax.nn.logsumexp(z, 0))

        # One more than is used: the draft has to read its last token too, should it be kept.
        (cache, _), (tokens, q) = jax.lax.scan(step, (c["aside"], last), jnp.arange(k + 1))
        return tokens[:k].T, q[:k], cache

    def body(c):
        live, made, n = ~c["done"], c["made"], c["n"]
        last = jnp.take_along_axis(c["text"], n[:, None] - 1, 1)[:, 0]
        drafted, q, aside = propose(c, last, live, made)
        h = forward(model, light, c["cache"], jnp.concatenate([last[:, None], drafted], 1), live, n - 1)
        x = jnp.moveaxis(h.x, 1, 0).reshape((k + 1) * B, -1)
        z = next_logits(x, model.unembed(light))  # [V, (k+1) B]
        tempered = z / (how.temperature or 1.0)
        lse = jax.nn.logsumexp(tempered, 0).reshape(k + 1, B)
        d = drafted.T  # [k,B]
        if how.temperature == 0:
            best = jnp.argmax(z, 0).astype(jnp.int32).reshape(k + 1, B)
            kept = jnp.cumprod(d == best[:k], axis=0).sum(0)
            new = best[kept, rows]
        else:
            p = _scaled(z, how)
            p = (p - jax.nn.logsumexp(p, 0)).reshape(-1, k + 1, B)
            at = lambda a: jnp.take_along_axis(a, d[:, None], 1)[:, 0]  # [k,V,B] -> [k,B]
            ratio = at(jnp.moveaxis(p[:, :k], 1, 0)) - (at(q) if q is not None else 0.0)
            u = accept[made + jnp.arange(k)[:, None], rows]
            kept = jnp.cumprod(jnp.log(u) < ratio, axis=0).sum(0)
            new = sampling.inverse_cdf(own[made + kept, rows], _rest(p[:, kept, rows], q, d, kept))
        i = jnp.arange(k + 1)[:, None]
        said = jnp.where(i < kept, jnp.pad(d, ((0, 1), (0, 0))), jnp.where(i == kept, new, how.pad))  # [k+1,B]
        logp = jnp.take_along_axis(tempered.reshape(-1, k + 1, B), said[None], 0)[0] - lse
        # A stop token ends what counts of them, and so does the room.
        last = ends(how, said, made + i) & (i <= kept)
        clear = jnp.cumsum(last, 0) - last == 0
        real = (i <= kept) & clear & (made + i < N) & live
        count, stopped = real.sum(0), (last & real).any(0)
        where = lambda base, most: jnp.where(real, base + i, most)
        return {
            "text": c["text"].at[rows, where(n, S)].set(said, mode="drop"),
            "logp": c["logp"].at[rows, where(made, N)].set(logp, mode="drop"),
            "n": n + count,
            "made": made + count,
            "stopped": c["stopped"] | stopped,
            "done": c["done"] | stopped | (made + count >= N),
            "cache": h.cache,
            "aside": aside,
            "calls": c["calls"] + live.sum(),
            "kept": c["kept"] + jnp.where(live, kept, 0).sum(),
        }

    zero = jnp.zeros((B,), jnp.int32)
    start = {"text": text, "logp": jnp.zeros((B, N)), "n": length, "made": zero, "stopped": zero > 0, "done": zero > 0, "cache": cache, "aside": aside, "calls": jnp.int32(0), "kept": jnp.int32(0)}
    c = jax.lax.while_loop(lambda c: ~c["done"].all(), body, start)
    out = jnp.take_along_axis(c["text"], length[:, None] + jnp.arange(N), 1)
    calls = c["calls"].astype(jnp.float32)
    metrics = {"speculative/acceptance": c["kept"] / (calls * k), "speculative/tokens_per_call": c["made"].sum() / calls}
    return together(prompts, how.pad, out, c["logp"], c["made"], c["stopped"], version), metrics


def _streams(key, row, T):
    """Three uniforms for token t of each row, f32[T,B] each: for the token itself (as `rollout.uniforms`), for keeping a draft of it, for drafting it."""

    def one(row, t):
        own = jax.random.fold_in(jax.random.fold_in(key, row), t)
        return tuple(jax.random.uniform(k) for k in (own, nn.fold(own, "accept"), nn.fold(own, "draft")))

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(row, jnp.arange(T))


def _scaled(z, how: Sampling):
    """Logits f[V,M] at the temperature, what top_k and top_p leave out at -inf. Both models are cut alike."""
    z = z / (how.temperature or 1.0)
    return sampling.filter_logits(z.T, how.top_k, how.top_p).T if 0 < how.top_k < z.shape[0] or how.top_p < 1 else z


def _rest(p, q, d, kept):
    """Log-weights of the token after the kept ones, f[V,B]: max(p - q, 0) where a draft was refused, p where none was.

    p [V,B] at that place; q [k,V,B], or None for drafts d [k,B] of probability 1.
    """
    k, V = d.shape[0], p.shape[0]
    i, rows = jnp.minimum(kept, k - 1), jnp.arange(d.shape[1])
    if q is None:
        rest = jnp.where(jnp.arange(V)[:, None] == d[i, rows], -jnp.inf, p)
    else:
        rest = jnp.log(jnp.maximum(jnp.exp(p) - jnp.exp(q[i, :, rows].T), 0.0))
    # Where rounding leaves nothing, p and q were the same.
    return jnp.where((kept < k) & jnp.isfinite(rest).any(0), rest, p)
