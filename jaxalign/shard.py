"""One named mesh, and the one table from logical axis names to its axes.

Weights carry logical names in their specs; activations are constrained at three places only (embedding out, residual
stream, hidden before the unembedding). The mesh is automatic: XLA propagates the rest.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import tree
from jaxalign.types import Tree, UserError

AXES = ("data", "fsdp", "tensor", "context", "expert")

# Logical axis of a weight -> mesh axis. A config may replace any entry.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
}

# Logical axis of an activation -> mesh axis.
ACTIVATIONS = {"batch": ("data", "fsdp"), "time": "context", "vocab": "tensor"}


def make_mesh(sizes: dict[str, int] | None = None, devices=None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes of `AXES`; one size may be -1 and takes what is left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1, **{a: 1 for a in AXES[1:]}, **(sizes or {})}
    if bad := sorted(set(sizes) - set(AXES)):
        raise UserError(f"mesh axis {bad[0]!r} is unknown; the axes are {', '.join(AXES)}")
    shape = [sizes[a] for a in AXES]
    free = [i for i, n in enumerate(shape) if n == -1]
    known = math.prod(n for n in shape if n != -1)
    if len(free) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"mesh sizes must be positive and at most one may be -1, got {dict(zip(AXES, shape))}")
    if free:
        shape[free[0]] = max(len(devices) // known, 1)
    if math.prod(shape) != len(devices):
        raise UserError(f"mesh {dict(zip(AXES, shape))} needs {math.prod(shape)} devices, this program has {len(devices)}; set one axis to -1 to let it fill")
    # make_mesh orders devices by the topology; devices given in hand are kept in their order.
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition(spec, mesh: Mesh, rules: dict | None = None) -> P:
    """The PartitionSpec of one weight. A dimension that its mesh axis does not divide stays whole."""
    rules = {**RULES, **(rules or {})}
    out, used = [], set()
    for dim, axis in zip(spec.shape, spec.axes):
        if axis is not None and axis not in rules:
            raise UserError(f"no sharding rule for logical axis {axis!r}; the rules name {', '.join(rules)}")
        names = rules.get(axis) if axis else None
        names = tuple(n for n in ((names,) if isinstance(names, str) else names or ()) if n not in used)
        if names and dim % math.prod(mesh.shape[n] for n in names) == 0:
            used.update(names)
            out.append(names if len(names) > 1 else names[0])
        else:
            out.append(None)
    return P(*out)


def _is_spec(x) -> bool:
    return hasattr(x, "axes") and hasattr(x, "init")


def shardings(specs: Tree, mesh: Mesh, rules: dict | None = None) -> Tree:
    """Tree of Spec -> tree of NamedSharding."""
    return jax.tree.map(lambda s: NamedSharding(mesh, partition(s, mesh, rules)), specs, is_leaf=_is_spec)


def abstract(specs: Tree, mesh: Mesh, rules: dict | None = None, dtype="float32") -> Tree:
    """Tree of Spec -> tree of ShapeDtypeStruct with shardings: what a checkpoint restores into."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype or dtype, sharding=NamedSharding(mesh, partition(s, mesh, rules))), specs, is_leaf=_is_spec
    )


def init(specs: Tree, key, mesh: Mesh, rules: dict | None = None, dtype="float32") -> Tree:
    """The one sharded initialiser: every leaf drawn from a key folded with its own name, straight into its shards."""
    from jaxalign.ops import nn

    return jax.jit(lambda k: nn.init(specs, k, dtype), out_shardings=shardings(specs, mesh, rules))(key)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return ACTIVATIONS["batch"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; the rest whole."""
    return NamedSharding(mesh, P(ACTIVATIONS["batch"]))


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many pieces the rows of a batch are cut."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in ACTIVATIONS["batch"])


def constrain(x, *axes: str | None):
    """Pin an activation's sharding by logical names; a no-op without a mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(AXES) <= set(mesh.axis_names):
        return x
    names = [ACTIVATIONS.get(a) if a else None for a in axes]
    for i, (n, dim) in enumerate(zip(names, x.shape)):
        n = (n,) if isinstance(n, str) else n
        if n and dim % math.prod(mesh.shape[a] for a in n):
            names[i] = None
    return jax.lax.with_sharding_constraint(x, P(*names))


def local_rows(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(index, count): this process feeds the index-th of `count` equal slices of every global batch.

    Processes that share a data shard (a tensor axis across hosts) get the same slice.
    """
    if batch % batch_shards(mesh):
        raise UserError(f"batch size {batch} is not a multiple of data x fsdp = {batch_shards(mesh)}; change the batch size or the mesh")
    spans = [idx[0].indices(batch)[:2] for idx in batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()]
    start, stop = min(a for a, _ in spans), max(b for _, b in spans)
    return start // (stop - start), batch // (stop - start)


def place(batch: Tree, mesh: Mesh) -> Tree:
    """Host rows of this process -> global arrays on the mesh. Leaves that are jax.Arrays already stay as they are."""
    sharding = batch_sharding(mesh)

    def put(x):
        if isinstance(x, jax.Array):
            return x
        x = np.asarray(x)
        if x.ndim == 0:
            return jax.device_put(x, replicated(mesh))
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)


def to_local(x) -> np.ndarray:
    """This process's rows of a row-sharded global array, in order: the inverse of `place`."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    pieces = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[k]) for k in sorted(pieces)])


def to_host(x) -> np.ndarray:
    """The whole of an array, on every process."""
    if getattr(x, "is_fully_addressable", True):
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def like(params: Tree, state: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimizer's state (arrays or shapes): what is named like a parameter lies like it, the rest is replicated.

    `params`: leaves with shape and sharding. A dimension that the state keeps at another size (a scale per block) is cut where
    that divides it, and a moment that lacks a dimension (a factored one) lies like those it has. A plain ``jit(tx.init)``
    would silently replicate everything.
    """
    known = tree.flat(params)

    def place(name, x):
        at = name.split("/")
        p = next((known[k] for i in range(len(at)) if (k := "/".join(at[i:])) in known), None)
        if p is None or not x.shape:
            return replicated(mesh)
        if x.shape == p.shape:
            return p.sharding
        spec = (*p.sharding.spec, *(None,) * (len(p.shape) - len(p.sharding.spec)))
        without = [d for d in range(len(p.shape)) if x.shape == p.shape[:d] + p.shape[d + 1 :]]
        spec = spec[: without[-1]] + spec[without[-1] + 1 :] if without else spec if len(x.shape) == len(p.shape) else (None,) * len(x.shape)
        ways = lambda s: math.prod(mesh.shape[a] for a in ((s,) if isinstance(s, str) else s or ()))
        return NamedSharding(mesh, P(*(s if n % ways(s) == 0 else None for s, n in zip(spec, x.shape))))

    return tree.map_named(place, state)


def describe(specs: Tree, mesh: Mesh, rules: dict | None = None) -> list[tuple[str, tuple, P]]:
    """(name, shape, partition) of every weight, for `inspect`."""
    return [(n, s.shape, partition(s, mesh, rules)) for n, s in tree.flat(specs, is_leaf=_is_spec).items()]
