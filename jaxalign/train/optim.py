"""Optax chains and schedules from plain values; regexes over parameter paths say what decays, freezes or runs slower."""

from __future__ import annotations

import dataclasses
import math
from typing import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign import tree
from jaxalign.types import Tree, UserError


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW by default, with the decay of GPT-3 and LLaMA: matrices only."""

    name: str = "adamw"  # adamw | adam_tf | sgd | lion | adafactor | rmsprop
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

    def __post_init__(self):
        for f in ("lr", "end", "b1", "b2", "eps", "weight_decay"):
            v = getattr(self, f)
            if not (math.isfinite(v) and v >= 0):
                raise UserError(f"optim.{f} must be a finite number >= 0, got {v}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"optim.max_grad_norm must be > 0 (or None for no clipping), got {self.max_grad_norm}")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.schedule {self.schedule!r} is unknown; choose constant, linear or cosine")
        if self.name not in OPTIMIZERS:
            raise UserError(f"optim.name {self.name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")


def scale_by_adam_tf(b1, b2, eps) -> optax.GradientTransformation:
    """Adam as TensorFlow has it: eps joins the uncorrected second moment, so early steps are smaller (methods.md 4.9)."""
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=0.0)

    def update(grads, state, params=None):
        _, new = plain.update(grads, state, params)
        t = new.count.astype(jnp.float32)
        rate = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        return jax.tree.map(lambda m, v: rate * m / (jnp.sqrt(v) + eps), new.mu, new.nu), new

    return optax.GradientTransformation(plain.init, update)


OPTIMIZERS: dict[str, Callable[[Optim], optax.GradientTransformation]] = {
    "adamw": lambda o: optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
    "adam_tf": lambda o: scale_by_adam_tf(o.b1, o.b2, o.eps),
    "sgd": lambda o: optax.identity(),
    "lion": lambda o: optax.scale_by_lion(b1=o.b1, b2=o.b2),
    "adafactor": lambda o: optax.scale_by_factored_rms(),
    "rmsprop": lambda o: optax.scale_by_rms(decay=o.b2, eps=o.eps),
}


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
    chain = [OPTIMIZERS[o.name](o)]
    if o.weight_decay:
        chain.append(optax.add_decayed_weights(o.weight_decay, mask=decayed(o, params)))
    if o.lr_scale:
        factors = tree.select(params, o.lr_scale, 1.0)
        chain.append(optax.stateless(lambda u, _: jax.tree.map(lambda x, f: x * f, u, factors)))
    chain.append(optax.scale_by_schedule(lambda t: -rate(t)))
    return optax.chain(*chain), rate
