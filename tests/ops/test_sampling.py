"""Sampling draws from the distribution it says, and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxalign.ops import nn, sampling

STATS = recordings.load("masked_stats.npz", "filter*")
inverse_cdf = jax.jit(sampling.inverse_cdf)
logs = lambda p: np.log(p, out=np.full(p.shape, -np.inf, np.float32), where=p > 0).T  # weights [B,V] -> what inverse_cdf reads, [V,B]
KEYS = jax.jit(lambda n: jax.vmap(lambda i: nn.fold(jax.random.key(0), "test", i))(jnp.arange(n)), static_argnums=0)


@pytest.mark.parametrize("V", [7, 256, 600])
def test_a_grid_of_uniforms_gives_the_distribution_itself(V):
    M = 4096
    p = np.random.default_rng(V).random(V).astype(np.float32)
    p[::3] = 0  # also the first entry
    p /= 3 * p.sum()  # weights need not be normalised
    u = ((np.arange(M) + 0.5) / M).astype(np.float32)
    got = np.asarray(inverse_cdf(u, logs(np.broadcast_to(p, (M, V)))))
    counts = np.bincount(got, minlength=V)
    # between two neighbours of the grid lies 1/M: no count is off by more than one, but for rounding
    assert np.abs(counts - M * p / p.sum()).max() < 1.1
    assert not counts[p == 0].any() and (np.diff(got) >= 0).all()


@pytest.mark.parametrize("V", [5, 600])
def test_edges_never_pick_a_token_without_probability(V):
    """u = 0, u just under 1 and 1 itself (outside the domain, but never out of range), and u on the border of every block, where rounding could fall to either side."""
    rows, us = [], []
    r = np.random.default_rng(0)
    for _ in range(200):
        p = np.where(r.random(V) < 0.05, r.random(V), 0).astype(np.float32)
        p[r.integers(V)] = 1e-3
        sums = np.cumsum(np.pad(p, (0, -V % 256)).reshape(-1, 256).sum(-1, dtype=np.float32), dtype=np.float32)
        for u in (0.0, np.nextafter(np.float32(1), np.float32(0)), *(sums[:-1] / sums[-1])):
            for v in (u, np.nextafter(np.float32(u), np.float32(0))):
                rows.append(p), us.append(np.clip(v, 0, 1))
        rows.append(p), us.append(1.0)
    rows = np.stack(rows)
    got = np.asarray(inverse_cdf(np.array(us, np.float32), logs(rows)))
    assert (rows[np.arange(len(got)), got] > 0).all()


@pytest.mark.parametrize("options, V", [({}, 9), ({"temperature": 0.6}, 9), ({"top_k": 3}, 9), ({"top_p": 0.7}, 9), ({"temperature": 1.5, "top_k": 6, "top_p": 0.8}, 9)])
def test_chi_square(options, V):
    n = 8192
    logits = np.random.default_rng(1).standard_normal(V).astype(np.float32)
    tokens, logp = jax.jit(lambda k: sampling.sample(k, jnp.broadcast_to(logits, (n, V)), **options))(KEYS(n))
    z = logits.astype(np.float64) / options.get("temperature", 1.0)
    np.testing.assert_allclose(logp, (z - np.log(np.exp(z).sum()))[tokens], rtol=1e-5, atol=1e-6)  # before truncation
    keep = np.isfinite(np.asarray(jax.jit(lambda x: sampling.filter_logits(x, options.get("top_k", 0), options.get("top_p", 1.0)))(z[None].astype(np.float32)))[0])
    p = np.where(keep, np.exp(z), 0) / np.exp(z)[keep].sum()
    counts = np.bincount(tokens, minlength=V)
    assert not counts[~keep].any()
    chi2, dof = ((counts - n * p)[keep] ** 2 / (n * p)[keep]).sum(), keep.sum() - 1
    assert chi2 < dof + 4 * np.sqrt(2 * dof) + 4, chi2  # mean dof, deviation sqrt(2 dof): beyond four deviations


def test_a_draw_depends_on_its_row_alone():
    V, n = 300, 6
    logits = np.random.default_rng(2).standard_normal((n, V)).astype(np.float32)
    run = jax.jit(sampling.sample)
    tokens, logp = run(KEYS(n), logits)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(run(KEYS(n)[order], logits[order])[0], tokens[order])
    for i in range(n):
        np.testing.assert_array_equal(run(KEYS(n)[i : i + 1], logits[i : i + 1])[0], tokens[i : i + 1])
    assert len(set(np.asarray(tokens))) > 1


def test_greedy():
    logits = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    tokens, logp = jax.jit(lambda k, x: sampling.sample(k, x, temperature=0.0))(KEYS(4), logits)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logp, logits.max(-1) - np.log(np.exp(logits).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("name, k, p", [("top_k5", 5, 1.0), ("top_p0.8", 0, 0.8), ("top_k7_top_p0.6", 7, 0.6)])
def test_filters_of_trl(name, k, p):
    got = jax.jit(lambda x: sampling.filter_logits(x, k, p))(STATS["filter_logits"])
    np.testing.assert_array_equal(got, STATS[f"filtered__{name}"])


def test_filter_edges_and_ties():
    x = np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)
    run = lambda k, p: np.isfinite(jax.jit(sampling.filter_logits, static_argnums=(1, 2))(x, k, p))[0].tolist()
    assert run(1, 1.0) == [False, True, True, False]  # the two largest tie: both stay
    assert run(0, 1e-6) == [False, True, True, False]
    assert run(4, 1.0) == run(9, 1.0) == run(0, 1.0) == [True] * 4
    # p = e^(1,3,3,2) / sum = .055, .410, .410, .151 -> .795 after two: 0.79 needs two, 0.83 three, 0.97 all
    assert run(0, 0.79) == [False, True, True, False]
    assert run(0, 0.83) == [False, True, True, True]
    assert run(0, 0.97) == [True] * 4


filter_one = jax.jit(lambda x, p: sampling.filter_logits(x, 0, 0.5))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6))
def test_top_p_keeps_the_smallest_set_that_reaches_it(xs):
    x = np.array([xs], np.float32)
    keep = np.isfinite(np.asarray(filter_one(x, 0.5)))[0]
    p = np.exp(x[0] - x[0].max(), dtype=np.float64)
    p /= p.sum()
    assert p[keep].sum() >= 0.5 - 1e-5
    smallest = p[keep].min()
    assert p[p > smallest].sum() < 0.5 + 1e-5  # without its smallest members it would not reach
    assert (p[~keep] <= smallest).all()
