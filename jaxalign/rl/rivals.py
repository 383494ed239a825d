"""Who writes one more answer to each prompt, beside those of the policy (`methods.Method.rival`, `rl.online.OnlineSource`).

Called as rival(model, sampling, policy, reference, prompts, key, version) -> Rollout. Keyword-only arguments are fields of the
config's rl section.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxalign.ops import nn
from jaxalign.rl import engine
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import Model, Prompts, Rollout, UserError


def reference(model: Model, how: Sampling, policy, ref, prompts: Prompts, key, version) -> Rollout:
    """The reference model (XPO)."""
    if how.draft not in ("", "ngram"):
        raise UserError("sampling.draft: the reference answers too, and no draft was made for it; use 'ngram' or leave it empty")
    return engine.generate(model, how, _there(ref), prompts, key, version)


def mixture(model: Model, how: Sampling, policy, ref, prompts: Prompts, key, version, *, mixture: float = 0.5) -> Rollout:
    """The geometric mixture pi^(1-m) ref^m of policy and reference, token by token (2312.00886, section 7; m is TRL's mixture_coef)."""
    if how.slots or how.draft:
        raise UserError("sampling.slots and sampling.draft: the mixture of two models is sampled all rows at once, without a draft; leave both out")
    if not 0 <= mixture <= 1:
        raise UserError(f"rl.mixture {mixture}: the reference's share of the logits must be between 0 and 1")
    return generate(Mixture(model, mixture), how, {"policy": policy, "reference": _there(ref)}, prompts, key, version)


def _there(ref):
    if ref is None:
        raise UserError("objective.beta 0: this method samples from the reference, which is loaded only where beta is above 0")
    return ref


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Two sets of weights of one architecture as a `Model` that decodes: params {"policy", "reference"}, logits
    (1 - share) z_policy + share z_reference, whose softmax is the normalised geometric mixture.

    Hidden states stand side by side and so do the unembeddings, so that decoding needs no case for it; each has its own cache.
    """

    model: Model
    share: float

    @property
    def config(self) -> Any:
        return self.model.config

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        out = []
        for i, name in enumerate(("policy", "reference")):
            own = cache and {**cache, "layers": cache["layers"][_at(cache, i)]}
            out.append(self.model.hidden(params[name], tokens, segments, positions, inputs=inputs, cache=own))
        both = cache and {**out[0].cache, "layers": _pair(*(h.cache["layers"] for h in out))}
        return out[0].replace(x=jnp.concatenate([h.x for h in out], -1), cache=both)

    def unembed(self, params):
        a, b = (self.model.unembed(params[k]) for k in ("policy", "reference"))
        if a.softcap is not None:
            raise UserError("nash_md: this model caps its logits (softcap), and a mixture of capped logits is not one of hidden states; take another model")
        m = self.share
        bias = None if a.bias is None else (1 - m) * a.bias + m * b.bias
        return nn.Unembed(jnp.concatenate([(1 - m) * a.weight, m * b.weight], -1), bias, a.scale)

    def init_cache(self, batch: int, size: int):
        one, other = (self.model.init_cache(batch, size) for _ in range(2))
        return {**one, "layers": _pair(one["layers"], other["layers"])}


# `nn.for_decoding` takes a tuple for layers that are unrolled, so two caches are a tuple only where each is one.
def _pair(a, b):
    return (a, b) if isinstance(a, tuple) else {"0": a, "1": b}


def _at(cache, i: int):
    return i if isinstance(cache["layers"], tuple) else str(i)
