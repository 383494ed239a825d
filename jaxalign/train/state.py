"""What training carries from step to step."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign import shard, tree
from jaxalign.types import Objective, Tree


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # i32[]; batches consumed
    params: Tree  # what is trained
    opt_state: Tree
    aux: Tree  # the objective's own: target networks, running statistics
    key: jax.Array  # the root key: never split, never replaced; every draw folds purpose, step and row into it


def create(params: Tree, tx: optax.GradientTransformation, objective: Objective, seed: int, mesh=None) -> TrainState:
    """A state at step 0. With a mesh, optimizer moments take their parameter's sharding and the rest is replicated."""

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
    of_params = jax.tree.map(lambda x: x.sharding, params)
    same = jax.tree.structure(params)
    # aux trees shaped like params (targets, averages) are sharded like them; anything else is small.
    aux_sh = of_params if jax.tree.structure(out[2]) == same else jax.tree.map(lambda _: shard.replicated(mesh), out[2])
    whole = shard.replicated(mesh)
    step, opt_state, aux, key = jax.jit(rest, out_shardings=(whole, shard.like(tx, of_params, out[1], mesh), aux_sh, whole))(params)
    return TrainState(step, params, opt_state, aux, key)


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings: what a checkpoint restores into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def count(state: TrainState) -> int:
    return tree.size(state.params)
