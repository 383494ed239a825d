"""Direct preference losses on pairs. Equations on small arrays first; then `preference`, which gives them their log-probs.

Per pair, with w the chosen and l the rejected completion (log-probs are sums over completion tokens, EOS included):
a = log pi(w) - log ref(w), b = log pi(l) - log ref(l), n_w and n_l the completion lengths. An equation is
f(a, b, n_w, n_l, beta) -> f32[B]. Losses that need more than an equation are in `dpo_variants`, those without a reference in `odds`.
"""

from __future__ import annotations

import functools
import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.types import BRANCH, Array, Loss, Metrics, Model, Objective, Pairs, SharedPairs, Term, Tokens, UserError

log_sigmoid = jax.nn.log_sigmoid


def sigmoid_loss(a, b, n_w, n_l, beta, smoothing=0.0):
    """-(1-e) log sigma(beta (a-b)) - e log sigma(-beta (a-b)): DPO (2305.18290 eq. 7); e > 0 is cDPO (Mitchell 2023, eq. 3)."""
    h = beta * (a - b)
    return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)


def robust_loss(a, b, n_w, n_l, beta, smoothing=0.1):
    """(-(1-e) log sigma(h) + e log sigma(-h)) / (1-2e), h = beta (a-b): of labels wrong with probability e < 1/2, its mean is DPO's
    loss on the right ones (2403.00409)."""
    h = beta * (a - b)
    return (-(1 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h)) / (1 - 2 * smoothing)


def ipo_loss(a, b, n_w, n_l, beta):
    """(a/n_w - b/n_l - 1/(2 beta))^2 (2310.12036 eq. 17; on per-token means, as its authors confirm)."""
    return (a / jnp.maximum(n_w, 1) - b / jnp.maximum(n_l, 1) - 1 / (2 * beta)) ** 2


def ipo_sum_loss(a, b, n_w, n_l, beta):
    """(a - b - 1/(2 beta))^2: IPO on sums, as printed in the paper."""
    return (a - b - 1 / (2 * beta)) ** 2


def hinge_loss(a, b, n_w, n_l, beta):
    """max(0, 1 - beta (a-b)) (RSO 2309.06657; SLiC 2305.10425)."""
    return jax.nn.relu(1 - beta * (a - b))


def normalised_loss(a, b, n_w, n_l, beta):
    """-log sigma(beta (a/n_w - b/n_l)): DPO on means over tokens (Tulu 3, 2411.15124; TRL's sigmoid_norm)."""
    return -log_sigmoid(beta * (a / jnp.maximum(n_w, 1) - b / jnp.maximum(n_l, 1)))


def length_loss(a, b, n_w, n_l, beta, alpha=0.01):
    """-log sigma(beta (a-b) + alpha (n_w - n_l)): a longer winner needs less of a margin (R-DPO, 2403.19159)."""
    return -log_sigmoid(beta * (a - b) + alpha * (n_w - n_l))


def exo_loss(a, b, n_w, n_l, beta, smoothing=1e-3):
    """KL((sigma(h), sigma(-h)) || (1-e, e)), h = beta (a-b): the reverse of DPO's direction (EXO, 2402.00856 eq. 16)."""
    h = beta * (a - b)
    return jax.nn.sigmoid(h) * (log_sigmoid(h) - math.log1p(-smoothing)) + jax.nn.sigmoid(-h) * (log_sigmoid(-h) - math.log(smoothing))


def nca_loss(a, b, n_w, n_l, beta):
    """-log sigma(beta a) - (log sigma(-beta a) + log sigma(-beta b)) / 2: absolute log-ratios, not their difference (NCA, 2402.05369)."""
    return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)


def bco_loss(a, b, n_w, n_l, beta, shift=0.0):
    """-log sigma(beta a - shift) - log sigma(-(beta b - shift)): each side classified by itself (BCO, 2404.04656)."""
    return -log_sigmoid(beta * a - shift) - log_sigmoid(-(beta * b - shift))


def sppo_loss(a, b, n_w, n_l, beta):
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2: SPPO where the winner wins for sure (2405.00675 eq. 4.7)."""
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero_loss(a, b, n_w, n_l, beta):
    """1 - sigma(beta a) + sigma(beta b): the chosen up, the rejected down (APO, 2408.06266 eq. 7)."""
    return jax.nn.sigmoid(-beta * a) + jax.nn.sigmoid(beta * b)


def apo_down_loss(a, b, n_w, n_l, beta):
    """sigma(beta a) + 1 - sigma(beta (a-b)): both down, the rejected further; for chosen answers worse than the policy's (APO, 2408.06266 eq. 8)."""
    return jax.nn.sigmoid(beta * a) + jax.nn.sigmoid(-beta * (a - b))


def discopop_loss(a, b, n_w, n_l, beta, tau=0.05):
    """(1-s)(-log sigma(h)) + s exp(-h), h = beta (a-b), s = sigma(h / tau): found by a language model (DiscoPOP, 2406.08414 eq. 5)."""
    h = beta * (a - b)
    s = h / tau
    return -jax.nn.sigmoid(-s) * log_sigmoid(h) + jnp.exp(log_sigmoid(s) - h)  # one exponent: far below zero exp(-h) alone overflows


def reverse_kl(x):
    """log u of the log-ratio x = log u: DPO itself."""
    return x


def forward_kl(x):
    """1 - 1/u. The constant makes f'(1) = 0, as of the others; the paper prints -1/u. Exponents are cut at 80, as in TRL."""
    return 1 - jnp.exp(jnp.minimum(-x, 80.0))


def js_divergence(x):
    """log(2u / (1+u))."""
    return math.log(2) + log_sigmoid(x)


def alpha_divergence(x, alpha=0.5):
    """(1 - u^-alpha) / alpha, 0 < alpha < 1: at 0 the reverse KL, at 1 the forward. TRL 1.16's coefficient is 1 - alpha, that of
    TRL 0.11 alpha."""
    return (1 - jnp.exp(jnp.minimum(-alpha * x, 80.0))) / alpha


DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js": js_divergence, "alpha": alpha_divergence}


def under(divergence: Callable, equation: Callable = sigmoid_loss) -> Callable:
    """The equation with f'(u) in the place of log-ratios: f-DPO (2309.16240), of any equation on (a, b)."""
    return lambda a, b, *rest: equation(divergence(a), divergence(b), *rest)


# -- log-probs of pairs ---------------------------------------------------------------------------------------------


def token_logps(model: Model, params, rows: Tokens):
    """(LogProbs, mask f32[B,T]) of the completions."""
    h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
    mask = targets(rows.mask, rows.segments)
    return logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, mask), mask


def sequence_logps(model: Model, params, rows: Tokens):
    """(log-prob sums f32[B], token count f32[B], entropy sum f32[]) over the completions."""
    out, mask = token_logps(model, params, rows)
    return out.logp.sum(1), mask.sum(1), out.entropy.sum()


def sides(batch: Pairs | SharedPairs) -> tuple[Tokens, Callable]:
    """(rows, split): what one forward reads, 2B rows, or B that hold both answers; split(x f32[rows,T], over=jnp.sum) -> (of the
    chosen, of the rejected), each reduced over its own answer's time; elsewhere x must be 0."""
    if isinstance(batch, SharedPairs):
        one = batch.rows.segments >> BRANCH == 1
        return batch.rows, lambda x, over=lambda x: x.sum(1): (over(jnp.where(one, x, 0)), over(jnp.where(one, 0, x)))
    B = batch.chosen.tokens.shape[0]
    rows = jax.tree.map(lambda w, l: jnp.concatenate([w, l]), batch.chosen, batch.rejected)
    return rows, lambda x, over=lambda x: x.sum(1): (over(x[:B]), over(x[B:]))


def pair_logps(model: Model, params, batch: Pairs | SharedPairs):
    """(chosen f32[B], rejected f32[B], n_w, n_l, entropy sum): one forward over 2B rows, or over B that hold both."""
    rows, split = sides(batch)
    out, mask = token_logps(model, params, rows)
    return *split(out.logp), *split(mask), out.entropy.sum()


class Compared(NamedTuple):
    """Everything about the pairs of a batch that their losses are made of; f32[B] each, log-probs 0 where real is 0."""

    a: Array  # log pi(w) - log ref(w)
    b: Array  # log pi(l) - log ref(l)
    w: Array  # log pi(w)
    l: Array  # log pi(l)
    n_w: Array  # tokens of w
    n_l: Array
    real: Array  # 0: one of its completions is empty, and it weighs nothing

    def mean(self, x, scale=1.0) -> Term:
        """The mean of x f32[B] over the pairs."""
        return Term((self.real * x).sum(), self.real.sum(), scale)


def compared(batch: Pairs | SharedPairs, w, l, n_w, n_l) -> Compared:
    real = ((n_w > 0) & (n_l > 0)).astype(jnp.float32)
    return Compared(*(jnp.where(real > 0, x, 0.0) for x in (w - batch.ref_chosen, l - batch.ref_rejected, w, l)), n_w, n_l, real)


def token_nll(c: Compared, scale=1.0) -> Term:
    """Cross entropy of the chosen answers, averaged over all their tokens in the step."""
    return Term(-(c.real * c.w).sum(), (c.real * c.n_w).sum(), scale)


def answer_nll(c: Compared, scale=1.0) -> Term:
    """Cross entropy of the chosen answers, averaged over the tokens of each and then over answers."""
    return c.mean(-c.w / jnp.maximum(c.n_w, 1), scale)


def whole(x, n):
    """What `rewards/...` show of an answer's log-ratio x and length n: beta x."""
    return x


def per_token(x, n):
    """As `whole`, of losses on means over tokens."""
    return x / jnp.maximum(n, 1)


def pair_metrics(c: Compared, entropy, beta: float, reward: Callable = whole) -> Metrics:
    c, entropy = jax.lax.stop_gradient((c, entropy))
    mean = lambda x: tuple(c.mean(x))[:2]
    a, b = reward(c.a, c.n_w), reward(c.b, c.n_l)
    return {
        "rewards/chosen": mean(beta * a),
        "rewards/rejected": mean(beta * b),
        "rewards/accuracies": mean(a > b),
        "rewards/margins": mean(beta * (a - b)),
        "logps/chosen": mean(c.w),
        "logps/rejected": mean(c.l),
        "entropy": (entropy, c.n_w.sum() + c.n_l.sum()),
    }


def of_pairs(model: Model, terms: Callable, *, beta: float, reward: Callable = whole, **more) -> Objective:
    """An objective from `terms(compared, aux) -> {name: Term}`. Reference log-probs ride in the batch (`rl.reference`). A pair with
    an empty mask weighs 0. more: other fields of `Objective`."""

    def loss(params, frozen, aux, batch: Pairs | SharedPairs, key, stats) -> Loss:
        *logps, entropy = pair_logps(model, params, batch)
        c = compared(batch, *logps)
        return Loss(terms(c, aux), pair_metrics(c, entropy, beta, reward))

    return Objective(loss, shared=True, **more)


def preference(model: Model, equation: Callable, *, beta: float, reward: Callable = whole) -> Objective:
    """An objective from `equation(a, b, n_w, n_l, beta) -> f32[B]`, averaged over the pairs of the step."""
    return of_pairs(model, lambda c, aux: {"preference": c.mean(equation(c.a, c.b, c.n_w, c.n_l, beta))}, beta=beta, reward=reward)


# -- objectives -----------------------------------------------------------------------------------------------------


def dpo(model: Model, *, beta: float = 0.1) -> Objective:
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290)."""
    return preference(model, sigmoid_loss, beta=beta)


def cdpo(model: Model, *, beta: float = 0.1, smoothing: float = 0.1) -> Objective:
    """DPO for labels that are wrong with probability `smoothing`."""
    return preference(model, functools.partial(sigmoid_loss, smoothing=smoothing), beta=beta)


def robust(model: Model, *, beta: float = 0.1, smoothing: float = 0.1) -> Objective:
    """DPO without the bias that labels wrong with probability `smoothing` give it (Chowdhury et al. 2024, 2403.00409)."""
    if not 0 <= smoothing < 0.5:
        raise UserError(f"objective.smoothing {smoothing}: robust divides by 1 - 2 smoothing; use 0 or more, below 0.5")
    return preference(model, functools.partial(robust_loss, smoothing=smoothing), beta=beta)


def ipo(model: Model, *, beta: float = 0.1) -> Objective:
    """Identity preference optimisation (Azar et al. 2023, 2310.12036), on means over tokens."""
    return preference(model, ipo_loss, beta=beta)


def ipo_sum(model: Model, *, beta: float = 0.1) -> Objective:
    """IPO on sums over tokens, as its paper prints it."""
    return preference(model, ipo_sum_loss, beta=beta)


def hinge(model: Model, *, beta: float = 0.1) -> Objective:
    """SLiC's hinge on log-ratios."""
    return preference(model, hinge_loss, beta=beta)


def dpo_norm(model: Model, *, beta: float = 5.0) -> Objective:
    """DPO on means over tokens (Tulu 3)."""
    return preference(model, normalised_loss, beta=beta, reward=per_token)


def r_dpo(model: Model, *, beta: float = 0.1, alpha: float = 0.01) -> Objective:
    """DPO with a price on length (Park et al. 2024, 2403.19159)."""
    return preference(model, functools.partial(length_loss, alpha=alpha), beta=beta)


def exo(model: Model, *, beta: float = 0.1, smoothing: float = 1e-3) -> Objective:
    """Exact preference optimisation on pairs (Ji et al. 2024, 2402.00856)."""
    if not 0 < smoothing < 1:
        raise UserError(f"objective.smoothing {smoothing}: exo takes its logarithm; use a number between 0 and 1, such as 0.001")
    return preference(model, functools.partial(exo_loss, smoothing=smoothing), beta=beta)


def nca(model: Model, *, beta: float = 0.1) -> Objective:
    """Noise contrastive alignment on pairs (Chen et al. 2024, 2402.05369)."""
    return preference(model, nca_loss, beta=beta)


def sppo(model: Model, *, beta: float = 0.1) -> Objective:
    """Self-play preference optimisation with sure winners (Wu et al. 2024, 2405.00675)."""
    return preference(model, sppo_loss, beta=beta)


def apo_zero(model: Model, *, beta: float = 0.1) -> Objective:
    """Anchored preference optimisation, for chosen answers better than the policy's own (D'Oosterlinck et al. 2024, 2408.06266)."""
    return preference(model, apo_zero_loss, beta=beta)


def apo_down(model: Model, *, beta: float = 0.1) -> Objective:
    """Anchored preference optimisation, for chosen answers worse than the policy's own."""
    return preference(model, apo_down_loss, beta=beta)


def discopop(model: Model, *, beta: float = 0.1, tau: float = 0.05) -> Objective:
    """Discovered preference optimisation (Lu et al. 2024, 2406.08414)."""
    return preference(model, functools.partial(discopop_loss, tau=tau), beta=beta)


def f_dpo(model: Model, *, beta: float = 0.1, divergence: str = "js", alpha: float = 0.5) -> Objective:
    """DPO under another divergence from the reference (Wang et al. 2023, 2309.16240): reverse_kl, forward_kl, js, or alpha, which reads `alpha`."""
    if divergence not in DIVERGENCES or not 0 < alpha < 1:
        raise UserError(f"objective.divergence {divergence!r} with alpha {alpha}: the divergences are {', '.join(DIVERGENCES)}, and alpha lies between 0 and 1")
    of = functools.partial(alpha_divergence, alpha=alpha) if divergence == "alpha" else DIVERGENCES[divergence]
    return preference(model, under(of), beta=beta)
