"""What must hold for every family, whatever its sizes: packing, padding, causality, the cache, scan and remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from jaxalign import shard, tree
from jaxalign.models import FamilyModel, decoder, flax_module, gpt2, neox
from jaxalign.ops import kvcache, logprob, nn
from jaxalign.ops.attention import attend
from jaxalign.types import UserError

V = 23


class LinenToy(flax_linen.Module):
    """Embedding, one attention layer over segments, dropout; the unembedding is a weight of its own, [D,V]."""

    dim: int

    @flax_linen.compact
    def __call__(self, tokens, segments, positions):
        table = flax_linen.with_logical_partitioning(flax_linen.initializers.normal(0.5), ("vocab", "embed"))
        x = flax_linen.Embed(V, self.dim, embedding_init=table, name="embed")(tokens)
        x = x + 0.1 * positions[..., None]
        q, k, v = (flax_linen.Dense(self.dim, name=n)(x)[:, :, None] for n in "qkv")
        a = attend(q, k, v, q_segments=segments, kv_segments=segments)[:, :, 0]
        x = x + flax_linen.Dropout(0.5)(a, deterministic=not self.has_rng("dropout"))
        self.param("head", flax_linen.initializers.normal(0.3), (self.dim, V))
        return flax_linen.LayerNorm(name="norm")(x)


class NNXToy(flax_nnx.Module):
    """The same, tied, with a list of layers (integer path keys)."""

    def __init__(self, dim: int, *, rngs: flax_nnx.Rngs):
        table = flax_nnx.with_partitioning(flax_nnx.initializers.normal(0.5), ("vocab", "embed"))
        self.embed = flax_nnx.Embed(V, dim, embedding_init=table, rngs=rngs)
        self.qkv = flax_nnx.List([flax_nnx.Linear(dim, dim, rngs=rngs) for _ in range(3)])
        self.dropout = flax_nnx.Dropout(0.5, rngs=rngs)
        self.norm = flax_nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, tokens, segments, positions):
        x = self.embed(tokens) + 0.1 * positions[..., None]
        q, k, v = (layer(x)[:, :, None] for layer in self.qkv)
        return self.norm(x + self.dropout(attend(q, k, v, q_segments=segments, kv_segments=segments)[:, :, 0]))


def linen_toy():
    return flax_module.linen(LinenToy(6), unembed="head")


def nnx_toy():
    return flax_module.nnx(NNXToy, {"dim": 6}, unembed="embed/embedding")


def random_model(seed: int):
    """A family and sizes drawn from a seed: odd widths, grouped heads, tied or not, scanned or not."""
    r = np.random.default_rng(seed)
    pick = lambda *options: options[r.integers(len(options))]
    kv, group, width = pick(1, 2, 3), pick(1, 2, 3), 2 * int(r.integers(1, 5))
    scan, layers = bool(seed % 2), int(r.integers(1, 4))
    if seed % 8 == 3:
        return gpt2.model(vocab=V, dim=kv * width, layers=layers, heads=kv, max_len=64, scan=scan)
    if seed % 8 == 7:
        return neox.model(vocab=V, dim=kv * 2 * width, layers=layers, heads=kv, hidden=int(r.integers(1, 30)), parallel=pick(True, False), rotary=0.5, tied=pick(True, False), scan=scan)
    more = {}
    if seed >= 4:  # everything that sets llama's relatives apart
        more = {
            "norm": ("post", "both", "pre")[seed % 3], "norm_offset": pick(0.0, 1.0), "qk_norm": pick("", "head", "whole"), "activation": pick("gelu_tanh", "gelu"), "embed_scale": pick(True, False),
            "qkv_bias": True, "o_bias": pick(True, False), "attn_softcap": pick(None, 2.0), "logit_softcap": pick(None, 3.0), "query_scale": 0.4, "rotary": pick(1.0, 0.5) if width % 4 == 0 else 1.0,
            "window": 4, "windowed": tuple(i % 2 == 0 for i in range(layers)), "window_theta": pick(None, 50.0), "rope_scaling": pick((), (("rope_type", "linear"), ("factor", 3.0))),
            **pick({}, {"experts": 4, "experts_per_token": 2, "shared_hidden": 3, "renormalise": False}),
        }  # fmt: skip
    return decoder.model(vocab=V, dim=int(r.integers(3, 20)), layers=layers, heads=kv * group, kv_heads=kv, head_dim=width, hidden=int(r.integers(1, 30)), tied=bool(seed % 3), scan=scan, **more)


MODELS = {**{f"random{i}": lambda i=i: random_model(i) for i in range(8)}, "linen": linen_toy, "nnx": nnx_toy}


class Case:
    """A model, its params (scaled up, so that differences show), and one compiled forward for [3, 13]."""

    def __init__(self, make):
        self.make, self.model = make, make()
        params = jax.jit(lambda k: nn.init(self.model.specs(), k))(jax.random.key(0))
        # Norms and biases are drawn as ones and zeros: perturb everything, so that dropping one would show.
        noise = np.random.default_rng(1)
        self.params = jax.tree.map(lambda x: np.asarray(2 * x + 0.1 * noise.standard_normal(x.shape), np.float32), params)
        self.logits = jax.jit(lambda p, t, s, pos: logprob.logits(self.model.hidden(p, t, s, pos).x, self.model.unembed(p)))

    def __call__(self, tokens, segments, positions=None):
        tokens, segments = np.asarray(tokens, np.int32), np.asarray(segments, np.int32)
        return np.asarray(self.logits(self.params, tokens, segments, restart(segments) if positions is None else positions))


def restart(segments):
    """Positions that restart at 0 in every segment."""
    out = np.zeros_like(segments)
    for b, t in np.ndindex(*segments.shape):
        out[b, t] = out[b, t - 1] + 1 if t and segments[b, t] == segments[b, t - 1] else 0
    return out


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return Case(MODELS[request.param])


TOKENS = np.random.default_rng(0).integers(0, V, (3, 13))
ONES = np.ones((3, 13), np.int32)


def test_packed_equals_unpacked(case):
    # documents of 5, 3 and 4 tokens in one row and then 1 of padding, against each in a row of its own
    lengths, row = (5, 3, 4), TOKENS[0]
    packed = np.repeat([1, 2, 3, 0], (*lengths, 1))
    apart, segments = np.zeros((3, 13), int), np.zeros((3, 13), int)
    for i, (end, n) in enumerate(zip(np.cumsum(lengths), lengths)):
        apart[i, :n], segments[i, :n] = row[end - n : end], 1
    together, alone = case([row] * 3, [packed] * 3)[0], case(apart, segments)
    for i, (end, n) in enumerate(zip(np.cumsum(lengths), lengths)):
        np.testing.assert_allclose(together[end - n : end], alone[i, :n], atol=1e-4)


def test_garbage_under_padding_changes_nothing(case):
    segments = ONES.copy()
    segments[0, 9:], segments[1, :4] = 0, 0  # right and left padding
    other = np.where(segments == 0, (TOKENS + 7) % V, TOKENS)
    a, b = case(TOKENS, segments), case(other, segments)
    np.testing.assert_array_equal(a[segments == 1], b[segments == 1])
    assert np.isfinite(a).all()


def test_left_padding_equals_none(case):
    shifted, segments = np.roll(TOKENS, 4, 1), ONES.copy()
    segments[:, :4] = 0
    np.testing.assert_allclose(case(shifted, segments)[:, 4:], case(TOKENS, ONES)[:, :-4], atol=1e-4)


def test_gradient_shows_causality(case):
    """d hidden[t] / d embedding of the token at s is zero exactly for s > t and for other segments, nonzero at s = t."""
    segments = np.repeat([[1, 2]], [6, 7], axis=1).astype(np.int32)
    tokens = np.arange(13)[None].astype(np.int32)  # every token once: the row of the table is the position
    name = [k for k in tree.flat(case.params) if k.startswith("embed")][0]

    @jax.jit
    def reach(leaves, w):
        x = lambda table: case.model.hidden(tree.unflat({**leaves, name: table}), tokens, segments, restart(segments)).x
        one = lambda t: jnp.abs(jax.grad(lambda table: (x(table)[0, t] * w).sum())(leaves[name])).sum(-1)[:13]
        experts = getattr(getattr(case.model, "config", None), "experts", 0)
        return jax.lax.map(one, jnp.arange(13)) if experts else jax.vmap(one)(jnp.arange(13))  # ragged_dot has no vmap for this

    width = case.model.hidden(case.params, tokens[:, :1], segments[:, :1], tokens[:, :1]).x.shape[-1]
    got = np.asarray(reach(tree.flat(case.params), np.random.default_rng(2).standard_normal(width).astype(np.float32)))  # [t, s]
    gap = np.arange(13)[:, None] - np.arange(13)[None]
    config = getattr(case.model, "config", None)
    # Through L layers a window lets a token reach L (window - 1) back, further where a layer has none.
    reach_ = sum(config.window - 1 if local else 13 for local in config.local) if getattr(config, "window", None) else 13
    allowed = (segments[0][:, None] == segments[0][None]) & (gap >= 0) & (gap <= reach_)
    np.testing.assert_array_equal(got > 0, allowed)


def test_cached_decoding_equals_the_full_forward(case):
    """Prefill of right-padded prompts, growth, then one token at a time: holes in the cache are seen by nobody."""
    P, N, prompts = 7, 6, np.array([7, 4, 2])
    prompt = np.arange(P) < prompts[:, None]
    position = lambda i: (prompts + i)[:, None].astype(np.int32)

    @jax.jit
    def run(params, tokens):
        out = lambda h: logprob.logits(h.x, case.model.unembed(params))
        h = case.model.hidden(params, tokens[:, :P], prompt.astype(np.int32), jnp.broadcast_to(jnp.arange(P), prompt.shape), cache=case.model.init_cache(3, P))

        def step(cache, x):
            token, i = x
            h = case.model.hidden(params, token[:, None], jnp.ones((3, 1), jnp.int32), jnp.asarray(prompts)[:, None] + i, cache=cache)
            return h.cache, out(h)[:, 0]

        cache, steps = jax.lax.scan(step, kvcache.grow(h.cache, P + N), (tokens[:, P:].T, jnp.arange(N)))
        return out(h), steps.swapaxes(0, 1), cache["length"], cache["segments"]

    first, steps, length, segments = run(case.params, TOKENS.astype(np.int32))
    assert length == P + N
    np.testing.assert_array_equal(segments, np.concatenate([prompt, np.ones((3, N))], 1))
    for b, n in enumerate(prompts):
        row = np.zeros(13, int)
        row[: n + N] = np.concatenate([TOKENS[b, :n], TOKENS[b, P:]])
        full = case([row] * 3, [np.arange(13) < n + N] * 3)[0]
        np.testing.assert_allclose(first[b, :n], full[:n], atol=1e-4)
        np.testing.assert_allclose(steps[b], full[n : n + N], atol=1e-4)


def test_rebuilding_never_recompiles(case):
    again = case.make()
    assert again == case.model and hash(again) == hash(case.model)
    traces = []
    g = jax.jit(lambda model, x: (traces.append(1), x)[1], static_argnums=0)
    g(case.model, 1.0), g(again, 1.0)
    assert len(traces) == 1


# -- families of our own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, changes",
    [
        (lambda **k: decoder.model(vocab=V, dim=8, heads=2, hidden=12, **k), [{"scan": True, "remat": "dots"}, {"remat": "full"}]),
        (lambda **k: gpt2.model(vocab=V, dim=8, heads=2, **k), [{"scan": True, "remat": "full"}]),
    ],
    ids=["decoder", "gpt2"],
)
def test_scan_and_remat_change_nothing(make, changes):
    base = make(layers=2)
    assert base.config.scan is False and make(layers=17).config.scan is True
    params = jax.jit(lambda k: nn.init(base.specs(), k))(jax.random.key(1))
    weights = np.random.default_rng(0).standard_normal((3, 13, 8)).astype(np.float32)

    def grads(model):
        f = lambda p: (model.hidden(p, TOKENS.astype(np.int32), ONES, restart(ONES)).x * weights).sum()
        return jax.jit(jax.value_and_grad(f))(params)

    want = grads(base)
    for change in changes:
        model = FamilyModel(base.family, dataclasses.replace(base.config, **change))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads(model), want)


def test_activations_in_bfloat16_keep_the_weights():
    model = decoder.model(vocab=V, dim=8, layers=1, heads=2, hidden=8, dtype="bfloat16")
    params = jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(0))
    x = jax.eval_shape(model.hidden, params, TOKENS, ONES, ONES).x
    assert x.dtype == jnp.bfloat16 and params["embed"].dtype == jnp.float32


def test_flops_by_hand():
    # one layer: q 8x8, k and v 8x4, o 8x8, gate, up, down 8x12 = 64 + 64 + 64 + 288 = 480; unembedding 23x8 = 184;
    # attention 6 L N H T = 6 * 1 * 2 * 4 * 10; norms are weights too: 2 x 8 in the layer.
    model = decoder.model(vocab=V, dim=8, layers=1, heads=2, kv_heads=1, hidden=12)
    assert model.flops_per_token(10) == 6 * (480 + 16 + 184) + 480


@pytest.mark.parametrize("bad", [dict(heads=3), dict(heads=4, kv_heads=3), dict(heads=8)])
def test_impossible_sizes_are_refused(bad):
    with pytest.raises(UserError):  # 8 / 3; 4 heads on 3; width 1 is odd
        decoder.model(**{**dict(vocab=V, dim=8, layers=1, hidden=8), **bad})


# -- Linen and NNX --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [linen_toy, nnx_toy])
def test_foreign_specs(make):
    model = make()
    assert model.config == flax_module.Sizes(vocab=V, dim=6, dtype="float32")
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    params = shard.init(model.specs(), jax.random.key(0), mesh)
    table = params["embed"]["embedding"]
    assert model.specs()["embed"]["embedding"].axes == ("vocab", "embed")
    assert table.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp") and table.shape == (V, 6)  # 23 is odd, so vocab stays whole
    np.testing.assert_allclose(np.std(table), 0.5, rtol=0.2)  # the module's own initialiser: normal(0.5) over 138 draws
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    again = jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(0))  # the mesh does not enter the draw
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert len({np.asarray(x).tobytes() for k, x in tree.flat(params).items() if k.endswith("kernel")}) == 3  # no two layers alike


@pytest.mark.parametrize("make", [linen_toy, nnx_toy])
def test_dropout_follows_the_key(make):
    case = Case(make)
    run = jax.jit(lambda p, key=None: case.model.hidden(p, TOKENS, ONES, restart(ONES), key=key).x)
    k0, k1 = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(run(case.params, k0), run(case.params, k0))
    assert np.abs(run(case.params, k0) - run(case.params, k1)).max() > 0.1
    assert np.abs(run(case.params, k0) - run(case.params)).max() > 0.1


@pytest.mark.parametrize("make", [linen_toy, nnx_toy])
def test_initialiser_of_a_foreign_module_is_pruned(make):
    """Every leaf draws the whole module; what is compiled must cost as much as drawing it once (else 9 or 11 times)."""
    model = make()
    flops = lambda f: jax.jit(f).lower(jax.random.key(0)).compile().cost_analysis()["flops"]
    assert flops(lambda k: nn.init(model.specs(), k)) < 1.1 * flops(model._init)


def test_initialiser_of_a_foreign_module_is_traced_once():
    calls = []

    def build(dim, rngs):
        calls.append(1)
        return NNXToy(dim, rngs=rngs)

    model = flax_module.nnx(build, {"dim": 6}, unembed="embed/embedding")
    params = jax.eval_shape(lambda k: nn.init(model.specs(), k), jax.random.key(0))
    assert len(jax.tree.leaves(params)) == 9 and len(calls) <= 3  # shapes, graph, init: not one per leaf


@pytest.mark.parametrize("unembed, message", [("nothing", "no parameter 'nothing'.*embed/embedding"), ("norm/scale", "has shape"), ("q/kernel", "has shape")])
def test_a_wrong_unembedding_is_refused(unembed, message):
    model = flax_module.linen(LinenToy(6), unembed=unembed)
    with pytest.raises(UserError, match=message):
        model.unembed(jax.tree.map(lambda s: jnp.zeros(s.shape), model.specs(), is_leaf=nn.is_spec))


def test_state_other_than_parameters_is_refused():
    class Linen(flax_linen.Module):
        @flax_linen.compact
        def __call__(self, tokens, segments, positions):
            return flax_linen.BatchNorm(use_running_average=False)(flax_linen.Embed(V, 4)(tokens))

    class NNX(flax_nnx.Module):
        def __init__(self, *, rngs):
            self.norm = flax_nnx.BatchNorm(4, rngs=rngs)

    with pytest.raises(UserError, match="batch_stats"):
        flax_module.linen(Linen(), unembed="x").specs()
    with pytest.raises(UserError, match="norm/mean"):
        flax_module.nnx(NNX, unembed="x").specs()
