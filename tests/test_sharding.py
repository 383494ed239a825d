"""The same curve on eight simulated devices as on one: every objective on data 2 x fsdp 2 x tensor 2, and every axis and products of them."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jaxalign import shard, tree
from jaxalign.models import heads, lora
from jaxalign.rl import engine
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import optim, state, step
from jaxalign.types import Prompts

STEPS = 20
# Adam divides by sqrt(v): where a gradient is nearly nothing its rounding becomes the direction. eps 1e-4 keeps that out.
OPTIM = optim.Optim(lr=3e-3, schedule="cosine", warmup=2, eps=1e-4, weight_decay=0.01)
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None)
NAMES = ["lm_smooth", "lm_gpt2", "pairs", "rankings", "dpo", "dpo_shared", "ipo", "grpo", "ppo"]


@pytest.fixture(scope="module")
def meshes():
    return {"mesh": shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), "one": shard.make_mesh({}, jax.devices()[:1])}


def specs_of(name):
    if name == "ppo":
        return {"policy": tiny.LLAMA.specs(), "value": heads.specs(tiny.LLAMA.config.dim)}
    if name == "grpo":
        return {"policy": tiny.LLAMA.specs()}
    return {"lm_gpt2": tiny.GPT2, "lm_experts": tiny.EXPERTS, "pairs": tiny.SCALAR, "rankings": tiny.SCALAR}.get(name, tiny.LLAMA).specs()


def curve(name, mesh, batches, accumulate=1):
    """(losses, last state), synchronised every step."""
    objective = tiny.CASES[name][0]
    where = shard.shardings(specs_of(name), mesh)
    params = jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), tiny.CASES[name][1](), where)
    tx, schedule = optim.make(OPTIM, STEPS, params)
    s = state.create(params, tx, objective, 0, mesh)
    fn = step.make_step(objective, tx, accumulate=accumulate, schedule=schedule, shardings=jax.tree.map(lambda x: x.sharding, s))
    losses, compiled = [], []
    with jax.set_mesh(mesh):
        for b in batches:
            s, m = fn(s, {}, shard.place(b, mesh))
            losses.append(float(m["loss"]))
            compiled.append(len(COMPILED))
    assert len(set(compiled)) == 1  # once; `_cache_size` also counts the dispatcher's entries, of which a mesh makes two
    assert jax.tree.map(lambda x: x.sharding, s.params) == where  # a step leaves everything where it was
    return np.array(losses), s


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_follows_one_device(name, meshes):
    """Four batches over and over, 20 steps: <= 1e-5 relative, on losses that move. On the mesh in two micro-batches for
    `lm`: each device keeps its own rows."""
    make = tiny.CASES[name][2]
    four = [make(np.random.default_rng(i), 8, 8) for i in range(4)]
    batches = [four[i % 4] for i in range(STEPS)]
    one, s1 = curve(name, meshes["one"], batches)
    many, s8 = curve(name, meshes["mesh"], batches, accumulate=2 if name == "lm_smooth" else 1)
    assert np.abs(one[-4:].mean() - one[:4].mean()) > 0.01 * np.abs(one[:4]).mean(), one
    np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    gap = tiny.far(jax.tree.map(np.asarray, s8.params), jax.tree.map(np.asarray, s1.params))
    assert gap < 1e-4, gap
    big = s8.params["policy"] if name in ("grpo", "ppo") else s8.params.get("trunk", s8.params)
    assert len({x.device for x in big["embed"].addressable_shards}) == 8
    assert big["embed"].addressable_shards[0].data.shape == (8, 8)  # [V 16, D 16] over tensor 2 and fsdp 2


@functools.cache
def alone(name, T):
    """(batches, losses and last state on one device) of six steps of rows of T tokens."""
    make = tiny.CASES[name][2]
    batches = [make(np.random.default_rng(i % 3), 8, T) for i in range(6)]
    return batches, *curve(name, shard.make_mesh({}, jax.devices()[:1]), batches)


MESHES = [
    ("lm_smooth", {"fsdp": 8}),
    ("lm_smooth", {"fsdp": 2, "tensor": 4}),  # four ways to cut two key heads
    ("lm_smooth", {"context": 8}),
    ("lm_smooth", {"fsdp": 2, "tensor": 2, "context": 2}),
    ("dpo", {"data": 2, "tensor": 2, "context": 2}),
    ("ppo", {"fsdp": 2, "tensor": 2, "context": 2}),
    ("lm_experts", {"fsdp": 2, "expert": 4}),
    ("lm_experts", {"tensor": 2, "context": 2, "expert": 2}),
]


@pytest.mark.parametrize("name, sizes", MESHES, ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}{n}" for k, n in x.items()))
def test_every_axis_follows_one_device(name, sizes):
    """Six steps: losses to 2e-5, and what they led to; time is really cut (T = 16 is two halves for each of eight devices)."""
    batches, one, s1 = alone(name, 16)
    many, s8 = curve(name, shard.make_mesh({"data": 1, **sizes}), batches)
    np.testing.assert_allclose(many, one, rtol=2e-5, atol=1e-6)
    assert np.ptp(one) > 1e-3 * abs(one[0])
    gap = tiny.far(jax.tree.map(np.asarray, s8.params), jax.tree.map(np.asarray, s1.params))
    assert gap < 1e-4, gap


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_rollouts_are_the_same(name, meshes):
    model = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}[name]
    r = np.random.default_rng(0)
    rows = tiny.rows(r, 8, 6)
    prompts = Prompts(rows.tokens, rows.segments, rows.positions, np.arange(8, dtype=np.int32))
    loud = jax.tree.map(np.array, tiny.loud(tiny.init(model, seed=3), 2.0))
    out = {}
    for k, mesh in meshes.items():
        params = jax.tree.map(jax.device_put, loud, shard.shardings(model.specs(), mesh))
        with jax.set_mesh(mesh):
            out[k] = jax.tree.map(np.asarray, generate(model, Sampling(8, (5, 6), temperature=0), params, shard.place(prompts, mesh), jax.random.key(0)))
            if (name, k) == ("llama", "mesh"):  # 8 rows in 4 slots
                out["slots"] = jax.tree.map(np.asarray, engine.generate(model, Sampling(8, (5, 6), temperature=0, slots=4), params, shard.place(prompts, mesh), jax.random.key(0)))
    for k in set(out) - {"one"}:
        for f in ("tokens", "mask", "segments", "positions", "truncated"):
            np.testing.assert_array_equal(getattr(out[k], f), getattr(out["one"], f), err_msg=f"{k} {f}")
        np.testing.assert_allclose(out[k].logp, out["one"].logp, atol=1e-5)
    assert len(set(out["one"].mask.sum(1))) > 1  # some rows stopped early


def test_adapters_follow_one_device(meshes):
    """DPO with DoRA on an nf4 base, in two micro-batches on the mesh: the same curve, adapters where their specs say."""
    model, rules, how = tiny.LLAMA, ((lora.MATRICES, "nf4"),), lora.Lora(((lora.MATRICES, 2, 4.0),), dora=True)
    objective, out = tiny.CASES["dpo"][0], {}
    four = [tiny.pairs(np.random.default_rng(i), 8, 8) for i in range(4)]
    for k, mesh in meshes.items():
        dense = jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), tiny.init(model), shard.shardings(model.specs(), mesh))
        params = lora.attach(lora.quantise(dense, rules, specs=model.specs(), mesh=mesh), how, jax.random.key(3), specs=model.specs(), mesh=mesh)
        trained, frozen = tree.split(params, lora.trainable(params))
        tx, _ = optim.make(OPTIM, STEPS, trained)
        s = state.create(trained, tx, objective, 0, mesh)
        fn = step.make_step(objective, tx, accumulate=2 if k == "mesh" else 1, shardings=jax.tree.map(lambda x: x.sharding, s))
        losses = []
        with jax.set_mesh(mesh):
            for i in range(STEPS):
                s, m = fn(s, {"base": frozen}, shard.place(four[i % 4], mesh))
                losses.append(float(m["loss"]))
        want = shard.shardings(lora.Adapted(model, how, rules).specs(), mesh)
        assert jax.tree.map(lambda x: x.sharding, tree.merge(s.params, frozen)) == want
        assert s.opt_state[0].mu["layers"]["q"]["a"].sharding == want["layers"]["q"]["a"]
        out[k] = np.array(losses), jax.tree.map(np.asarray, s.params)
    assert np.abs(out["one"][0][-4:].mean() - out["one"][0][:4].mean()) > 0.01
    np.testing.assert_allclose(out["mesh"][0], out["one"][0], rtol=2e-5, atol=1e-6)
    assert tiny.far(out["mesh"][1], out["one"][1]) < 1e-3
