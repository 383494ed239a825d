"""Learning from episodes by what came of them: Monte-Carlo returns instead of a bootstrapped Q (`objectives.ilql` has that one).

params {"trunk", "v"} and, for Monte-Carlo Q, {"q"}; batches `Trajectories`. Filtered behaviour cloning needs no loss of its own:
it is `lm` on the best episodes (`data.trajectories`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.objectives.ilql import before, cloning, conservative_loss, means, q_of_tokens, states
from jaxalign.ops.advantage import gae
from jaxalign.types import Loss, Objective, Term, Trajectories, UserError


def returns_to_go(rewards, mask, gamma):
    """f32[B,T]: at each action, the rewards from it on, discounted by gamma per action; 0 elsewhere."""
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def exponential_weight(returns, values, temperature, cap):
    """min(exp((G - V) / temperature), cap), a constant (AWR, Peng et al. 2019, 1910.00177; the cap is that of its code)."""
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp((returns - values) / temperature), cap))


def _begin(model, params, batch: Trajectories, gamma):
    mask, x, after = states(model, params, batch)
    values = jnp.where(mask > 0, before(after, batch.segments), 0.0)
    return mask, x, values, returns_to_go(jnp.where(mask > 0, batch.rewards, 0.0), mask, gamma)


def _explained(mask, returns, values):
    """Sums of squares whose ratio is the share of the returns that the values leave unexplained, around 0."""
    return jax.lax.stop_gradient(((mask * (returns - values) ** 2).sum(), (mask * returns**2).sum()))


def advantage_weighted_bc(model, *, gamma: float = 1.0, weight_temperature: float = 1.0, weight_cap: float = 20.0, value_coef: float = 1.0) -> Objective:
    """Behaviour cloning, each token weighted by `exponential_weight` of its return over what the value head expected; that head
    regresses on the returns. Means over actions. model: a `models.heads.Guided` without Q heads."""
    if not (weight_temperature > 0 and weight_cap > 0 and 0 <= gamma <= 1):
        raise UserError(f"advantage_weighted_bc needs weight_temperature > 0, weight_cap > 0 and 0 <= gamma <= 1, got {weight_temperature}, {weight_cap} and {gamma}")

    def loss(params, frozen, aux, batch: Trajectories, key, stats) -> Loss:
        mask, x, values, returns = _begin(model, params, batch, gamma)
        n = mask.sum()
        weight = jnp.where(mask > 0, exponential_weight(returns, values, weight_temperature, weight_cap), 0.0)
        bc, out = cloning(model, params, x, batch.tokens, mask, weight)
        terms = {"bc": Term(bc, n), "v": Term((mask * (returns - values) ** 2).sum(), n, value_coef)}
        metrics = means(mask, nll=-out.logp, entropy=out.entropy, values=values, returns=returns, weights=weight, capped=(weight >= weight_cap).astype(jnp.float32))
        return Loss(terms, metrics | {"val/unexplained": _explained(mask, returns, values)})

    return Objective(loss)


def mc_returns(model, *, gamma: float = 0.99, cql_scale: float = 0.1, bc_scale: float = 1.0) -> Objective:
    """Q and V regress on the returns, beside behaviour cloning; one step of policy improvement over the data, by decoding with Q
    (Abdulhai et al. 2023, LMRL-Gym, 2311.18232). Means over actions. model: a `models.heads.Guided`."""
    if not 0 <= gamma <= 1:
        raise UserError(f"mc_returns needs 0 <= gamma <= 1, got {gamma}")

    def loss(params, frozen, aux, batch: Trajectories, key, stats) -> Loss:
        mask, x, values, returns = _begin(model, params, batch, gamma)
        n, total = mask.sum(), lambda v: jnp.where(mask > 0, v, 0.0).sum()
        online = q_of_tokens(model, params["q"], x, batch.tokens, mask)
        bc, out = cloning(model, params, x, batch.tokens, mask, mask)
        terms = {
            "q": Term(sum(total((returns - q) ** 2) for q, _ in online), n),
            "v": Term(total((returns - values) ** 2), n),
            "cql": Term(sum(total(conservative_loss(q, lse)) for q, lse in online), n, cql_scale),
            "bc": Term(bc, n, bc_scale),
        }
        metrics = means(mask, nll=-out.logp, entropy=out.entropy, values=values, returns=returns, qvalues=online[0][0])
        return Loss(terms, metrics | {"val/unexplained": _explained(mask, returns, online[0][0])})

    return Objective(loss)
