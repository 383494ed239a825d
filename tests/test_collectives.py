"""What a train step says to other devices, read in the compiled text: weights are gathered over fsdp and gradients scattered,
the vocabulary, time and experts stay where they are. On eight simulated devices, and for TPUs that are not there."""

import collections
import functools
import math
import os

import hlo
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.objectives import lm
from jaxalign.train import optim, state, step
from jaxalign.types import Tokens

B, T, V, D = 8, 48, 80, 24  # no two products of pieces alike, as far as that goes
DENSE = decoder.model(vocab=V, dim=D, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=56, tied=False)
EXPERTS = decoder.model(vocab=V, dim=D, layers=1, heads=4, kv_heads=2, head_dim=8, hidden=56, experts=8, tied=False)


def compiled(model, mesh, batch=(B, T)):
    """The train step of `lm` with AdamW, as `build` makes it."""
    params = shard.abstract(model.specs(), mesh)
    tx, schedule = optim.make(optim.Optim(lr=1e-3), 10, params)
    opt = jax.eval_shape(tx.init, params)
    place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    opt = jax.tree.map(place, opt, shard.like(params, opt, mesh))
    whole = lambda x: place(x, shard.replicated(mesh))
    s = state.TrainState(whole(jax.ShapeDtypeStruct((), np.int32)), params, opt, (), whole(jax.eval_shape(lambda: jax.random.key(0))))
    fn = step.make_step(lm.lm(model), tx, schedule=schedule, shardings=jax.tree.map(lambda x: x.sharding, s))
    field = lambda dtype: jax.ShapeDtypeStruct(batch, dtype, sharding=shard.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return fn.lower(s, {}, Tokens(field(np.int32), field(np.float32), field(np.int32), field(np.int32))).compile()


@functools.cache
def program(model, **sizes):
    """(the compiled step on eight simulated devices, kind of collective -> shapes of all that such make)."""
    c = compiled(model, shard.make_mesh({"data": 1, **sizes}))
    return c, kinds(c.as_text())


def kinds(text):
    out = collections.defaultdict(set)
    for c in hlo.collectives(text):
        out[c.kind] |= c.shapes
    return out


def weights(model, mesh, without=()):
    """Shapes of all matrices as the mesh cuts them, axes in `without` left out, dimensions of 1 too."""
    rules = {k: None if v in without else v for k, v in shard.RULES.items()}
    local = jax.tree.map(lambda s: s.shard_shape, shard.shardings(model.specs(), mesh, rules))
    shapes = jax.tree.map(lambda s, f: tuple(n for n in f(s.shape) if n != 1), model.specs(), local, is_leaf=lambda x: hasattr(x, "axes"))
    return {s for s in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)) if len(s) > 1}


def test_fsdp_gathers_weights_and_keeps_its_part_of_everything():
    c, kind = program(DENSE, fsdp=8)
    assert weights(DENSE, shard.make_mesh({}), ("fsdp",)) <= kind["all-gather"]
    assert not [s for s in kind["all-gather"] if math.prod(s) > V * D]  # no activations
    assert (V, D // 8) in kind["reduce-scatter"]  # of the embedding and of the unembedding; the rest is XLA's to spell on a CPU
    params = 4 * sum(math.prod(s.shape) for s in jax.tree.leaves(DENSE.specs(), is_leaf=lambda x: hasattr(x, "axes")))
    batch = 4 * 4 * B * T
    # Weights and both moments: an eighth each. Norms are whole everywhere.
    assert c.memory_analysis().argument_size_in_bytes < 3 * (params / 8 + 3 * 4 * D) + batch / 8 + 64


def test_tensor_cuts_the_vocabulary_and_gathers_nothing():
    c, kind = program(DENSE, data=4, tensor=2)
    held, rows = hlo.shapes(c.as_text()), B // 4 * T
    assert not [s for s in held if V in s and s != (V,)]  # neither weights nor logits, whole
    assert [s for s in held if s[-1:] == (V // 2,) and math.prod(s) == rows * V // 2]  # the logits of this device
    assert not kind["all-gather"] and [s for s in kind["all-reduce"] if math.prod(s) == rows * D]  # after every second weight


def test_context_moves_keys_and_values_and_gathers_no_activation():
    c, kind = program(DENSE, fsdp=2, context=4)
    held, b, t = hlo.shapes(c.as_text()), B // 2, T // 4
    assert kind["all-gather"] <= weights(DENSE, shard.make_mesh({}), ("fsdp",))
    assert (2, b, 2, t // 2, 8) in kind["collective-permute"]  # two halves of the keys
    assert not [s for s in held if T in s and math.prod(s) >= b * T * D]  # no activation of a whole row
    assert not [s for s in held if s[-2:] == (t, t)] and [s for s in held if s[-2:] == (t // 2, t // 2)]  # halves meet halves


def test_experts_stay_where_they_are():
    c, kind = program(EXPERTS, fsdp=2, expert=4)
    E, F = 8, 56
    full = weights(EXPERTS, shard.make_mesh({}), ("fsdp", "expert"))
    assert {(E, D, F), (E, F, D)} <= full and not {(E, D, F), (E, F, D)} & hlo.shapes(c.as_text())
    assert (E // 4, D, F) in kind["all-gather"]  # over fsdp
    rows = B // 2 * T  # of the four devices that share their tokens
    assert (rows, D) in kind["all-gather"] and (rows // 4, D) in kind["reduce-scatter"]


def tpu(sizes):
    """A mesh of four v5e chips; skips where libtpu is not installed."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    shape = [{**dict.fromkeys(shard.AXES, 1), **sizes}[a] for a in shard.AXES]
    return Mesh(np.array(devices).reshape(shape), shard.AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_a_tpu_program_holds_splash_attention_and_scatters_its_gradients():
    # Of a real width: the compiler spells the scatter of small weights as one all-reduce of many.
    t, v, d = 384, 4096, 1024
    model = decoder.model(vocab=v, dim=d, layers=1, heads=8, kv_heads=4, hidden=2304, tied=False, dtype="bfloat16")
    mesh = tpu({"fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        assert shard.platform() == "tpu"
    text = compiled(model, mesh, (4, t)).as_text()
    assert "tpu_custom_call" in text and "splash_mha_fwd_segmented" in text and "splash_mha_dkv_segmented" in text
    assert not [s for s in hlo.shapes(text) if s[-2:] == (t, t)]  # no square outside of the kernel
    kind = kinds(text)
    parts, gathered = weights(model, mesh), weights(model, mesh, ("fsdp",))
    assert parts <= kind["reduce-scatter"]
    assert gathered <= kind["all-gather"]
    assert not gathered & kind["all-reduce"]
    assert not [s for s in hlo.shapes(text) if v in s and math.prod(s) > v]
