"""Hidden states to token log-probabilities without ever holding [B,T,V] logits, forward or backward.

`before` is the only shift in the package. `logprob` walks over time in chunks, keeps only lse and entropy per token, and
recomputes a chunk's logits in its own VJP, exact for the cotangents of log-prob, entropy and lse. `linear_ce` (`lm`) and
`token_loss` (`ppo`) are sums over tokens, linear in their one cotangent, so their gradients are made in the forward pass
and no logits are computed twice. A chunk in which nothing is asked for (a prompt, padding) is skipped.

On a mesh each device walks over its own rows, times and vocabulary (`shard.local`): the unembedding is gathered over fsdp
once, never over the vocabulary; lse, entropy and the target's logit are sums over the vocabulary's pieces (Shoeybi et al.
2019, 1909.08053, section 3); weight gradients add up on the device and are reduced once, after the last chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops import branches
from jaxalign.ops.nn import Unembed, columns, wide


class LogProbs(NamedTuple):
    """All f32[B,T], 0 where mask is 0."""

    logp: jax.Array  # log p(token_t)
    entropy: jax.Array  # of the whole distribution, nats
    lse: jax.Array  # logsumexp of the logits after temperature


def before(x: jax.Array, segments: jax.Array) -> jax.Array:
    """x[t-1] at t (at the first token of a branch: x at its trunk's last), 0 at the first token of every segment and on
    padding. x [B,T,...]."""
    at = branches.predecessors(segments)
    if branches.branched(segments):
        shifted = jax.vmap(lambda row, i: row[i])(x, jnp.maximum(at, 0))
    else:
        shifted = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
    return jnp.where((at >= 0).reshape(at.shape + (1,) * (x.ndim - 2)), shifted, 0)


def targets(mask: jax.Array, segments: jax.Array) -> jax.Array:
    """The mask with the first token of every segment and padding taken out: nothing predicts those."""
    return mask * (branches.predecessors(segments) >= 0)


# How inputs are cut.
ROWS, STATES = "batch time", "batch time ."


def _cut(u: Unembed) -> Unembed:
    return u.replace(weight="vocab embed", bias=None if u.bias is None else "vocab")


def _gathered(pieces, u: Unembed, dtype) -> Unembed:
    """Over fsdp, in the dtype it is multiplied in: half of the bytes in bf16."""
    return u.replace(weight=pieces.whole(u.weight.astype(dtype), 1, "embed")) if pieces.over("embed") else u


def _chunk(B: int, T: int, V: int, cap: int | None) -> int:
    """Time steps per chunk: about 2^24 logits on a device (64 MiB in f32) on CPU, 2^27 elsewhere."""
    c = max((cap or (2**24 if shard.platform() == "cpu" else 2**27)) // (B * V), 1)
    n = max(-(-T // c), 1)  # equal chunks, so that padding is small
    return -(-T // n)


def _asked(pieces, *chunks) -> jax.Array:
    """bool[n]: in which chunks [n,b,c] anything is not 0. Devices that hold pieces of one vocabulary must go the same way, and
    no device waits for another if all do."""
    asked = sum((x != 0).any((1, 2)).astype(jnp.int32) for x in chunks)
    return (pieces.max(asked, "batch", "time") if pieces.over("vocab") else asked) > 0


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
    y = jnp.einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), u.weight.astype(x.dtype), preferred_element_type=wide(x)).reshape(*x.shape[:-1], -1)
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
    dy = (dy * u.scale if u.scale != 1.0 else dy).astype(x.dtype).reshape(-1, dy.shape[-1])
    dx = jnp.einsum("nv,vd->nd", dy, u.weight.astype(x.dtype), preferred_element_type=wide(x)).reshape(x.shape)
    dw = jnp.einsum("nv,nd->vd", dy, x.reshape(-1, x.shape[-1]), preferred_element_type=wide(x))
    return dx, dw, db


def _grads(pieces, u: Unembed, dw, db) -> Unembed:
    """Of the whole batch, of this device's piece of the weights."""
    dw = pieces.sum(dw, "batch", "time", scatter=(1, "embed"))
    return u.replace(weight=dw.astype(u.weight.dtype), bias=None if u.bias is None else pieces.sum(db, "batch", "time").astype(u.bias.dtype))


def _states(pieces, dx, T: int) -> jax.Array:
    """Chunks of cotangents of the states -> [B,T,D], each summed over the vocabulary."""
    return pieces.sum(_join(dx, T), "vocab")


def _zeros(u: Unembed, dtype):
    return jnp.zeros(u.weight.shape, dtype), jnp.zeros(u.weight.shape[:1], dtype)


def _here(pieces, tokens, V: int) -> jax.Array:
    """Ids as indices into this device's V rows of the unembedding; those of others lie outside of it."""
    return tokens - pieces.index("vocab") * V


def _softmax(pieces, z, tokens):
    """(e^(z - top), top, its sum, the sum of e^(z - top) z, the target's logit), all but the first [b,c] and of the whole vocabulary."""
    top = pieces.max(z.max(-1), "vocab")
    e = jnp.exp(z - top[..., None])
    own = _here(pieces, tokens, z.shape[-1])
    hit = jnp.take_along_axis(z, jnp.clip(own, 0, z.shape[-1] - 1)[..., None], -1)[..., 0]
    if pieces.over("vocab"):
        hit = jnp.where((own >= 0) & (own < z.shape[-1]), hit, 0.0)
    return e, top, *pieces.sum((e.sum(-1), (e * z).sum(-1), hit), "vocab")


def _hot(pieces, z, tokens) -> jax.Array:
    return jnp.arange(z.shape[-1]) == _here(pieces, tokens, z.shape[-1])[..., None]


# -- log-probs ------------------------------------------------------------------------------------------------------


def logprob(x, unembed: Unembed, tokens, mask, *, temperature=1.0, chunk: int | None = None) -> LogProbs:
    """Log-probability, entropy and lse of tokens under already shifted hidden states (`before`).

    x f[B,T,D]; tokens i32[B,T]; mask f32[B,T], where 0 gives 0 and costs nothing if a whole chunk is 0. `chunk` bounds
    the logits held at once (elements). Differentiable in x, the unembedding and the temperature.
    """
    return LogProbs(*_logprob(x, unembed, jnp.asarray(temperature, wide(x)), tokens, mask.astype(wide(x)), chunk))


def log_sum_squares(x, unembed: Unembed, mask, *, temperature: float = 1.0, chunk: int | None = None) -> jax.Array:
    """log sum_v p_v^2 f32[B,T] under already shifted hidden states, 0 where mask is 0: how sure the model is of itself, in nats, at
    most 0. It has no gradient (it weighs losses: WPO, 2406.11827)."""

    def walk(pieces, x, u, mask):
        c = _chunk(*x.shape[:2], u.weight.shape[0], chunk)
        full = _gathered(pieces, u, x.dtype)

        def some(xc, mc):
            z = _logits(xc, full, temperature)[0]
            e = jnp.exp(z - pieces.max(z.max(-1), "vocab")[..., None])
            total, squares = pieces.sum((e.sum(-1), (e * e).sum(-1)), "vocab")
            return jnp.where(mc > 0, jnp.log(squares) - 2 * jnp.log(total), 0.0)

        def body(_, xs):
            return None, jax.lax.cond(xs[0], some, lambda xc, mc: jnp.zeros_like(mc), *xs[1])

        chunks = tuple(_split(a, c) for a in (x, mask))
        return _join(jax.lax.scan(body, None, (_asked(pieces, chunks[1]), chunks))[1], x.shape[1])

    x, unembed = jax.lax.stop_gradient((x, unembed))
    return shard.local(walk, STATES, _cut(unembed), ROWS, out=ROWS)(x, unembed, mask.astype(wide(x)))


def _stats(pieces, z, tokens, mask) -> LogProbs:
    _, top, total, product, hit = _softmax(pieces, z, tokens)
    lse = top + jnp.log(total)
    return LogProbs(*(jnp.where(mask > 0, v, 0.0) for v in (hit - lse, lse - product / total, lse)))


def _dz(pieces, z, tokens, mask, entropy, lse, g_logp, g_entropy, g_lse):
    """Cotangent of the logits: d logp = onehot - p; d lse = p; d H = -p (log p + H). No g_entropy: entropy has none.
    Under the mask lse is 0, and a large logit would overflow."""
    log_p = z - lse[..., None]
    factor = (g_lse - g_logp)[..., None]
    if g_entropy is not None:
        factor = factor - g_entropy[..., None] * (log_p + entropy[..., None])
    dz = jnp.exp(log_p) * factor
    dz = jnp.where(_hot(pieces, z, tokens), dz + g_logp[..., None], dz)
    return jnp.where(mask[..., None] > 0, dz, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _logprob(x, u, temperature, tokens, mask, cap):
    return _logprob_fwd(x, u, temperature, tokens, mask, cap)[0]


def _logprob_fwd(x, u, temperature, tokens, mask, cap):
    def walk(pieces, x, u, temperature, tokens, mask):
        c = _chunk(*x.shape[:2], u.weight.shape[0], cap)
        full = _gathered(pieces, u, x.dtype)

        def some(xc, tc, mc):
            return tuple(_stats(pieces, _logits(xc, full, temperature)[0], tc, mc))

        def body(_, xs):
            none = lambda xc, tc, mc: (jnp.zeros_like(mc),) * 3
            return None, jax.lax.cond(xs[0], some, none, *xs[1])

        chunks = tuple(_split(a, c) for a in (x, tokens, mask))
        _, out = jax.lax.scan(body, None, (_asked(pieces, chunks[2]), chunks))
        return tuple(_join(v, x.shape[1]) for v in out)

    out = shard.local(walk, STATES, _cut(u), "", ROWS, ROWS, out=ROWS)(x, u, temperature, tokens, mask)
    return out, (x, u, temperature, tokens, mask, out)


def _logprob_bwd(cap, saved, cotangents):
    x, u, temperature, tokens, mask, (_, entropy, lse) = saved
    g = tuple(jnp.where(mask > 0, v, 0.0) for v in cotangents)

    def walk(pieces, x, u, temperature, *per_token):
        c = _chunk(*x.shape[:2], u.weight.shape[0], cap)
        full = _gathered(pieces, u, x.dtype)

        def some(carry, xs):
            dw, db, dt = carry
            xc, tc, mc, hc, lc, g_logp, g_ent, g_lse = xs
            z, slope = _logits(xc, full, temperature)
            dz = _dz(pieces, z, tc, mc, hc, lc, g_logp, g_ent, g_lse)
            dx, w, b = _back(dz, slope, xc, full, temperature)
            return (dw + w, db + b, dt - (dz * z).sum() / temperature), dx.astype(x.dtype)

        def body(carry, xs):
            return jax.lax.cond(xs[0], some, lambda k, v: (k, jnp.zeros_like(v[0])), carry, xs[1])

        chunks = tuple(_split(a, c) for a in (x, *per_token))
        start = (*_zeros(full, wide(x)), jnp.zeros((), wide(x)))
        (dw, db, dt), dx = jax.lax.scan(body, start, (_asked(pieces, *chunks[5:]), chunks))
        return _states(pieces, dx, x.shape[1]), _grads(pieces, u, dw, db), pieces.sum(dt, "batch", "time", "vocab")

    run = shard.local(walk, STATES, _cut(u), "", *(ROWS,) * 7, out=(STATES, _cut(u), ""))
    return *run(x, u, temperature, tokens, mask, entropy, lse, *g), None, None


_logprob.defvjp(_logprob_fwd, _logprob_bwd)


# -- sums over tokens with gradients ready --------------------------------------------------------------------------


def token_loss(x, unembed: Unembed, tokens, mask, extra, f, *, entropy=False, temperature: float = 1.0, chunk: int | None = None):
    """(sum over tokens of f(logp, entropy, extra), LogProbs): `logprob` for losses that are sums over tokens, as PPO's.

    The gradient of such a sum is known up to one factor when a chunk's logits are there, so it is made with them and
    they are computed once, not twice. Only the sum carries a gradient, into x and the unembedding; through the entropy
    only if `entropy`.

    x f[B,T,D]; tokens i32[B,T]; mask f32[B,T]; extra: tree of f32[B,T]; f maps these, chunk by chunk, to f32[B,c], and
    holds no arrays of its own.
    """
    total, *out = _token_loss(x, unembed, tokens, mask.astype(wide(x)), jax.tree.map(lambda e: e.astype(wide(x)), extra), f, entropy, temperature, chunk)
    return total, LogProbs(*map(jax.lax.stop_gradient, out))


def _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, cap, grads: bool):
    def walk(pieces, x, u, tokens, mask, extra):
        c = _chunk(*x.shape[:2], u.weight.shape[0], cap)
        full = _gathered(pieces, u, x.dtype)

        def some(carry, xs):
            xc, tc, mc, ec = xs
            z, slope = _logits(xc, full, temperature)
            out = _stats(pieces, z, tc, mc)
            total = lambda logp, h: jnp.where(mc > 0, f(logp, h, ec), 0.0).sum()
            if not grads:
                return (carry[0] + total(out.logp, out.entropy), None), (out, None)
            value, (g_logp, g_entropy) = jax.value_and_grad(total, (0, 1))(out.logp, out.entropy)
            dz = _dz(pieces, z, tc, mc, out.entropy, out.lse, g_logp, g_entropy if entropy else None, 0.0)
            dx, w, b = _back(dz, slope, xc, full, temperature)
            return (carry[0] + value, (carry[1][0] + w, carry[1][1] + b)), (out, dx.astype(x.dtype))

        def body(carry, xs):
            none = lambda k, v: (k, (LogProbs(*(jnp.zeros_like(v[2]),) * 3), jnp.zeros_like(v[0]) if grads else None))
            return jax.lax.cond(xs[0], some, none, carry, xs[1])

        start = (jnp.zeros((), wide(x)), _zeros(full, wide(x)) if grads else None)
        chunks = jax.tree.map(lambda a: _split(a, c), (x, tokens, mask, extra))
        (total, dwb), (out, dx) = jax.lax.scan(body, start, (_asked(pieces, chunks[2]), chunks))
        out = (pieces.sum(total, "batch", "time"), *(_join(v, x.shape[1]) for v in out))
        return (out, (_states(pieces, dx, x.shape[1]), _grads(pieces, u, *dwb))) if grads else (out, None)

    out = (("", ROWS, ROWS, ROWS), (STATES, _cut(u)) if grads else None)
    return shard.local(walk, STATES, _cut(u), ROWS, ROWS, ROWS, out=out)(x, u, tokens, mask, extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _token_loss(x, u, tokens, mask, extra, f, entropy, temperature, cap):
    return _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, cap, grads=False)[0]


def _token_loss_fwd(x, u, tokens, mask, extra, f, entropy, temperature, cap):
    return _token_scan(x, u, tokens, mask, extra, f, entropy, temperature, cap, grads=True)


def _token_loss_bwd(f, entropy, temperature, cap, saved, g):
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
    return CrossEntropy(*_linear_ce(x, unembed, tokens, weights.astype(wide(x)), smoothing, z_loss, chunk))


def _ce_scan(x, u, tokens, weights, smoothing, z_loss, cap, grads: bool):
    V = u.weight.shape[0]

    def walk(pieces, x, u, tokens, weights):
        c = _chunk(*x.shape[:2], u.weight.shape[0], cap)
        full = _gathered(pieces, u, x.dtype)

        def some(carry, xs):
            xc, tc, wc = xs
            z, slope = _logits(xc, full, 1.0)
            e, top, total, product, hit = _softmax(pieces, z, tc)
            lse = top + jnp.log(total)
            nll = lse - hit
            loss = nll if smoothing == 0 else (1 - smoothing) * nll + smoothing * (lse - pieces.sum(z.sum(-1), "vocab") / V)
            loss = loss + z_loss * lse**2 if z_loss else loss
            sums = [(wc * v).sum() for v in (loss, nll, lse - product / total, (hit >= top).astype(jnp.float32))]
            sums = jax.tree.map(jnp.add, carry[0], tuple(sums))
            if not grads:
                return (sums, None), None
            # d loss / dz = w (p (1 + 2 z_loss lse) - (1-e) onehot - e/V)
            p_scale = wc / total * (1 + 2 * z_loss * lse if z_loss else 1.0)
            dz = e * p_scale[..., None] - (wc * smoothing / V)[..., None] if smoothing else e * p_scale[..., None]
            dz = jnp.where(_hot(pieces, z, tc), dz - ((1 - smoothing) * wc)[..., None], dz)
            dx, w, b = _back(dz, slope, xc, full, 1.0)
            return (sums, (carry[1][0] + w, carry[1][1] + b)), dx.astype(x.dtype)

        def body(carry, xs):
            none = lambda k, v: (k, jnp.zeros_like(v[0]) if grads else None)
            return jax.lax.cond(xs[0], some, none, carry, xs[1])

        start = ((jnp.zeros((), wide(x)),) * 4, _zeros(full, wide(x)) if grads else None)
        chunks = tuple(_split(a, c) for a in (x, tokens, weights))
        (sums, dwb), dx = jax.lax.scan(body, start, (_asked(pieces, chunks[2]), chunks))
        sums = pieces.sum(sums, "batch", "time")
        return (sums, (_states(pieces, dx, x.shape[1]), _grads(pieces, u, *dwb))) if grads else (sums, None)

    out = ("", (STATES, _cut(u)) if grads else None)
    return shard.local(walk, STATES, _cut(u), ROWS, ROWS, out=out)(x, u, tokens, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _linear_ce(x, u, tokens, weights, smoothing, z_loss, cap):
    return _ce_scan(x, u, tokens, weights, smoothing, z_loss, cap, grads=False)[0]


def _linear_ce_fwd(x, u, tokens, weights, smoothing, z_loss, cap):
    return _ce_scan(x, u, tokens, weights, smoothing, z_loss, cap, grads=True)


def _linear_ce_bwd(smoothing, z_loss, cap, saved, g):
    return *_scaled(saved, g[0]), None, None


_linear_ce.defvjp(_linear_ce_fwd, _linear_ce_bwd)
