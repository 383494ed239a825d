"""Compute-optimal sizing against the published numbers, and fits against laws that made the data."""

import math

import numpy as np
import pytest
from jaxalign.evals import scaling
from jaxalign.evals.scaling import LAWS, Law, Runs
from jaxalign.types import UserError

CHINCHILLA = 5.76e23  # 70e9 parameters, 1.4e12 tokens


@pytest.mark.parametrize("name, ratio", [("published", 92.6), ("refit", 18.4)])
def test_tokens_per_parameter_at_chinchillas_budget(name, ratio):
    n, d = scaling.optimum(LAWS[name], CHINCHILLA)
    assert d / n == pytest.approx(ratio, abs=0.1)
    assert 6 * n * d == pytest.approx(CHINCHILLA, rel=1e-12)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("flops", [1e15, CHINCHILLA])
def test_the_optimum_is_one(law, flops):
    """dL/dN = 0 along 6 N D = C, and both neighbours are worse."""
    n, _ = scaling.optimum(law, flops)
    along = lambda n: scaling.loss(law, n, flops / 6 / n)
    h = 1e-4
    slope = (along(n * math.exp(h)) - along(n * math.exp(-h))) / (2 * h)
    assert abs(slope) < 1e-7 * along(n)
    assert along(n) < min(along(n * 1.2), along(n / 1.2))


def test_exponents_add_to_one_and_are_those_of_the_optimum():
    a, b = scaling.exponents(LAWS["published"])
    assert a + b == pytest.approx(1) and a == pytest.approx(0.28 / 0.62)
    small, large = (scaling.optimum(LAWS["published"], c)[0] for c in (1e18, 1e20))
    assert math.log(large / small) / math.log(100) == pytest.approx(a)


def test_rule_of_thumb():
    n, d = scaling.rule_of_thumb(CHINCHILLA)
    assert d == pytest.approx(20 * n) and n == pytest.approx(math.sqrt(CHINCHILLA / 120)) and n == pytest.approx(69.3e9, rel=0.01)


@pytest.mark.parametrize("n", [2e5, 1e7, 1e8, 1e9, 7e10])
def test_shapes_come_near(n):
    from jaxalign.models import decoder
    from jaxalign.ops import nn

    x = scaling.shape(n, vocab=512 if n < 1e7 else 32000)
    assert abs(math.log(x.parameters / n)) < 0.25 and x.dim % x.heads == 0
    if n < 1e9:
        model = decoder.model(vocab=x.vocab, dim=x.dim, layers=x.layers, heads=x.heads, hidden=x.hidden)
        assert nn.count(model.specs()) == x.parameters
    with pytest.raises(UserError, match="vocabulary"):
        scaling.shape(1e5, vocab=200000)


@pytest.mark.parametrize("vocab, budgets", [(512, (1e12, 1e21)), (32000, (1e15, 1e25)), (128256, (1e17, 1e26))])
def test_every_proposal_can_be_trained(vocab, budgets):
    """A decoder takes the shape, eight devices the rows; the size stays near the one that was asked for, and the budget is spent."""
    from jaxalign.models import decoder

    for flops in np.geomspace(*budgets, 60):
        n, d = scaling.optimum(LAWS["refit"], flops)
        s = scaling.sizing(flops, vocab, 1024, (n, d))
        x = s.shape
        config = decoder.Config(vocab=vocab, dim=x.dim, layers=x.layers, heads=x.heads, hidden=x.hidden)
        assert config.head_dim * x.heads == x.dim and config.head_dim == (64 if x.dim >= 256 else 32 if x.dim >= 64 else 8)
        assert s.batch > 0 and (s.batch % 8 == 0 or s.batch < 8)
        assert abs(math.log(x.parameters / n)) < 0.3 and s.flops == pytest.approx(flops, rel=0.05), (flops, x)


def test_sizing_keeps_the_budget():
    s = scaling.sizing(1e18, 32000, 1024, scaling.optimum(LAWS["refit"], 1e18))
    assert s.flops == pytest.approx(1e18, rel=0.02)
    assert s.lr == pytest.approx(0.3118 * 10**-2.25) and s.batch * 1024 == pytest.approx(0.2920 * 1e18**0.3271, rel=0.02)  # whole eights of rows
    text = "\n".join(scaling.lines(1e18, 32000, 1024))
    assert all(w in text for w in ("refit", "published", "20 tokens", "--config.model.dim=", "--config.stage.train.steps="))


TRUE = Law(1.2, 300.0, 900.0, 0.35, 0.38)


def runs(noise=0.0, budgets=(1e14, 1e15, 1e16), sizes=7, seed=0):
    rng = np.random.default_rng(seed)
    c = np.repeat(budgets, sizes)
    n = np.concatenate([scaling.optimum(TRUE, x)[0] * np.geomspace(0.25, 4, sizes) for x in budgets])
    d = c / 6 / n
    return Runs(c, n, d, scaling.loss(TRUE, n, d) * np.exp(noise * rng.standard_normal(len(n))))


def test_isoflop_finds_the_exponent():
    out = scaling.isoflop(runs())
    assert out.exponent == pytest.approx(scaling.exponents(TRUE)[0], abs=0.01)
    assert out.inside.all()
    np.testing.assert_allclose(out.n, [scaling.optimum(TRUE, c)[0] for c in out.budgets], rtol=0.1)
    np.testing.assert_allclose(out.loss, [scaling.loss(TRUE, *scaling.optimum(TRUE, c)) for c in out.budgets], rtol=0.01)
    np.testing.assert_allclose([np.polyval(p, np.log(n)) for p, n in zip(out.parabolas, out.n)], out.loss, rtol=1e-6)


def test_isoflop_says_what_it_can_not():
    r = runs()
    upside = r._replace(loss=np.where(r.flops == 1e14, 10 - r.loss, r.loss))  # opens downward: no best size
    out = scaling.isoflop(upside)
    assert np.isnan(out.n[0]) and not out.inside[0] and np.isfinite(out.exponent)
    assert np.isnan(scaling.isoflop(r.take(r.flops == 1e15)).exponent)  # one point is no line
    with pytest.raises(UserError, match="three sizes"):
        scaling.isoflop(r.take(np.array([0, 1, 7, 8, 9])))


def test_parametric_finds_the_law():
    got = scaling.parametric(runs())
    np.testing.assert_allclose([got.E, got.alpha, got.beta], [TRUE.E, TRUE.alpha, TRUE.beta], rtol=0.02)
    np.testing.assert_allclose(scaling.exponents(got), scaling.exponents(TRUE), rtol=0.01)


def test_the_gradient_of_the_fit():
    r, v = runs(0.05), np.array([5.0, 6.0, 0.1, 0.3, 0.4])
    args = np.log(r.n), np.log(r.d), np.log(r.loss), 0.02
    g = scaling._objective(v, *args)[1]
    for i in range(5):
        h = 1e-6 * np.eye(5)[i]
        assert g[i] == pytest.approx((scaling._objective(v + h, *args)[0] - scaling._objective(v - h, *args)[0]) / 2e-6, rel=1e-5)


def test_bootstrap_covers_and_widens():
    a = scaling.exponents(TRUE)[0]
    exponent = lambda r: scaling.isoflop(r).exponent
    quiet, loud = (scaling.bootstrap(runs(x), exponent, times=200) for x in (0.001, 0.01))
    assert quiet[0] - 0.02 < a < quiet[2] + 0.02
    assert loud[2] - loud[0] > 2 * (quiet[2] - quiet[0])
    assert quiet == scaling.bootstrap(runs(0.001), exponent, times=200)  # same seed, same interval
    best = scaling.parametric(runs(0.002))
    low, _, high = scaling.bootstrap(runs(0.002), lambda r: scaling.exponents(scaling.parametric(r, start=best))[0], times=20)
    assert low < high and low - 0.05 < a < high + 0.05
