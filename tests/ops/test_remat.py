"""What the backward pass makes again changes memory and time, never a loss or a gradient."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from jaxalign.models import decoder, gpt2, neox
from jaxalign.objectives import lm
from jaxalign.ops import nn
from jaxalign.types import UserError

SHAPE = dict(vocab=tiny.V, dim=16, layers=2, heads=2, hidden=24)
POLICIES = ("full", "dots", "qkv", "attn", "mlp", "qkv+attn+o+mlp", "offload", "offload:attn")
# More than one block of queries, and packed: the blocked attention's own backward pass runs inside of the checkpoint.
ROWS = tiny.rows(np.random.default_rng(0), 2, 70)


def loss(model, params):
    out = lm.lm(model).loss(params, {}, (), ROWS, None, {})
    return out.terms["lm"].total / out.terms["lm"].weight


@pytest.fixture(scope="module")
def plain():
    model = decoder.model(**SHAPE)
    params = tiny.init(model)
    return params, jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(params)


@pytest.mark.parametrize("scan, remat", [*((True, r) for r in POLICIES), (False, "attn"), (False, "offload")])
def test_any_policy_gives_the_same_gradient(scan, remat, plain):
    params, (want, gradient) = plain
    got, g = jax.jit(jax.value_and_grad(lambda p: loss(decoder.model(**SHAPE, scan=scan, remat=remat), p)))(params)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g, gradient)


@pytest.mark.parametrize("family", [decoder, gpt2, neox], ids=lambda f: f.__name__.split(".")[-1])
def test_what_is_made_again(family):
    """Of a layer's products the backward pass makes again those that it needs and that were not kept. It needs all but the
    feed-forward's last; one block of queries has two products without weights, scores and their sum over values."""
    shape = SHAPE | dict(layers=1)
    params = jax.eval_shape(lambda: nn.init(family.model(**shape).specs(), jax.random.key(0)))
    short = jax.tree.map(lambda x: x[:, :8], ROWS)

    def products(remat):
        model = family.model(**shape, scan=False, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: model.hidden(p, short.tokens, short.segments, short.positions).x.sum()))(params)).count("dot_general[")

    none = products("none")
    made = {r: products(r) - none for r in ("full", "dots", "attn", "mlp", "qkv", "o", "qkv+attn+o+mlp")}
    qkv, mlp = (3, 2) if family is decoder else (1, 1)
    needed = qkv + 2 + 1 + mlp
    turns = 2 * (family is decoder)  # of queries and keys: the product that a rotation is on a CPU
    want = {"full": needed, "dots": 2, "attn": needed - 2, "mlp": needed - mlp, "qkv": needed - qkv, "o": needed - 1, "qkv+attn+o+mlp": 0}
    if family is neox:  # a parallel block: the feed-forward reads what attention reads, and o is needed by nobody
        want = {k: v - ("o" not in k.split("+") and k != "dots") for k, v in want.items()} | {"o": needed - 1}
    assert made == {k: v + turns * (k != "dots") for k, v in want.items()}


@pytest.mark.parametrize("wrong", ["some", "qkv+atn", "offload:", "offload:dots", "host:attn", ""])
def test_unknown_policies_are_refused(wrong):
    with pytest.raises(UserError, match="model.remat '.*' is unknown; it is none, full, dots"):
        decoder.model(**SHAPE, remat=wrong)


TPU = """
import os
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.objectives import lm
from jaxalign.train import optim, state, step
from jaxalign.types import Tokens

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = shard.make_mesh({"fsdp": 4, "data": 1}, devices)
rows = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=shard.batch_sharding(mesh))
batch = Tokens(rows, jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=rows.sharding), rows, rows)

def memory(remat="none", offload=False):
    model = decoder.model(vocab=512, dim=256, layers=2, heads=2, hidden=512, scan=True, remat=remat)
    objective, params = lm.lm(model), shard.abstract(model.specs(), mesh)
    tx, _ = optim.make(optim.Optim(), 10, params)
    s = state.create(params, tx, objective, 0, mesh, offload=offload)
    fn = step.make_step(objective, tx, shardings=jax.tree.map(lambda x: x.sharding, s))
    with jax.set_mesh(mesh):
        return fn.lower(s, {}, batch).compile().memory_analysis()
"""


def on_tpu(code: str) -> str:
    """What a program prints that compiles for a TPU. In a process of its own: libtpu may be loaded once, and not at all."""
    pytest.importorskip("libtpu")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", TPU + code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_offloading_moves_activations_to_the_host():
    """Kept products [2 layers, 2 rows, 256 tokens, ...] leave the chip: q, k, v, o of 256 numbers, gate and up of 512."""
    out = on_tpu("a, b, c = memory(), memory('qkv+o+mlp'), memory('offload:qkv+o+mlp')\nprint([(x.peak_memory_in_bytes, x.host_temp_size_in_bytes) for x in (a, b, c)])")
    (all_, no), (kept, none), (chip, host) = eval(out)
    size = 2 * 2 * 256 * (4 * 256 + 2 * 512) * 4
    assert no == none == 0 and host >= size and chip < kept < all_


def test_offloading_moves_the_optimizer_to_the_host():
    out = on_tpu("a, b = memory(), memory(offload=True)\nprint([(x.argument_size_in_bytes, x.host_argument_size_in_bytes) for x in (a, b)])")
    (chip, none), (less, host) = eval(out)
    assert none == 0 and 1.9 < host / less < 2.1 and chip > 2.9 * less - 10_000
