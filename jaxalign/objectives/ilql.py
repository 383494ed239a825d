"""Implicit language Q-learning (Snell et al. 2022, 2206.11871): a policy, Q heads over the vocabulary and a value head learn
from episodes that somebody else played; decoding then leans towards tokens of high advantage (`models.heads.Guided`).

params {"trunk", "q", "v"}, batches `Trajectories`, index t speaks of token t: values[t] is the value of the state before it,
q[t] that of writing it there. aux holds the target Q heads.

No [B,T,V] array is held: of a Q head over the vocabulary the losses need Q of the token taken and logsumexp Q, and both are
`ops.logprob`'s, chunk by chunk, forward and backward. What is held of the heads are their inner layers, f32[B,T,2D], four of
them (two heads and their targets), and their weights.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign.ops.logprob import before, logprob, targets, token_loss
from jaxalign.types import Loss, Objective, Term, Trajectories, UserError

# -- equations: arrays f32[B,T] in, f32[B,T] out --------------------------------------------------------------------


def q_loss(q, rewards, next_values, gamma):
    """(r + gamma V(s') - Q(s, a))^2, without a gradient into V (2206.11871; no 1/2)."""
    return (rewards + gamma * jax.lax.stop_gradient(next_values) - q) ** 2


def expectile_loss(values, target_q, tau):
    """|tau - 1[Q < V]| (Q - V)^2, without a gradient into Q: V becomes the tau-expectile of Q over the data's actions, towards
    its maximum as tau -> 1 (2206.11871; Kostrikov et al. 2021, 2110.06169)."""
    d = jax.lax.stop_gradient(target_q) - values
    return jnp.where(d >= 0, tau, 1 - tau) * d**2


def conservative_loss(q, lse):
    """logsumexp Q - Q(s, a): the cross entropy of softmax Q, which keeps Q of tokens that the data never takes low (CQL, 2006.04779)."""
    return lse - q


def advantage_weight(target_q, values, beta):
    """exp(beta (Q - V)), a constant: what the behaviour's cross entropy is weighted with (AWAC, 2006.09359). beta 0: 1."""
    return jax.lax.stop_gradient(jnp.exp(beta * (target_q - values)))


def next_values(values, mask, terminal, after):
    """The value of the state in which the next action is taken, for every action. After the last one, where the episode goes on
    (terminal 0), that of the state it was left in, else 0.

    values f32[B,T], before each token; mask f32[B,T], the actions; terminal f32[B]; after f32[B,T], the value after each token.
    Between two turns somebody else speaks: the next action is then the first of the next turn.
    """
    T = mask.shape[1]
    at = jax.lax.cummin(jnp.where(mask > 0, jnp.arange(T), T), axis=1, reverse=True)  # the first action from t on
    at = jnp.pad(at[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    return jnp.where(at < T, jnp.take_along_axis(values, jnp.minimum(at, T - 1), 1), (1 - terminal[:, None]) * after)


# -- what the losses of offline RL share ----------------------------------------------------------------------------


def states(model, params, batch: Trajectories):
    """(mask f32[B,T], hidden states f[B,T,D] before each token, the value head's numbers after each token f32[B,T])."""
    x = model.hidden(params, batch.tokens, batch.segments, batch.positions).x
    return targets(batch.mask, batch.segments), before(x, batch.segments), model.v(params["v"], x)


def q_of_tokens(model, params, x, tokens, mask):
    """[(Q of each token, logsumexp Q over the vocabulary)] of every Q head, f32[B,T]. x f[B,T,D], before each token."""
    outs = [logprob(h, u, tokens, mask) for h, u in model.q(params, x)]
    return [(out.logp + out.lse, out.lse) for out in outs]


def cloning(model, params, x, tokens, mask, weight):
    """(sum of weight times the cross entropy, LogProbs of the policy that the trunk is). weight f32[B,T], a constant."""
    return token_loss(x, model.unembed(params), tokens, mask, weight, lambda logp, entropy, weight: -weight * logp)


def means(mask, **values):
    """Metrics: token means of f32[B,T]."""
    return {k: jax.lax.stop_gradient((jnp.where(mask > 0, v, 0.0).sum(), mask.sum())) for k, v in values.items()}


# -- the objectives -------------------------------------------------------------------------------------------------


def action_tokens(mask, segments):
    """What the cross entropy is divided by: the actions (trlX)."""
    return mask.sum()


def attended_tokens(mask, segments):
    """What the cross entropy is divided by: all tokens, prompts too (the authors' code)."""
    return (segments != 0).sum().astype(mask.dtype)


def _make(model, normaliser: Callable, tau, gamma, cql_scale, awac_scale, beta, alpha, target_every) -> Objective:
    if not (0 < tau < 1 and 0 <= gamma <= 1 and 0 < alpha <= 1 and target_every >= 1):
        raise UserError(f"ilql needs 0 < tau < 1, 0 <= gamma <= 1, 0 < alpha <= 1 and target_every >= 1, got tau {tau}, gamma {gamma}, alpha {alpha}, target_every {target_every}")

    def loss(params, frozen, aux, batch: Trajectories, key, stats) -> Loss:
        mask, x, after = states(model, params, batch)
        rewards, values = jnp.where(mask > 0, batch.rewards, 0.0), jnp.where(mask > 0, before(after, batch.segments), 0.0)
        n, total = mask.sum(), lambda v: jnp.where(mask > 0, v, 0.0).sum()
        online = q_of_tokens(model, params["q"], x, batch.tokens, mask)
        target = jax.lax.stop_gradient(q_of_tokens(model, aux["q"], jax.lax.stop_gradient(x), batch.tokens, mask))
        target = jnp.stack([q for q, _ in target]).min(0)
        coming = next_values(values, mask, batch.terminal, after)
        weight = jnp.where(mask > 0, advantage_weight(target, values, beta), 0.0)
        bc, out = cloning(model, params, x, batch.tokens, mask, weight)
        terms = {
            "q": Term(sum(total(q_loss(q, rewards, coming, gamma)) for q, _ in online), n),
            "v": Term(total(expectile_loss(values, target, tau)), n),
            "cql": Term(sum(total(conservative_loss(q, lse)) for q, lse in online), n, cql_scale),
            "awac": Term(bc, normaliser(mask, batch.segments), awac_scale),
        }
        first = online[0][0]
        metrics = means(mask, nll=-out.logp, entropy=out.entropy, qvalues=first, values=values, advantages=target - values, td_error=jnp.abs(rewards + gamma * coming - first))
        return Loss(terms, metrics)

    def update_aux(aux, params, metrics, step):
        due = (step + 1) % target_every == 0
        return {"q": jax.tree.map(lambda new, old: jnp.where(due, new, old), optax.incremental_update(params["q"], aux["q"], alpha), aux["q"])}

    # What decodes are the target heads, so these are kept; of a finished stage they are the Q heads there are.
    return Objective(loss, init_aux=lambda params: {"q": params["q"]}, update_aux=update_aux, finish=lambda params, aux: {**params, "q": aux["q"]})


def ilql(
    model, *, tau: float = 0.7, gamma: float = 0.99, cql_scale: float = 0.1, awac_scale: float = 1.0, beta: float = 0.0, alpha: float = 0.001, target_every: int = 5
) -> Objective:  # fmt: skip
    """L_Q + L_V + cql_scale L_CQL + awac_scale L_BC, means over actions, with the defaults of trlX. beta weights L_BC while training
    (not the beta of decoding); the target heads move by `alpha` towards the Q heads every `target_every` steps.

    model: a `models.heads.Guided`.
    """
    return _make(model, action_tokens, tau, gamma, cql_scale, awac_scale, beta, alpha, target_every)


def ilql_original(
    model, *, tau: float = 0.7, gamma: float = 0.99, cql_scale: float = 1e-4, awac_scale: float = 1.0, beta: float = 0.0, alpha: float = 0.005, target_every: int = 1
) -> Objective:  # fmt: skip
    """The same with the authors' normaliser of L_BC, which counts all tokens, and their defaults for Wordle."""
    return _make(model, attended_tokens, tau, gamma, cql_scale, awac_scale, beta, alpha, target_every)
