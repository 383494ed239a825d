"""Losses on pairs that are more than one equation of log-ratios: sorted over the batch, weighted by token, with a running shift,
as sums of several, against a reference that moves. Letters and equations are those of `preference`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign import tree
from jaxalign.objectives.preference import (
    answer_nll, bco_loss, compared, of_pairs, pair_logps, pair_metrics, sides, sigmoid_loss, token_logps, token_nll,
)  # fmt: skip
from jaxalign.ops.logprob import before, log_sum_squares, logprob, targets
from jaxalign.types import Loss, Model, Objective, Pairs, SharedPairs, Term, UserError


# -- over the whole batch: AOT --------------------------------------------------------------------------------------


def quantile_gap(x, y, real):
    """(gap f32[B], weight f32[B]): the k-th least of x less the k-th least of y, the n real ones first; weight 1 for these."""
    last = lambda v: jnp.sort(jnp.where(real > 0, v, 1e30))
    weight = (jnp.arange(x.shape[0]) < real.sum()).astype(jnp.float32)
    return jnp.where(weight > 0, last(x) - last(y), 0.0), weight


def _sorted(model: Model, values, beta: float, smoothing: float) -> Objective:
    def terms(c, aux):
        gap, weight = quantile_gap(*values(c), c.real)
        return {"preference": Term((weight * sigmoid_loss(gap, 0.0, 1, 1, beta, smoothing)).sum(), weight.sum())}

    return of_pairs(model, terms, beta=beta, whole_batch=True)


def aot(model: Model, *, beta: float = 0.1, smoothing: float = 0.0) -> Objective:
    """Alignment via optimal transport (Melnyk et al. 2024, 2406.05882) on pairs: DPO's loss on the difference of the sorted log pi(w) - log pi(l)
    and the sorted log ref(w) - log ref(l). The order is that of the whole batch, so it can not be accumulated."""
    return _sorted(model, lambda c: (c.w - c.l, jax.lax.stop_gradient((c.w - c.a) - (c.l - c.b))), beta, smoothing)


def aot_unpaired(model: Model, *, beta: float = 0.1, smoothing: float = 0.0) -> Objective:
    """AOT between the chosen and the rejected answers: sorted a against sorted b, whoever belongs to whom."""
    return _sorted(model, lambda c: (c.a, c.b), beta, smoothing)


# -- a running shift: BCO, MPO --------------------------------------------------------------------------------------

SHIFTS = ("running", "none")


def running_mean(metric) -> dict:
    """Fields of an `Objective` whose aux is the mean of metric(metrics) over the updates so far, this one's left out: that saves a
    forward pass before the loss. (TRL 0.11 takes it in.)"""
    init = lambda params: {"mean": jnp.zeros(()), "count": jnp.zeros(())}

    def update(aux, params, metrics, step):
        count = aux["count"] + 1
        return {"mean": aux["mean"] + (metric(metrics) - aux["mean"]) / count, "count": count}

    return dict(init_aux=init, update_aux=update)


def _shifted(model: Model, terms, beta: float, shift: str) -> Objective:
    """terms(compared, shift) with the shift that the option asks for."""
    if shift not in SHIFTS:
        raise UserError(f"objective.shift {shift!r}: use one of {', '.join(SHIFTS)}")
    if shift == "none":
        return of_pairs(model, lambda c, aux: terms(c, 0.0), beta=beta)
    mean = running_mean(lambda m: (m["rewards/chosen"] + m["rewards/rejected"]) / 2)
    return of_pairs(model, lambda c, aux: terms(c, aux["mean"]), beta=beta, **mean)


def bco_pair(model: Model, *, beta: float = 0.1, shift: str = "running") -> Objective:
    """Binary classifier optimisation on pairs (Jung et al. 2024, 2404.04656). shift: the running mean of all rewards, or none, as in TRL 1.16."""
    return _shifted(model, lambda c, s: {"preference": c.mean(bco_loss(c.a, c.b, c.n_w, c.n_l, beta, s))}, beta, shift)


def mpo(model: Model, *, beta: float = 0.1, sigmoid: float = 0.8, bco: float = 0.2, sft: float = 1.0, shift: str = "running") -> Objective:
    """Mixed preference optimisation (Wang et al. 2024, 2411.10442): sigmoid x DPO + bco x BCO + sft x cross entropy of the chosen answers."""

    def terms(c, s):
        x = c.a, c.b, c.n_w, c.n_l, beta
        return {"sigmoid": c.mean(sigmoid_loss(*x), sigmoid), "bco_pair": c.mean(bco_loss(*x, s), bco), "sft": token_nll(c, sft)}

    return _shifted(model, terms, beta, shift)


def rpo(model: Model, *, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """DPO + alpha x cross entropy per token of each chosen answer (Pang et al. 2024, 2404.19733)."""
    return of_pairs(model, lambda c, aux: {"preference": c.mean(sigmoid_loss(c.a, c.b, c.n_w, c.n_l, beta)), "nll": answer_nll(c, alpha)}, beta=beta)


# -- by token: WPO, LD-DPO ------------------------------------------------------------------------------------------


def wpo(model: Model, *, beta: float = 0.1) -> Objective:
    """DPO weighted by how likely the policy is to write the pair itself (WPO, Zhou et al. 2024, 2406.11827 eq. 2): each answer's
    weight is exp(mean_t(log p_t - log sum_v p_v^2)), without gradient; a pair's is their product."""

    def loss(params, frozen, aux, batch: Pairs | SharedPairs, key, stats) -> Loss:
        rows, split = sides(batch)
        h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
        mask, x, u = targets(rows.mask, rows.segments), before(h.x, rows.segments), model.unembed(params)
        out, likely = logprob(x, u, rows.tokens, mask), log_sum_squares(*jax.lax.stop_gradient((x, u)), mask)
        n_w, n_l = split(mask)
        on_w, on_l = split(jax.lax.stop_gradient(out.logp) - likely)
        weight = jnp.exp(on_w / jnp.maximum(n_w, 1) + on_l / jnp.maximum(n_l, 1))
        c = compared(batch, *split(out.logp), n_w, n_l)
        metrics = pair_metrics(c, out.entropy.sum(), beta) | {"weights": tuple(c.mean(weight))[:2]}
        return Loss({"preference": c.mean(weight * sigmoid_loss(c.a, c.b, n_w, n_l, beta))}, metrics)

    return Objective(loss, shared=True)


def damped_logps(model: Model, params, batch: Pairs | SharedPairs, alpha: float):
    """As `pair_logps`, with alpha x the log-probs of what the longer answer has beyond the length of the shorter."""
    rows, split = sides(batch)
    out, mask = token_logps(model, params, rows)
    (m_w, m_l), n = split(mask, lambda x: x), split(mask)
    common = jnp.minimum(*n)[:, None]
    sums = [jnp.where(m.cumsum(1) <= common, x, alpha * x).sum(1) for x, m in zip(split(out.logp, lambda x: x), (m_w, m_l))]
    return *sums, *n, out.entropy.sum()


def ld_dpo(model: Model, *, beta: float = 0.1, alpha: float = 0.5) -> Objective:
    """DPO in which tokens beyond the length of the shorter answer count alpha (LD-DPO, Liu et al. 2024, 2409.06411), for policy and reference."""

    def loss(params, frozen, aux, batch, key, stats) -> Loss:
        *logps, entropy = damped_logps(model, params, batch, alpha)
        c = compared(batch, *logps)
        return Loss({"preference": c.mean(sigmoid_loss(c.a, c.b, c.n_w, c.n_l, beta))}, pair_metrics(c, entropy, beta))

    return Objective(loss, shared=True, reference=functools.partial(damped_logps, alpha=alpha))


# -- a reference that moves: TR-DPO ---------------------------------------------------------------------------------


def tr_dpo(model: Model, *, beta: float = 0.1, alpha: float = 0.6, every: int = 512) -> Objective:
    """DPO with reference <- alpha x policy + (1 - alpha) x reference after every `every`-th update (TR-DPO, Gorbatovski et al. 2024,
    2404.09656); alpha 1 is its hard form. The reference starts as the policy does and lives in aux, so its log-probs are
    computed in the loss and none can be kept on disk."""
    if not 0 < alpha <= 1 or every < 1:
        raise UserError(f"objective.alpha {alpha} must be above 0 and at most 1, and objective.every {every} 1 or more")

    def loss(params, frozen, aux, batch: Pairs | SharedPairs, key, stats) -> Loss:
        reference = jax.lax.stop_gradient(tree.merge(aux, frozen["base"]) if "base" in frozen else aux)
        ref_w, ref_l, *_ = pair_logps(model, reference, batch)
        *logps, entropy = pair_logps(model, params, batch)
        c = compared(batch._replace(ref_chosen=ref_w, ref_rejected=ref_l), *logps)
        return Loss({"preference": c.mean(sigmoid_loss(c.a, c.b, c.n_w, c.n_l, beta))}, pair_metrics(c, entropy, beta))

    def update(aux, params, metrics, step):
        now = (step + 1) % every == 0
        return jax.tree.map(lambda r, p: jnp.where(now, alpha * p + (1 - alpha) * r, r).astype(r.dtype), aux, params)

    # A copy: the params' own buffers are given away at the first step.
    return Objective(loss, shared=True, init_aux=lambda params: jax.tree.map(jnp.copy, params), update_aux=update)
