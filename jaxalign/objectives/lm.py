"""Cross entropy: pretraining and supervised fine-tuning differ only in the mask of their batches."""

from __future__ import annotations

import jax

from jaxalign.ops import moe
from jaxalign.ops.logprob import before, linear_ce, targets
from jaxalign.types import Loss, Model, Objective, Term, Tokens


def cross_entropy(model: Model, params, batch: Tokens, *, smoothing: float = 0.0, z_loss: float = 0.0):
    """(CrossEntropy sums, number of targets, what else the model reports). Shared by `lm` and PPO-ptx."""
    h = model.hidden(params, batch.tokens, batch.segments, batch.positions)
    mask = targets(batch.mask, batch.segments)
    ce = linear_ce(before(h.x, batch.segments), model.unembed(params), batch.tokens, mask, smoothing=smoothing, z_loss=z_loss)
    return ce, mask.sum(), h.aux


def lm(model: Model, *, smoothing: float = 0.0, z_loss: float = 0.0) -> Objective:
    """Token-global negative log-likelihood: sum over the targets of the whole step / their number (methods.md 1.1, 2).

    A mixture of experts adds its load-balancing loss, scaled by the config's `router_aux` (`ops.moe.balance`); `stats`
    looks up the experts' load over the whole step first, so that accumulation gives the same gradient.
    """
    router = getattr(getattr(model, "config", None), "router_aux", 0.0)

    def stats(params, frozen, aux, batch: Tokens):
        load = model.hidden(params, batch.tokens, batch.segments, batch.positions).aux["load"]
        return {"expert_share": (load.chosen, load.tokens)}

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        ce, n, extra = cross_entropy(model, params, batch, smoothing=smoothing, z_loss=z_loss)
        ce_, n_ = jax.lax.stop_gradient((ce, n))
        metrics = {"nll": (ce_.nll, n_), "entropy": (ce_.entropy, n_), "mean_token_accuracy": (ce_.correct, n_)}
        terms = {"lm": Term(ce.total, n)}
        if router:
            balance = moe.balance(extra["load"], stats["expert_share"])
            terms["router"] = Term(balance, extra["load"].tokens, router)
            metrics["aux_loss"] = jax.lax.stop_gradient((balance, extra["load"].tokens))
        return Loss(terms, metrics)

    return Objective(loss, stats=stats if router else None)
