"""Optimizers that hold less: moments of a byte, factored, in bf16, on the host; what each is compared with is written by hand."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from jaxalign import build, shard, tree
from jaxalign.models import decoder
from jaxalign.objectives import lm
from jaxalign.ops import nn
from jaxalign.train import adam8bit, optim, state, step
from jaxalign.train.optim import Optim
from jaxalign.types import Objective, UserError

CONSTANT = dict(schedule="constant", lr=1e-2)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_off_by_less_than_one(signed):
    """|sqrt|x| - sqrt|q|| <= sqrt(s) / 127 and |x^(1/4) - q^(1/4)| <= s^(1/4) / 255, s the largest of the block; blocks of 172
    in rows of 344. One block has an outlier, one is zero, and magnitudes run over ten decades."""
    r = np.random.default_rng(0)
    x = r.standard_normal((40, 344)) * 10.0 ** r.integers(-10, 1, (40, 344))
    x[3, 200], x[5, :172] = 1e4, 0
    x = (x if signed else x * x).astype(np.float32)
    root, levels = (2, 127) if signed else (4, 255)
    coded = jax.jit(lambda x, t: adam8bit.encode(x, t, signed))
    assert adam8bit.block(344) == 172
    s = np.repeat(np.abs(x).reshape(40, 2, 172).max(-1), 172, 1)
    for t in (0, 1, 7):
        code, scale = coded(x, jnp.int32(t))
        q = np.asarray(jax.jit(adam8bit.decode)(code, scale))
        assert (np.abs(np.abs(x) ** (1 / root) - np.abs(q) ** (1 / root)) <= s ** (1 / root) / levels * 1.0001).all()
        assert (np.sign(q) * np.sign(x) >= 0).all() and (q[x == 0] == 0).all() and (q[s == np.abs(x)] == x[s == np.abs(x)]).all()
        if not signed:
            assert (q[x > 0] > 0).all()  # else the update would divide by eps


def test_rounding_is_right_on_average():
    """A number between two codes becomes either in proportion: the mean code over 500 steps is that number to 1/100."""
    x = np.linspace(0.001, 1, 256, dtype=np.float32)[None]
    codes = jax.jit(jax.vmap(lambda t: adam8bit.encode(jnp.asarray(x), t, True)[0]))(jnp.arange(500))
    np.testing.assert_allclose(np.asarray(codes, np.float64).mean(0), np.sqrt(x) * 127, atol=0.01)


def test_small_leaves_are_adam():
    params = {"b": jnp.ones(8), "w": jnp.ones((16, 16))}
    ours, theirs = adam8bit.scale_by_adam8bit(0.9, 0.99), optax.scale_by_adam(0.9, 0.99)
    a, b = ours.init(params), theirs.init(params)
    for i in range(3):
        g = jax.tree.map(lambda x: x * (i - 1.5), params)
        (u, a), (v, b) = ours.update(g, a), theirs.update(g, b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), u, v)


def curve(o: Optim, seed: int, steps: int = 150):
    """Losses of a two-layer network that learns another one's outputs from noisy batches; 64 x 128 + 128 x 64 weights."""
    r = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(r.standard_normal(s) / np.sqrt(s[0]), jnp.float32)
    target, params = {"a": draw(64, 128), "b": draw(128, 64)}, {"a": draw(64, 128), "b": draw(128, 64)}
    f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    x = jnp.asarray(r.standard_normal((steps, 64, 64)), jnp.float32)
    tx, _ = optim.make(o, steps, params)

    def one(c, x):
        p, s = c
        loss, g = jax.value_and_grad(lambda p: jnp.square(f(p, x) - f(target, x)).mean())(p)
        u, s = tx.update(g, s, p)
        return (optax.apply_updates(p, u), s), loss

    return jax.jit(lambda c: jax.lax.scan(one, c, x))((params, tx.init(params)))


@pytest.mark.parametrize("name, mu, b2", [("adamw_8bit", None, 0.95), ("adamw_8bit", None, 0.999), ("adamw", "bfloat16", 0.999)])
def test_narrow_moments_follow_adam(name, mu, b2):
    for seed in (0, 1):
        _, want = curve(Optim(name="adamw", b2=b2, **CONSTANT), seed)
        (_, s), got = curve(Optim(name=name, mu_dtype=mu, b2=b2, **CONSTANT), seed)
        assert want[-1] < 0.2 * want[0]
        np.testing.assert_allclose(got[-20:].mean(), want[-20:].mean(), rtol=0.03)
    assert (name == "adamw") == all(x.dtype == jnp.bfloat16 for k, x in tree.flat(s).items() if "/mu/" in k)


def test_bytes():
    """2 bytes of codes and 8 of scales per 256 numbers, against 8: 0.254. Factored: a row and a column per matrix."""
    params = {"layers": {"w": jax.ShapeDtypeStruct((2, 256, 512), jnp.float32)}}
    held = lambda name, **k: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optim.make(Optim(name=name, **k), 1, params)[0].init, params)) if x.size > 1)
    n = 2 * 256 * 512
    assert held("adamw") == 8 * n and held("adamw", mu_dtype="bfloat16") == 6 * n and held("muon") - 12 == 4 * n
    assert held("adamw_8bit") == 2 * n + 2 * 4 * n // 256
    assert held("adafactor") == 4 * 2 * (256 + 512)


def test_muon_orthogonalises_each_layer():
    """Of a stacked leaf every layer by itself: the singular values of what it makes of momentum lie in 0.2 sqrt(max(in, out)) x
    [0.3, 1.3] (five steps of Newton-Schulz come no closer), with the same vectors; embeddings and norms are Adam's."""
    r = np.random.default_rng(0)
    params = {"embed": jnp.ones((12, 8)), "layers": {"w": jnp.ones((3, 8, 24)), "norm": jnp.ones((3, 8))}}
    g = jax.tree.map(lambda p: jnp.asarray(r.standard_normal(p.shape), jnp.float32), params)
    made = {n: optim.make(Optim(name=n, lr=1.0, schedule="constant"), 10, params)[0] for n in ("muon", "adamw")}
    u, adam = (jax.jit(tx.update)(g, tx.init(params), params)[0] for tx in made.values())
    for k in ("embed", "layers/norm"):
        np.testing.assert_allclose(tree.flat(u)[k], tree.flat(adam)[k], rtol=1e-5)
    for layer, grad in zip(-np.asarray(u["layers"]["w"]), np.asarray(g["layers"]["w"])):
        left, s, right = np.linalg.svd(grad, full_matrices=False)
        inner = left.T @ (layer / (0.2 * 24**0.5)) @ right.T
        assert (np.diag(inner) > 0.3).all() and (np.diag(inner) < 1.3).all()
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=2e-2)


def test_schedule_free_averages():
    """z is where Adam without momentum goes from gradients at y; x the mean of the z so far (at a constant rate), y = (1 - b1) z
    + b1 x. What is trained is y, what is evaluated and kept is x."""
    b1, b2, lr, w0 = 0.9, 0.99, 0.1, np.array([3.0, -2.0])
    tx, _ = optim.make(Optim(name="schedule_free_adamw", b1=b1, b2=b2, lr=lr, schedule="constant"), 10, {"w": jnp.asarray(w0)})
    s = state.create({"w": jnp.asarray(w0, jnp.float32)}, tx, Objective(None), 0)
    y = x = z = w0
    v = 0.0
    for t in range(1, 6):
        updates, opt = tx.update({"w": s.params["w"]}, s.opt_state, s.params)  # of w^2 / 2
        s = s.replace(params=optax.apply_updates(s.params, updates), opt_state=opt)
        v = b2 * v + (1 - b2) * y * y
        z = z - lr * y / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        x = x + (z - x) / t
        y = (1 - b1) * z + b1 * x
        np.testing.assert_allclose(s.params["w"], y, rtol=1e-4)
        np.testing.assert_allclose(state.averaged(s)["w"], x, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in optim.OPTIMIZERS if n != "sgd"])
def test_no_big_state_is_replicated(name):
    """On data 2 x fsdp 2 x tensor 2: every leaf of 256 numbers or more is cut as its parameter is, as far as it divides."""
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = decoder.model(vocab=256, dim=128, layers=2, heads=2, hidden=256)
    params = shard.abstract(model.specs(), mesh)
    tx, _ = optim.make(Optim(name=name, schedule="constant", weight_decay=0.1), 10, params)
    s = state.create(params, tx, Objective(None), 0, mesh, offload=True)
    leaves = {k: x for k, x in tree.flat(s.opt_state).items() if x.size >= 256 and "norm" not in k}
    assert leaves and all(x.sharding.memory_kind == "pinned_host" for x in leaves.values())
    for k, x in leaves.items():
        pieces = x.size // np.prod(x.sharding.shard_shape(x.shape))
        assert pieces == (2 if "v_row" in k or "v_col" in k else 2 if x.shape[-1] == 1 else 4), (k, x.shape, x.sharding.spec)
    assert all(x.sharding.memory_kind == "device" for x in jax.tree.leaves(s.opt_state) if x.size == 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with runs.devices(2):
        return runs.prepared(tmp_path_factory.mktemp("data"))


KINDS = {
    "plain": {},
    "offload": {"optim.offload": True},
    "8bit": {"optim.name": "adamw_8bit", "optim.offload": True},
    "muon": {"optim.name": "muon", "optim.mu_dtype": "bfloat16"},
    "adafactor": {"optim.name": "adafactor", "optim.weight_decay": 0.1},
    "free": {"optim.name": "schedule_free_adamw", "optim.schedule": "constant", "optim.b1": 0.9, "optim.offload": True},
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """kind -> a finished stage of four steps, with its checkpoints of steps 2 and 4."""
    done = {}

    def run(kind):
        if kind not in done:
            d = tmp_path_factory.mktemp(kind)
            done[kind] = d, runs.train(runs.config("lm", data, **{"train.steps": 4, "train.save_every": 2, **KINDS[kind]}), d)
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_bits(kind, data, finished):
    with runs.devices(2):
        d, _ = finished(kind)
        want = runs.facts(d)
        for gone in ("checkpoints/4", "params"):
            shutil.rmtree(d / gone)
        runs.train(runs.config("lm", data, **{"train.steps": 4, "train.save_every": 2, **KINDS[kind]}), d)
        assert runs.facts(d) == want
        if kind == "offload":  # where the state lies changes nothing
            assert {**want, "weights": 0} == {**runs.facts(finished("plain")[0]), "weights": 0} and want["weights"] == runs.weights(finished("plain")[0] / "params")


def test_what_a_stage_keeps_is_the_average(finished):
    """The checkpoint holds y and z; params/ holds x = (y - (1 - b1) z) / b1."""
    from jaxalign.train import checkpoint

    with runs.devices(2):
        d, (_, kept) = finished("free")
    saved, _ = checkpoint.load_tree(d / "checkpoints" / "4", checkpoint.structure(d / "checkpoints" / "4"))
    flat = tree.flat(saved["state"])
    for k, x in tree.flat(kept).items():
        y, z = (np.asarray(flat[at + k], np.float64) for at in ("params/", "opt_state/z/"))
        np.testing.assert_allclose(x, (y - 0.1 * z) / 0.9, atol=1e-6)
    assert not np.array_equal(flat["params/embed"], tree.flat(kept)["embed"])


def test_bf16_activations_follow_f32():
    """Weights, gradients and moments stay in f32; the losses of 30 steps are those of f32 to 3 %."""
    losses = {}
    batch = tiny.rows(np.random.default_rng(0), 8, 24)
    for dtype in ("float32", "bfloat16"):
        model = decoder.model(vocab=tiny.V, dim=16, layers=2, heads=2, hidden=24, dtype=dtype)
        objective, params = lm.lm(model), jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(0))
        tx, schedule = optim.make(Optim(lr=3e-3, schedule="constant"), 30, params)
        s, fn = state.create(params, tx, objective, 0), step.make_step(objective, tx, schedule=schedule)
        grads = jax.eval_shape(lambda p: step.gradient(objective, p, {}, (), batch, jax.random.key(0))[2], params)
        losses[dtype] = []
        for _ in range(30):
            s, metrics = fn(s, {}, batch)
            assert metrics["skipped"] == 0
            losses[dtype].append(float(metrics["loss"]))
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((s.params, grads))) and jnp.bfloat16 not in [x.dtype for x in jax.tree.leaves(s.opt_state)]
    assert losses["float32"][-1] < 0.9 * losses["float32"][0]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.03)


def test_frozen_models_in_bf16(data):
    """The reference takes half the bytes; what is trained stays in f32."""
    with runs.devices(2):
        for kind in ("dpo", "ppo"):
            c = runs.config(kind, data, frozen_dtype="bfloat16")
            s = build.make_stage(build.world(c, data / "x"), kind, c.stage, data / "x")
            assert {x.dtype.name for x in jax.tree.leaves(s.source.params if kind == "dpo" else s.source.reference)} == {"bfloat16"} and {x.dtype.name for x in jax.tree.leaves(s.params)} == {"float32"}
    with pytest.raises(UserError, match="frozen_dtype 'float16' must be float32 or bfloat16"):
        build.check_stage(shard.make_mesh({"data": 8}), "dpo", runs.config("dpo", data, frozen_dtype="float16").stage)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(mu_dtype="bfloat16", name="adamw_8bit"), "mu_dtype 'bfloat16' with adamw_8bit"),
        (dict(mu_dtype="float16"), "mu_dtype 'float16'"),
        (dict(name="schedule_free_adamw"), "set optim.schedule to constant"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Optim(**wrong)
