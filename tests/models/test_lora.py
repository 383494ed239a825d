"""Adapters and quantised bases by themselves: numbers by hand, round trips, specs, sharding, memory. Against peft: test_peft.py."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jaxalign import shard, tree
from jaxalign.models import decoder, gpt2, heads, lora
from jaxalign.objectives import preference
from jaxalign.ops import logprob, nn, quant
from jaxalign.train import step
from jaxalign.types import UserError

V = 16
MODELS = {
    "decoder": decoder.model(vocab=V, dim=12, layers=2, heads=2, hidden=20, tied=False),
    "tied": decoder.model(vocab=V, dim=12, layers=2, heads=2, hidden=20),
    "gpt2": gpt2.model(vocab=V, dim=12, layers=2, heads=2, max_len=16),
}
TOKENS = np.random.default_rng(0).integers(0, V, (2, 8)).astype(np.int32)
ONES, POSITIONS = np.ones_like(TOKENS), np.broadcast_to(np.arange(8, dtype=np.int32), TOKENS.shape)
ALL = (".", 3, 6.0)


def drawn(model, seed=0):
    params = jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(seed))
    return jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)


def shaken(params, seed=1):
    """Adapters that do something."""
    r = np.random.default_rng(seed)
    f = lambda n, x, t: x if not t else x * 1.3 if n.endswith("magnitude") else x + jnp.asarray(0.2 * r.standard_normal(x.shape), jnp.float32)
    return tree.map_named(f, params, lora.trainable(params))


def adapted(model, kind="lora", targets=(ALL,), seed=0):
    return shaken(lora.attach(drawn(model, seed), lora.Lora(targets, rs=kind == "rslora", dora=kind == "dora"), jax.random.key(2)))


def logits(model, params):
    return jax.jit(lambda p: logprob.logits(model.hidden(p, TOKENS, ONES, POSITIONS).x, model.unembed(p)))(params)


# -- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, scale", [("lora", 6 / 3), ("rslora", 6 / 3**0.5)])
def test_the_equation_by_hand(kind, scale):
    p = adapted(MODELS["decoder"], kind, (("/q$", 3, 6.0),))["layers"]["q"]
    np.testing.assert_allclose(p["scale"], scale)
    x = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    for layer in range(2):
        w, a, b = (np.asarray(p[k][layer], np.float64) for k in ("base", "a", "b"))
        np.testing.assert_allclose(nn.linear(x, jax.tree.map(lambda v: v[layer], p)), x @ (w + scale * a @ b), atol=1e-5)


def test_dora_by_hand():
    """m * (W + s a b) / |W + s a b|, columns being outputs; and the gradient in b as if the norm were a constant."""
    p = jax.tree.map(lambda v: v[0], adapted(MODELS["decoder"], "dora", (("/q$", 3, 6.0),))["layers"]["q"])
    x = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    w, a, b, m = (np.asarray(p[k], np.float64) for k in ("base", "a", "b", "magnitude"))
    full = w + 2 * a @ b
    norm = np.sqrt((full**2).sum(0))
    np.testing.assert_allclose(nn.linear(x, p), x @ full * m / norm, atol=1e-5)
    got = jax.grad(lambda b: nn.linear(x, {**p, "b": b}).sum())(p["b"])
    np.testing.assert_allclose(got, 2 * (x @ a).sum(0)[:, None] * (m / norm), rtol=1e-4)
    zero = {**p, "base": jnp.zeros((12, 12)), "b": jnp.zeros((3, 12)), "magnitude": jnp.zeros(12)}
    assert np.isfinite(jax.grad(lambda b: nn.linear(x, {**zero, "b": b}).sum())(zero["b"])).all()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_attached_changes_nothing_until_it_is_trained(name, kind):
    model = MODELS[name]
    params = drawn(model)
    new = lora.attach(params, lora.Lora((ALL,), rs=kind == "rslora", dora=kind == "dora"), jax.random.key(0))
    np.testing.assert_allclose(logits(model, new), logits(model, params), atol=1e-5)
    assert all(a is b for a, b in zip(jax.tree.leaves(lora.base(new)), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge(name, kind):
    """Embeddings and unembeddings too: attached = merged = unmerged, and unmerged is what it was."""
    model, params = MODELS[name], adapted(MODELS[name], kind)
    want = logits(model, params)
    assert np.abs(want - logits(model, lora.base(params))).max() > 0.1
    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(drawn(model))
    np.testing.assert_allclose(logits(model, merged), want, atol=2e-5)
    again = lora.unmerge(merged, lora.adapters(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, params)


def test_scanned_and_unrolled_and_decoding():
    from jaxalign.rl.rollout import Sampling, generate
    from jaxalign.types import Prompts

    shape = dict(vocab=V, dim=12, layers=3, heads=2, hidden=20)
    a, b = decoder.model(**shape, scan=True, remat="full"), decoder.model(**shape, scan=False)
    params = lora.quantise(drawn(a), ((lora.MATRICES, "nf4"),))
    params = shaken(lora.attach(params, lora.Lora(((lora.MATRICES, 3, 6),), dora=True), jax.random.key(0)))
    np.testing.assert_allclose(logits(a, params), logits(b, params), atol=1e-5)
    prompts = Prompts(TOKENS, ONES, POSITIONS, np.arange(2, dtype=np.int32))
    roll = lambda m, p: generate(m, Sampling(5, temperature=0), p, prompts, jax.random.key(0))
    np.testing.assert_array_equal(roll(a, params).tokens, roll(b, lora.merge(params)).tokens)


# -- which weights --------------------------------------------------------------------------------------------------


def test_rank_and_alpha_per_pattern():
    params = lora.attach(drawn(MODELS["gpt2"]), lora.Lora((("qkv", 2, 4), ("(up|down)/w$", 5, 1))), jax.random.key(0))
    got = {k: (x["b"].shape[-2], float(x["scale"][0])) for k, x in lora.adapters(params).items()}
    assert got == {"layers/qkv/w": (2, 2.0), "layers/up/w": (5, pytest.approx(0.2)), "layers/down/w": (5, pytest.approx(0.2))}  # no bias: it is a vector


def test_draws_are_by_name():
    """One target more changes no other, and the bound is that of peft: 1 / sqrt(D)."""
    params = drawn(MODELS["decoder"])
    one = lora.adapters(lora.attach(params, lora.Lora((("/q$", 3, 6),)), jax.random.key(0)))
    two = lora.adapters(lora.attach(params, lora.Lora((("/(q|up)$", 3, 6),)), jax.random.key(0)))
    np.testing.assert_array_equal(one["layers/q"]["a"], two["layers/q"]["a"])
    a = np.asarray(two["layers/up"]["a"])
    assert 0.8 / 12**0.5 < np.abs(a).max() < 1 / 12**0.5 and np.abs(a[0] - a[1]).max() > 0.1


@pytest.mark.parametrize(
    "targets, message",
    [
        ((), "need targets"),
        ((("/q$", 0, 1),), "rank 0"),
        ((("/q$", 2.0, 1),), "rank 2.0"),
        ((("/q$", 2, float("inf")),), "alpha inf"),
        ((("(", 2, 1),), "not a regular expression"),
        ((("query", 2, 1),), "'query' matches no parameter; the names are: .*layers/q"),
        ((("norm", 2, 1),), "'norm' matches no parameter"),
        ((("/q$", 2, 1), ("layers", 2, 1)), "'layers/q' is matched by"),
    ],
)
def test_wrong_targets(targets, message):
    with pytest.raises(UserError, match=message):
        lora.attach(drawn(MODELS["decoder"]), lora.Lora(targets), jax.random.key(0))


def test_twice_is_refused():
    params = adapted(MODELS["decoder"], targets=(("/q$", 2, 1),))
    with pytest.raises(UserError, match="layers/q has an adapter already"):
        lora.attach(params, lora.Lora((("/q$", 2, 1),)), jax.random.key(0))
    with pytest.raises(UserError, match="layers/q is adapted or quantised already"):
        lora.quantise(params, (("/q$", "int8"),))
    with pytest.raises(UserError, match="there is no layers/z"):
        lora.unmerge(drawn(MODELS["decoder"]), {"layers/z": {}})


def test_what_trains():
    model = heads.Scalar(MODELS["decoder"])
    params = {"trunk": adapted(MODELS["decoder"], "dora", (("/q$", 2, 1),)), "head": drawn(model)["head"]}
    trained, frozen = tree.split(params, lora.trainable(params, ("^head/",)))
    assert set(tree.flat(trained)) == {"head/weight", "head/bias", *(f"trunk/layers/q/{k}" for k in ("a", "b", "magnitude"))}
    assert jax.tree.structure(tree.merge(trained, frozen)) == jax.tree.structure(params)


# -- quantised bases ------------------------------------------------------------------------------------------------


def test_nf4_levels_from_their_definition():
    """Appendix E: 2^3 + 1 quantiles of N(0,1) up to the one that leaves half a 15th and half a 16th of the mass, and 2^3 on the
    other side, whose zeros coincide; divided by the largest."""
    ppf = statistics.NormalDist().inv_cdf
    top = 1 - (1 / 32 + 1 / 30) / 2
    quantiles = lambda n: [ppf(float(p)) for p in np.linspace(top, 0.5, n)]
    levels = sorted([*quantiles(9)[:-1], 0.0, *(-q for q in quantiles(8)[:-1])])
    np.testing.assert_allclose(quant.NF4, np.array(levels) / max(levels), atol=1e-6)


@pytest.mark.parametrize("D, block", [(128, 64), (96, 48), (12, 12), (344, 43), (64, 64), (134, 2)])
def test_nf4_by_a_loop(D, block):
    w = np.random.default_rng(D).standard_normal((2, D, 3)).astype(np.float32)
    w[1, :block, 0] = 0  # a block of zeros has scale 0
    node = quant.quantise(w, "nf4")
    assert quant.block(D) == block and node["nf4"].shape == (2, D // 2, 3) and node["absmax"].shape == (2, D // block, 3) and quant.shape(node) == w.shape
    codes, absmax = np.asarray(node["nf4"]), np.asarray(node["absmax"])
    got, loop = np.asarray(quant.dequantise(node)), np.zeros_like(w)
    for l, d, o in np.ndindex(*w.shape):
        byte = int(codes[l, d // 2, o])
        loop[l, d, o] = quant.NF4[byte >> 4 if d % 2 == 0 else byte & 15] * absmax[l, d // block, o]
    np.testing.assert_array_equal(got, loop)
    blocks = w.reshape(2, D // block, block, 3)
    np.testing.assert_array_equal(absmax, np.abs(blocks).max(2))
    # Nearest: no other level is closer; so the error is at most half the widest gap, (1 - 0.6962) / 2, of the block's largest.
    distance = np.abs(w[..., None] - np.repeat(absmax, block, 1)[..., None] * np.array(quant.NF4, np.float32))
    np.testing.assert_allclose(np.abs(got - w), distance.min(-1), atol=1e-6)
    assert (np.abs(got - w) <= 0.152 * np.repeat(absmax, block, 1) + 1e-6).all()


def test_int8_by_a_loop():
    w = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    w[1, :, 2] = 0
    node = quant.quantise(w, "int8")
    for l, o in np.ndindex(2, 3):
        scale = np.abs(w[l, :, o]).max() / np.float32(127)
        np.testing.assert_allclose(node["scale"][l, o], scale, rtol=1e-6)
        np.testing.assert_array_equal(node["int8"][l, :, o], np.round(w[l, :, o] / scale) if scale else 0)
    assert (np.abs(quant.dequantise(node) - w) <= 0.5001 * np.asarray(node["scale"])[:, None]).all()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_door_takes_quantised_weights(kind):
    r = np.random.default_rng(0)
    x, w = r.standard_normal((2, 5, 8)).astype(np.float32), r.standard_normal((8, 6)).astype(np.float32)
    node = quant.quantise(w, kind)
    f = lambda w: lambda x: jnp.sin(nn.linear(x, w)).sum()
    np.testing.assert_allclose(f(node)(x), f(quant.dequantise(node))(x), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(f(node))(x), jax.grad(f(quant.dequantise(node)))(x), rtol=1e-4, atol=1e-5)
    assert nn.linear(x.astype(jnp.bfloat16), node).dtype == jnp.bfloat16
    np.testing.assert_array_equal(nn.embed(node, np.array([[3, 0]]), jnp.float32)[0], quant.dequantise(node)[np.array([3, 0])])


def test_what_cannot_be_quantised():
    with pytest.raises(UserError, match="two inputs in a byte, and this weight has 7"):
        quant.quantise(jnp.ones((7, 2)), "nf4")
    with pytest.raises(UserError, match="not to 'fp3'"):
        quant.quantise(jnp.ones((8, 2)), "fp3")
    with pytest.raises(UserError, match="not drawn"):
        nn.init(lora.Adapted(MODELS["decoder"], None, (("/q$", "int8"),)).specs(), jax.random.key(0))


# -- specs, meshes, memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_specs_are_those_of_the_params_and_lie_like_their_weights(name, kind):
    model, mesh = MODELS[name], shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = () if kind == "float32" else ((lora.MATRICES, kind),)
    how = lora.Lora((ALL,), dora=True)
    specs = lora.Adapted(model, how, rules).specs()
    whole = drawn(model)
    placed = jax.tree.map(jax.device_put, whole, shard.shardings(model.specs(), mesh))
    make = lambda p, **k: lora.attach(lora.quantise(p, rules, **k) if rules else p, how, jax.random.key(0), **{("rules" if a == "shard_rules" else a): b for a, b in k.items()})
    got = make(placed, specs=model.specs(), mesh=mesh)
    want = shard.abstract(specs, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), got) == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), want)
    np.testing.assert_allclose(logits(model, got), logits(model, make(whole)), atol=1e-5)
    merged = lora.merge(got)
    assert jax.tree.map(lambda x: x.sharding, merged) == shard.shardings(model.specs(), mesh)


def test_adapted_is_the_model():
    how = lora.Lora((("/q$", 2, 1),))
    a = lora.Adapted(MODELS["decoder"], how)
    assert a == lora.Adapted(MODELS["decoder"], lora.Lora((("/q$", 2, 1),))) and hash(a) == hash(lora.Adapted(MODELS["decoder"], how))
    params = jax.jit(lambda k: nn.init(a.specs(), k))(jax.random.key(0))
    assert nn.count(a.specs()) == tree.size(params) == nn.count(MODELS["decoder"].specs()) + 2 * (2 * 12 * 2 + 1)
    np.testing.assert_allclose(logits(a, params), logits(MODELS["decoder"], params))


def test_memory_by_hand():
    """One layer's q [12,12] in int8: 144 codes and 12 scales of 4 bytes; LoRA of rank 2: 48 numbers, thrice with Adam's moments
    and a step count; the adapter's scale stays with the frozen."""
    model = decoder.model(vocab=V, dim=12, layers=1, heads=2, hidden=20)
    params = lora.quantise(drawn(model), (("/q$", "int8"),))
    rest = lora.nbytes(params) - 144 - 48
    params = lora.attach(params, lora.Lora((("/q$", 2, 1),)), jax.random.key(0))
    trained, frozen = tree.split(params, lora.trainable(params))
    got = lora.memory(trained, frozen, optax.adam(1e-3))
    assert got == {"frozen": rest + 144 + 48 + 4, "trained": 48 * 4, "optimizer": 2 * 48 * 4 + 4}
    per_weight = lambda kind: lora.nbytes(jax.eval_shape(lambda w: quant.quantise(w, kind), jax.ShapeDtypeStruct((4096, 4096), "float32"))) / 4096**2
    assert [per_weight(k) for k in ("bfloat16", "int8", "nf4")] == [2, 1 + 4 / 4096, 0.5 + 4 / 64]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_backward_keeps_no_dense_copy(kind):
    """Scanned, the temporaries of the gradient do not grow by a dense layer for each layer more."""
    def temporaries(layers):
        model = decoder.model(vocab=V, dim=64, layers=layers, heads=2, hidden=256, scan=True, remat="full")
        how = lora.Lora(((lora.MATRICES, 2, 1),))
        make = lambda k: lora.attach(lora.quantise(nn.init(model.specs(), k), ((lora.MATRICES, kind),)), how, k)
        params = jax.eval_shape(make, jax.random.key(0))
        trained, frozen = tree.split(params, lora.trainable(params))
        loss = lambda t, f: model.hidden(tree.merge(t, f), TOKENS, ONES, POSITIONS).x.sum()
        return jax.jit(jax.grad(loss)).lower(trained, frozen).compile().memory_analysis().temp_size_in_bytes

    dense = 4 * (4 * 64 * 64 + 3 * 64 * 256)
    assert (temporaries(12) - temporaries(4)) / 8 < 0.2 * dense


# -- training -------------------------------------------------------------------------------------------------------


def test_dpo_starts_from_the_frozen_tree():
    """The reference is the base: rewards are 0 and the loss ln 2 at step 0, the gradient in b is not; no weight is held twice."""
    model = tiny.LLAMA
    params = lora.quantise(tiny.init(model), ((lora.MATRICES, "nf4"),))
    params = lora.attach(params, lora.Lora(((lora.MATRICES, 2, 4),)), jax.random.key(0))
    trained, frozen = tree.split(params, lora.trainable(params))
    reference = lora.base(params)
    held = {id(x) for x in jax.tree.leaves((trained, frozen))}
    assert all(id(x) in held for x in jax.tree.leaves(reference))
    batch = tiny.pairs(np.random.default_rng(0), 8, 8)
    w, l, *_ = jax.jit(lambda p: preference.pair_logps(model, p, batch))(reference)
    objective = preference.dpo(model)
    _, metrics, grads = jax.jit(lambda t, b: step.gradient(objective, t, {"base": frozen}, (), b, jax.random.key(0)))(trained, batch._replace(ref_chosen=w, ref_rejected=l))
    for k in ("chosen", "rejected", "margins"):
        np.testing.assert_allclose(metrics[f"rewards/{k}"], 0, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert all(np.abs(g).max() > 1e-5 for k, g in tree.flat(grads).items() if k.endswith("/b"))
    two = jax.jit(lambda t, b: step.gradient(objective, t, {"base": frozen}, (), b, jax.random.key(0), 2))(trained, batch._replace(ref_chosen=w, ref_rejected=l))[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), two, grads)
