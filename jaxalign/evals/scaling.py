"""Compute-optimal sizes, and scaling laws fitted to runs of one's own. Host only: numpy, and scipy for the minimiser.

N parameters (embeddings included, as Hoffmann et al. count), D tokens, C = 6 N D training FLOPs, L loss in nats per token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Callable, NamedTuple

import numpy as np

from jaxalign.types import UserError


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float


# Hoffmann et al. 2022 (2203.15556, equation 10), and the same data fitted again (Besiroglu et al. 2024, 2404.10102). The rounded
# published constants ask for 93 tokens a parameter at Chinchilla's own budget, against 20 by that paper's two other ways; the refit for 18.
LAWS = {"refit": Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658), "published": Law(1.69, 406.4, 410.7, 0.34, 0.28)}
TOKENS_PER_PARAMETER = 20.0  # the rule of thumb
# What Hoffmann et al. report for N ~ C^a, with the 10th and 90th percentile (table 2).
CHINCHILLA = {"minimum over curves": (0.50, 0.488, 0.502), "isoFLOP": (0.49, 0.462, 0.534), "parametric": (0.46, 0.454, 0.455)}


def loss(law: Law, n, d):
    return law.E + law.A / np.power(n, law.alpha) + law.B / np.power(d, law.beta)


def exponents(law: Law) -> tuple[float, float]:
    """(a, b) of N ~ C^a, D ~ C^b."""
    return law.beta / (law.alpha + law.beta), law.alpha / (law.alpha + law.beta)


def optimum(law: Law, flops: float) -> tuple[float, float]:
    """(N, D) of least loss under 6 N D = flops (2203.15556, equation 4)."""
    a, b = exponents(law)
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    return g * (flops / 6) ** a, (flops / 6) ** b / g


def rule_of_thumb(flops: float, ratio: float = TOKENS_PER_PARAMETER) -> tuple[float, float]:
    """(N, D) with D = ratio N under 6 N D = flops."""
    n = math.sqrt(flops / (6 * ratio))
    return n, ratio * n


# -- from a size to a config ----------------------------------------------------------------------------------------

WIDTHS = (*range(32, 64, 8), *range(64, 256, 32), *range(256, 512, 64), *range(512, 23297, 128))  # whole heads, as `shaped` has them


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a `models.decoder` with gated feed-forward."""

    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    tied: bool = True

    @property
    def parameters(self) -> int:
        layer = 4 * self.dim**2 + 3 * self.dim * self.hidden + 2 * self.dim
        return self.vocab * self.dim * (1 if self.tied else 2) + self.layers * layer + self.dim


def shaped(vocab: int, dim: int, layers: int, tied: bool = True) -> Shape:
    """Heads 64 wide (32 or less in a model below 256), a feed-forward of 8/3 dim in whole 8s (Touvron et al. 2023)."""
    width = 64 if dim >= 256 else 32 if dim >= 64 else 8
    return Shape(vocab, dim, layers, max(dim // width, 1), -(-8 * dim // 3) // 8 * 8, tied)


def shape(n: float, vocab: int, tied: bool = True) -> Shape:
    """The decoder nearest to n parameters. Its width is 32 to 128 times its depth: between those the loss hardly depends on it
    (Kaplan et al. 2020, 2001.08361, section 3.1). Raises UserError where the vocabulary leaves nothing for layers."""
    best = math.inf, None
    for dim in WIDTHS:
        one = shaped(vocab, dim, 1, tied)
        layer = shaped(vocab, dim, 2, tied).parameters - one.parameters
        layers = min(max(round((n - (one.parameters - layer)) / layer), -(-dim // 128)), dim // 32)
        off = abs(math.log(shaped(vocab, dim, layers, tied).parameters / n)) + 0.02 * abs(math.log2(dim / layers / 80))
        if off < best[0]:
            best = off, shaped(vocab, dim, layers, tied)
    if abs(math.log(best[1].parameters / n)) > 0.5:
        raise UserError(f"no model of {n:,.0f} parameters has a vocabulary of {vocab:,}: its embeddings would be most of it; give more --flops or a smaller --vocab")
    return best[1]


class Sizing(NamedTuple):
    """What to train with so many FLOPs."""

    n: float
    d: float
    shape: Shape
    lr: float
    batch: int  # rows of a step
    seq_len: int
    steps: int
    warmup: int
    flops: float  # of the shape that was found, on steps x batch x seq_len tokens: 6 N D


def sizing(flops: float, vocab: int, seq_len: int, n_and_d: tuple[float, float], tied: bool = True) -> Sizing:
    """Peak learning rate and batch by the power laws of DeepSeek LLM (2401.02954, equation 1: lr 0.3118 C^-0.125, batch
    0.2920 C^0.3271 tokens, in whole eights of rows where there are eight, for rows are shared among devices); cosine over exactly these steps to a tenth (2203.15556, appendix B: a longer one costs loss), after a warm-up of 2 %."""
    n, d = n_and_d
    found = shape(n, vocab, tied)
    d = flops / (6 * found.parameters)  # the budget is kept, whatever shape was at hand
    batch = 0.2920 * flops**0.3271 / seq_len
    batch = 8 * round(batch / 8) if batch >= 8 else max(1, round(batch))
    steps = max(1, round(d / (batch * seq_len)))
    return Sizing(n, n_and_d[1], found, 0.3118 * flops**-0.125, batch, seq_len, steps, max(1, steps // 50), 6.0 * found.parameters * steps * batch * seq_len)


def lines(flops: float, vocab: int, seq_len: int, section: str = "stage") -> list[str]:
    """What `jaxalign plan --flops` prints; the last line is what to add to a command of configs/pretrain.py."""
    ways = {"refit of Chinchilla's law": optimum(LAWS["refit"], flops), "published constants": optimum(LAWS["published"], flops), "20 tokens a parameter": rule_of_thumb(flops)}
    out = [f"{flops:.3g} FLOPs, C = 6 N D, a vocabulary of {vocab:,}, rows of {seq_len} tokens", "", "| by | N | D | D / N | dim x layers | heads | hidden | lr | batch | steps | predicted loss |", "|---" * 11 + "|"]
    for name, nd in ways.items():
        s = sizing(flops, vocab, seq_len, nd)
        x = s.shape
        law = LAWS["published" if name.startswith("published") else "refit"]
        out.append(f"| {name} | {nd[0]:.3g} | {nd[1]:.3g} | {nd[1] / nd[0]:.1f} | {x.dim} x {x.layers} | {x.heads} | {x.hidden} | {s.lr:.2e} | {s.batch} | {s.steps} | {loss(law, *nd):.3f} |")
    s = sizing(flops, vocab, seq_len, ways["refit of Chinchilla's law"])
    at = f"--config.{section}"
    model = " ".join(f"--config.model.{k}={getattr(s.shape, k)}" for k in ("dim", "layers", "heads", "hidden"))
    rest = f"{at}.data.batch_size={s.batch} {at}.data.seq_len={seq_len} {at}.train.steps={s.steps} {at}.optim.lr={s.lr:.2e} {at}.optim.warmup={s.warmup} {at}.optim.schedule=cosine {at}.optim.end=0.1"
    return [*out, "", "The loss is that of Chinchilla's text and vocabulary: compare rows, not with your own.", "", f"{model} {rest}"]


# -- fits to runs ---------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """One entry a run; of a budget there are several sizes."""

    flops: np.ndarray  # f64[R]: the budget, exactly equal within one
    n: np.ndarray  # f64[R]
    d: np.ndarray  # f64[R]
    loss: np.ndarray  # f64[R]

    def take(self, index) -> Runs:
        return Runs(*(np.asarray(x)[index] for x in self))


class IsoFlop(NamedTuple):
    budgets: np.ndarray  # f64[K]
    n: np.ndarray  # f64[K]; best size of each budget
    loss: np.ndarray  # f64[K]; there
    parabolas: np.ndarray  # f64[K,3]; coefficients in ln N, highest power first
    exponent: float  # a of N ~ C^a
    inside: np.ndarray  # bool[K]; the minimum lies among the sizes that were tried, not beyond them


def isoflop(runs: Runs) -> IsoFlop:
    """Chinchilla's second way (2203.15556, section 3.2): a parabola in ln N through the losses of each budget, then a line through
    its minima. A budget without a minimum (its parabola opens downward) has NaN there and is left out of the line; the exponent
    is NaN where fewer than two have one."""
    budgets = np.unique(runs.flops)
    fits, best, least, inside = [], [], [], []
    for c in budgets:
        here = runs.take(np.asarray(runs.flops) == c)
        if len(np.unique(here.n)) < 3:
            raise UserError(f"a parabola needs three sizes or more, and the budget {c:.3g} has {len(np.unique(here.n))}")
        x = np.log(here.n)
        p = np.polyfit(x - x.mean(), here.loss, 2)
        top = -p[1] / (2 * p[0]) if p[0] > 0 else math.nan
        m = x.mean()
        fits.append((p[0], p[1] - 2 * p[0] * m, p[2] - p[1] * m + p[0] * m * m))
        best.append(math.exp(min(top + m, 80.0)) if p[0] > 0 else math.nan)
        least.append(np.polyval(p, top))
        inside.append(bool(x.min() <= top + m <= x.max()))
    best = np.array(best)
    ok = np.isfinite(best)
    exponent = float(np.polyfit(np.log(budgets[ok]), np.log(best[ok]), 1)[0]) if ok.sum() >= 2 else math.nan
    return IsoFlop(budgets, best, np.array(least), np.array(fits), exponent, np.array(inside))


def _objective(v, n, d, target, delta):
    """(sum of Huber(log L_hat - log L), its gradient) in v = (log A, log B, log E, alpha, beta)."""
    a, b, e, alpha, beta = v
    parts = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    top = parts.max(0)
    share = np.exp(parts - top)
    total = share.sum(0)
    share = share / total
    r = top + np.log(total) - target
    g = np.clip(r, -delta, delta)
    value = np.where(np.abs(r) <= delta, 0.5 * r * r, delta * (np.abs(r) - 0.5 * delta)).sum()
    return value, np.array([(g * share[0]).sum(), (g * share[1]).sum(), (g * share[2]).sum(), -(g * share[0] * n).sum(), -(g * share[1] * d).sum()])


def parametric(runs: Runs, *, delta: float = 1e-3, start: Law | None = None) -> Law:
    """Chinchilla's third way (2203.15556, section 3.3): log L by Huber's loss and L-BFGS, from a grid of starts (or one). The losses
    are summed, not averaged: with the mean, a minimiser's tolerance ends the search early (2404.10102, appendix)."""
    from scipy import optimize

    n, d, target = np.log(runs.n), np.log(runs.d), np.log(runs.loss)
    if start is None:
        scale = target.min()
        starts = itertools.product((0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (scale - 1.0, scale), (0.2, 0.6), (0.2, 0.6))
    else:
        starts = [(math.log(start.A), math.log(start.B), math.log(start.E), start.alpha, start.beta)]
    bounds = [(-10, 60), (-10, 60), (-10, None), (0.0, 4.0), (0.0, 4.0)]
    run = lambda v, most: optimize.minimize(_objective, v, (n, d, target, delta), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": most, "ftol": 1e-15, "gtol": 1e-10})
    near = sorted((run(np.array(v), 40) for v in starts), key=lambda r: r.fun)[:3]  # a few steps tell the basins apart
    best = min((run(r.x, 3000) for r in near), key=lambda r: r.fun)
    a, b, e, alpha, beta = best.x
    return Law(math.exp(e), math.exp(a), math.exp(b), float(alpha), float(beta))


def bootstrap(runs: Runs, statistic: Callable[[Runs], float], *, times: int = 1000, level: float = 0.9, seed: int = 0) -> tuple[float, float, float]:
    """(low, median, high) of a statistic over runs drawn again with replacement, budget by budget. A draw with fewer than three
    sizes of a budget fits no parabola and is drawn again; one whose statistic is not finite is left out."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(np.asarray(runs.flops) == c) for c in np.unique(runs.flops)]
    if any(len(np.unique(np.asarray(runs.n)[g])) < 3 for g in groups):
        raise UserError("bootstrapping needs three sizes or more of every budget")

    def again(group):
        while True:
            drawn = rng.choice(group, len(group))
            if len(np.unique(np.asarray(runs.n)[drawn])) >= 3:
                return drawn

    values = np.array([statistic(runs.take(np.concatenate([again(g) for g in groups]))) for _ in range(times)])
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    low, middle, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return float(low), float(middle), float(high)
