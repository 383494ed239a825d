"""Sampling with a cache: against the naive full forward, stop ids, padding, streams per row, distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign.ops.logprob import logits
from jaxalign.rl import rollout
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import Prompts

MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}
LENGTHS, P, N = (1, 3, 5, 6, 2, 4), 6, 8
KEY = jax.random.key(7)


def prompts(left=False, rows=None, lengths=LENGTHS, P=P, seed=0):
    """Prompts of several lengths; row i is always the same tokens, wherever it stands."""
    rows = range(len(lengths)) if rows is None else rows
    tokens, segments = np.full((len(rows), P), 9, np.int32), np.zeros((len(rows), P), np.int32)  # 9 in the padding: a real id
    positions = np.zeros_like(tokens)
    for b, i in enumerate(rows):
        n = lengths[i]
        at = slice(P - n, P) if left else slice(0, n)
        tokens[b, at], segments[b, at], positions[b, at] = np.random.default_rng([seed, i]).integers(0, tiny.V, n), 1, np.arange(n)
    return Prompts(tokens, segments, positions, np.array(rows, np.int32))


@functools.cache
def sharp(model):
    """Weights that prefer some tokens clearly, so that greedy has no near-ties."""
    return tiny.loud(tiny.init(model, seed=3), 2.0)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, length):
    """f32[B,T,V]: logits of the whole sequence so far, by the training forward, without a cache."""
    t = jnp.arange(tokens.shape[1])
    real = (t < length[:, None]).astype(jnp.int32)
    return logits(model.hidden(params, tokens, real, t * real).x, model.unembed(params))


def naive(model, p, stop=()):
    """(token lists, log-prob lists): a full forward per token."""
    length = (p.segments != 0).sum(1)
    seq = np.zeros((len(length), P + N), np.int32)
    for b, n in enumerate(length):
        seq[b, :n] = p.tokens[b][p.segments[b] != 0]
    out, logps, alive = [[] for _ in length], [[] for _ in length], np.ones(len(length), bool)
    for _ in range(N):
        z = np.asarray(forward(model, sharp(model), seq, length), np.float64)
        for b in np.flatnonzero(alive):
            row = z[b, length[b] - 1]
            token = int(row.argmax())
            out[b].append(token)
            logps[b].append(row[token] - np.log(np.exp(row - row.max()).sum()) - row.max())
            seq[b, length[b]] = token
            length[b] += 1
            alive[b] = token not in stop
    return out, logps


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_naive_forward(name):
    """Right- and left-padded prompts; stop ids that cut some rows early and leave others to run out of room."""
    model = MODELS[name]
    free, _ = naive(model, prompts())
    # Two stop ids: what row 2 says third, and one that another row says late. Found from the free run, so they do occur.
    stop = (free[2][2], free[1][5])
    want, logps = naive(model, prompts(), stop)
    ends = [len(w) for w in want]
    assert min(ends) < N, "no row stops: the test would show nothing"
    for left in (False, True):
        out = jax.tree.map(np.asarray, generate(model, Sampling(N, stop, temperature=0, pad=11), sharp(model), prompts(left), KEY, 5))
        for b, n in enumerate(LENGTHS):
            k = len(want[b])
            assert list(out.tokens[b, n : n + k]) == want[b], (left, b)
            np.testing.assert_array_equal(out.tokens[b, :n], prompts().tokens[b, :n])
            assert (out.tokens[b, n + k :] == 11).all()
            t = np.arange(P + N)
            np.testing.assert_array_equal(out.mask[b], (t >= n) & (t < n + k))  # the stop token is in the mask
            np.testing.assert_array_equal(out.segments[b], t < n + k)
            np.testing.assert_array_equal(out.positions[b], np.where(t < n + k, t, 0))
            np.testing.assert_allclose(out.logp[b, n : n + k], logps[b], atol=1e-4)
            assert not out.logp[b][out.mask[b] == 0].any()
            assert out.truncated[b] == (want[b][-1] not in stop)
        assert out.version == 5 and list(out.row) == list(range(len(LENGTHS)))


@dataclasses.dataclass(frozen=True)
class Counting:
    """A model that counts its decoding steps as they run."""

    inner: object
    seen: list = dataclasses.field(default_factory=list, compare=False)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def hidden(self, params, tokens, *rest, **more):
        if tokens.shape[1] == 1:
            jax.debug.callback(lambda: self.seen.append(1))
        return self.inner.hidden(params, tokens, *rest, **more)


def test_it_ends_when_every_row_has_stopped():
    """With every id a stop id one token comes from the prefill and no step is taken; with none, N - 1 steps."""
    model = Counting(tiny.LLAMA)
    out = generate(model, Sampling(N, tuple(range(tiny.V)), temperature=0), sharp(tiny.LLAMA), prompts(), KEY)
    jax.effects_barrier()
    assert (np.asarray(out.mask).sum(1) == 1).all() and not np.asarray(out.truncated).any() and len(model.seen) == 0
    out = generate(model, Sampling(N, (), temperature=0), sharp(tiny.LLAMA), prompts(), KEY)
    jax.effects_barrier()
    assert (np.asarray(out.mask).sum(1) == N).all() and np.asarray(out.truncated).all() and len(model.seen) == N - 1


def test_a_cache_that_grows_on_the_way_changes_nothing(monkeypatch):
    how = Sampling(N, (3,), temperature=1.0, pad=12)
    want = generate(tiny.LLAMA, how, sharp(tiny.LLAMA), prompts(), KEY)
    monkeypatch.setattr(rollout, "LONG", 2)
    got = generate(tiny.LLAMA, dataclasses.replace(how, pad=13), sharp(tiny.LLAMA), prompts(), KEY)  # another pad, so that it is traced again
    np.testing.assert_array_equal(np.where(want.mask > 0, want.tokens, -1), np.where(got.mask > 0, got.tokens, -1))
    np.testing.assert_allclose(want.logp, got.logp, atol=1e-5)
    assert want.mask.sum(1).max() == N, "no row is long enough to need the second half"


def completions(r):
    r = jax.tree.map(np.asarray, r)
    return {int(i): list(t[m > 0]) for i, t, m in zip(r.row, r.tokens, r.mask)}


def test_a_draw_depends_on_its_row_alone():
    """The same rows in another order, among other neighbours, left-padded, in a smaller batch: the same tokens. Another
    key, or the same prompt under another row id: other tokens."""
    how = Sampling(N, (3,), temperature=1.0)
    run = lambda p, key=KEY: completions(generate(tiny.LLAMA, how, sharp(tiny.LLAMA), p, key))
    want = run(prompts())
    assert run(prompts(rows=[5, 3, 1, 0, 2, 4])) == want
    assert run(prompts(left=True)) == want
    few = run(prompts(rows=[4, 1]))
    assert few == {4: want[4], 1: want[1]}
    p = prompts(rows=[2] * 6)
    assert set(map(tuple, run(p._replace(row=np.arange(6, dtype=np.int32) + 2)).values())) != {tuple(want[2])}
    assert run(p)[2] == want[2]
    assert run(prompts(), jax.random.key(8)) != want


B = 4096  # draws for the distribution tests


def many(seed=0):
    """The same prompt in every row, row ids 0..B-1."""
    p = prompts(rows=[2], lengths=LENGTHS)
    return Prompts(*(np.repeat(x, B, 0) for x in (p.tokens, p.segments, p.positions)), np.arange(B, dtype=np.int32))


@functools.cache
def next_token(temperature):
    """p(next token | prompt) in float64, by the training forward."""
    p = prompts(rows=[2])
    z = np.asarray(forward(tiny.LLAMA, sharp(tiny.LLAMA), p.tokens, np.array([LENGTHS[2]])), np.float64)[0, LENGTHS[2] - 1] / temperature
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6)])
def test_the_distribution_is_the_models(temperature, top_k, top_p):
    """Chi-square over the first token of 4096 draws. With V = 16 at most 15 degrees of freedom: P(chi2 > 45) < 1e-4.

    Truncated sampling draws from the renormalised head and reports the log-prob of the whole distribution.
    """
    p = next_token(temperature)
    order = np.argsort(-p)
    if top_k:
        allowed = set(order[:top_k])
    else:
        allowed = set(order[: 1 + int((np.cumsum(p[order]) < top_p).sum())])
    assert len(allowed) > 1
    out = jax.tree.map(np.asarray, generate(tiny.LLAMA, Sampling(1, (), temperature, top_k, top_p), sharp(tiny.LLAMA), many(), KEY))
    n = LENGTHS[2]
    drawn = out.tokens[:, n]
    assert set(drawn) <= allowed
    head = np.array([p[i] if i in allowed else 0.0 for i in range(tiny.V)])
    head, seen = head / head.sum(), np.bincount(drawn, minlength=tiny.V)
    big = head * B >= 5
    chi = ((seen - B * head)[big] ** 2 / (B * head[big])).sum()
    assert chi < 45, (chi, seen, B * head)
    np.testing.assert_allclose(out.logp[:, n], np.log(p[drawn]), atol=1e-4)


def test_the_second_token_follows_the_first():
    """Chi-square over pairs: the cache after one step conditions on what was drawn, row by row."""
    out = jax.tree.map(np.asarray, generate(tiny.LLAMA, Sampling(2, (), 1.0), sharp(tiny.LLAMA), many(), KEY))
    n = LENGTHS[2]
    first = out.tokens[:, n]
    common = np.bincount(first).argmax()
    seq = np.zeros((1, n + 1), np.int32)
    seq[0] = [*prompts(rows=[2]).tokens[0, :n], common]
    z = np.asarray(forward(tiny.LLAMA, sharp(tiny.LLAMA), seq, np.array([n + 1])), np.float64)[0, n]
    p = np.exp(z - z.max())
    p /= p.sum()
    seen = np.bincount(out.tokens[first == common, n + 1], minlength=tiny.V)
    total = seen.sum()
    assert total > 200
    big = p * total >= 5
    assert ((seen - total * p)[big] ** 2 / (total * p[big])).sum() < 45
