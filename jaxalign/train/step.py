"""The one step. Every objective goes through it; nothing here knows which.

The gradient is that of  sum over terms of scale * total / weight,  with each weight summed over the whole global batch
first. So accumulation, packing, padding and data parallelism all give the same gradient.
"""

from __future__ import annotations

import math
from typing import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign import shard, tree
from jaxalign.ops import nn
from jaxalign.train.state import TrainState
from jaxalign.types import Objective, Tree, UserError


def add(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


def mean(total, weight):
    """total / weight; an empty weight gives 0, never NaN."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def micro(batch: Tree, n: int) -> Tree:
    """Leaves [B,...] -> [n, B/n, ...]. Micro-batch i takes rows i, i+n, ...: each device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0), batch)


# Tokens of a micro-batch on a CPU: fewer, and matrix products become small; more, and what they leave behind is in no cache.
CACHED = 1024


def suited(batch: Tree) -> int:
    """Into how many micro-batches a step cuts its batch where nobody says: on a CPU as many as leave each device CACHED tokens
    at a time, elsewhere one. The gradient is the same (of a loss that looks at its batch as a whole, as PPO's ratio_threshold does, that of the micro-batches); a CPU finds activations in its caches, and holds fewer of them."""
    if shard.platform() != "cpu":
        return 1
    leaves = tree.flat(batch)
    tokens = sum(x.size for k, x in leaves.items() if k.split("/")[-1] == "tokens") // shard.batch_shards()
    rows = math.gcd(*(x.shape[0] for x in leaves.values())) // shard.batch_shards()
    return max((n for n in range(1, rows + 1) if rows % n == 0 and tokens // n >= CACHED), default=1)


def gradient(objective: Objective, params, frozen, aux, batch, key, accumulate: int = 1):
    """(loss, metrics, gradient) of the whole batch in `accumulate` micro-batches, each f32 and exact."""

    def losses(p, b, stats):
        full = tree.merge(p, frozen["base"]) if "base" in frozen else p
        return objective.loss(full, frozen, aux, b, key, stats)

    batches = micro(batch, accumulate)

    def total(f):
        """Sum of f over the micro-batches; what f does not return is dead code to the compiler."""
        first = jax.tree.map(lambda x: x[0], batches)
        if accumulate == 1:
            return f(first)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, first))
        return jax.lax.scan(lambda c, b: (add(c, f(b)), None), zero, batches)[0]

    stats = {}
    if objective.stats:
        full = tree.merge(params, frozen["base"]) if "base" in frozen else params
        sums = total(lambda b: objective.stats(full, frozen, aux, b))
        stats = jax.lax.stop_gradient({k: mean(*v) for k, v in sums.items()})

    weights = jax.lax.stop_gradient(total(lambda b: {k: _wide(t.weight) for k, t in losses(params, b, stats).terms.items()}))

    def share(p, b):
        out = losses(p, b, stats)
        parts = {k: t.scale * mean(t.total, weights[k]) for k, t in out.terms.items()}
        return sum(parts.values()), (parts, jax.tree.map(_wide, out.metrics))

    (loss, (parts, sums)), grads = total(lambda b: jax.value_and_grad(share, has_aux=True)(params, b))
    metrics = {"loss": loss, **{k: mean(*v) for k, v in sums.items()}}
    if len(parts) > 1:
        metrics |= {f"loss/{k}": v for k, v in parts.items()}
    return loss, metrics, grads


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(nn.wide(x))


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = 1.0,
    schedule: Callable | None = None,
    shardings: TrainState | None = None,
) -> Callable:
    """jitted (state, frozen, batch) -> (state, metrics). The state's buffers are donated.

    A step whose loss or gradient norm is not finite changes nothing but the step counter and reports `skipped` = 1.
    Batches must have a multiple of `accumulate` rows; 0 takes as many micro-batches as `suited` says. Raises UserError for accumulation where a loss is not a sum.
    """
    if accumulate > 1 and objective.whole_batch:
        raise UserError("this objective is not a sum over examples, so gradient accumulation would change it; set accumulate = 1")

    def step(state: TrainState, frozen: Tree, batch: Tree):
        state = state.replace(opt_state=_near(state.opt_state, shardings))
        key = nn.fold(state.key, "loss", state.step)
        n = accumulate or (1 if objective.whole_batch else suited(batch))
        loss, metrics, grads = gradient(objective, state.params, frozen, state.aux, batch, key, n)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        aux = objective.update_aux(state.aux, params, metrics, state.step) if objective.update_aux else state.aux
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        metrics |= {"grad_norm": norm, "skipped": 1.0 - ok.astype(jnp.float32)}
        if schedule is not None:
            metrics["learning_rate"] = schedule(_updates_done(state.opt_state))
        new = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), keep(aux, state.aux), state.key)
        return new, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return jax.jit(step, donate_argnums=0, **({} if shardings is None else {"out_shardings": (shardings, None)}))


def _near(opt_state: Tree, shardings: TrainState | None) -> Tree:
    """The optimizer's state in the device's memory; the step's shardings take it back to where it came from."""
    if shardings is None:
        return opt_state
    return jax.tree.map(lambda x, s: jax.device_put(x, s.with_memory_kind("device")) if s.memory_kind == "pinned_host" else x, opt_state, shardings.opt_state)


def _updates_done(opt_state) -> jax.Array:
    """The count that the schedule reads: skipped steps do not advance it."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return counts[0][1] if counts else jnp.zeros((), jnp.int32)
