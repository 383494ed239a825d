"""Preference losses on pairs without a reference: likelihoods and odds of the policy alone, mostly with cross entropy of the chosen.

Equations are those of `preference` with reference log-probs of 0: a = log pi(w), b = log pi(l), sums over n_w and n_l tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.objectives.preference import (
    Compared, alpha_divergence, compared, hinge_loss, ipo_loss, log_sigmoid, of_pairs, pair_metrics, per_token, sides, sigmoid_loss,
    token_nll, whole,
)  # fmt: skip
from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.types import BRANCH, Loss, Model, Objective, Pairs, SharedPairs, Term, UserError


def log1mexp(u):
    """log(1 - exp(u)) for u < 0, exact near both ends (Maechler 2012). u is cut at -1e-6: at probability 1 odds are infinite."""
    u, edge = jnp.minimum(u, -1e-6), -math.log(2)
    near = u > edge  # each form is given numbers of its own half: the other's would make a NaN of the gradient
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, u, edge))), jnp.log1p(-jnp.exp(jnp.where(near, edge, u))))


def log_odds_ratio(a, b, n_w, n_l):
    """log odds(w) - log odds(l), odds(y) = p / (1 - p) with p = exp of the mean log-prob per token (2403.07691 eq. 3 and 4)."""
    x, y = per_token(a, n_w), per_token(b, n_l)
    return (x - y) - (log1mexp(x) - log1mexp(y))


def odds_ratio_loss(a, b, n_w, n_l, beta):
    """-beta log sigma(log odds(w) - log odds(l)): what ORPO adds to cross entropy (2403.07691 eq. 6 and 7; beta is its lambda)."""
    return -beta * log_sigmoid(log_odds_ratio(a, b, n_w, n_l))


def simpo_loss(a, b, n_w, n_l, beta, gamma=1.0, smoothing=0.0):
    """-log sigma(beta (a/n_w - b/n_l) - gamma) (SimPO, 2405.14734 eq. 6); smoothing as in cDPO."""
    return sigmoid_loss(beta * (per_token(a, n_w) - per_token(b, n_l)) - gamma, 0.0, n_w, n_l, 1.0, smoothing)


def alphapo_loss(a, b, n_w, n_l, beta, gamma=0.5, alpha=0.25):
    """SimPO with the reward (1 - p^-alpha) / alpha in place of log p, p = exp of the mean log-prob per token (AlphaPO, 2501.03884)."""
    return simpo_loss(alpha_divergence(per_token(a, n_w), alpha), alpha_divergence(per_token(b, n_l), alpha), 1.0, 1.0, beta, gamma)


def slic_loss(a, b, n_w, n_l, beta, delta=1.0):
    """max(0, delta - log pi(w) + log pi(l)): SLiC-HF as printed (2305.10425 eq. 1), on likelihoods, without a reference."""
    return jax.nn.relu(delta - a + b)


def with_nll(model: Model, equation: Callable, *, beta: float, alpha: float, nll: Callable = token_nll, reward: Callable = whole) -> Objective:
    """The equation + alpha x cross entropy of the chosen answers."""

    def terms(c: Compared, aux):
        pair = {"preference": c.mean(equation(c.a, c.b, c.n_w, c.n_l, beta))}
        return pair | {"nll": nll(c, alpha)} if alpha else pair

    return of_pairs(model, terms, beta=beta, reward=reward)


# -- objectives -----------------------------------------------------------------------------------------------------


def cpo(model: Model, *, beta: float = 0.1, alpha: float = 1.0, smoothing: float = 0.0) -> Objective:
    """Contrastive preference optimisation (Xu et al. 2024, 2401.08417): DPO under a uniform reference, and cross entropy of the chosen."""
    return with_nll(model, functools.partial(sigmoid_loss, smoothing=smoothing), beta=beta, alpha=alpha)


def cpo_hinge(model: Model, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """CPO with the hinge."""
    return with_nll(model, hinge_loss, beta=beta, alpha=alpha)


def cpo_ipo(model: Model, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """CPO with IPO's square, on means over tokens."""
    return with_nll(model, ipo_loss, beta=beta, alpha=alpha, reward=per_token)


def simpo(model: Model, *, beta: float = 2.0, gamma: float = 1.0, smoothing: float = 0.0, alpha: float = 0.0) -> Objective:
    """Simple preference optimisation (Meng et al. 2024, 2405.14734). gamma: the margin, outside of beta (TRL: the same); alpha: of cross entropy (CPO-SimPO)."""
    return with_nll(model, functools.partial(simpo_loss, gamma=gamma, smoothing=smoothing), beta=beta, alpha=alpha, reward=per_token)


def alphapo(model: Model, *, beta: float = 2.5, gamma: float = 0.5, alpha: float = 0.25) -> Objective:
    """SimPO with a reward whose shape alpha sets (Gupta et al. 2025, 2501.03884)."""
    return with_nll(model, functools.partial(alphapo_loss, gamma=gamma, alpha=alpha), beta=beta, alpha=0.0, reward=lambda x, n: alpha_divergence(per_token(x, n), alpha))


def slic(model: Model, *, delta: float = 1.0, alpha: float = 0.1) -> Objective:
    """Sequence likelihood calibration from human feedback (Zhao et al. 2023, 2305.10425). alpha: of the log-prob of the target, which is
    the chosen answer here (the paper also takes one from supervised data)."""
    summed = lambda c, scale: c.mean(-c.w, scale)
    return with_nll(model, functools.partial(slic_loss, delta=delta), beta=1.0, alpha=alpha, nll=summed)


NLL_ON = ("completion", "all")


def orpo(model: Model, *, beta: float = 0.1, nll_on: str = "completion") -> Objective:
    """Odds ratio preference optimisation (Hong et al. 2024, 2403.07691). nll_on: cross entropy of the chosen completion, as in the
    paper, or of prompt and completion, as in its authors' code and TRL."""
    if nll_on not in NLL_ON:
        raise UserError(f"objective.nll_on {nll_on!r}: use one of {', '.join(NLL_ON)}")

    def loss(params, frozen, aux, batch: Pairs | SharedPairs, key, stats) -> Loss:
        rows, split = sides(batch)
        answers = targets(rows.mask, rows.segments)
        asked = answers if nll_on == "completion" else targets((rows.segments > 0).astype(jnp.float32), rows.segments)
        h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
        out = logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, asked)
        c = compared(batch, *split(out.logp * answers), *split(answers))
        nll = token_nll(c)
        if nll_on == "all":
            n = c.real.shape[0]  # one row each, the chosen first; in shared rows what is not the rejected answer's
            of = (lambda x: jnp.where(rows.segments >> BRANCH < 2, x, 0).sum(1)) if isinstance(batch, SharedPairs) else lambda x: x[:n].sum(1)
            nll = Term(-(c.real * of(out.logp)).sum(), (c.real * of(asked)).sum())
        ratio = jax.lax.stop_gradient(log_odds_ratio(c.a, c.b, c.n_w, c.n_l))
        metrics = pair_metrics(c, (out.entropy * answers).sum(), beta, per_token)
        metrics |= {"log_odds_ratio": tuple(c.mean(log_sigmoid(ratio)))[:2], "log_odds_chosen": tuple(c.mean(ratio))[:2]}
        return Loss({"nll": nll, "odds_ratio": c.mean(odds_ratio_loss(c.a, c.b, c.n_w, c.n_l, beta))}, metrics)

    return Objective(loss, shared=True)
