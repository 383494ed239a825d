"""A Flax Linen and an NNX module train with `lm` and `dpo` and are sampled from, like a family of the house."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen, nnx
from jaxalign.models import flax_module
from jaxalign.objectives import lm, preference
from jaxalign.ops import nn
from jaxalign.rl.reference import add_reference
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import optim, state, step
from jaxalign.types import Prompts

V, D, HEADS = tiny.V, 24, 2


def visible(segments):
    """bool[B,1,T,T]: causal, within a segment."""
    t = jnp.arange(segments.shape[1])
    return ((t[:, None] >= t[None]) & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] != 0))[:, None]


class LinenDecoder(linen.Module):
    @linen.compact
    def __call__(self, tokens, segments, positions):
        x = linen.Embed(V, D, name="embed")(tokens) + linen.Embed(32, D, name="positions")(positions)
        x = x + linen.MultiHeadDotProductAttention(HEADS, name="attention")(linen.LayerNorm()(x), mask=visible(segments))
        x = x + linen.Dense(D)(linen.gelu(linen.Dense(2 * D)(linen.LayerNorm()(x))))
        return linen.LayerNorm()(x)


class NNXDecoder(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.embed, self.positions = nnx.Embed(V, dim, rngs=rngs), nnx.Embed(32, dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, dim, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(dim, 2 * dim, rngs=rngs), nnx.Linear(2 * dim, dim, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(dim, rngs=rngs) for _ in range(3)])

    def __call__(self, tokens, segments, positions):
        x = self.embed(tokens) + self.positions(positions)
        x = x + self.attention(self.norms[0](x), mask=visible(segments))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.norms[2](x)


MODELS = {
    "linen": flax_module.linen(LinenDecoder(), unembed="embed/embedding"),
    "nnx": flax_module.nnx(NNXDecoder, {"dim": D}, unembed="embed/embedding"),
}


@functools.cache
def fresh(name):
    return jax.tree.map(np.asarray, jax.jit(lambda k: nn.init(MODELS[name].specs(), k))(jax.random.key(0)))


def train(name, objective, batch):
    params = jax.tree.map(jnp.array, fresh(name))
    tx, _ = optim.make(optim.Optim(lr=1e-2, schedule="constant"), 20, params)
    s, fn, losses = state.create(params, tx, objective, 0), step.make_step(objective, tx), []
    for _ in range(20):
        s, m = fn(s, {}, batch)
        losses.append(float(m["loss"]))
    assert fn._cache_size() == 1
    return s.params, losses


@pytest.mark.parametrize("name", MODELS)
def test_lm_learns_and_greedy_says_it_back(name):
    """Two rows of a fixed text for 20 steps: the loss falls by half, and what is said greedily is the full forward's choice."""
    model = MODELS[name]
    rows = tiny.rows(np.random.default_rng(0), 8, 8)
    params, losses = train(name, lm.lm(model), rows)
    assert losses[-1] < 0.5 * losses[0] and losses[0] > 2
    prompts = Prompts(rows.tokens[:, :4], np.minimum(rows.segments[:, :4], 1), rows.positions[:, :4], np.arange(8, dtype=np.int32))
    out = jax.tree.map(np.asarray, generate(model, Sampling(4, (), temperature=0), params, prompts, jax.random.key(0)))
    full = jax.jit(lambda p, r: model.hidden(p, r.tokens, r.segments, r.positions).x @ model.unembed(p).weight.T)
    best = np.asarray(full(params, out)).argmax(-1)
    for b in range(8):
        at = np.flatnonzero(out.mask[b])
        assert len(at) == 4
        np.testing.assert_array_equal(out.tokens[b, at], best[b, at - 1])


@pytest.mark.parametrize("name", MODELS)
def test_dpo_learns(name):
    """From ln 2, with the module itself as reference."""
    model = MODELS[name]
    batch = add_reference(model, fresh(name), tiny.pairs(np.random.default_rng(1), 4, 8))
    _, losses = train(name, preference.dpo(model, beta=0.5), batch)
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert losses[-1] < 0.3 * losses[0]
