"""A policy that another one restricts, as NLPO samples from it (`objectives.nlpo`): both read the text as it grows, each with
its own cache, and a token is drawn from what the masking policy allows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.objectives.nlpo import masked_logps, masking_policy
from jaxalign.objectives.ppo import states_and_values
from jaxalign.ops.allowed import NEVER, Rule, allowed
from jaxalign.ops.logprob import next_logits, targets
from jaxalign.ops.masked import masked_mean
from jaxalign.rl.experience import make_experience
from jaxalign.types import Model, Rollout, ScalarModel, Tree

BOTH = ("segments", "positions", "length", "cross_segments")  # of a cache: what is the same for two networks that read one text


@dataclasses.dataclass(frozen=True)
class Masked:
    """A `types.Model` for sampling; params {"policy", "masking"}. Its hidden states are those of both, side by side."""

    model: Model
    rule: Rule

    @property
    def config(self):
        return self.model.config

    @property
    def trunk(self):
        """What a reference is: without a mask."""
        return self.model

    @property
    def positions(self):
        return getattr(self.model, "positions", None)

    @property
    def start(self):
        return getattr(self.model, "start", None)

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        run = lambda i, name: self.model.hidden(params[name], tokens, segments, positions, inputs=inputs, cache=cache and _side(cache, i), key=key)
        a, b = run(0, "policy"), run(1, "masking")
        return a.replace(x=jnp.concatenate([a.x, b.x], -1), cache=cache and _paired(a.cache, b.cache))

    def unembed(self, params):
        return self.model.unembed(params["policy"])

    def init_cache(self, batch, size):
        cache = self.model.init_cache(batch, size)
        return _paired(cache, cache)

    def next_logits(self, params, x):
        """f[B,2D] -> f32[V,B]."""
        own, other = jnp.split(x, 2, -1)
        ok = allowed(next_logits(other, self.model.unembed(params["masking"])).T, self.rule).T
        return jnp.where(ok, next_logits(own, self.unembed(params)), NEVER)


def _paired(a: Tree, b: Tree) -> Tree:
    """Two caches as one. Layers that are unrolled stay a tuple, of both: so `ops.nn.for_decoding` knows them."""
    return {k: a[k] if k in BOTH else a[k] + b[k] if isinstance(a[k], tuple) else {"policy": a[k], "masking": b[k]} for k in a}


def _side(cache: Tree, i: int) -> Tree:
    half = lambda c: (c[: len(c) // 2], c[len(c) // 2 :])[i] if isinstance(c, tuple) else c[("policy", "masking")[i]]
    return {k: v if k in BOTH else half(v) for k, v in cache.items()}


def actor(model: Model, *, mask_type: str, top_mask: float, min_tokens_to_keep: int, special: tuple[int, ...] = (), **others) -> Masked:
    """What samples for an objective with these options."""
    return Masked(model, Rule(mask_type, top_mask, min_tokens_to_keep, tuple(special)))


def beside(frozen: dict) -> Callable:
    """(params, aux) -> params with the masking policy beside the policy, as `Masked` and `nlpo_experience` read them."""
    return lambda params, aux: {**params, "policy": {"policy": params["policy"], "masking": masking_policy(aux, frozen)}}


@functools.partial(
    jax.jit, static_argnums=(0, 1), static_argnames=("temperature", "gamma", "lam", "kl_estimator", "missing_eos_penalty", "missing_eos_value", "clip_score")
)
def nlpo_experience(
    model: Masked,
    value: ScalarModel | None,
    params,
    reference,
    rollout: Rollout,
    scores,
    beta,
    divisor=1.0,
    *,
    temperature: float = 1.0,
    gamma: float = 0.99,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    missing_eos_penalty: float = 0.0,
    missing_eos_value: float | None = None,
    clip_score: float | None = None,
):
    """As `rl.experience.make_experience`, of params with the masking policy beside the policy (`beside`): the old log-probs are
    masked ones, for the ratio; rewards take the KL of the unmasked ones off. Advantages are left to the minibatch, but for their mean:
    a minibatch that whitens them finds the same, and its E[A^2] - E[A]^2 stays exact when a new critic is far off."""
    both = params["policy"]
    params = {**params, "policy": both["policy"]}
    shaping = dict(temperature=temperature, gamma=gamma, lam=lam, kl_estimator=kl_estimator, missing_eos_penalty=missing_eos_penalty, missing_eos_value=missing_eos_value, clip_score=clip_score)
    exp, metrics = make_experience(model.model, value, params, reference, rollout, scores, beta, divisor, whiten_advantages=False, **shaping)
    mask = targets(rollout.mask, rollout.segments)
    x, _ = states_and_values(model.model, value, params, rollout)  # the same forward again: the compiler runs it once
    old, count = masked_logps(model.model, both["policy"], both["masking"], rollout, x, mask, model.rule, temperature)
    metrics |= {
        "objective/entropy": old.entropy.sum(1).mean(),
        "objective/allowed": masked_mean(count, mask),
        "logprob_gap": jnp.abs(jnp.where(mask > 0, old.logp - rollout.logp, 0.0)).max(),
    }
    return exp._replace(logp=old.logp, advantages=mask * (exp.advantages - masked_mean(exp.advantages, mask))), metrics
