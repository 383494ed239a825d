"""Optax chains and schedules from plain values; regexes over parameter paths say what decays, freezes or runs slower."""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxalign import tree
from jaxalign.train.adam8bit import scale_by_adam8bit
from jaxalign.types import Tree, UserError


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW by default, with the decay of GPT-3 and LLaMA: matrices only."""

    name: str = "adamw"  # one of OPTIMIZERS
    lr: float = 3e-4
    schedule: str = "cosine"  # constant | linear | cosine, after the warm-up
    warmup: int = 0  # steps from 0 to lr
    end: float = 0.1  # of lr, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: tuple[str, ...] = ()  # regexes of what decays; (): every leaf that is a matrix within its layer
    lr_scale: tuple[tuple[str, float], ...] = ()  # regex -> multiple of lr
    freeze: tuple[str, ...] = ()  # regexes of what is not trained
    max_grad_norm: float | None = 1.0
    mu_dtype: str | None = None  # of the first moment: bfloat16, or as the params (the second, which moves by 1 - b2, would stand still in bf16)
    ema: float = 0.0  # decay of the average of the params that is evaluated and kept (InstructGPT: 0.992); 0: those trained
    offload: bool = False  # keep the optimizer's state in the host's memory between updates

    def __post_init__(self):
        for f in ("lr", "end", "b1", "b2", "eps", "weight_decay"):
            v = getattr(self, f)
            if not (math.isfinite(v) and v >= 0):
                raise UserError(f"optim.{f} must be a finite number >= 0, got {v}")
        if not self.ema < 1 or self.ema < 0 or (self.ema and self.name == "schedule_free_adamw"):
            raise UserError(f"optim.ema must be 0 (none) or a decay below 1, got {self.ema}; schedule_free_adamw makes an average of its own")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"optim.max_grad_norm must be > 0 (or None for no clipping), got {self.max_grad_norm}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.schedule {self.schedule!r} is unknown; choose constant, linear or cosine")
        if self.name not in OPTIMIZERS:
            raise UserError(f"optim.name {self.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        if self.mu_dtype is not None and (self.mu_dtype != "bfloat16" or self.name not in MOMENTA):
            raise UserError(f"optim.mu_dtype {self.mu_dtype!r} with {self.name}: it may be bfloat16, with {', '.join(MOMENTA)}; else leave it out")
        if self.name == "schedule_free_adamw" and not (self.schedule == "constant" and self.b1 > 0):
            raise UserError("schedule_free_adamw averages in place of decaying: set optim.schedule to constant (after the warm-up), and optim.b1 > 0")


def scale_by_adam_tf(b1, b2, eps, mu_dtype=None) -> optax.GradientTransformation:
    """Adam as TensorFlow has it: eps joins the uncorrected second moment, so early steps are smaller (methods.md 4.9)."""
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=0.0, mu_dtype=mu_dtype)

    def update(grads, state, params=None):
        _, new = plain.update(grads, state, params)
        t = new.count.astype(jnp.float32)
        rate = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), new.mu, new.nu), new

    return optax.GradientTransformation(plain.init, update)


class AverageState(NamedTuple):
    average: Tree  # of the params


def average(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are and keeps an exponential moving average of the params they make, which begins as the params do
    (`state.averaged` reads it). Last in a chain."""

    def update(updates, state, params):
        new = optax.apply_updates(params, updates)
        return updates, AverageState(jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new))

    return optax.GradientTransformation(lambda params: AverageState(jax.tree.map(jnp.copy, params)), update)


def adafactor(o: Optim, params: Tree) -> optax.GradientTransformation:
    """Shazeer & Stern 2018 (1804.04235): a factored second moment and updates of RMS at most 1 (their d). Neither relative
    steps nor steps relative to the parameters' size: rate and schedule are those of the config, as for every optimizer."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def muon(o: Optim, params: Tree) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the layers, each of a stacked leaf [L,in,out] by itself; Adam for all
    else: embeddings, heads, norms, biases. Momentum 0.95, and updates of RMS 0.2, which is about Adam's, so that one rate and
    one decay do for both (Liu et al. 2025, 2502.16982, section 2.2)."""
    labels = tree.map_named(lambda n, x: "muon" if "layers/" in n and x.ndim >= 3 else "adam", params)
    # Left to itself optax takes 2-D leaves alone, and would give every stacked weight to Adam without a word.
    sides = lambda p: jax.tree.map(lambda x: contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,)), p)
    rms = optax.stateless(lambda u, _: jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, u))
    matrices = optax.chain(contrib.scale_by_muon(mu_dtype=o.mu_dtype, weight_dimension_numbers=sides), rms)
    return optax.partition({"muon": matrices, "adam": optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps, mu_dtype=o.mu_dtype)}, labels)


OPTIMIZERS: dict[str, Callable[[Optim, Tree], optax.GradientTransformation]] = {
    "adamw": lambda o, _: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps, mu_dtype=o.mu_dtype),
    "adam_tf": lambda o, _: scale_by_adam_tf(o.b1, o.b2, o.eps, o.mu_dtype),
    "adamw_8bit": lambda o, _: scale_by_adam8bit(b1=o.b1, b2=o.b2, eps=o.eps),
    "sgd": lambda o, _: optax.identity(),
    "lion": lambda o, _: optax.scale_by_lion(b1=o.b1, b2=o.b2, mu_dtype=o.mu_dtype),
    "adafactor": adafactor,
    "rmsprop": lambda o, _: optax.scale_by_rms(decay=o.b2, eps=o.eps),
    "muon": muon,
    "schedule_free_adamw": lambda o, _: optax.scale_by_rms(decay=o.b2, eps=o.eps, eps_in_sqrt=False, bias_correction=True),
}
MOMENTA = ("adamw", "adam_tf", "lion", "muon")  # those whose first moment may be bf16


def schedule(o: Optim, steps: int) -> Callable:
    """step -> learning rate: linear warm-up to lr, then the named decay to end * lr at `steps`."""
    rest = max(steps - o.warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(o.lr),
        "linear": lambda: optax.linear_schedule(o.lr, o.lr * o.end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(o.lr, rest, alpha=o.end),
    }[o.schedule]()
    if not o.warmup:
        return after
    # The first step already moves: (t+1)/warmup, so that no step is spent at rate 0.
    return lambda t: jnp.where(t < o.warmup, o.lr * (t + 1) / o.warmup, after(t - o.warmup))


def trainable(o: Optim, params: Tree) -> Tree:
    """bool per leaf: what `freeze` leaves."""
    return tree.select(params, tuple((p, False) for p in o.freeze), True)


def decayed(o: Optim, params: Tree) -> Tree:
    """bool per leaf. By default matrices: two or more dimensions, not counting the layer axis of stacked leaves."""
    if o.decay:
        return tree.select(params, tuple((p, True) for p in o.decay), False)
    return tree.map_named(lambda n, x: x.ndim - ("layers/" in n) >= 2, params)


def make(o: Optim, steps: int, params: Tree) -> tuple[optax.GradientTransformation, Callable]:
    """(transformation, schedule). Clipping is done by the step, which reports the norm before it."""
    rate = schedule(o, steps)
    chain = [OPTIMIZERS[o.name](o, params)]
    if o.weight_decay:
        chain.append(optax.add_decayed_weights(o.weight_decay, mask=decayed(o, params)))
    if o.lr_scale:
        factors = tree.select(params, o.lr_scale, 1.0)
        chain.append(optax.stateless(lambda u, _: jax.tree.map(lambda x, f: x * f, u, factors)))
    chain.append(optax.scale_by_schedule(lambda t: -rate(t)))
    if o.ema:
        chain.append(average(o.ema))
    tx = optax.chain(*chain)
    if o.name == "schedule_free_adamw":  # Defazio et al. 2024 (2405.15682); b1 mixes the average into where gradients are taken
        tx = contrib.schedule_free(tx, rate, b1=o.b1)
    return tx, rate
