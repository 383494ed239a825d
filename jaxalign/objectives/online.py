"""Preference learning on answers that the policy writes while it trains: the losses of offline methods on its own samples, XPO, Nash-MD.

What is made of rollouts stands in `rl.selection`, who writes the other answer in `rl.rivals`. params {"policy": ...}.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.objectives.lm import lm
from jaxalign.objectives.preference import dpo, pair_logps, sigmoid_loss
from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.types import Duels, Loss, Model, Objective, RivalPairs, Term, UserError


def on_policy(maker: Callable[..., Objective]) -> Callable[..., Objective]:
    """The same loss (of pairs, of tokens) for a policy that samples its own batches: what `maker` asks of params, and of frozen
    weights beside them, is the policy's."""

    @functools.wraps(maker)
    def make(model: Model, **options) -> Objective:
        o = maker(model, **options)
        if o.reference is not None:
            raise UserError("objective.name: this loss sums the reference's log-probs in a way of its own, which only files of pairs have; take it without online_")
        base = lambda frozen: {**frozen, "base": frozen["base"]["policy"]} if "base" in frozen else frozen
        inner = lambda f: f and (lambda params, frozen, *rest: f(params["policy"], base(frozen), *rest))
        update = o.update_aux and (lambda aux, params, metrics, step: o.update_aux(aux, params["policy"], metrics, step))
        init = o.init_aux and (lambda params: o.init_aux(params["policy"]))
        finish = o.finish and (lambda params, aux: {**params, "policy": o.finish(params["policy"], aux)})
        return dataclasses.replace(o, loss=inner(o.loss), stats=inner(o.stats), held_out=inner(o.held_out), init_aux=init, update_aux=update, finish=finish, shared=False)

    return make


online_dpo = on_policy(dpo)  # Guo et al. 2024, 2402.04792: two answers of the policy, the better one chosen
raft = on_policy(lm)  # Dong et al. 2023, 2304.06767: cross entropy on the best of its own answers


# -- equations ------------------------------------------------------------------------------------------------------


def nash_md_loss(logp, ref_logp, preferred, beta, mask):
    """-(P - 1/2 - beta log pi(y)/ref(y)) log pi(y), f32[B], whose gradient is Nash-MD-PG's (2312.00886, section 7): REINFORCE with
    the preference over the mixture's answer as reward, 1/2 as baseline, and the KL of the whole answer. Log-probs f32[B,T], P f32[B]."""
    ratio = (mask * (logp - ref_logp)).sum(1)
    return -jax.lax.stop_gradient(preferred - 0.5 - beta * ratio) * (mask * logp).sum(1)


def nash_md_token_loss(logp, ref_logp, preferred, beta, mask):
    """The same as TRL's NashMDTrainer has it: in the KL part each token answers for its own log-ratio alone."""
    ratio = jax.lax.stop_gradient(logp - ref_logp)
    return (mask * (beta * ratio - (preferred - 0.5)[:, None]) * logp).sum(1)


# -- objectives -----------------------------------------------------------------------------------------------------


def xpo(model: Model, *, beta: float = 0.1, alpha: float = 1e-5) -> Objective:
    """Exploratory preference optimisation (Xie et al. 2024, 2405.21046, algorithm 1): DPO on an answer of the policy and one of the
    reference, plus alpha log pi(the reference's answer), which drives the policy away from what the reference says anyway.
    Both are means over the pairs; alpha is TRL's."""

    def loss(params, frozen, aux, batch: RivalPairs, key, stats) -> Loss:
        w, l, n_w, n_l, entropy = pair_logps(model, params["policy"], batch)
        real = ((n_w > 0) & (n_l > 0)).astype(jnp.float32)
        a, b = (jnp.where(real > 0, x, 0.0) for x in (w - batch.ref_chosen, l - batch.ref_rejected))
        rival = jnp.where(batch.rival_won > 0, w, l)
        n = real.sum()
        terms = {"preference": Term((real * sigmoid_loss(a, b, n_w, n_l, beta)).sum(), n), "exploration": Term((real * rival).sum(), n, alpha)}
        a, b, w, l, rival, entropy = jax.lax.stop_gradient((a, b, w, l, rival, entropy))
        mean = lambda x: ((real * x).sum(), n)
        metrics = {
            "rewards/chosen": mean(beta * a),
            "rewards/rejected": mean(beta * b),
            "rewards/accuracies": mean(a > b),
            "rewards/margins": mean(beta * (a - b)),
            "logps/chosen": mean(w),
            "logps/rejected": mean(l),
            "logps/rival": mean(rival),
            "entropy": (entropy, n_w.sum() + n_l.sum()),
        }
        return Loss(terms, metrics)

    return Objective(loss)


def duel(model: Model, equation: Callable, *, beta: float, temperature: float = 1.0) -> Objective:
    """An objective from `equation(logp, ref_logp, preferred, beta, mask) -> f32[B]` on batches of `Duels`, averaged over the answers."""

    def loss(params, frozen, aux, batch: Duels, key, stats) -> Loss:
        mask = targets(batch.mask, batch.segments)
        h = model.hidden(params["policy"], batch.tokens, batch.segments, batch.positions)
        out = logprob(before(h.x, batch.segments), model.unembed(params["policy"]), batch.tokens, mask, temperature=temperature)
        ref = jnp.where(mask > 0, batch.ref_logp, 0.0)
        length = mask.sum(1)
        real = (length > 0).astype(jnp.float32)
        n = real.sum()
        term = Term((real * equation(out.logp, ref, batch.preferred, beta, mask)).sum(), n)
        logp, entropy = jax.lax.stop_gradient((out.logp, out.entropy))
        mean = lambda x: ((real * x).sum(), n)
        metrics = {
            "objective/kl": mean((mask * (logp - ref)).sum(1)),
            "rewards/probabilities": mean(batch.preferred),
            "logps/policy": mean((mask * logp).sum(1)),
            "entropy": ((mask * entropy).sum(), length.sum()),
        }
        return Loss({"policy": term}, metrics)

    return Objective(loss)


def nash_md(model: Model, *, beta: float = 0.1, temperature: float = 1.0) -> Objective:
    """Nash-MD (Munos et al. 2023, 2312.00886): policy gradient towards the answers that are preferred to those of a mixture between
    policy and reference, whose fixed point no policy beats; beta is the paper's tau."""
    return duel(model, nash_md_loss, beta=beta, temperature=temperature)


def nash_md_token(model: Model, *, beta: float = 0.1, temperature: float = 1.0) -> Objective:
    """Nash-MD with the KL part token by token, as TRL (to 0.2x) has it: a smaller variance, and what a token does to the KL of
    those after it is left out."""
    return duel(model, nash_md_token_loss, beta=beta, temperature=temperature)
