"""Divergences between two models' distributions over the vocabulary, token by token, without [B,T,V] logits.

As `ops.logprob.linear_ce`: both unembeddings walk over time in chunks, and the student's gradients are made in the forward
pass. An equation maps log-probs of the teacher and of the student, of the same shape, to the terms of a sum over the vocabulary;
its derivative in the student's log-probs is taken there, element by element, so it needs none of its own.
"""

from __future__ import annotations

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops.logprob import ROWS, STATES, _asked, _chunk, _cut, _gathered, _grads, _back, _hot, _logits, _scaled, _softmax, _split, _states, _zeros
from jaxalign.ops.nn import Unembed, wide


def forward_kl(teacher, student):
    """Terms of KL(teacher || student): the student must cover all that the teacher does (Hinton et al. 2015, 1503.02531)."""
    return jnp.exp(teacher) * (teacher - student)


def reverse_kl(teacher, student):
    """Terms of KL(student || teacher): the student may leave out, but must not invent (MiniLLM, 2306.08543)."""
    return jnp.exp(student) * (student - teacher)


def jsd(beta: float) -> Callable:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, 0 < beta < 1 (GKD, 2306.13649,
    equation 1). Divided by beta it goes to the forward KL as beta goes to 0, by 1 - beta to the reverse one at 1."""

    def terms(teacher, student):
        m = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
        return beta * jnp.exp(teacher) * (teacher - m) + (1 - beta) * jnp.exp(student) * (student - m)

    return terms


def between(beta: float) -> Callable:
    """Forward KL at 0, reverse KL at 1, `jsd` between: TRL's reading of GKD's beta, which leaves the ends undivided."""
    return forward_kl if beta == 0 else reverse_kl if beta == 1 else jsd(beta)


class Divergence(NamedTuple):
    """Sums over the tokens of the mask. Only `total` carries a gradient, into the student."""

    total: jax.Array  # alpha divergence + (1 - alpha) nll
    divergence: jax.Array
    nll: jax.Array  # of the student, at temperature 1
    teacher_nll: jax.Array
    entropy: jax.Array  # of the student
    correct: jax.Array  # how often the student's argmax is the token


def divergence(x, unembed: Unembed, teacher_x, teacher_unembed: Unembed, tokens, mask, equation: Callable, *, alpha: float = 1.0, tau: float = 1.0, chunk: int | None = None) -> Divergence:
    """sum over tokens of alpha equation(log p, log q) + (1 - alpha) (-log q1[token]), p and q at temperature tau, q1 at 1.

    x f[B,T,D], teacher_x f[B,T,D'], both already shifted (`ops.logprob.before`); unembeddings [V,D] and [V,D'];
    tokens i32[B,T]; mask f32[B,T]. Differentiable in x and its unembedding.
    """
    return Divergence(*_divergence(x, unembed, teacher_x, teacher_unembed, tokens, mask.astype(wide(x)), equation, alpha, tau, chunk))


def _scan(x, u, tx, tu, tokens, mask, equation, alpha, tau, cap, grads: bool):
    def walk(pieces, x, u, tx, tu, tokens, mask):
        c = _chunk(*x.shape[:2], 2 * u.weight.shape[0], cap)  # two models' logits at once
        full, teacher = _gathered(pieces, u, x.dtype), _gathered(pieces, tu, tx.dtype)

        def log_probs(z):
            top = pieces.max(z.max(-1), "vocab")[..., None]
            return z - top - jnp.log(pieces.sum(jnp.exp(z - top).sum(-1), "vocab"))[..., None]

        def some(carry, xs):
            xc, txc, tc, mc = xs
            z, slope = _logits(xc, full, 1.0)
            tz = _logits(txc, teacher, 1.0)[0]
            e, top, total, product, hit = _softmax(pieces, z, tc)
            _, ttop, ttotal, _, thit = _softmax(pieces, tz, tc)
            lse = top + jnp.log(total)
            p, q = log_probs(tz / tau), log_probs(z / tau)
            terms, pull = jax.vjp(lambda q: equation(p, q), q)
            value = pieces.sum(terms.sum(-1), "vocab")
            nll = lse - hit
            out = (alpha * value + (1 - alpha) * nll, value, nll, ttop + jnp.log(ttotal) - thit, lse - product / total, (hit >= top).astype(z.dtype))
            sums = jax.tree.map(lambda a, v: a + jnp.where(mc > 0, mc * v, 0).sum(), carry[0], out)
            if not grads:
                return (sums, None), None
            # d log q / dz = (1 - q) / tau, so dz = (g - q sum g) / tau with g the derivative of the terms in log q.
            g = pull(jnp.ones_like(terms))[0]
            dz = alpha / tau * (g - jnp.exp(q) * pieces.sum(g.sum(-1), "vocab")[..., None])
            if alpha != 1:
                dz = dz + (1 - alpha) * (e / total[..., None] - _hot(pieces, z, tc))
            dz = jnp.where(mc[..., None] > 0, mc[..., None] * dz, 0.0)
            dx, w, b = _back(dz, slope, xc, full, 1.0)
            return (sums, (carry[1][0] + w, carry[1][1] + b)), dx.astype(x.dtype)

        def body(carry, xs):
            none = lambda k, v: (k, jnp.zeros_like(v[0]) if grads else None)
            return jax.lax.cond(xs[0], some, none, carry, xs[1])

        start = ((jnp.zeros((), wide(x)),) * 6, _zeros(full, wide(x)) if grads else None)
        chunks = tuple(_split(a, c) for a in (x, tx, tokens, mask))
        (sums, dwb), dx = jax.lax.scan(body, start, (_asked(pieces, chunks[3]), chunks))
        sums = pieces.sum(sums, "batch", "time")
        return (sums, (_states(pieces, dx, x.shape[1]), _grads(pieces, u, *dwb))) if grads else (sums, None)

    out = ("", (STATES, _cut(u)) if grads else None)
    return shard.local(walk, STATES, _cut(u), STATES, _cut(tu), ROWS, ROWS, out=out)(x, u, tx, tu, tokens, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _divergence(x, u, tx, tu, tokens, mask, equation, alpha, tau, cap):
    return _scan(x, u, tx, tu, tokens, mask, equation, alpha, tau, cap, grads=False)[0]


def _divergence_fwd(x, u, tx, tu, tokens, mask, equation, alpha, tau, cap):
    return _scan(x, u, tx, tu, tokens, mask, equation, alpha, tau, cap, grads=True)


def _divergence_bwd(equation, alpha, tau, cap, saved, g):
    return *_scaled(saved, g[0]), None, None, None, None


_divergence.defvjp(_divergence_fwd, _divergence_bwd)
