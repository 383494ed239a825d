"""Another number of rows for the embedding and the unembedding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign import shard, tree
from jaxalign.models import FamilyModel
from jaxalign.ops.nn import is_spec
from jaxalign.types import Tree, UserError


def resize(model: FamilyModel, params: Tree, size: int, *, used: int | None, mesh=None, rules: dict | None = None) -> tuple[FamilyModel, Tree]:
    """(model, params) with `size` ids: every [V,D] (and [V]) leaf gets or loses rows at its end.

    New rows are the mean of the old ones. A new token's logit is then the mean of the old logits, whose exponential is at
    most the mean of theirs: k new tokens among V take at most k / (V + k) of the probability, and no old log-prob falls by
    more than log(1 + k / V). Rows at random have no such bound: where logits are very negative, they win.
    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).

    params: the model's, or {"trunk", "head"}. used: how many ids the tokenizer has; None if there is none to ask, and then
    nothing may be dropped. With a mesh the new leaves are sharded as `rules` say. Raises UserError where an id that the
    tokenizer uses would have no row.
    """
    old = model.config.vocab
    if type(size) is not int or size < 1:
        raise UserError(f"a vocabulary of {size!r} ids: give a positive whole number")
    if size < (old if used is None else used):
        why = f"the tokenizer uses {used} ids" if used is not None else f"there is no tokenizer to say which of the {old} ids are used"
        raise UserError(f"cannot shrink the vocabulary to {size}: {why}; give at least {old if used is None else used}")
    new = FamilyModel(model.family, dataclasses.replace(model.config, vocab=size))
    if set(params) == {"trunk", "head"}:
        return new, {**params, "trunk": _rows(new, params["trunk"], size, mesh, rules)}
    return new, _rows(new, params, size, mesh, rules)


def _rows(model: FamilyModel, params: Tree, size: int, mesh, rules) -> Tree:
    specs = tree.flat(model.specs(), is_leaf=is_spec)

    def leaf(path, x):
        spec = specs[path]
        if "vocab" not in spec.axes or x.shape[0] == size:
            return x
        more = size - x.shape[0]  # the vocabulary is the first dimension of every leaf that has it

        def rows(x):
            mean = x.mean(0, dtype=jnp.float32, keepdims=True).astype(x.dtype)
            return jnp.concatenate([x, jnp.broadcast_to(mean, (more, *x.shape[1:]))]) if more > 0 else x[:size]

        return jax.jit(rows, out_shardings=mesh and NamedSharding(mesh, shard.partition(spec, mesh, rules)))(x)

    return tree.map_named(leaf, params)
