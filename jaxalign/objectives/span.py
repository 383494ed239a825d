"""Span corruption, the pretraining of T5 (Raffel et al. 2019, 1910.10683, section 3.1.4): pieces of a text are cut out, a sentinel
stands in the place of each, and the decoder writes sentinel and piece, sentinel and piece, one after another.

    the encoder reads   Thank you <0> me to your party <1> week EOS
    the decoder writes  <0> for inviting <1> last EOS

Made on the device from rows of plain text, so that every epoch cuts them elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.lm import cross_entropy, row_keys
from jaxalign.types import Loss, Model, Objective, Term, Tokens, UserError


def _starts(u, items, parts):
    """bool[T]: which of the first `items` begin a part, when these are cut into `parts` pieces of 1 or more: every way to cut is as
    likely (`random_segmentation` of the paper's code). u f32[T] draws."""
    i = jnp.arange(u.shape[0])
    rank = jnp.argsort(jnp.argsort(jnp.where((i > 0) & (i < items), u, 2.0)))
    return (i < items) & ((i == 0) | (rank < parts - 1))


def _row(tokens, n, key, sentinel: int, eos: int, start: int, rate: float, length: float, width: int, most: int):
    """One text i32[T], its first n real -> (tokens i32[W], mask f32[W], real bool[W]): encoder's side, start token, decoder's side."""
    T = tokens.shape[0]
    cut = jnp.clip(jnp.round(n * rate).astype(jnp.int32), 1, jnp.maximum(n - 1, 1))
    spans = jnp.clip(jnp.round(cut / length).astype(jnp.int32), 1, jnp.minimum(cut, jnp.maximum(n - cut, 1)))
    u = jax.random.uniform(jax.random.fold_in(key, 3), (2, T))
    kept, i, s = n - cut, jnp.arange(T), jnp.arange(most)
    starts = _starts(u[0], kept, spans), _starts(u[1], cut, spans)
    of_kept, of_cut = (jnp.cumsum(x) - 1 for x in starts)  # the span that the i-th token kept, or cut, belongs to
    kept_to, cut_to = ((s[:, None] >= of) & (i < m) for of, m in ((of_kept, kept), (of_cut, cut)))
    kept_to, cut_to = kept_to.sum(1), cut_to.sum(1)  # i32[S]: how many tokens spans 0 ... s hold
    # A text begins with what is kept, then what is cut, span by span.
    place_kept = i + jnp.where(of_kept > 0, cut_to[of_kept - 1], 0)
    place_cut = i + kept_to[jnp.clip(of_cut, 0, most - 1)]
    take = lambda place: tokens[jnp.clip(place, 0, T - 1)]
    second = kept + spans + 1  # slot of the start token
    slots = [
        (i < kept, i + of_kept, take(place_kept)),
        (s < spans, kept_to + s, sentinel - s),
        (True, kept + spans, eos),
        (True, second, start),
        (s < spans, second + 1 + jnp.where(s > 0, cut_to[s - 1], 0) + s, sentinel - s),
        (i < cut, second + 2 + i + of_cut, take(place_cut)),
        (True, second + 1 + cut + spans, eos),
    ]
    out = jnp.zeros((width,), jnp.int32)
    for real, slot, value in slots:
        out = out.at[jnp.where(real & (n > 1), slot, width)].set(value, mode="drop")
    at = jnp.arange(width)
    end = jnp.where(n > 1, second + 2 + cut + spans, 0)
    return out, ((at > second) & (at < end)).astype(jnp.float32), at < end


def corrupt(batch: Tokens, key, *, sentinel: int, eos: int, start: int, rate: float, length: float) -> Tokens:
    """Rows of text [B,T] -> rows of encoder's text, start token, decoder's text [B,W]. A row is one text, whatever documents stand in
    it (as in the paper); a row of one token or none is empty afterwards. A text's last token, where it is `eos`, is not part of it."""
    B, T = batch.tokens.shape
    most = max(round(max(round(T * rate), 1) / length), 1) + 1
    if sentinel + 1 < most:
        raise UserError(f"rows of {T} tokens need {most} sentinels, and objective.sentinel_id {sentinel} leaves {sentinel + 1}; shorten data.seq_len")
    n = (batch.segments != 0).sum(1)
    last = jnp.take_along_axis(batch.tokens, jnp.maximum(n - 1, 0)[:, None], 1)[:, 0]
    n = n - ((n > 0) & (last == eos))
    one = lambda tokens, n, key: _row(tokens, n, key, sentinel, eos, start, rate, length, T + 2 * most + 3, most)
    tokens, mask, real = jax.vmap(one)(batch.tokens, n, row_keys(batch.tokens, key))
    return Tokens(tokens, mask, real.astype(jnp.int32), jnp.where(real, jnp.arange(real.shape[1]), 0))


def span_corruption(model: Model, *, sentinel_id: int = -1, eos_id: int = 1, rate: float = 0.15, length: float = 3.0) -> Objective:
    """Cross entropy of the decoder's side of `corrupt`ed texts. rate: share of the tokens that is cut out, in spans `length` long on
    average. sentinel_id: the first sentinel; the others count down from it (T5: 32099).

    Draws are folded from the step's key and what a row holds. Raises UserError where the model is no encoder-decoder, or
    an option is out of range.
    """
    if getattr(model, "start", None) is None:
        raise UserError("span_corruption needs an encoder-decoder (model.family t5): a decoder alone can not read what stands after a gap")
    V = model.config.vocab
    if not 0 <= sentinel_id < V or not 0 <= eos_id < V or not 0 < rate < 1 or length < 1:
        raise UserError(f"span_corruption needs sentinel_id (the vocabulary's first sentinel, 0 to {V - 1}, got {sentinel_id}), eos_id {eos_id} in it, 0 < rate < 1 (got {rate}) and length >= 1 (got {length})")

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        rows = corrupt(batch, key, sentinel=sentinel_id, eos=eos_id, start=model.start, rate=rate, length=length)
        ce, n, _ = cross_entropy(model, params, rows)
        ce_, n_ = jax.lax.stop_gradient((ce, n))
        return Loss({"lm": Term(ce.total, n)}, {"nll": (ce_.nll, n_), "entropy": (ce_.entropy, n_), "mean_token_accuracy": (ce_.correct, n_)})

    return Objective(loss)
