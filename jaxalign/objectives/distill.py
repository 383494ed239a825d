"""Distillation: a student learns a teacher's whole distribution at every token, not only the token that stands there.

The teacher is another model (any family, any size) with the same vocabulary; its weights are `frozen["teacher"]`. On texts and
demonstrations (`distill`), or on what the student itself writes (`on_policy_distill`).
"""

from __future__ import annotations

from typing import Callable

import jax

from jaxalign.ops.divergence import between, divergence
from jaxalign.ops.logprob import before, targets
from jaxalign.types import Loss, Model, Objective, Term, Tokens, UserError


def match(model: Model, teacher: Model | None, equation: Callable, *, scale: float = 1.0, alpha: float = 1.0, tau: float = 1.0, policy: Callable = lambda params: params) -> Objective:
    """An objective from `equation(teacher log-probs, student log-probs) -> terms` (`ops.divergence`): the mean over the targets
    of the step of  alpha scale divergence + (1 - alpha) nll.  teacher None: of the student's own kind.

    `policy` takes the student out of what is trained. Raises UserError where the vocabularies differ in size.
    """
    teacher = model if teacher is None else teacher
    ours, theirs = (getattr(getattr(m, "config", None), "vocab", None) for m in (model, teacher))
    if ours != theirs:
        raise UserError(f"the teacher's vocabulary has {theirs} ids and the student's {ours}: their distributions can only be compared over the same tokens; give the student the teacher's tokenizer and model.vocab {theirs}")
    if not 0 <= alpha <= 1 or not tau > 0:
        raise UserError(f"distillation needs 0 <= alpha <= 1 and tau > 0, got alpha {alpha} and tau {tau}")
    total = alpha * scale + 1 - alpha  # the walk knows one weight between the two, the step the rest

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        if "teacher" not in frozen:
            raise UserError('distillation reads the teacher\'s weights from frozen["teacher"], and there are none')
        params, fixed = policy(params), jax.lax.stop_gradient(frozen["teacher"])
        rows = batch.tokens, batch.segments, batch.positions
        x, tx = model.hidden(params, *rows).x, teacher.hidden(fixed, *rows).x
        mask = targets(batch.mask, batch.segments)
        shift = lambda x: before(x, batch.segments)
        d = divergence(shift(x), model.unembed(params), shift(tx), teacher.unembed(fixed), batch.tokens, mask, equation, alpha=alpha * scale / total, tau=tau)
        n = mask.sum()
        d_, n_ = jax.lax.stop_gradient((d, n))
        metrics = {"divergence": (d_.divergence, n_), "nll": (d_.nll, n_), "teacher_nll": (d_.teacher_nll, n_), "entropy": (d_.entropy, n_), "mean_token_accuracy": (d_.correct, n_)}
        return Loss({"distill": Term(d.total, n, total)}, metrics)

    return Objective(loss)


def _checked(beta: float) -> Callable:
    if not 0 <= beta <= 1:
        raise UserError(f"beta {beta} must lie between 0 (forward KL) and 1 (reverse KL)")
    return between(beta)


def distill(model: Model, teacher: Model | None = None, *, beta: float = 0.0, alpha: float = 0.9, tau: float = 1.0) -> Objective:
    """Logit distillation on given texts: alpha tau^2 D(teacher, student; temperature tau) + (1 - alpha) nll (Hinton et al. 2015,
    1503.02531, section 2: tau^2 keeps the gradient's size when tau changes). D: the forward KL at beta 0, the reverse one at 1,
    the generalised Jensen-Shannon divergence between."""
    return match(model, teacher, _checked(beta), scale=tau**2, alpha=alpha, tau=tau)


def on_policy_distill(model: Model, teacher: Model | None = None, *, beta: float = 0.5, tau: float = 1.0) -> Objective:
    """Generalised knowledge distillation (Agarwal et al. 2023, 2306.13649, algorithm 1): D(teacher, student) at every token of the
    student's own answers, no gradient through the sampling, or of given ones (`rl.given` says when). params {"policy": ...}. As in
    the paper and in TRL there is no tau^2."""
    return match(model, teacher, _checked(beta), tau=tau, policy=lambda params: params["policy"])
