"""Direct preference losses. Equations on small arrays first; then `preference`, which gives them their log-probs.

Per pair, with w the chosen and l the rejected completion (log-probs are sums over completion tokens, EOS included):
a = log pi(w) - log ref(w), b = log pi(l) - log ref(l), n_w and n_l the completion lengths.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.types import BRANCH, Loss, Model, Objective, Pairs, SharedPairs, Term, Tokens

log_sigmoid = jax.nn.log_sigmoid


def sigmoid_loss(a, b, n_w, n_l, beta, smoothing=0.0):
    """-(1-e) log sigma(beta (a-b)) - e log sigma(-beta (a-b)): DPO (2305.18290 eq. 7); e > 0 is cDPO (Mitchell 2023, eq. 3)."""
    h = beta * (a - b)
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def ipo_loss(a, b, n_w, n_l, beta):
    """(a/n_w - b/n_l - 1/(2 beta))^2 (2310.12036 eq. 17; on per-token means, as its authors confirm)."""
    return (a / jnp.maximum(n_w, 1) - b / jnp.maximum(n_l, 1) - 1 / (2 * beta)) ** 2


def ipo_sum_loss(a, b, n_w, n_l, beta):
    """(a - b - 1/(2 beta))^2: IPO on sums, as printed in the paper."""
    return (a - b - 1 / (2 * beta)) ** 2


def hinge_loss(a, b, n_w, n_l, beta):
    """max(0, 1 - beta (a-b)) (RSO 2309.06657; SLiC 2305.10425)."""
    return jax.nn.relu(1 - beta * (a - b))


def token_logps(model: Model, params, rows: Tokens):
    """(LogProbs, mask f32[B,T]) of the completions."""
    h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
    mask = targets(rows.mask, rows.segments)
    return logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, mask), mask


def sequence_logps(model: Model, params, rows: Tokens):
    """(log-prob sums f32[B], token count f32[B], entropy sum f32[]) over the completions."""
    out, mask = token_logps(model, params, rows)
    return out.logp.sum(1), mask.sum(1), out.entropy.sum()


def pair_logps(model: Model, params, batch: Pairs | SharedPairs):
    """(chosen f32[B], rejected f32[B], n_w, n_l, entropy sum): one forward over 2B rows, or over B that hold both."""
    if isinstance(batch, SharedPairs):
        out, mask = token_logps(model, params, batch.rows)
        one = batch.rows.segments >> BRANCH == 1
        of = lambda x, side: jnp.where(side, x, 0).sum(1)
        return of(out.logp, one), of(out.logp, ~one), of(mask, one), of(mask, ~one), out.entropy.sum()
    B = batch.chosen.tokens.shape[0]
    rows = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), batch.chosen, batch.rejected)
    logps, n, entropy = sequence_logps(model, params, rows)
    return logps[:B], logps[B:], n[:B], n[B:], entropy


def preference(model: Model, equation: Callable, *, beta: float) -> Objective:
    """An objective from `equation(a, b, n_w, n_l, beta) -> f32[B]`, averaged over the pairs of the step.

    Reference log-probs ride in the batch (`rl.reference`). A pair with an empty mask weighs 0.
    """

    def loss(params, frozen, aux, batch: Pairs | SharedPairs, key, stats) -> Loss:
        w, l, n_w, n_l, entropy = pair_logps(model, params, batch)
        real = ((n_w > 0) & (n_l > 0)).astype(jnp.float32)
        a, b = (jnp.where(real > 0, x, 0.0) for x in (w - batch.ref_chosen, l - batch.ref_rejected))
        n = real.sum()
        terms = {"preference": Term((real * equation(a, b, n_w, n_l, beta)).sum(), n)}
        a, b, w, l, entropy = jax.lax.stop_gradient((a, b, w, l, entropy))
        mean = lambda x: ((real * x).sum(), n)
        metrics = {
            "rewards/chosen": mean(beta * a),
            "rewards/rejected": mean(beta * b),
            "rewards/accuracies": mean(a > b),
            "rewards/margins": mean(beta * (a - b)),
            "logps/chosen": mean(w),
            "logps/rejected": mean(l),
            "entropy": (entropy, n_w.sum() + n_l.sum()),
        }
        return Loss(terms, metrics)

    return Objective(loss, shared=True)


def dpo(model: Model, *, beta: float = 0.1) -> Objective:
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290)."""
    return preference(model, sigmoid_loss, beta=beta)


def cdpo(model: Model, *, beta: float = 0.1, smoothing: float = 0.1) -> Objective:
    """DPO for labels that are wrong with probability `smoothing`."""
    return preference(model, lambda *x: sigmoid_loss(*x, smoothing), beta=beta)


def ipo(model: Model, *, beta: float = 0.1) -> Objective:
    """Identity preference optimisation (Azar et al. 2023, 2310.12036)."""
    return preference(model, ipo_loss, beta=beta)


def hinge(model: Model, *, beta: float = 0.1) -> Objective:
    """SLiC's hinge on log-ratios."""
    return preference(model, hinge_loss, beta=beta)
