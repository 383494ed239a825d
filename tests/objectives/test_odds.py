"""Losses without a reference: TRL's ORPO, CPO and SimPO, every key; AlphaPO; SLiC in closed form."""

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import odds, preference
from jaxalign.types import UserError

TRL, LOG = recordings.load("orpo_cpo_simpo.npz"), recordings.load("logprobs.npz", "log1mexp_*")
CASES = list(dict.fromkeys(k.rsplit("__", 1)[0] for k in TRL.files if "__" in k))
NLL = float(TRL["nll"])


def equation(case):
    """(inputs "avg" or "sum", per pair f(w, l), factor of the cross entropy, reward f(w)) of a key of the vectors."""
    name, beta, *rest = case.split("__")
    beta = float(beta.removeprefix("beta"))
    if name == "orpo":
        return "avg", lambda w, l: odds.odds_ratio_loss(w, l, 1.0, 1.0, beta), 1.0, lambda w: beta * w
    known = ("ls", "gamma", "cpo_alpha", "alphapo")
    smoothing, gamma, alpha, shape = (float(x.removeprefix(p)) for x, p in zip(rest, known, strict=True))
    if shape:
        return "avg", lambda w, l: odds.alphapo_loss(w, l, 1.0, 1.0, beta, gamma, shape), alpha, lambda w: beta * (1 - np.exp(-shape * w)) / shape
    f = {
        "cpo_sigmoid": lambda w, l: preference.sigmoid_loss(w, l, 1.0, 1.0, beta, smoothing),
        "cpo_hinge": lambda w, l: preference.hinge_loss(w, l, 1.0, 1.0, beta),
        "cpo_ipo": lambda w, l: preference.ipo_loss(w, l, 1.0, 1.0, beta),
        "cpo_simpo": lambda w, l: odds.simpo_loss(w, l, 1.0, 1.0, beta, gamma, smoothing),
    }[name]
    return "avg" if name in ("cpo_ipo", "cpo_simpo") else "sum", f, alpha, lambda w: beta * w


@pytest.mark.parametrize("case", CASES)
def test_trl(case):
    """Values per pair, the total with cross entropy, gradients of the total, rewards."""
    kind, f, alpha, reward = equation(case)
    w, l = TRL[f"{kind}_chosen_logps"], TRL[f"{kind}_rejected_logps"]
    per_pair, back = jax.vjp(f, w, l)
    want = {k.removeprefix(f"{case}__"): TRL[k] for k in TRL.files if k.startswith(f"{case}__")}
    np.testing.assert_allclose(per_pair, -want["neg_or_loss_per_pair"] if "orpo" in case else want["per_pair"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alpha * NLL + per_pair.mean(), want["total_loss"], rtol=1e-5)
    for side, got in zip(("chosen", "rejected"), back(np.full(len(w), 1 / len(w), np.float32))):
        np.testing.assert_allclose(got, want[f"grad_{side}"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(reward(w), want["chosen_rewards"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reward(l), want["rejected_rewards"], rtol=1e-5, atol=1e-6)
    if "orpo" in case:
        ratio = odds.log_odds_ratio(w, l, 1.0, 1.0)
        np.testing.assert_allclose([ratio.mean(), jax.nn.log_sigmoid(ratio).mean()], [want["mean_log_odds"], want["mean_log_sigmoid_odds"]], rtol=1e-5)
    else:
        np.testing.assert_allclose([(w > l).mean(), (reward(w) - reward(l)).mean()], [want["accuracy"], want["margin"]], rtol=1e-5)


def test_log1mexp_to_both_ends():
    np.testing.assert_allclose(odds.log1mexp(LOG["log1mexp_in"]), LOG["log1mexp_out"], rtol=1e-5)
    slope = jax.vmap(jax.grad(odds.log1mexp))(np.array([0.0, -1e-3, -np.log(2), -1.0, -90.0], np.float32))
    u = np.array([-1e-3, -np.log(2), -1.0, -90.0])
    assert np.isfinite(slope[0])
    np.testing.assert_allclose(slope[1:], -1 / np.expm1(-u), rtol=1e-3, atol=1e-30)  # d/du log(1 - e^u) = -1 / (e^-u - 1)


def losses(objective, params, batch):
    out = objective.loss(params, {}, (), batch, None, {})
    return {k: t.total / t.weight for k, t in out.terms.items()}


def test_cross_entropy_beside_them_by_hand():
    """Per token (CPO, ORPO), of whole answers (SLiC), of prompt and answer (ORPO's authors), from the same log-probs."""
    r = np.random.default_rng(0)
    logps = -np.abs(r.standard_normal((4, 6))).astype(np.float32) - 0.1
    mask = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]], np.float32)
    zero = np.zeros(2, np.float32)
    batch = preference.Pairs(tiny.replay_rows(mask[:2]), tiny.replay_rows(mask[2:], first=2), zero, zero, zero)
    batch = batch._replace(chosen=batch.chosen._replace(segments=np.where(np.arange(7) < [[7], [4]], 1, 0)), rejected=batch.rejected._replace(segments=np.where(np.arange(7) < [[5], [7]], 1, 0)))
    sums, n = (logps * mask).sum(1), mask.sum(1)
    params, m = {"logps": logps}, tiny.Replay()
    got = jax.jit(lambda p: {k: losses(o, p, batch) for k, o in dict(cpo=odds.cpo(m), slic=odds.slic(m), orpo=odds.orpo(m), every=odds.orpo(m, nll_on="all"), simpo=odds.simpo(m)).items()})(params)
    np.testing.assert_allclose(got["cpo"]["nll"], -sums[:2].sum() / n[:2].sum(), rtol=1e-5)
    np.testing.assert_allclose(got["orpo"]["nll"], -sums[:2].sum() / n[:2].sum(), rtol=1e-5)
    np.testing.assert_allclose(got["every"]["nll"], -(logps[0].sum() + logps[1, :3].sum()) / 9, rtol=1e-5)
    assert got["every"]["odds_ratio"] == got["orpo"]["odds_ratio"]
    np.testing.assert_allclose(got["slic"]["nll"], -sums[:2].mean(), rtol=1e-5)
    np.testing.assert_allclose(got["slic"]["preference"], np.maximum(0, 1 - sums[:2] + sums[2:]).mean(), rtol=1e-5)
    x = 2.0 * ((sums / n)[:2] - (sums / n)[2:]) - 1.0
    np.testing.assert_allclose(got["simpo"]["preference"], np.log1p(np.exp(-x)).mean(), rtol=1e-5)
    with pytest.raises(UserError, match="nll_on"):
        odds.orpo(m, nll_on="prompt")
