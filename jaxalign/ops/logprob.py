"""Hidden states to token log-probabilities without ever holding [B,T,V] logits, forward or backward.

`before` is the only shift in the package. `logprob` walks over time in chunks, keeps only lse and entropy per token, and
recomputes a chunk's logits in its own VJP, exact for the cotangents of log-prob, entropy and lse. `linear_ce` (`lm`) and
`token_loss` (`ppo`) are sums over tokens, linear in their one cotangent, so their gradients are made in the forward pass
and no logits are computed twice. A chunk in which nothing is asked for (a prompt, padding) is skipped.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops.nn import Unembed, columns, rows, wide


class LogProbs(NamedTuple):
    """All f32[B,T], 0 where mask is 0."""

    logp: jax.Array  # log p(token_t)
    entropy: jax.Array  # of the whole distribution, nats
    lse: jax.Array  # logsumexp of the logits after temperature


def firsts(segments: jax.Array) -> jax.Array:
    """bool[B,T]: the first token of every segment."""
    return jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)


def before(x: jax.Array, segments: jax.Array) -> jax.Array:
    """x[t-1] at t, 0 at the first token of every segment and on padding. x [B,T,...]."""
    shifted = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
    keep = (~firsts(segments)) & (segments != 0)
    return jnp.where(keep.reshape(keep.shape + (1,) * (x.ndim - 2)), shifted, 0)


def targets(mask: jax.Array, segments: jax.Array) -> jax.Array:
    """The mask with the first token of every segment and padding taken out: nothing predicts those."""
    return mask * ((~firsts(segments)) & (segments != 0))


def _chunk(B: int, T: int, V: int, cap: int | None) -> int:
    """Time steps per chunk: about 2^24 logits on a device (64 MiB in f32) on CPU, 2^27 elsewhere."""
    budget = cap or (2**24 if jax.default_backend() == "cpu" else 2**27)
    c = max(budget * shard.batch_shards() // (B * V), 1)
    n = max(-(-T // c), 1)  # equal chunks, so that padding is small
    return -(-T // n)


def _split(a: jax.Array, c: int) -> jax.Array:
    """[B,T,...] -> [T/c, B, c, ...], T padded with zeros."""
    B, T = a.shape[:2]
    a = jnp.pad(a, [(0, 0), (0, -T % c)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(B, -1, c, *a.shape[2:]), 1, 0)


def _join(a: jax.Array, T: int) -> jax.Array:
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :T]


def _logits(x, u: Unembed, temperature):
    """(z [b,c,V] f32 after everything, dz/dy [b,c,V] or 1.0 with y the plain matmul)."""
    y = jnp.einsum("nd,vd->nv", rows(x), u.weight.astype(x.dtype), preferred_element_type=wide(x)).reshape(*x.shape[:-1], -1)
    y = y * u.scale if u.scale != 1.0 else y
    y = y if u.bias is None else y + u.bias.astype(y.dtype)
    if u.softcap is None:
        return y / temperature, 1.0
    t = jnp.tanh(y / u.softcap)
    return u.softcap * t / temperature, 1.0 - t * t


def logits(x: jax.Array, u: Unembed, temperature: float = 1.0) -> jax.Array:
    """f[B,T,D] -> f32[B,T,V]: for sampling the last position, never for a whole batch."""
    return _logits(x, u, temperature)[0]


def next_logits(x, u: Unembed) -> jax.Array:
    """f[B,D] -> f32[V,B], what follows one position of each row: vocabulary first, as `nn.columns` multiplies and `ops.sampling` reads."""
    y = columns(u.weight, x)
    y = y * u.scale if u.scale != 1.0 else y
    y = y if u.bias is None else y + u.bias.astype(y.dtype)[:, None]
    return y if u.softcap is None else u.softcap * jnp.tanh(y / u.softcap)


def _back(dz, slope, x, u: Unembed, temperature):
    """Cotangent of logits -> (dx, dweight f32, dbias f32)."""
    dy = dz * slope / temperature
    db = dy.sum((0, 1))
    dy = rows(dy * u.scale if u.scale != 1.0 else dy).astype(x.dtype)
    dx = jnp.einsum("nv,vd->nd", dy, u.weight.astype(x.dtype), preferred_element_type=wide(x)).reshape(x.shape)
    dw = jnp.einsum("nv,nd->vd", dy, rows(x), preferred_element_type=wide(x))
    return dx, dw, db


def _grads(u: Unembed, dw, db) -> Unembed:
    return u.replace(weight=dw.astype(u.weight.dtype), bias=None if u.bias is None else db.astype(u.bias.dtype))


def _zeros(u: Unembed, dtype):
    return jnp.zeros(u.weight.shape, dtype), jnp.zeros(u.weight.shape[:1], dtype)


# -- log-probs ------------------------------------------------------------------------------------------------------


def logprob(x, unembed: Unembed, tokens, mask, *, temperature=1.0, chunk: int | None = None) -> LogProbs:
    """Log-probability, entropy and lse of tokens under already shifted hidden states (`before`).

    x f[B,T,D]; tokens i32[B,T]; mask f32[B,T], where 0 gives 0 and costs nothing if a whole chunk is 0. `chunk` bounds
    the logits held at once (elements). Differentiable in x, the unembedding and the temperature.
    """
    c = _chunk(*x.shape[:2], unembed.weight.shape[0], chunk)
    return LogProbs(*_logprob(x, unembed, jnp.asarray(temperature, wide(x)), tokens, mask.astype(wide(x)), c))


def _stats(z, tokens, mask) -> LogProbs:
    top = z.max(-1)
    e = jnp.exp(z - top[..., None])
    total = e.sum(-1)
    lse = top + jnp.log(total)
    entropy = lse - (e * z).sum(-1) / total
    logp = jnp.take_along_axis(z, tokens[..., None], -1)[..., 0] - lse
    return LogProbs(*(jnp.where(mask > 0, v, 0.0) for v in (logp, entropy, lse)))


def _dz(z, tokens, mask, entropy, lse, g_logp, g_entropy, g_lse):
    """Cotangent of the logits: d logp = onehot - p; d lse = p; d H = -p (log p + H). No g_entropy: entropy has none.
    Under the mask lse is 0, and a large logit would overflow."""
    log_p = z - lse[..., None]
    factor = (g_lse - g_logp)[..., None]
    if g_entropy is not None:
        factor = factor - g_entropy[..., None] * (log_p + entropy[..., None])
    dz = jnp.exp(log_p) * factor
    dz = jnp.where(jnp.arange(z.shape[-1]) == tokens[..., None], dz + g_logp[..., None], dz)
    return jnp.where(mask[..., None] > 0, dz, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _logprob(x, u, temperature, tokens, mask, c):
    return _logprob_fwd(x, u, temperature, tokens, mask, c)[0]


def _logprob_fwd(x, u, temperature, tokens, mask, c):
    def some(xc, tc, mc):
        return tuple(_stats(_logits(xc, u, temperature)[0], tc, mc))

    def body(_, xs):
        none = lambda xc, tc, mc: (jnp.zeros_like(mc),) * 3
        return None, jax.lax.cond(xs[2].any(), some, none, *xs)

    _, out = jax.lax.scan(body, None, tuple(_split(a, c) for a in (x, tokens, mask)))
    out = tuple(_join(v, x.shape[1]) for v in out)
    return out, (x, u, temperature, tokens, mask, out)


def _logprob_bwd(c, saved, cotangents):
    x, u, temperature, tokens, mask, (logp, entropy, lse) = saved
    g = tuple(jnp.where(mask > 0, v, 0.0) for v in cotangents)

    def some(carry, xs):
        dw, db, dt = carry
        xc, tc, mc, hc, lc, g_logp, g_ent, g_lse = xs
        z, slope = _logits(xc, u, temperature)
        dz = _dz(z, tc, mc, hc, lc, g_logp, g_ent, g_lse)
        dx, w, b = _back(dz, slope, xc, u, temperature)
        return (dw + w, db + b, dt - (dz * z).sum() / temperature), dx.astype(x.dtype)

    def body(carry, xs):
        asked = (xs[5] != 0).any() | (xs[6] != 0).any() | (xs[7] != 0).any()
        return jax.lax.cond(asked, some, lambda k, v: (k, jnp.zeros_like(v[0])), carry, xs)

    xs = tuple(_split(a, c) for a in (x, tokens, mask, entropy, lse, *g))
    (dw, db, dt), dx = jax.lax.scan(body, (*_zeros(u, wide(x)), jnp.zeros((), wide(x))), xs)
    return _join(dx, x.shape[1]), _grads(u, dw, db), dt, None, None


_logprob.defvjp(_logprob_fwd, _logprob_bwd)


# -- sums over tokens with gradients ready --------------------------------------------------------------------------


def token_loss(x, unembed: Unembed, tokens, mask, extra, f, *, entropy=False, temperature: float = 1.0, chunk: int | None = None):
    """(sum over tokens of f(logp, entropy, extra), LogProbs): `logprob` for losses that are sums over tokens, as PPO's.

    The gradient of such a sum is known up to one factor when a chunk's logits are there, so it is made with them and
    they are computed once, not twice. Only the sum carries a gradient, into x and the unembedding; through the entropy
    only if `entropy`.

    x f[B,T,D]; tokens i32[B,T]; mask f32[B,T]; extra: tree of f32[B,T]; f maps these, chunk by chunk, to f32[B,c].
    """
    c = _chunk(*x.shape[:2], unembed.weight.shape[0], chunk)
    total, *out = _token_loss(x, unembed, tokens, mask.astype(wide(x)), jax.tree.map(lambda e: e.astype(wide(x)), extra), f, entropy, temperature, c)
    return total, LogProbs(*map(jax.lax.stop_gradient, out))


def _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, c, grads: bool):
    def some(carry, xs):
        xc, tc, mc, ec = xs
        z, slope = _logits(xc, u, temperature)
        out = _stats(z, tc, mc)
        total = lambda logp, h: jnp.where(mc > 0, f(logp, h, ec), 0.0).sum()
        if not grads:
            return (carry[0] + total(out.logp, out.entropy), None), (out, None)
        value, (g_logp, g_entropy) = jax.value_and_grad(total, (0, 1))(out.logp, out.entropy)
        dz = _dz(z, tc, mc, out.entropy, out.lse, g_logp, g_entropy if entropy else None, 0.0)
        dx, w, b = _back(dz, slope, xc, u, temperature)
        return (carry[0] + value, (carry[1][0] + w, carry[1][1] + b)), (out, dx.astype(x.dtype))

    def body(carry, xs):
        none = lambda k, v: (k, (LogProbs(*(jnp.zeros_like(v[2]),) * 3), jnp.zeros_like(v[0]) if grads else None))
        return jax.lax.cond(xs[2].any(), some, none, carry, xs)

    start = (jnp.zeros((), wide(x)), _zeros(u, wide(x)) if grads else None)
    (total, dwb), (out, dx) = jax.lax.scan(body, start, jax.tree.map(lambda a: _split(a, c), (x, tokens, mask, extra)))
    return (total, *(_join(v, x.shape[1]) for v in out)), dwb, dx


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _token_loss(x, u, tokens, mask, extra, f, entropy, temperature, c):
    return _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, c, grads=False)[0]


def _token_loss_fwd(x, u, tokens, mask, extra, f, entropy, temperature, c):
    out, (dw, db), dx = _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, c, grads=True)
    return out, (_join(dx, x.shape[1]), _grads(u, dw, db))


def _token_loss_bwd(f, entropy, temperature, c, saved, g):
    return *_scaled(saved, g[0]), None, None, None


def _scaled(tree, by):
    return jax.tree.map(lambda v: (v * by).astype(v.dtype), tree)


_token_loss.defvjp(_token_loss_fwd, _token_loss_bwd)


# -- cross entropy with gradients ready -----------------------------------------------------------------------------


class CrossEntropy(NamedTuple):
    """Sums over the batch, each weighted by `weights`. Only `total` carries a gradient."""

    total: jax.Array  # what is minimised: smoothed nll + z_loss * lse^2
    nll: jax.Array  # plain cross entropy, nats
    entropy: jax.Array
    correct: jax.Array  # how often the argmax is the target


def linear_ce(x, unembed: Unembed, tokens, weights, *, smoothing: float = 0.0, z_loss: float = 0.0, chunk: int | None = None) -> CrossEntropy:
    """Weighted sum of cross entropies of already shifted hidden states: the fused unembedding and loss of `lm`.

    x f[B,T,D]; tokens i32[B,T]; weights f32[B,T]. total = sum w ((1-e) nll + e (lse - mean_v z_v) + z_loss lse^2).
    Sources: Szegedy et al. 1512.00567 (smoothing over the full vocabulary); PaLM 2204.02311 section 5 (z-loss).
    """
    c = _chunk(*x.shape[:2], unembed.weight.shape[0], chunk)
    return CrossEntropy(*_linear_ce(x, unembed, tokens, weights.astype(wide(x)), smoothing, z_loss, c))


def _ce_scan(x, u, tokens, weights, smoothing, z_loss, c, grads: bool):
    V = u.weight.shape[0]

    def some(carry, xs):
        xc, tc, wc = xs
        z, slope = _logits(xc, u, 1.0)
        top = z.max(-1)
        e = jnp.exp(z - top[..., None])
        total = e.sum(-1)
        lse = top + jnp.log(total)
        hit = jnp.take_along_axis(z, tc[..., None], -1)[..., 0]
        nll = lse - hit
        loss = nll if smoothing == 0 else (1 - smoothing) * nll + smoothing * (lse - z.mean(-1))
        loss = loss + z_loss * lse**2 if z_loss else loss
        sums = [(wc * v).sum() for v in (loss, nll, lse - (e * z).sum(-1) / total, (hit >= top).astype(jnp.float32))]
        sums = jax.tree.map(jnp.add, carry[0], tuple(sums))
        if not grads:
            return (sums, None), None
        # d loss / dz = w (p (1 + 2 z_loss lse) - (1-e) onehot - e/V)
        p_scale = wc / total * (1 + 2 * z_loss * lse if z_loss else 1.0)
        dz = e * p_scale[..., None] - (wc * smoothing / V)[..., None] if smoothing else e * p_scale[..., None]
        dz = jnp.where(jnp.arange(V) == tc[..., None], dz - ((1 - smoothing) * wc)[..., None], dz)
        dx, w, b = _back(dz, slope, xc, u, 1.0)
        return (sums, (carry[1][0] + w, carry[1][1] + b)), dx.astype(x.dtype)

    def body(carry, xs):
        none = lambda k, v: (k, jnp.zeros_like(v[0]) if grads else None)
        return jax.lax.cond((xs[2] != 0).any(), some, none, carry, xs)

    start = ((jnp.zeros((), wide(x)),) * 4, _zeros(u, wide(x)) if grads else None)
    (sums, dwb), dx = jax.lax.scan(body, start, tuple(_split(a, c) for a in (x, tokens, weights)))
    return sums, dwb, dx


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear_ce(x, u, tokens, weights, smoothing, z_loss, c):
    return _ce_scan(x, u, tokens, weights, smoothing, z_loss, c, grads=False)[0]


def _linear_ce_fwd(x, u, tokens, weights, smoothing, z_loss, c):
    sums, (dw, db), dx = _ce_scan(x, u, tokens, weights, smoothing, z_loss, c, grads=True)
    return sums, (_join(dx, x.shape[1]), _grads(u, dw, db))


def _linear_ce_bwd(smoothing, z_loss, c, saved, g):
    return *_scaled(saved, g[0]), None, None


_linear_ce.defvjp(_linear_ce_fwd, _linear_ce_bwd)
