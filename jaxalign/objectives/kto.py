"""Losses on single answers that somebody called good or bad. Equations on small arrays first; then `unpaired`, which gives them their log-probs.

Per row: a = log pi(y) - log ref(y), sums over the completion; good is 1 where the label is above 0. So labels may be true and
false, 1 and -1, or scores around 0.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

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


def unpaired(model: Model, equation: Callable, *, beta: float, origin: Callable | None = None, **more) -> Objective:
    """An objective from `equation(a, good, beta, z) -> f32[B]`, averaged over the rows of the step. origin(aux, stats) -> z; None: 0.
    A row with an empty mask weighs 0. more: other fields of `Objective`."""

    def loss(params, frozen, aux, batch: Labelled, key, stats) -> Loss:
        logp, n, entropy = sequence_logps(model, params, batch.rows)
        real = (n > 0).astype(jnp.float32)
        a = jnp.where(real > 0, logp - batch.ref, 0.0)
        good = (batch.label > 0).astype(jnp.float32)
        z = origin(aux, stats) if origin else 0.0
        terms = {"preference": Term((real * equation(a, good, beta, z)).sum(), real.sum())}
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
