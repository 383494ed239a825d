"""What training carries from step to step."""

from __future__ import annotations

import hashlib
import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxalign import shard, tree
from jaxalign.types import Objective, Tree


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # i32[]; batches consumed
    params: Tree  # what is trained
    opt_state: Tree
    aux: Tree  # the objective's own: target networks, running statistics
    key: jax.Array  # the root key: never split, never replaced; every draw folds purpose, step and row into it


def create(params: Tree, tx: optax.GradientTransformation, objective: Objective, seed: int, mesh=None, *, offload: bool = False) -> TrainState:
    """A state at step 0. With a mesh, optimizer moments take their parameter's sharding and the rest is replicated.

    offload: the optimizer's arrays lie in the host's memory; `step.make_step` moves them for the update.
    Of abstract params (ShapeDtypeStruct with shardings, see `shard.abstract`) an abstract state.
    """

    def rest(p):
        return (
            jnp.zeros((), jnp.int32),
            tx.init(p),
            objective.init_aux(p) if objective.init_aux else (),
            jax.random.key(seed),
        )

    if mesh is None:
        step, opt_state, aux, key = jax.jit(rest)(params)
        return TrainState(step, params, opt_state, aux, key)
    out = jax.eval_shape(rest, params)
    aux_sh = shard.like(params, out[2], mesh)  # targets and averages lie like what they follow; anything else is small
    whole = shard.replicated(mesh)
    opt_sh = shard.like(params, out[1], mesh)
    if offload:
        opt_sh = jax.tree.map(lambda s, x: s.with_memory_kind("pinned_host") if x.size > 1 else s, opt_sh, out[1])
    make = jax.jit(rest, out_shardings=(whole, opt_sh, aux_sh, whole))
    imagined = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    step, opt_state, aux, key = make.eval_shape(params) if imagined else make(params)
    return TrainState(step, params, opt_state, aux, key)


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings: what a checkpoint restores into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def averaged(state: TrainState) -> Tree:
    """The params to evaluate and to keep: those trained, or their average where the optimizer makes one.

    Schedule-free optimizers take gradients at y = (1 - b1) z + b1 x and keep z; x is the average (2405.15682, equation 3).
    """
    found = optax.tree.get(state.opt_state, "AverageState")
    if found is not None:
        return jax.tree.map(lambda a, p: jax.device_put(a, p.sharding), found.average, state.params)
    found = optax.tree.get(state.opt_state, "ScheduleFreeState")
    if found is None:
        return state.params
    near = found._replace(z=jax.tree.map(lambda z, p: jax.device_put(z, p.sharding), found.z, state.params))  # it may lie on the host
    return contrib.schedule_free_eval_params(near, state.params)


def count(state: TrainState) -> int:
    return tree.size(state.params)


def fingerprint(params: Tree) -> str:
    """16 hex digits of every bit of a tree of arrays, summed where they lie: what is frozen is not in the checkpoints, but a
    run must not go on with another. Integers only, so meshes and orders of summation do not matter."""

    @jax.jit
    def total(x):
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)).astype(jnp.uint32)
        place = sum((jax.lax.broadcasted_iota(jnp.uint32, bits.shape, d) * np.uint32(2654435761 + 2 * d) for d in range(bits.ndim)), jnp.uint32(0))
        return (bits * (place * np.uint32(2246822519) | 1)).sum(dtype=jnp.uint32)

    sums = {k: int(total(x)) for k, x in tree.flat(params).items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]
