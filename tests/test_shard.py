"""The mesh and the table from names to axes, on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.ops import nn
from jaxalign.ops.nn import Spec
from jaxalign.types import UserError


@pytest.fixture(scope="module")
def mesh():
    return shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_make_mesh():
    assert dict(shard.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}
    assert dict(shard.make_mesh({"fsdp": -1, "data": 1, "tensor": 2}).shape)["fsdp"] == 4
    assert shard.make_mesh({}, jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize("sizes, message", [({"model": 2}, "'model' is unknown"), ({"data": 3}, "needs 3 devices, this program has 8"), ({"data": -1, "fsdp": -1}, "at most one"), ({"data": 0}, "positive"), ({"tensor": 3}, "needs"), ({"tensor": 16}, "needs 16")])
def test_impossible_meshes_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        shard.make_mesh(sizes)


def test_partition(mesh):
    part = lambda shape, axes, rules=None: shard.partition(Spec(shape, axes), mesh, rules)
    assert part((3, 8, 4), ("layers", "embed", "heads")) == P(None, "fsdp", "tensor")
    assert part((7, 8), ("vocab", "embed")) == P(None, "fsdp")  # 7 is odd: whole
    assert part((8, 8), ("heads", "mlp")) == P("tensor", None)  # an axis is used once
    assert part((8, 6), ("embed", None), {"embed": ("data", "fsdp")}) == P(("data", "fsdp"), None)
    assert part((6, 6), ("embed", None), {"embed": ("data", "fsdp")}) == P(None, None)  # 4 does not divide 6
    assert part((8, 8), ("embed", "mlp"), {"embed": None}) == P(None, "tensor")
    with pytest.raises(UserError, match="no sharding rule for logical axis 'heds'"):
        part((8,), ("heds",))


def test_init_is_sharded_and_independent_of_the_mesh(mesh):
    specs = decoder.specs(decoder.Config(vocab=32, dim=8, layers=2, heads=2, hidden=12))
    params = shard.init(specs, jax.random.key(0), mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == shard.shardings(specs, mesh)
    assert params["layers"]["gate"].addressable_shards[0].data.shape == (2, 4, 6)
    alone = jax.jit(lambda k: nn.init(specs, k))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    abstract = shard.abstract(specs, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params)
    assert ("layers/gate", (2, 8, 12), P(None, "fsdp", "tensor")) in shard.describe(specs, mesh)


def test_moments_carry_their_parameters_sharding(mesh):
    specs = {"w": Spec((8, 4), ("embed", "mlp"), nn.normal(1.0)), "b": Spec((3,), (None,))}
    params = shard.init(specs, jax.random.key(0), mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.1, 10)))
    where = shard.like(tx, shard.shardings(specs, mesh), jax.eval_shape(tx.init, params), mesh)
    state = jax.jit(tx.init, out_shardings=where)(params)
    (adam,) = (s for s in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for moment in (adam.mu, adam.nu):
        assert moment["w"].sharding.spec == P("fsdp", "tensor") and moment["w"].addressable_shards[0].data.shape == (4, 2)
    assert adam.count.sharding == shard.replicated(mesh)


def test_rows(mesh):
    assert shard.batch_shards(mesh) == 4 and shard.batch_shards() == 1
    assert shard.local_rows(mesh, 8) == (0, 1)  # one process feeds everything
    with pytest.raises(UserError, match="batch size 6 is not a multiple of data x fsdp x expert = 4"):
        shard.local_rows(mesh, 6)
    batch = {"tokens": np.arange(8).reshape(8, 1), "beta": np.float32(2), "done": jnp.ones(3)}
    placed = shard.place(batch, mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 1)
    assert placed["beta"].sharding == shard.replicated(mesh) and placed["done"] is batch["done"]


def test_a_process_feeds_the_rows_of_its_devices(monkeypatch, mesh):
    """Two processes of four devices: each feeds half; if the tensor axis crosses them, both feed the same rows."""
    real = NamedSharding.addressable_devices_indices_map

    class Mine:
        def __init__(self, mesh, mine):
            self.sharding, self.mine = NamedSharding(mesh, P(shard.ACTIVATIONS["batch"])), mine

        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in real(self.sharding, shape).items() if d in self.mine}

    for sizes, mine, want in [
        ({"data": 2, "fsdp": 2, "tensor": 2}, range(4, 8), (1, 2)),
        ({"data": 4, "tensor": 2}, range(0, 8, 2), (0, 1)),  # one half of the tensor axis: every row
        ({"data": 8}, [2, 3], (1, 4)),
    ]:
        m = shard.make_mesh(sizes)
        devices = {m.devices.flat[i] for i in mine}
        monkeypatch.setattr(shard, "batch_sharding", lambda _, m=m, d=devices: Mine(m, d))
        assert shard.local_rows(m, 16) == want


def test_constrain(mesh):
    x = np.zeros((8, 6, 4), np.float32)
    assert shard.constrain(x, "batch", "time", None) is x  # no mesh, no work
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: shard.constrain(x, "batch", "time", None))(x)
        odd = jax.jit(lambda x: shard.constrain(x, "batch", "time", None))(x[:3])
    assert y.addressable_shards[0].data.shape == (2, 6, 4)
    assert odd.addressable_shards[0].data.shape == (3, 6, 4)
