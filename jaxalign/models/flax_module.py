"""A Flax Linen or NNX module as a `types.Model`, through its functional form.

The contract: the module is called with (tokens, segments, positions), all i32[B,T], and returns hidden states [B,T,D]
after its last norm, without the unembedding. Attention must be causal by slot and must not cross segments (0 = padding).
All its weights are parameters; running statistics are refused. Dropout is on when the trainer gives a key: in Linen the
rng "dropout" is there then (``deterministic=not self.has_rng("dropout")``), in NNX the module is put into train mode.

A foreign module has no key/value cache. Ours is the tokens so far, and every step runs the whole forward over them: the
same path for sampling, at quadratic cost. Fine for small models; a family of its own is the way for large ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jaxalign import tree
from jaxalign.ops import kvcache, nn
from jaxalign.types import UserError


def linen(module: flax_linen.Module, *, unembed: str, bias: str | None = None) -> LinenModel:
    """`linen(MyDecoder(vocab=512, dim=64), unembed="embed/embedding")`

    unembed: path of the [V,D] or [D,V] weight that turns hidden states into logits; bias: of its [V] bias, if it has one.
    """
    return LinenModel(module, unembed, bias)


def nnx(build: Callable[..., flax_nnx.Module], config: dict | None = None, *, unembed: str, bias: str | None = None) -> NNXModel:
    """`nnx(MyDecoder, {"vocab": 512, "dim": 64}, unembed="embed/embedding")`; the module is build(**config, rngs=...).

    build: a class or a function at module level, so that models made twice compare equal and nothing recompiles; for the
    same reason the values of config must be hashable.
    """
    return NNXModel(build, tuple(sorted((config or {}).items())), unembed, bias)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the rest of jaxalign asks of a config; read off the module's own shapes."""

    vocab: int
    dim: int
    dtype: str


class _Foreign:
    """What both share. A subclass gives `_init(key) -> {path: array}`, `_axes() -> {path: names}` and `_apply`."""

    unembed_path: str
    bias_path: str | None

    @functools.cached_property
    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return jax.eval_shape(self._init, jax.random.key(0))

    @functools.cached_property
    def _jitted(self):
        return jax.jit(self._init)

    def specs(self):
        """Each leaf is drawn by the module's own initialiser, from a key of its own.

        The initialiser draws all leaves; the others are dead code, which jit removes. It is traced once for all of them.
        """
        axes = self._axes()

        def draw(path):
            return lambda key, shape, dtype: self._jitted(key)[path].astype(dtype)

        leaf = lambda path, s: nn.Spec(s.shape, (*axes[path], *(None,) * (len(s.shape) - len(axes[path]))), draw(path))
        return tree.unflat({path: leaf(path, s) for path, s in self._shapes.items()})

    @functools.cached_property
    def config(self) -> Sizes:
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        x = jax.eval_shape(lambda p, t: self._apply(p, t, t + 1, t, None), tree.unflat(self._shapes), one)
        for path in filter(None, (self.unembed_path, self.bias_path)):
            if path not in self._shapes:
                raise UserError(f"the module has no parameter {path!r}; its parameters are {', '.join(self._shapes)}")
        shape, dim = self._shapes[self.unembed_path].shape, x.shape[-1]
        if len(shape) != 2 or dim not in shape or shape[0] == shape[1]:
            raise UserError(f"{self.unembed_path} has shape {shape}; an unembedding is [V,{dim}] or [{dim},V] with V not equal to {dim}")
        return Sizes(sum(shape) - dim, dim, x.dtype.name)

    def unembed(self, params) -> nn.Unembed:
        dim, leaves = self.config.dim, tree.flat(params)
        weight = leaves[self.unembed_path]
        return nn.Unembed(weight if weight.shape[1] == dim else weight.T, leaves[self.bias_path] if self.bias_path else None)

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
        if cache is None:
            return nn.Hidden(self._apply(params, tokens, segments, positions, key))
        cache, kv_segments, start = kvcache.reserve(cache, segments)
        write = lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new[:, None, :, None], start, axis=2)
        layers = {k: write(cache["layers"][k], v) for k, v in (("tokens", tokens), ("positions", positions))}
        x = self._apply(params, layers["tokens"][:, 0, :, 0], kv_segments, layers["positions"][:, 0, :, 0], key)
        return nn.Hidden(jax.lax.dynamic_slice_in_dim(x, start, tokens.shape[1], axis=1), {**cache, "layers": layers})

    def init_cache(self, batch: int, size: int):
        """Tokens and positions in the shape of keys, [B,1,S,1], so that `ops.kvcache.grow` needs no case for them."""
        empty = jnp.zeros((batch, 1, size, 1), jnp.int32)
        return {"layers": {"tokens": empty, "positions": empty}, "segments": jnp.zeros((batch, size), jnp.int32), "length": jnp.zeros((), jnp.int32)}

    def flops_per_token(self, length: int) -> float:
        """6 per weight; attention and the embedding look-up are not told apart in a foreign module."""
        return 6.0 * nn.count(self.specs())


@dataclasses.dataclass(frozen=True)
class LinenModel(_Foreign):
    module: flax_linen.Module
    unembed_path: str
    bias_path: str | None = None

    def _variables(self, key):
        one = jnp.ones((1, 1), jnp.int32)
        return self.module.init(key, one, one, one - 1)

    def _init(self, key):
        variables = self._variables(key)
        if other := sorted(set(variables) - {"params"}):
            raise UserError(f"{type(self.module).__name__} keeps state in {other[0]!r}; only parameters are supported")
        return tree.flat(flax_linen.meta.unbox(variables["params"]))

    def _axes(self):
        boxed = jax.eval_shape(self._variables, jax.random.key(0))["params"]
        return tree.flat(flax_linen.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))

    def _apply(self, params, tokens, segments, positions, key):
        return self.module.apply({"params": params}, tokens, segments, positions, rngs=None if key is None else {"dropout": key})


@dataclasses.dataclass(frozen=True)
class NNXModel(_Foreign):
    build: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]
    unembed_path: str
    bias_path: str | None = None

    def _module(self, key):
        # The weights' sharding is ours to decide, in `shard`: NNX would ask for a mesh right here.
        with flax_nnx.use_eager_sharding(False):
            return self.build(**dict(self.options), rngs=flax_nnx.Rngs(key))

    @functools.cached_property
    def _split(self):
        """(graph, {path: abstract Param}, {path: abstract rng}), paths as tuples."""
        graph, params, rngs, other = flax_nnx.split(flax_nnx.eval_shape(lambda: self._module(0)), flax_nnx.Param, flax_nnx.RngState, ...)
        if other := flax_nnx.to_flat_state(other):
            raise UserError(f"{self.build.__name__} keeps state in {_name(next(iter(other))[0])}; only nnx.Param is supported")
        return graph, dict(flax_nnx.to_flat_state(params)), dict(flax_nnx.to_flat_state(rngs))

    def _init(self, key):
        state = flax_nnx.state(self._module(key), flax_nnx.Param)
        return {_name(path): v[...] for path, v in flax_nnx.to_flat_state(state)}

    def _axes(self):
        return {_name(path): v.get_metadata().get("out_sharding") or () for path, v in self._split[1].items()}

    def _apply(self, params, tokens, segments, positions, key):
        graph, weights, rngs = self._split
        leaves = tree.flat(params)
        given = {path: v.replace(leaves[_name(path)]) for path, v in weights.items()}
        # Dropout keeps a key and a counter in the module; each use gets a key of its own, folded with its path.
        root = jax.random.key(0) if key is None else key
        fresh = lambda path, v: jnp.zeros((), v.dtype) if isinstance(v, flax_nnx.RngCount) else nn.fold(root, _name(path))
        given |= {path: v.replace(fresh(path, v)) for path, v in rngs.items()}
        module = flax_nnx.merge(graph, flax_nnx.from_flat_state(given))
        module.eval() if key is None else module.train()
        return module(tokens, segments, positions)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
