"""Specs, initialisation, the door where weights meet activations, norms and the layer stack.

A model is a nested dict of `Spec`; init, shardings, shape checks, import and counts are maps over it.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxalign import shard, tree
from jaxalign.ops import quant
from jaxalign.types import Tree, UserError

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


# -- specs ----------------------------------------------------------------------------------------------------------


def normal(std: float) -> Init:
    """N(0, std^2). Drawn flat and then shaped: the values are the same and high ranks compile an order slower."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, (int(np.prod(shape)),), jnp.float32)).reshape(shape).astype(dtype)


def zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One weight: shape, a logical axis name (or None) per dimension, and how to draw it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init = zeros
    dtype: str | None = None  # None: that of the tree it is drawn in; adapters and quantised weights have their own

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), f"{self.shape} has {len(self.axes)} axis names"


def is_spec(x) -> bool:
    return isinstance(x, Spec)


def fold(key: jax.Array, *what) -> jax.Array:
    """The key of a purpose: strings enter by their crc32, integers (static or traced) as they are."""
    for w in what:
        key = jax.random.fold_in(key, zlib.crc32(w.encode()) if isinstance(w, str) else w)
    return key


def init(specs: Tree, key: jax.Array, dtype="float32") -> Tree:
    """Draw every weight from the key folded with its own name: adding one weight changes no other."""
    return tree.map_named(lambda path, s: s.init(fold(key, path), s.shape, jnp.dtype(s.dtype or dtype)), specs, is_leaf=is_spec)


def stacked(specs: Tree, layers: int) -> Tree:
    """Specs of one layer -> specs of L of them, leaves [L, ...]."""
    return jax.tree.map(lambda s: Spec((layers, *s.shape), ("layers", *s.axes), s.init, s.dtype), specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """Number of parameters."""
    return sum(int(np.prod(s.shape)) for s in jax.tree.leaves(specs, is_leaf=is_spec))


# -- what models return ---------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Hidden:
    x: jax.Array  # f[B,T,D], after the last norm
    cache: Any = None
    aux: dict = flax.struct.field(default_factory=dict)  # name -> Term


@flax.struct.dataclass
class Unembed:
    """logits = softcap * tanh((scale * x @ weight.T + bias) / softcap); the sampling temperature divides last."""

    weight: jax.Array  # [V,D]
    bias: jax.Array | None = None  # [V]
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)


# -- weights meet activations ---------------------------------------------------------------------------------------


def rows(x: jax.Array) -> jax.Array:
    """f[..., I] -> f[n, I]: a sum over one dimension of rows is a plain matrix product for XLA's CPU backend, a sum over
    two is a slow one, above all in weight gradients. Where a mesh cuts time they stay two: a merged dimension would have to
    be gathered first."""
    return x if shard.ways("time") > 1 else x.reshape(-1, x.shape[-1])


def wide(*xs):
    """The dtype of sums and softmaxes: f32, or f64 where an argument has it."""
    return jnp.promote_types(jnp.result_type(*xs), jnp.float32)


def linear(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    """The one door: f[..., I] x [I,O] -> f[..., O], in the dtype of x. w may be adapted or quantised (see below)."""
    y = _product(rows(x), w)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if b is None else y + b.astype(x.dtype)


# A weight may be a dict in the place of its array, which no block ever sees (`models.lora` makes them):
#   quantised   see `ops.quant`
#   adapted     {"base" an array [I,O] or quantised, "a" [I,R], "b" [R,O], "scale" [], and for DoRA "magnitude" [O]}
#   decoding    {"out_in" [O,I]}, see `for_decoding`
# W' = W + scale a b (LoRA, Hu et al. 2106.09685), and with DoRA magnitude * W' / |W'| per output (Liu et al. 2402.09353).


def is_adapted(w) -> bool:
    return isinstance(w, dict) and "base" in w and "a" in w


@flax.struct.dataclass
class Noisy:
    """A table of embeddings whose look-ups get noise: what stands in the place of the table while training, see `objectives.lm`."""

    table: Any
    noise: jax.Array  # f32[B,T,D]


def is_weight(w) -> bool:
    """A leaf of a tree of weights: an array (or Spec), or a node that stands for one."""
    return not isinstance(w, dict) or is_adapted(w) or quant.is_quantised(w)


def _product(x: jax.Array, w) -> jax.Array:
    """f[n,I] x [I,O] -> f[n,O]"""
    if isinstance(w, dict) and "out_in" in w:
        return columns(w["out_in"], x).T.astype(x.dtype)
    if is_adapted(w):
        low = (x @ w["a"].astype(x.dtype)) * w["scale"].astype(x.dtype)
        y = _frozen(x, w["base"]) + low @ w["b"].astype(x.dtype)
        return y * (w["magnitude"] * dora_factor(w)).astype(x.dtype) if "magnitude" in w else y
    return _frozen(x, w) if quant.is_quantised(w) else x @ w.astype(x.dtype)


def columns(w: jax.Array, x: jax.Array) -> jax.Array:
    """[O,I] x f[n,I] -> [O,n], sums in at least f32: the form in which XLA's CPU backend multiplies few rows fastest. Behind the barriers,
    because the compiler would else turn it into the other one."""
    y = jnp.matmul(w.astype(x.dtype), jax.lax.optimization_barrier(x.T), preferred_element_type=wide(x))
    return jax.lax.optimization_barrier(y)


def _frozen(x: jax.Array, w) -> jax.Array:
    """x times a weight that gets no gradient. What is dequantised or cast for it is made anew in the backward pass: kept,
    it would be a second copy of the model, in the dtype of the activations (measured in benchmarks/adapters.py)."""
    if not quant.is_quantised(w) and w.dtype == x.dtype:
        return x @ w

    def dense(x, w):
        if quant.is_quantised(w) and "int8" in w:  # the scale is per output, so it may wait for the product
            return (x @ w["int8"].astype(x.dtype)) * w["scale"].astype(x.dtype)
        return x @ quant.dequantise(w).astype(x.dtype)

    return jax.checkpoint(dense)(x, w)


def dora_factor(w) -> jax.Array:
    """1 / |W + scale a b| per output, f32[..., O], without gradient (2402.09353 section 4.3; so does peft). 1 where it is 0."""
    norm = jnp.linalg.norm(jax.lax.stop_gradient(_sum(w)), axis=-2)
    return 1 / jnp.where(norm > 0, norm, 1)


def _sum(w) -> jax.Array:
    """W + scale a b, at least f32."""
    base = quant.dequantise(w["base"])
    return base.astype(wide(base)) + w["scale"][..., None, None] * (w["a"] @ w["b"])


def weight(w, dtype=None) -> jax.Array:
    """The effective weight [..., I, O] of an array or a node, dense: for unembeddings, expert weights and merging.

    dtype None: that of an array, f32 of a node. Gradients flow to a, b and magnitude, through a dense one.
    """
    w = w.table if isinstance(w, Noisy) else w
    if is_adapted(w):
        dense = _sum(w)
        dense = dense * (w["magnitude"] * dora_factor(w))[..., None, :] if "magnitude" in w else dense
    else:
        dense = quant.dequantise(w)
    return dense if dtype is None else dense.astype(dtype)


def scalar(head, x: jax.Array) -> jax.Array:
    """f[..., D] -> f32[...]: linear, or with a hidden layer (`models.heads.mlp_specs`). In f32: rewards are compared, and values
    regressed, at a finer grain than bf16 has."""
    x = x.astype(wide(x))
    if "up" in head:
        x = jax.nn.relu(linear(x, head["up"]["w"], head["up"]["b"]))
        head = {"weight": head["down"]["w"][:, 0], "bias": head["down"]["b"][0]}
    return x @ head["weight"].astype(x.dtype) + head["bias"].astype(x.dtype)


def last(x: jax.Array, segments: jax.Array) -> jax.Array:
    """x [B,T] at each row's last token that is not padding, by position: EOS may equal PAD. -> [B]"""
    index = segments.shape[1] - 1 - jnp.argmax((segments != 0)[:, ::-1], axis=1)
    return jnp.take_along_axis(x, index[:, None], 1)[:, 0]


def embed(table: jax.Array, ids: jax.Array, dtype, axis: str = "vocab") -> jax.Array:
    """[V,D], i32[B,T] -> [B,T,D]. Ids are checked on the host: out of range would clamp silently here.

    An adapted table looks up W and a, and multiplies by b; a quantised one is dequantised whole. `axis` is the logical axis
    of V ("." for one that no mesh cuts, as a table of positions).
    """
    if isinstance(table, Noisy):
        return embed(table.table, ids, dtype, axis) + table.noise.astype(dtype)
    if not is_adapted(table):
        return _look_up(weight(table), ids, jnp.dtype(dtype), axis)
    low = embed(table["a"], ids, dtype, axis) * table["scale"].astype(dtype)
    y = embed(table["base"], ids, dtype, axis) + low @ table["b"].astype(dtype)
    return y * (table["magnitude"] * dora_factor(table)).astype(dtype) if "magnitude" in table else y


# On a mesh each device looks up its own rows' ids in its own piece of the vocabulary: left alone, XLA gathers the whole table.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(table, ids, dtype, axis):
    def run(pieces, table, ids):
        own = ids - pieces.index(axis) * table.shape[0]
        x = jnp.take(pieces.whole(table, 1, "embed"), own, axis=0, mode="clip").astype(dtype)
        return pieces.sum(jnp.where(((own >= 0) & (own < table.shape[0]))[..., None], x, 0), axis) if pieces.over(axis) else x

    return shard.local(run, f"{axis} embed", "batch time", out="batch time .")(table, ids)


def _look_up_fwd(table, ids, dtype, axis):
    return _look_up(table, ids, dtype, axis), (table, ids)


def _look_up_bwd(dtype, axis, saved, g):
    def run(pieces, table, ids, g):
        own = ids - pieces.index(axis) * table.shape[0]
        own = jnp.where(own >= 0, own, table.shape[0]) if pieces.over(axis) else jnp.clip(own, 0, table.shape[0] - 1)
        dw = jnp.zeros((table.shape[0], g.shape[-1]), table.dtype).at[own].add(g.astype(table.dtype), mode="drop")
        return pieces.sum(dw, "batch", "time", scatter=(1, "embed"))

    cut = f"{axis} embed"
    return shard.local(run, cut, "batch time", "batch time .", out=cut)(*saved, g), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


# By the names that configs use; "gelu" is the exact one, as in transformers.
ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + scale), in f32 (Zhang & Sennrich 2019, 1910.07467). Gemma stores its scales less 1."""
    f = x.astype(wide(x))
    f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + eps)
    return (f * (offset + scale.astype(f.dtype))).astype(x.dtype) if offset else f.astype(x.dtype) * scale.astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / std * scale + bias, in f32 (Ba et al. 2016, 1607.06450)."""
    f = x.astype(wide(x))
    f = f - jnp.mean(f, -1, keepdims=True)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + eps)
    return (f * scale + bias).astype(x.dtype)


# -- layers ---------------------------------------------------------------------------------------------------------

NAMES = ("qkv", "attn", "o", "mlp")  # what blocks name with `name`, in the order in which they make it


def name(x, what: str):
    """x (any pytree), which a remat policy can choose to keep by this name. A product of a weight is named where it leaves
    the product: saving silu(x @ w) instead would leave the matmul to be done again."""
    return jax.tree.map(lambda a: checkpoint_name(a, what), x)


def policy(remat: str) -> Callable | None:
    """What the backward pass finds, and what it makes again from each layer's input; None: it finds everything.

    full: nothing; dots: the product of every weight. One or several of `NAMES`, joined by "+": these alone: qkv (queries,
    keys and values before rotation), attn (what attention returns), o (its product with the weight that leads back), mlp (the
    products before the activation). offload:NAMES: the same, kept in the host's memory; "offload" alone is all of them.

    No policy changes a loss or a gradient. Raises UserError for another word.
    """
    if remat in ("none", "full", "dots"):
        return {"none": None, "full": jax.checkpoint_policies.nothing_saveable, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}[remat]
    host, _, said = remat.rpartition(":")
    names = NAMES if remat == "offload" else tuple(said.split("+"))
    if host not in ("", "offload") or not set(names) <= set(NAMES):
        raise UserError(f"model.remat {remat!r} is unknown; it is none, full, dots, some of {', '.join(NAMES)} joined by +, or offload: before these")
    if "offload" not in remat:
        return jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device", offload_dst="pinned_host"
    )


def unstack(params: Tree, layers: int) -> list[Tree]:
    """Leaves [L, ...] -> L trees. `lax.split` transposes to one concatenation; indexing would add L padded copies."""
    leaves, treedef = jax.tree.flatten(params)
    pieces = [[p.reshape(p.shape[1:]) for p in jax.lax.split(x, [1] * layers)] for x in leaves]
    return [treedef.unflatten(p) for p in zip(*pieces)]


BIG = 2**19  # entries of a matrix from which on a CPU reads it faster as (out, in)


def for_decoding(params: Tree, cache: Tree) -> Tree:
    """The weights as a loop over single tokens wants them, made once before it. Where layers are unrolled, every layer is an
    array of its own: cut from the stack inside the loop, each would be copied at each step. On a CPU large matrices are
    turned, for `columns`; in training (in, out) is the better form.
    """

    def turned(w):
        return {"out_in": w.T} if not isinstance(w, dict) and w.ndim == 2 and w.size >= BIG and shard.platform() == "cpu" else w

    def walk(path, p):
        if isinstance(p, dict):
            return {k: walk(k, v) for k, v in p.items()} if path != "layers" else layers(p)
        return p

    def layers(p):
        n = jax.tree.leaves(p)[0].shape[0]
        return tuple(jax.tree.map(turned, one, is_leaf=is_weight) for one in unstack(p, n))

    return walk("", params) if cache and isinstance(cache["layers"], tuple) else params


def stack(block: Callable, params: Tree, x, cache, layers: int, *, scan: bool, remat: str = "none", each: Tree = ()):
    """x through L layers: block(params_l, x, cache_l) -> (x, cache_l). `x` may be any pytree.

    `each`, if there is any, is a fourth argument: leaves [L, ...] of what differs from layer to layer and is no weight (a window, say), as NumPy arrays: a scan
    reads them as it reads weights, and where layers are unrolled they are constants.

    params: leaves [L, ...], or a tuple of L trees (`for_decoding`).
    scan=True compiles one layer (deep models); False unrolls them, which is faster where L is small, above all when
    decoding, because a scan copies each layer's cache in and out. The cache is stacked or a tuple accordingly.
    """
    more = (each,) if jax.tree.leaves(each) else ()
    if remat != "none":
        block = jax.checkpoint(block, policy=policy(remat), prevent_cse=not scan)
    if scan:
        return jax.lax.scan(lambda h, pce: block(pce[0], h, pce[1], *pce[2]), x, (params, cache, more))
    out = []
    for i, (p, c) in enumerate(zip(params if isinstance(params, tuple) else unstack(params, layers), cache or (None,) * layers)):
        x, c = block(p, x, c, *jax.tree.map(lambda e: e[i], more))
        out.append(c)
    return x, (tuple(out) if cache is not None else None)
