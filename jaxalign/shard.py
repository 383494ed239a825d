"""One named mesh, and the one table from logical axis names to its axes.

Weights carry logical names in their specs; activations are constrained at three places only (embedding out, residual
stream, hidden before the unembedding). The mesh is automatic: XLA propagates the rest.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
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

# Logical axis of an activation -> mesh axes. The expert axis cuts rows too: outside of the experts it is one more axis of data.
ACTIVATIONS = {"batch": ("data", "fsdp", "expert"), "time": ("context",), "vocab": ("tensor",)}
# What else `local` may cut: of weights, and of activations between two weights, where XLA finds out by itself.
LOCAL = {**ACTIVATIONS, "embed": ("fsdp",), "heads": ("tensor",), "mlp": ("tensor",), "expert": ("expert",)}


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
    auto = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(shape), AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # 8 x 8 of a torus of 4 x 4 x 4: one of its axes must be shared by two of ours
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=auto)


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data, fsdp and expert; the rest whole."""
    return NamedSharding(mesh, P(ACTIVATIONS["batch"]))


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many pieces the rows of a batch are cut."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape.get(a, 1) for a in ACTIVATIONS["batch"])


def platform() -> str:
    """cpu, gpu or tpu: of the mesh in context, which may lie elsewhere (programs for a TPU compile on any host), or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def _here() -> dict[str, int]:
    """Axes of the mesh in context that XLA places by itself and that cut something."""
    mesh = jax.sharding.get_abstract_mesh()
    return {a: mesh.shape[a] for a in AXES if mesh.shape[a] > 1} if not mesh.empty and set(AXES) <= set(mesh.auto_axes) else {}


def ways(name: str) -> int:
    """Into how many pieces the mesh in context cuts a logical axis; 1 inside of `local`."""
    return math.prod(_here().get(a, 1) for a in LOCAL[name])


def constrain(x, *axes: str | None):
    """Pin an activation's sharding by logical names; a no-op without a mesh in context."""
    here = _here()
    if not here:
        return x
    names = [a if a and dim % ways(a) == 0 else None for a, dim in zip(axes, x.shape)]
    return jax.lax.with_sharding_constraint(x, P(*(ACTIVATIONS[a] if a else None for a in names)))


# -- by hand: each device on its own piece --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Which mesh axes cut each logical axis of the arrays that a function has from `local`. Every method is the identity
    where nothing is cut, so a function is written once for one device and for many."""

    axes: dict[str, tuple[str, ...]]
    sizes: dict[str, int]

    def over(self, *names: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for n in names for a in self.axes.get(n, ())))

    def ways(self, name: str) -> int:
        return math.prod(self.sizes[a] for a in self.over(name))

    def index(self, name: str):
        """Which piece this device holds."""
        return jax.lax.axis_index(self.over(name)) if self.over(name) else 0

    def sum(self, x, *names: str, scatter: tuple[int, str] | None = None):
        """x summed over the pieces of `names`; with `scatter` (dimension, name) each device keeps its piece of that dimension."""
        over = self.over(*names)
        kept = self.over(scatter[1]) if scatter else ()
        assert set(kept) <= set(over), f"{scatter} is no part of the sum over {names}"
        for a in kept:
            x = jax.lax.psum_scatter(x, a, scatter_dimension=scatter[0], tiled=True)
        rest = tuple(a for a in over if a not in kept)
        return jax.lax.psum(x, rest) if rest else x

    def max(self, x, *names: str):
        return jax.lax.pmax(x, over) if (over := self.over(*names)) else x

    def whole(self, x, dim: int, name: str):
        """All pieces of one dimension, side by side."""
        return jax.lax.all_gather(x, over, axis=dim, tiled=True) if (over := self.over(name)) else x

    def turn(self, x, name: str, by: list[tuple[int, int]]):
        """Every leaf of x from the i-th device along `name` to the j-th, for every (i, j)."""
        return jax.lax.ppermute(x, self.over(name)[0], by)


def local(f: Callable, *ins: Tree, out: Tree) -> Callable:
    """f(pieces, *args) on each device's own piece of args (`jax.shard_map` over the mesh in context, all axes of it).

    `ins` and `out` say how arguments and results are cut: strings of logical names, one per dimension, "." for one that stays
    whole ("batch time ."); a string stands for every leaf of its argument. A name is cut only if its mesh axes divide it
    wherever it occurs. Without a mesh, or where that leaves nothing to cut, f runs as it is, on the whole.
    """

    def run(*args):
        here, sizes = _here(), {}

        def note(names, arg):
            for leaf in jax.tree.leaves(arg):
                for name, dim in zip(names.split(), np.shape(leaf), strict=True):
                    sizes.setdefault(name, []).append(dim)

        jax.tree.map(note, ins, args)
        axes = {n: tuple(a for a in LOCAL[n] if a in here) for n in sizes if n != "."}
        axes = {n: a for n, a in axes.items() if a and not any(d % math.prod(here[x] for x in a) for d in sizes[n])}
        if not set(axes.get("embed", ())) <= set(axes.get("batch", ())):
            del axes["embed"]  # a weight's gradient is scattered in the sum over rows, so where rows are whole it stays whole
        pieces = Pieces(axes, here)
        if not axes:
            return f(pieces, *args)
        spec = lambda names: P(*(axes.get(n) for n in names.split()))
        specs, outs = (jax.tree.map(spec, t) for t in (ins, out))
        return jax.shard_map(lambda *a: f(pieces, *a), in_specs=specs, out_specs=outs, check_vma=False)(*args)

    return run


def local_rows(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(index, count): this process feeds the index-th of `count` equal slices of every global batch.

    Processes that share a data shard (a tensor axis across hosts) get the same slice.
    """
    if batch % batch_shards(mesh):
        raise UserError(f"batch size {batch} is not a multiple of data x fsdp x expert = {batch_shards(mesh)}; change the batch size or the mesh")
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


def agreed(n: int) -> int:
    """The largest over all processes: shapes and loops must be the same on each. For the main thread: all processes must call it in the same order."""
    if jax.process_count() == 1:
        return n
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(n)).max())


def attempt(f, *args):
    """f(*args), or the exception that it ended in, for `settled`."""
    try:
        return f(*args)
    except Exception as e:
        return e


def settled(said, who: str):
    """What this process's own work said (`attempt`), once all have told each other that theirs went well: one that raised alone would leave
    the others waiting for it. For the main thread, as `agreed`. who: begins the sentence of those that hear of another's error."""
    failed = isinstance(said, Exception)
    if agreed(int(failed)):
        raise said if failed else UserError(f"{who} failed in another process, which says how")
    return said


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
