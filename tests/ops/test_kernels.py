"""The forms of attention for other machines, in value and gradient against autodiff through the whole square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxalign import shard
from jaxalign.ops import attention, flash, splash


def draw(B, T, N, K, H, seed=0):
    """(q, k, v, segments): rows packed with segments of random lengths, padding at the end."""
    r = np.random.default_rng(seed)
    q, k, v = (r.standard_normal((B, T, n, H)).astype(np.float32) for n in (N, K, K))
    cuts = np.sort(r.integers(1, T, (B, 3)), 1)
    segments = 1 + (np.arange(T)[None, :, None] >= cuts[:, None]).sum(-1)
    return q, k, v, np.where(segments == 4, 0, segments).astype(np.int32)


def far(form, q, k, v, segments, **options):
    """The largest gaps between `form` and the plain form (which a traced `start` selects), in the output and in dq, dk and dv."""
    weights = np.random.default_rng(9).standard_normal(q.shape).astype(np.float32) * (segments != 0)[..., None, None]

    def run(f, *args):
        g = jax.value_and_grad(lambda *a: (lambda out: ((out * weights).sum(), out * weights))(f(*a)), argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = jax.jit(g)(*args)
        return out, *grads

    plain = jax.jit(lambda start, *a: run(lambda *a: attention.attend(*a, q_segments=segments, kv_segments=segments, start=start, scale=1.0, **options), *a))
    return [float(abs(a - b).max()) for a, b in zip(run(form, q, k, v), plain(0, q, k, v))]


# 256: one kernel backward; 640 is five blocks of 128: two kernels.
@pytest.mark.parametrize("T, K, causal, window, softcap", [(256, 2, True, None, None), (640, 1, True, 200, 1.5), (256, 4, False, None, None)])
def test_splash(T, K, causal, window, softcap):
    q, k, v, segments = draw(1, T, 4, K, 16)
    form = lambda q, k, v: splash.attend(q, k, v, segments, segments, causal=causal, window=window, softcap=softcap, interpret=True)
    assert max(far(form, q, k, v, segments, causal=causal, window=window, softcap=softcap)) < 5e-5


@pytest.mark.parametrize("local", [True, False])
def test_layers_that_differ_in_the_window_choose_between_two_kernels(local, monkeypatch):
    """As in Gemma 2, where a scan tells each layer whether its window holds."""
    monkeypatch.setattr(shard, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    q, k, v, segments = draw(1, 128, 2, 1, 8)
    form = lambda local: lambda q, k, v: attention.attend(q, k, v, q_segments=segments, kv_segments=segments, scale=1.0, window=20, windowed=local)
    assert max(far(form(jnp.asarray(local)), q, k, v, segments, window=20 if local else None)) < 5e-5


@pytest.mark.parametrize("causal", [True, False])
def test_flash(causal):
    q, k, v, segments = draw(1, 128, 2, 1, 16)
    form = lambda q, k, v: flash.attend(q, k, v, segments, causal=causal, interpret=True)
    assert max(far(form, q, k, v, segments, causal=causal)) < 5e-5


@pytest.mark.parametrize("sizes, K, options", [({"context": 4, "tensor": 2}, 2, {}), ({"context": 2, "tensor": 4}, 2, {"window": 7, "softcap": 1.5}), ({"context": 8}, 1, {"window": "traced"})])
def test_ring(sizes, K, options):
    """Also where there are more devices for heads than key heads, and by blocks of queries within a step."""
    q, k, v, segments = draw(2, 32, 4, K, 4)
    mesh = shard.make_mesh({"data": 1, **sizes})
    cut = NamedSharding(mesh, P(None, "context"))
    traced = options == {"window": "traced"}
    options = {"window": 9} if traced else options

    def form(q, k, v, segments, window):
        window = {"window": window} if traced else {}
        return attention.attend(q, k, v, q_segments=segments, kv_segments=segments, scale=1.0, **{**options, **window})

    weights = np.random.default_rng(9).standard_normal(q.shape).astype(np.float32) * (segments != 0)[..., None, None]
    g = lambda f: jax.value_and_grad(lambda *a: (lambda out: ((out * weights).sum(), out * weights))(f(*a)), argnums=(0, 1, 2), has_aux=True)
    plain = lambda start, *a: attention.attend(*a, q_segments=segments, kv_segments=segments, start=start, scale=1.0, **options)
    with jax.set_mesh(mesh):
        (_, out), grads = jax.jit(g(form))(*(jax.device_put(x, cut) for x in (q, k, v, segments)), 9)
    (_, want), want_grads = jax.jit(lambda start, *a: g(functools.partial(plain, start))(*a))(0, q, k, v)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "context", "tensor")), 4)
    for a, b in zip((out, *grads), (want, *want_grads)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_ring_by_blocks_of_queries(monkeypatch):
    """Each step in four blocks: the same numbers."""
    from jaxalign.ops import ring

    q, k, v, segments = draw(1, 32, 2, 2, 4)
    mesh = shard.make_mesh({"context": 2}, jax.devices()[:2])
    loss = lambda *a: (attention.attend(*a, q_segments=segments, kv_segments=segments) * (segments != 0)[..., None, None] * q).sum()
    with jax.set_mesh(mesh):
        whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
        monkeypatch.setattr(ring, "BLOCK", 2)
        parts = jax.jit(jax.value_and_grad(lambda *a: loss(*a), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), parts, whole)


# -- which form -----------------------------------------------------------------------------------------------------


def picked(monkeypatch, platform, q, k, **options):
    """The name of the form that `attend` hands q and k to."""
    seen = []
    monkeypatch.setattr(shard, "platform", lambda: platform)
    for module in (flash, splash):
        monkeypatch.setattr(module, "attend", lambda q, k, v, *a, _n=module.__name__.rsplit(".")[-1], **kw: (seen.append(_n), q)[1])
    ones = lambda x: jnp.ones(x.shape[:2], jnp.int32)
    s = ones(q)
    jax.eval_shape(lambda: attention.attend(q, k, k, q_segments=s, kv_segments=s if k.shape[1] == q.shape[1] else ones(k), **options))
    return seen[0] if seen else "ours"


def test_the_platform_and_the_shape_pick_the_form(monkeypatch):
    x = lambda T, H=64, dtype="bfloat16", N=4: jnp.zeros((1, T, N, H), dtype)
    pick = functools.partial(picked, monkeypatch)
    assert pick("cpu", x(256), x(256)) == "ours"
    assert pick("tpu", x(256), x(256, N=2)) == pick("tpu", x(256), x(256), window=32, softcap=5.0) == pick("tpu", x(256), x(256), causal=False) == "splash"
    assert pick("gpu", x(256), x(256, N=2)) == "flash"
    for platform in ("tpu", "gpu"):
        assert pick(platform, x(100), x(100)) == pick(platform, x(256, 7), x(256, 7)) == pick(platform, x(1), x(256), start=3) == "ours"
        assert pick(platform, x(256), x(256), bias=jnp.zeros((4, 256, 256)), causal=False) == "ours"
        assert pick(platform, x(256), x(256), window=jnp.int32(8)) == "ours"
    assert pick("gpu", x(256), x(256), window=32) == pick("gpu", x(256, dtype="float32"), x(256, dtype="float32")) == "ours"


def test_a_gpu_program_holds_the_kernel_and_no_square():
    """Lowered on whatever machine this is, for one GPU of the mesh in context: forward and backward kernels, packed rows, no
    mask of T x T."""
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,) * 5, shard.AXES, axis_types=(AxisType.Auto,) * 5, abstract_device=gpu)
    T = 128
    q, k, v, segments = (jnp.asarray(x, jnp.int32 if x.ndim == 2 else jnp.bfloat16) for x in draw(1, T, 2, 1, 16))
    loss = lambda q, k, v: attention.attend(q, k, v, q_segments=segments, kv_segments=segments).astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(mesh):
        assert shard.platform() == "gpu"
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "mha_forward" in text and "mha_backward" in text and "triton" in text
    assert f"{T}x{T}x" not in text
