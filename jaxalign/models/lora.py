"""Adapters: LoRA (Hu et al. 2106.09685), rsLoRA (Kalajdzievski 2312.03732), DoRA (Liu et al. 2402.09353), and frozen bases
in 8 or 4 bits (QLoRA, Dettmers et al. 2305.14314).

An adapted weight is a dict in the place of its array: {"base", "a" [..., D, R], "b" [..., R, O], "scale" [...]} and for DoRA
"magnitude" [..., O], with the weight's own stacked dimensions in front. `ops.nn` multiplies by it; nothing else knows. So
the params of an adapted model are again a nested dict of arrays that splits, shards, scans and saves like any other, and
the reference model is what is left when the adapters are taken out: `base(params)`, the same buffers.

D in, O out, R rank.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import shard, tree
from jaxalign.ops import nn, quant
from jaxalign.ops.nn import Spec
from jaxalign.types import Model, Tree, UserError

TRAINED = ("a", "b", "magnitude")
MATRICES = "(^|/)layers/"  # every matrix of the layers: PEFT's "all-linear"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which weights, by regex over their names ("layers/q"; matrices only: others are passed over), with which rank and alpha.

    W' = W + alpha / rank * a b; rs: alpha / sqrt(rank), whose size does not fall with the rank.
    dora: a trained magnitude per output, the direction from W'. Raises UserError for what could not be meant.
    """

    targets: tuple[tuple[str, int, float], ...]
    rs: bool = False
    dora: bool = False

    def __post_init__(self):
        if not self.targets:
            raise UserError("adapters need targets: (regex, rank, alpha), one or more")
        for pattern, rank, alpha in self.targets:
            if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0):
                raise UserError(f"adapter {pattern!r} has rank {rank!r} and alpha {alpha!r}: the rank is a whole number of at least 1, alpha a number above 0")
            _compiled(pattern)

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.rs else alpha / rank


def _compiled(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as e:
        raise UserError(f"{pattern!r} is not a regular expression: {e}") from None


def weights(params: Tree) -> dict[str, Any]:
    """{name: array, Spec or node}: an adapted or quantised weight counts as one."""
    return tree.flat(params, is_leaf=nn.is_weight)


def _map(f, params: Tree, *rest: Tree) -> Tree:
    return tree.map_named(f, params, *rest, is_leaf=nn.is_weight)


def _chosen(params: Tree, rules: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """{name: value} of the matrices that the rules pick, with the errors of `tree.select`. Within its layer a bias or a norm is
    a vector, and has no low-rank form."""
    matrices = {k: 0 for k, x in weights(params).items() if len(shape(x)) - ("layers/" in k) >= 2}
    return {k: v for k, v in tree.select(matrices, rules, None).items() if v is not None}


def shape(w) -> tuple[int, ...]:
    """[..., D, O] of a weight, whatever stands for it."""
    return quant.shape(w["base"] if nn.is_adapted(w) else w)


# -- specs ----------------------------------------------------------------------------------------------------------


def _uniform(bound: float) -> nn.Init:
    return lambda key, shape, dtype: jax.random.uniform(key, (math.prod(shape),), jnp.float32, -bound, bound).reshape(shape).astype(dtype)


def adapter_specs(s: Spec, rank: int, scale: float, dora: bool) -> dict[str, Spec]:
    """Specs of what an adapter adds to a weight. a's D lies where the weight's lies, and b's O; the rank is never sharded."""
    *lead, D, O = s.shape
    *axes, i, o = s.axes
    out = {
        "a": Spec((*lead, D, rank), (*axes, i, None), _uniform(D**-0.5), "float32"),  # as peft: Kaiming with slope sqrt(5)
        "b": Spec((*lead, rank, O), (*axes, None, o), nn.zeros, "float32"),
        "scale": Spec(tuple(lead), tuple(axes), lambda key, shape, dtype: jnp.full(shape, scale, dtype), "float32"),
    }
    return out | ({"magnitude": Spec((*lead, O), (*axes, o), nn.ones, "float32")} if dora else {})


def _quantised_specs(s: Spec, kind: str) -> Spec | dict[str, Spec]:
    def no(key, shape, dtype):
        raise UserError("quantised weights are not drawn: draw or load the model, then lora.quantise it")

    *lead, D, O = s.shape
    *axes, i, o = s.axes
    if kind == "bfloat16":
        return dataclasses.replace(s, dtype=kind)
    if kind == "int8":
        return {"int8": Spec(s.shape, s.axes, no, "int8"), "scale": Spec((*lead, O), (*axes, o), no, "float32")}
    return {"nf4": Spec((*lead, D // 2, O), s.axes, no, "uint8"), "absmax": Spec((*lead, D // quant.block(D), O), s.axes, no, "float32")}


def specs(dense: Tree, lora: Lora | None = None, quantised: tuple[tuple[str, str], ...] = ()) -> Tree:
    """Specs of a model -> those of `attach(quantise(params, ...), lora, ...)`: (regex, kind) rules and targets over its names."""
    kinds = _chosen(dense, quantised)
    ranks = _chosen(dense, tuple((p, (r, lora.scale(r, a))) for p, r, a in lora.targets)) if lora else {}

    def leaf(name, s):
        base = _quantised_specs(s, kinds[name]) if name in kinds else s
        return {"base": base, **adapter_specs(s, *ranks[name], lora.dora)} if name in ranks else base

    return tree.map_named(leaf, dense, is_leaf=nn.is_spec)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A `Model` whose specs are those of the adapted params: for shardings, counts and restoring. It computes as `model` does,
    which takes adapted params just as well."""

    model: Model
    lora: Lora | None
    quantised: tuple[tuple[str, str], ...] = ()

    def specs(self) -> Tree:
        return specs(self.model.specs(), self.lora, self.quantised)

    def __getattr__(self, name):
        if name.startswith("__") or name == "model":  # copy and pickle ask before there is a model
            raise AttributeError(name)
        return getattr(self.model, name)


# -- on and off -----------------------------------------------------------------------------------------------------


def quantise(params: Tree, rules: tuple[tuple[str, str], ...], *, specs: Tree | None = None, mesh=None, shard_rules: dict | None = None) -> Tree:
    """The matrices that (regex, kind) rules pick, as bfloat16, int8 or nf4 (see `ops.quant`); everything else is the same buffer.

    With `specs` (of the dense model) and a mesh, codes and scales are laid out like their weight. Raises UserError for a
    pattern that matches nothing, a weight matched twice, and one that has an adapter or is quantised already.
    """
    kinds = _chosen(params, rules)
    dense = specs if specs is not None else params

    def leaf(name, w, s):
        if name not in kinds:
            return w
        if isinstance(w, dict):
            raise UserError(f"{name} is adapted or quantised already; quantise a plain base first, then attach")
        where = None if mesh is None else shard.shardings(_quantised_specs(s, kinds[name]), mesh, shard_rules)
        return jax.jit(quant.quantise, static_argnums=1, out_shardings=where)(w, kinds[name])

    return tree.unflat({k: leaf(k, w, s) for (k, w), s in zip(weights(params).items(), tree.flat(dense, is_leaf=nn.is_weight).values())})


def attach(params: Tree, lora: Lora, key: jax.Array, *, specs: Tree | None = None, mesh=None, rules: dict | None = None) -> Tree:
    """`params` with an adapter at every target: b is 0, so the function does not change; the base is the same buffer.

    a ~ U(-1/sqrt(D), 1/sqrt(D)), each from the key folded with its own name. f32, whatever the base. With `specs` (of the
    dense model) and a mesh, straight into their shards. Raises UserError like `tree.select`, and for a second adapter.
    """
    ranks = _chosen(params, tuple((p, (r, lora.scale(r, a))) for p, r, a in lora.targets))
    flat = weights(params)
    given = tree.flat(specs, is_leaf=nn.is_spec) if specs is not None else {k: Spec(shape(flat[k]), (None,) * len(shape(flat[k]))) for k in ranks}
    new = {k: adapter_specs(given[k], *ranks[k], lora.dora) for k in ranks}
    drawn = shard.init(new, key, mesh, rules) if mesh is not None else jax.jit(lambda k: nn.init(new, k))(key)
    return join(params, {k: _with_magnitude(flat[k], node) for k, node in drawn.items()})


def _with_magnitude(base, node: dict) -> dict:
    """DoRA starts from the norms of W, so that the function does not change."""
    if "magnitude" not in node or nn.is_adapted(base):
        return node
    norm = jax.jit(lambda w: jnp.linalg.norm(quant.dequantise(w).astype(jnp.float32), axis=-2), out_shardings=node["magnitude"].sharding)
    return {**node, "magnitude": norm(base)}


def join(params: Tree, adapters: dict[str, dict]) -> Tree:
    """`params` with the adapters {weight's name: {"a", "b", "scale"[, "magnitude"]}} in place, whatever made them."""

    def leaf(name, w):
        if name not in adapters:
            return w
        if nn.is_adapted(w):
            raise UserError(f"{name} has an adapter already; merge it first, or train that one")
        return {"base": w, **{k: v for k, v in adapters[name].items() if k != "norm"}}

    return _map(leaf, params)


def base(params: Tree) -> Tree:
    """The frozen model: adapters taken out, the same buffers. The reference of DPO and PPO, at no cost."""
    return _map(lambda _, w: w["base"] if nn.is_adapted(w) else w, params)


def adapters(params: Tree) -> dict[str, dict]:
    """{weight's name: its node without the base}: what `join` puts back, and what `unmerge` needs (for DoRA with "norm",
    the norms that merging divides by)."""

    def taken(w):
        node = {k: v for k, v in w.items() if k != "base"}
        return {**node, "norm": 1 / jax.jit(nn.dora_factor)(w)} if "magnitude" in w else node

    return {k: taken(w) for k, w in weights(params).items() if nn.is_adapted(w)}


def merge(params: Tree) -> Tree:
    """A dense tree with the adapters' effect in its weights: what was adapted, quantised or bfloat16 comes out in f32, every
    other leaf is the same buffer. (Whether a bfloat16 leaf was quantised to it or loaded so, the tree does not say.)

    It computes what the adapted tree computes, up to rounding: later stages, exports and samplers need not know.
    """

    def leaf(name, w):
        if not isinstance(w, dict):
            return w.astype(jnp.float32) if w.dtype == jnp.bfloat16 else w
        codes = w["base"] if nn.is_adapted(w) else w
        where = next(iter(codes[k] for k in ("int8", "nf4") if k in codes)) if isinstance(codes, dict) else codes
        return jax.jit(nn.weight, out_shardings=where.sharding)(w)

    return _map(leaf, params)


def unmerge(merged: Tree, kept: dict[str, dict]) -> Tree:
    """The inverse of `merge`, up to rounding: dense weights and `adapters(params)` -> adapted params with a dense base."""

    @jax.jit
    def leaf(w, k):
        direction = w * (k["norm"] / k["magnitude"])[..., None, :] if "magnitude" in k else w
        return direction - k["scale"][..., None, None] * (k["a"] @ k["b"])

    flat = weights(merged)
    if missing := sorted(set(kept) - set(flat)):
        raise UserError(f"these adapters are not of this model: there is no {', '.join(missing)}")
    return join(_map(lambda n, w: leaf(w, kept[n]) if n in kept else w, merged), kept)


def trainable(params: Tree, also: tuple[str, ...] = ()) -> Tree:
    """bool per leaf: a, b and magnitude of every adapter, and what the regexes of `also` find (heads)."""
    inside = {f"{k}/{part}" for k, w in weights(params).items() if nn.is_adapted(w) for part in TRAINED if part in w}
    return tree.map_named(lambda n, _: n in inside or any(re.search(p, n) for p in also), params)


# -- memory ---------------------------------------------------------------------------------------------------------


def nbytes(t: Tree) -> int:
    """Bytes of the arrays (or shapes) of a tree, over all devices."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(t))


def memory(trained: Tree, frozen: Tree, tx=None) -> dict[str, int]:
    """Bytes held from step to step, over all devices, before any activation: of the frozen weights, the trained ones (their
    gradients are as large again) and, with an optax transformation, of the optimizer's moments."""
    out = {"frozen": nbytes(frozen), "trained": nbytes(trained)}
    return out if tx is None else {**out, "optimizer": nbytes(jax.eval_shape(tx.init, trained))}
