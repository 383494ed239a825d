"""Log-probs of a policy that another one restricts: only tokens that the other holds likely may be written (NLPO,
Ramamurthy et al. 2022, 2210.01241). Chunked over time like `ops.logprob`: never [B,T,V] of either, forward or backward."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.ops.logprob import LogProbs, _chunk, _join, _logits, _split
from jaxalign.ops.nn import Unembed
from jaxalign.types import UserError

KINDS = ("learned_top_p", "learned_top_k", "top_p", "top_k")  # the last two by a masking policy that is never replaced
NEVER = -1e30  # a logit that no softmax sees, and that is 0 when multiplied by its probability


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which tokens the masking policy allows. Names and defaults are those of RL4LMs."""

    mask_type: str = "learned_top_p"
    top_mask: float = 0.9  # p, or k
    min_tokens_to_keep: int = 100
    special: tuple[int, ...] = ()  # ids that are always allowed: a text must be able to end

    def __post_init__(self):
        k = self.mask_type.endswith("top_k")
        if self.mask_type not in KINDS or not (self.top_mask >= 1 and self.top_mask == int(self.top_mask) if k else 0 < self.top_mask <= 1) or self.min_tokens_to_keep < 1:
            raise UserError(
                f"objective.mask_type is one of {', '.join(KINDS)}, top_mask a share above 0 and at most 1 (of top_k and learned_top_k: a whole number), min_tokens_to_keep 1 or more; "
                f"got {self.mask_type!r}, {self.top_mask} and {self.min_tokens_to_keep}"
            )


def allowed(logits: jax.Array, rule: Rule) -> jax.Array:
    """bool[...,V] of the masking policy's logits [...,V].

    top_p, learned_top_p: of the tokens in falling order, those before which the cumulative probability is not above p, so that the one
    that crosses p stays; and the first min_tokens_to_keep. top_k, learned_top_k: the first k. Special tokens always. Ties at the border
    stay. p = 1 allows everything, whatever rounding makes of the sum.
    """
    V = logits.shape[-1]
    if rule.mask_type.endswith("top_k"):
        border = jax.lax.top_k(logits, min(max(int(rule.top_mask), 1), V))[0][..., -1:]
    elif rule.top_mask >= 1:
        return jnp.ones(logits.shape, bool)
    else:
        ordered = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ordered, axis=-1)
        kept = (jnp.cumsum(p, axis=-1) - p <= rule.top_mask) | (jnp.arange(V) < rule.min_tokens_to_keep)
        border = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    ok = logits >= border
    return ok.at[..., jnp.array(rule.special)].set(True) if rule.special else ok


def masked_logprob(x, unembed: Unembed, other, other_unembed: Unembed, tokens, mask, rule: Rule, *, temperature=1.0, chunk: int | None = None) -> tuple[LogProbs, jax.Array]:
    """(`LogProbs` of the policy restricted to what the other allows, entropy and lse too; how many tokens that is, f32[B,T]).

    x and other f[B,T,D], before each token; tokens i32[B,T]; mask f32[B,T], where 0 gives 0. The token that stands there is
    always allowed: rounding must not take the ground from under a sample. Differentiable in x and the unembedding alone.
    """
    other, other_unembed = jax.lax.stop_gradient((other, other_unembed))
    B, T = tokens.shape
    c = _chunk(-(-B // shard.batch_shards()), T, unembed.weight.shape[0], chunk)

    def some(xc, oc, tc, mc, unembed):
        ok = allowed(_logits(oc, other_unembed, 1.0)[0], rule) | (jnp.arange(unembed.weight.shape[0]) == tc[..., None])
        z = jnp.where(ok, _logits(xc, unembed, temperature)[0], NEVER)
        lse = jax.nn.logsumexp(z, -1)
        logp = z - lse[..., None]
        own = jnp.take_along_axis(logp, tc[..., None], -1)[..., 0]
        return tuple(jnp.where(mc > 0, v, 0.0) for v in (own, -jnp.where(ok, jnp.exp(logp) * logp, 0.0).sum(-1), lse, ok.sum(-1).astype(z.dtype)))

    @jax.checkpoint  # the logits of a chunk are made again in the backward pass
    def body(unembed, asked, chunk):
        return jax.lax.cond(asked, some, lambda xc, oc, tc, mc, u: (jnp.zeros_like(mc),) * 4, *chunk, unembed)

    chunks = tuple(_split(a, c) for a in (x, other, tokens, mask.astype(jnp.float32)))
    _, out = jax.lax.scan(lambda _, xs: (None, body(unembed, *xs)), None, ((chunks[3] != 0).any((1, 2)), chunks))
    *values, count = (_join(v, T) for v in out)
    return LogProbs(*values), jax.lax.stop_gradient(count)
