"""ILQL's losses, gradients and targets as trlX has them; the objective against a dense recomputation, in rows of several turns
and with an encoder-decoder."""

import dataclasses
import functools
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign import shard
from jaxalign.models import decoder, heads, t5
from jaxalign.objectives import ilql, offline
from jaxalign.ops import nn, sampling
from jaxalign.train import step
from jaxalign.types import Trajectories, UserError

V = recordings.load("ilql_trlx.npz")
CASES = {
    "trlx_default": {},
    "beta1_tau0.9_gamma1": dict(beta=1.0, tau=0.9, gamma=1.0),
    "cql1_awac0": dict(cql_scale=1.0, awac_scale=0.0),
    "single_q": {},
}


@dataclasses.dataclass(frozen=True)
class Replay:
    """A network whose numbers are its params: logits, Q values and values at every position, f32[B,T,V] and f32[B,T,1]."""

    def hidden(self, params, tokens, segments, positions):
        return nn.Hidden(params["trunk"])

    def unembed(self, params):
        return nn.Unembed(jnp.eye(params["trunk"].shape[-1]))

    def q(self, params, x):
        return [(ilql.before(p, jnp.ones(p.shape[:2], jnp.int32)), nn.Unembed(jnp.eye(p.shape[-1]))) for _, p in sorted(params.items())]

    def v(self, params, x):
        return params[..., 0]


def recorded():
    """(batch, spread): trlX's columns of actions, at the positions of our rows."""
    at, states, dones = V["actions_ixs"], V["states_ixs"], V["dones"]
    B, T = V["input_ids"].shape
    rows, real = np.arange(B)[:, None], dones[:, :-1] > 0
    mask, rewards = np.zeros((2, B, T + 1), np.float32)  # one more column, for what is no action
    mask[rows, np.where(real, at + 1, T)] = 1
    rewards[rows, np.where(real, at + 1, T)] = V["rewards"]
    ones = np.ones((B, T), np.int32)
    batch = Trajectories(V["input_ids"].astype(np.int32), mask[:, :T], ones, ones * np.arange(T, dtype=np.int32), rewards[:, :T], np.ones(B, np.float32))

    def spread(x):
        where = np.where((dones if x.shape[1] == dones.shape[1] else dones[:, :-1]) > 0, states if x.shape[1] == dones.shape[1] else at, T)
        return jnp.zeros((B, T + 1, x.shape[-1])).at[rows, where].set(x)[:, :T]

    return batch, spread


@pytest.mark.parametrize("case", CASES)
def test_trlx(case):
    batch, spread = recorded()
    numbers = {"logits": V["logits"], "vs": V["vs"], "q": {str(i): V[f"q{i + 1}"] for i in range(1 if case == "single_q" else 2)}}
    target = {k: spread(V[f"target_q{int(k) + 1}"]) for k in numbers["q"]}
    objective = ilql.ilql(Replay(), **CASES[case])

    @jax.jit
    def run(numbers):
        params = {"trunk": numbers["logits"], "q": jax.tree.map(spread, numbers["q"]), "v": spread(numbers["vs"])}
        out = objective.loss(params, {}, {"q": target}, batch, None, {})
        parts = {k: step.mean(t.total, t.weight) for k, t in out.terms.items()}
        return sum(t.scale * parts[k] for k, t in out.terms.items()), parts

    (loss, parts), grads = jax.value_and_grad(run, has_aux=True)(numbers)
    np.testing.assert_allclose(loss, V[f"loss__{case}"], rtol=1e-5)
    for k in ("q", "v", "cql", "awac"):
        np.testing.assert_allclose(parts[k], V[f"loss_{k}__{case}"], rtol=1e-5)
    for ours, theirs in {"logits": grads["logits"], "vs": grads["vs"], **{f"q{int(k) + 1}": g for k, g in grads["q"].items()}}.items():
        np.testing.assert_allclose(theirs, V[f"grad_{ours}__{case}"], rtol=1e-4, atol=1e-7)


def test_every_recorded_case_is_here():
    names = {k.split("__")[1] for k in V.files if k.startswith("loss")}
    assert names == set(CASES)


def test_the_largest_as_trlx_keeps_them():
    """Its decoding leaves the five largest logits of a step, as the sampler's top_k does."""
    np.testing.assert_array_equal(sampling.filter_logits(V["topk_in"], 5), V["topk5_out"])


def test_targets_follow_as_trlx_s():
    rates = [k for k in V.files if k.startswith("polyak_target_after__alpha")]
    assert rates
    for k in rates:
        objective = ilql.ilql(None, alpha=float(k.split("alpha")[1]), target_every=3)
        old = {"q": V["polyak_target_before"]}
        move = lambda s: jax.jit(objective.update_aux)(old, {"q": V["polyak_q_before"]}, {}, jnp.int32(s))["q"]
        np.testing.assert_allclose(move(5), V[k], rtol=1e-6)  # the sixth step
        for s in (3, 4, 6):
            np.testing.assert_array_equal(move(s), old["q"])


def test_next_values_of_turns_by_a_loop():
    r = np.random.default_rng(0)
    mask = (r.random((16, 12)) < 0.5).astype(np.float32)
    mask[0] = 0
    values, after, terminal = r.standard_normal((16, 12)), r.standard_normal((16, 12)), (r.random(16) < 0.5).astype(np.float32)
    got = jax.jit(ilql.next_values)(values, mask, terminal, after)
    for b in range(16):
        actions = np.flatnonzero(mask[b])
        for t, nxt in zip(actions, [*actions[1:], None]):
            want = values[b, nxt] if nxt is not None else (1 - terminal[b]) * after[b, t]
            np.testing.assert_allclose(got[b, t], want, rtol=1e-6)


def episodes(r, B, T, turns=True):
    """Rows of every length; the policy and somebody else take turns in them. The eighth has no action."""
    x = tiny.rows(r, B, T)
    mask = x.mask * (r.random((B, T)) < 0.7) if turns else x.mask
    mask[7:8] = 0
    mask = mask.astype(np.float32)
    return Trajectories(*x._replace(mask=mask), (r.standard_normal((B, T)) * mask).astype(np.float32), (r.random(B) < 0.6).astype(np.float32))


T5 = t5.model(vocab=tiny.V, dim=16, layers=1, encoder_layers=1, heads=2, hidden=16)
TRUNKS = {"llama": tiny.LLAMA, "t5": T5}


def t5_rows(r, B, T):
    """A prompt, PAD (0) that opens the decoder's part, an answer."""
    x = episodes(r, B, T, turns=False)
    first = np.where(x.mask.any(1), x.mask.argmax(1), 3)
    x.tokens[np.arange(B), first - 1] = 0
    x.tokens[:] = np.where((np.arange(T) == first[:, None] - 1) | (x.segments == 0), 0, np.maximum(x.tokens, 1))
    return x


@functools.cache
def params_of(name, twins=2):
    return tiny.loud(jax.jit(lambda k: nn.init(heads.Guided(TRUNKS[name], twins).specs(), k))(jax.random.key(3)), 2.0)


def targets_of(params):
    return {"q": jax.tree.map(lambda x: 0.9 * x + 0.02, params["q"])}


def dense(model, params, aux, batch, tau, gamma, beta):
    """{name: total} with everything over the vocabulary held; which token follows which, by a loop over rows."""
    x = model.hidden(params, *batch[:1], *batch[2:4]).x
    lm = jax.nn.log_softmax(nn_logits(x, model.unembed(params)))
    q, tq, v = heads.q_values(params["q"], x), heads.q_values(aux["q"], x).min(0), heads.v_values(params["v"], x)
    found = []  # row, token, position of the next state, whether it counts
    for b in range(len(batch.tokens)):
        actions = [t for t in range(1, batch.tokens.shape[1]) if batch.mask[b, t] and batch.segments[b, t] == batch.segments[b, t - 1]]
        found += [(b, t, nxt - 1, 1.0) if nxt is not None else (b, t, t, 1 - batch.terminal[b]) for t, nxt in zip(actions, [*actions[1:], None])]
    b, t, after, goes_on = map(np.array, zip(*found))
    a = batch.tokens[b, t]
    d = jax.lax.stop_gradient(tq[b, t - 1, a]) - v[b, t - 1]
    return {
        "q": ((batch.rewards[b, t] + gamma * jax.lax.stop_gradient(goes_on * v[b, after]) - q[:, b, t - 1, a]) ** 2).sum(),
        "v": (jnp.abs(tau - (d < 0)) * d**2).sum(),
        "cql": -jax.nn.log_softmax(q)[:, b, t - 1, a].sum(),
        "awac": -(jax.lax.stop_gradient(jnp.exp(beta * d)) * lm[b, t - 1, a]).sum(),
    }


def nn_logits(x, u):
    return (x @ u.weight.T + (0 if u.bias is None else u.bias)) * u.scale


@pytest.mark.parametrize("name", TRUNKS)
def test_the_objective_is_the_dense_one(name):
    batch = (t5_rows if name == "t5" else episodes)(np.random.default_rng(1), 4, 10)
    model, params = heads.Guided(TRUNKS[name]), params_of(name)
    aux = targets_of(params)
    loss, m, grads = jax.jit(lambda p: step.gradient(ilql.ilql(model, beta=0.5), p, {}, aux, batch, jax.random.key(0)))(params)
    scales = {"q": 1.0, "v": 1.0, "cql": 0.1, "awac": 1.0}
    n = sum(float(batch.mask[b, t]) for b in range(4) for t in range(1, 10) if batch.segments[b, t])

    def whole(p):
        parts = dense(model, p, aux, batch, 0.7, 0.99, 0.5)
        return sum(scales[k] * v for k, v in parts.items()) / n, parts

    (want, parts), want_grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for k, s in scales.items():
        np.testing.assert_allclose(m[f"loss/{k}"], s * parts[k] / n, rtol=1e-5)
    assert tiny.far(grads, want_grads) < 1e-4


@pytest.mark.parametrize("name", ["mc_returns", "advantage_weighted_bc"])
def test_monte_carlo_objectives_are_the_dense_ones(name):
    make, twins = MAKERS[name]
    batch, model, params = episodes(np.random.default_rng(6), 4, 10), heads.Guided(tiny.LLAMA, twins), params_of("llama", twins)
    gamma = 0.99 if name == "mc_returns" else 0.9
    mask = np.asarray(ilql.targets(batch.mask, batch.segments))
    b, t = np.nonzero(mask)
    a, n = batch.tokens[b, t], len(b)
    returns = np.array([sum(gamma ** k * batch.rewards[row, s] for k, s in enumerate(s for s in np.flatnonzero(mask[row]) if s >= at)) for row, at in zip(b, t)])

    def whole(p):
        x = model.hidden(p, *batch[:1], *batch[2:4]).x
        logp, v = jax.nn.log_softmax(nn_logits(x, model.unembed(p)))[b, t - 1, a], heads.v_values(p["v"], x)[b, t - 1]
        if name == "advantage_weighted_bc":
            w = jax.lax.stop_gradient(jnp.minimum(jnp.exp((returns - v) / 0.5), 20.0))
            return ((returns - v) ** 2 - w * logp).sum() / n
        q = heads.q_values(p["q"], x)[0][b, t - 1]
        own = jnp.take_along_axis(q, a[:, None], 1)[:, 0]
        return ((returns - own) ** 2 + (returns - v) ** 2 + 0.1 * (jax.nn.logsumexp(q, -1) - own) - logp).sum() / n

    loss, _, grads = jax.jit(lambda p: step.gradient(make(model), p, {}, (), batch, jax.random.key(0)))(params)
    want, want_grads = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert tiny.far(grads, want_grads) < 1e-4


def test_the_authors_count_all_tokens():
    batch, params = episodes(np.random.default_rng(2), 8, 10), params_of("llama")
    makers = [make(heads.Guided(tiny.LLAMA), cql_scale=0.1) for make in (ilql.ilql, ilql.ilql_original)]
    ours, theirs = jax.jit(lambda p: [o.loss(p, {}, targets_of(p), batch, None, {}).terms for o in makers])(params)
    assert theirs["awac"].weight == (batch.segments != 0).sum() and ours["awac"].weight == ours["q"].weight == ilql.targets(batch.mask, batch.segments).sum()
    for k in ours:
        assert theirs[k].total == ours[k].total


MAKERS = {
    "ilql": (lambda m: ilql.ilql(m, beta=0.3), 2),
    "mc_returns": (offline.mc_returns, 1),
    "advantage_weighted_bc": (lambda m: offline.advantage_weighted_bc(m, gamma=0.9, weight_temperature=0.5), 0),
}


@pytest.mark.parametrize("name", MAKERS)
def test_split_and_sharded_alike(name):
    """In one piece, and in two (ILQL: on eight devices): the same loss and gradient. Garbage outside the mask changes nothing."""
    make, twins = MAKERS[name]
    objective, batch, params = make(heads.Guided(tiny.LLAMA, twins)), episodes(np.random.default_rng(3), 8, 12), params_of("llama", twins)
    aux = targets_of(params) if twins == 2 else ()
    run = jax.jit(lambda p, b, n: step.gradient(objective, p, {}, aux, b, jax.random.key(0), n), static_argnums=2)
    loss, metrics, grads = run(params, batch, 1)
    assert np.isfinite(loss) and all(np.isfinite(v) for v in metrics.values())
    noisy = batch._replace(rewards=np.where(batch.mask > 0, batch.rewards, np.nan).astype(np.float32))
    assert run(params, noisy, 1)[0] == loss
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2} if name == "ilql" else {"data": 1}, jax.devices()[: 8 if name == "ilql" else 1])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shard.shardings(heads.Guided(tiny.LLAMA, twins).specs(), mesh))
        got = run(placed, shard.place(batch, mesh), 2)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    assert tiny.far(jax.device_get(got[2]), grads) < 1e-4


@pytest.mark.parametrize("name", ["ilql", "mc_returns"])
def test_no_program_holds_q_of_a_batch(name):
    B, T, size = 4, 256, 2**15
    make, twins = MAKERS[name]
    model = heads.Guided(decoder.model(vocab=size, dim=8, layers=1, heads=2, hidden=8), twins)
    shape = lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32)
    params = jax.tree.map(shape, model.specs(), is_leaf=nn.is_spec)
    aux = {"q": params["q"]} if twins == 2 else ()
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), episodes(np.random.default_rng(0), B, T))
    program = jax.jit(lambda p, a, b: step.gradient(make(model), p, {}, a, b, jax.random.key(0))).lower(params, aux, batch).compile().as_text()
    assert not [s for s in hlo.shapes(program) if math.prod(s) >= B * T * size]


def test_returns_and_weights_by_loops():
    r = np.random.default_rng(5)
    b = episodes(r, 8, 12)
    got = jax.jit(lambda: offline.returns_to_go(jnp.asarray(b.rewards), jnp.asarray(b.mask), 0.9))()
    for row in range(8):
        total = 0.0
        for t in reversed(np.flatnonzero(b.mask[row])):
            total = b.rewards[row, t] + 0.9 * total
            np.testing.assert_allclose(got[row, t], total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(offline.exponential_weight(np.float32([0.5, 9.0]), 0.0, 0.5, 20.0), [math.e, 20.0], rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: ilql.ilql(None, tau=1.0), lambda: ilql.ilql(None, target_every=0), lambda: offline.mc_returns(None, gamma=1.5), lambda: offline.advantage_weighted_bc(None, weight_temperature=0.0)])
def test_refused(make):
    with pytest.raises(UserError, match="needs"):
        make()
