"""Losses on single answers that somebody called good or bad. Equations on small arrays first; then `unpaired`, which gives them their log-probs.

Per row: a = log pi(y) - log ref(y), sums over the completion; good is 1 where the label is above 0. So labels may be true and
false, 1 and -1, or scores around 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.objectives.dpo_variants import SHIFTS, running_mean
from jaxalign.objectives.preference import log_sigmoid, sequence_logps
from jaxalign.types import Labelled, Loss, Model, Objective, Term, UserError


def kto_loss(a, good, beta, z, desirable=1.0, undesirable=1.0):
    """desirable (1 - sigma(beta (a - z))) of the good, undesirable (1 - sigma(beta (z - a))) of the bad (KTO, 2402.01306 eq. 7 and 8)."""
    return jnp.where(good > 0, desirable * jax.nn.sigmoid(beta * (z - a)), undesirable * jax.nn.sigmoid(beta * (a - z)))


def apo_zero_unpaired_loss(a, good, beta, z, desirable=1.0, undesirable=1.0):
    """1 - sigma(beta a) of the good, sigma(beta a) of the bad: KTO around 0 (APO, 2408.06266)."""
    return kto_loss(a, good, beta, 0.0, desirable, undesirable)


def bco_unpaired_loss(a, good, beta, z):
    """-log sigma(beta a - z) of the good, -log sigma(-(beta a - z)) of the bad (BCO, 2404.04656); z is in units of the reward."""
    return -log_sigmoid(jnp.where(good > 0, 1.0, -1.0) * (beta * a - z))


def density_ratio(x, good, low: float = 0.5, high: float = 10.0) -> Callable:
    """How much more often a prompt comes with good answers than with bad ones, of its embedding: f[m,D] -> f64[m], p / (1 - p) clipped to
    [low, high] (BCO, 2404.04656, underlying distribution matching). On the host, in f64.

    p is a logistic regression on x f[n,D], good bool[n], the two kinds of rows weighing alike, with 1/2 |w|^2 beside the summed loss:
    scikit-learn's with C 1, which TRL takes. Embeddings are centred and scaled to a mean square norm of 1 first, which those made for
    comparing sentences have and hidden states have not, so that C means the same. Raises UserError where all rows are of one kind.
    """
    from scipy import optimize

    x, good = np.asarray(x, np.float64), np.asarray(good, bool)
    n, m = len(good), int(good.sum())
    if m in (0, n):
        raise UserError(f"of the {n} labels all are {'good' if m else 'bad'}: matching the prompts of good and of bad answers needs both; take bco, or kto")
    centre = x.mean(0)
    scale = np.sqrt(((x - centre) ** 2).sum(1).mean()) or 1.0
    z, sign, share = (x - centre) / scale, np.where(good, 1.0, -1.0), np.where(good, n / (2 * m), n / (2 * (n - m)))

    def loss(v):
        margin = sign * (z @ v[:-1] + v[-1])
        slope = -share * sign * (1 - np.tanh(margin / 2)) / 2
        return 0.5 * v[:-1] @ v[:-1] + share @ np.logaddexp(0, -margin), np.append(z.T @ slope + v[:-1], slope.sum())

    v = optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-8}).x
    return lambda x: np.clip(np.exp((np.asarray(x, np.float64) - centre) / scale @ v[:-1] + v[-1]), low, high)


def unpaired(model: Model, equation: Callable, *, beta: float, origin: Callable | None = None, **more) -> Objective:
    """An objective from `equation(a, good, beta, z) -> f32[B]`, averaged over the rows of the step. origin(aux, stats) -> z; None: 0.
    A row with an empty mask weighs 0; `Labelled.weight` multiplies a row's loss and is not divided by. more: other fields of `Objective`."""

    def loss(params, frozen, aux, batch: Labelled, key, stats) -> Loss:
        logp, n, entropy = sequence_logps(model, params, batch.rows)
        real = (n > 0).astype(jnp.float32)
        a = jnp.where(real > 0, logp - batch.ref, 0.0)
        good = (batch.label > 0).astype(jnp.float32)
        z = origin(aux, stats) if origin else 0.0
        each = equation(a, good, beta, z) * (1.0 if batch.weight is None else batch.weight)
        terms = {"preference": Term((real * each).sum(), real.sum())}
        a, logp, entropy = jax.lax.stop_gradient((a, logp, entropy))
        of = lambda x, who: ((real * who * x).sum(), (real * who).sum())
        metrics = {
            "rewards/chosen": of(beta * a, good),
            "rewards/rejected": of(beta * a, 1 - good),
            "rewards/mean": of(beta * a, 1.0),
            "logps/chosen": of(logp, good),
            "logps/rejected": of(logp, 1 - good),
            "chosen_share": of(good, 1.0),
            "entropy": (entropy, n.sum()),
        }
        metrics |= {} if batch.weight is None else {"weights": of(batch.weight, 1 - good)}
        return Loss(terms, metrics | ({"kl": of(z, 1.0)} if stats else {}))

    return Objective(loss, **more)


def mismatched_kl(model: Model):
    """`Objective.stats` of KTO: the mean over the whole global batch of log pi - log ref of answers behind prompts they do not belong to."""

    def stats(params, frozen, aux, batch: Labelled) -> dict:
        logp, n, _ = sequence_logps(model, params, batch.mismatched)
        return {"kl": (jnp.where(n > 0, logp - batch.ref_mismatched, 0.0).sum(), (n > 0).sum().astype(jnp.float32))}

    return stats


# -- objectives -----------------------------------------------------------------------------------------------------


def kto(model: Model, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Objective:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306). What is gained counts from z, the KL to the reference as
    mismatched answers show it, at least 0: one more forward of those, without gradient. Choose the weights so that
    (desirable x number of good) / (undesirable x number of bad) lies between 1 and 4/3."""
    equation = functools.partial(kto_loss, desirable=desirable, undesirable=undesirable)
    z = lambda aux, stats: jnp.maximum(stats["kl"], 0.0)  # of the global mean, as all devices see it
    return unpaired(model, equation, beta=beta, origin=z, stats=mismatched_kl(model), mismatched=True)


def apo_zero_unpaired(model: Model, *, beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Objective:
    """APO-zero on labels (D'Oosterlinck et al. 2024, 2408.06266; TRL's apo_zero_unpaired): KTO without its z."""
    return unpaired(model, functools.partial(apo_zero_unpaired_loss, desirable=desirable, undesirable=undesirable), beta=beta)


def bco(model: Model, *, beta: float = 0.1, shift: str = "running") -> Objective:
    """Binary classifier optimisation (Jung et al. 2024, 2404.04656) on labels. shift: the running mean of all rewards, or none."""
    if shift not in SHIFTS:
        raise UserError(f"objective.shift {shift!r}: use one of {', '.join(SHIFTS)}")
    if shift == "none":
        return unpaired(model, bco_unpaired_loss, beta=beta)
    mean = running_mean(lambda m: m["rewards/mean"])
    return unpaired(model, bco_unpaired_loss, beta=beta, origin=lambda aux, stats: aux["mean"], **mean)


def bco_matched(model: Model, *, beta: float = 0.1, shift: str = "running", min_ratio: float = 0.5, max_ratio: float = 10.0) -> Objective:
    """BCO in which bad answers weigh as their prompts are more or less usual among the good ones (`density_ratio`, its limits being
    min_ratio and max_ratio), so that good and bad prompts are alike in distribution: thumbs are given to different questions."""
    if not 0 <= min_ratio <= max_ratio:
        raise UserError(f"objective.min_ratio {min_ratio} must be at least 0, and objective.max_ratio {max_ratio} no less than it")
    return dataclasses.replace(bco(model, beta=beta, shift=shift), weights=functools.partial(density_ratio, low=min_ratio, high=max_ratio))
