"""Rankings: Plackett-Luce and RRHF against loops."""

import jax
import numpy as np
import tiny
from jaxalign.objectives import preference, ranked
from jaxalign.types import Rankings

R = np.random.default_rng(3)
SCORES = R.standard_normal((6, 4)).astype(np.float32)
RANK = np.array([[0, 1, 2, 3], [3, 0, 2, 1], [0, 0, 1, 2], [1, 1, 1, 0], [2, 2, 2, 2], [0, 1, 0, 9]], np.int32)
VALID = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], np.float32)


def by_loops(scores, rank, valid):
    """(Plackett-Luce: each draw among itself and all that are worse; RRHF: a hinge for each strict pair) of one prompt."""
    luce = hinge = 0.0
    for i in range(len(rank)):
        if valid[i]:
            worse = [j for j in range(len(rank)) if valid[j] and rank[j] > rank[i]]
            luce -= scores[i] - np.log(sum(np.exp(scores[j]) for j in [i, *worse]))
            hinge += sum(max(0.0, scores[j] - scores[i]) for j in worse)
    return luce, hinge


def test_against_loops():
    want = np.array([by_loops(*x) for x in zip(SCORES.astype(np.float64), RANK, VALID)])
    luce, hinge = jax.jit(lambda *x: (ranked.plackett_luce_loss(*x), ranked.rrhf_loss(*x)))(SCORES, RANK, VALID)
    np.testing.assert_allclose(luce, want[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hinge, want[:, 1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(want[4], 0, atol=1e-12)  # all tied
    unknown = np.where(VALID > 0, SCORES, np.nan)  # what is no candidate has any score
    for equation in (ranked.plackett_luce_loss, ranked.rrhf_loss):
        grads = jax.jit(jax.grad(lambda s: equation(s, RANK, VALID).sum()))(unknown)
        assert np.isfinite(grads).all() and (grads[1, 3], grads[5, 3]) == (0, 0)


def test_of_two_candidates_it_is_dpo():
    """K = 2: the same loss and gradient as the pair's, through the whole objectives."""
    r, params = np.random.default_rng(0), tiny.init(tiny.LLAMA)
    pairs = tiny.pairs(r, 4, 8)
    both = jax.tree.map(lambda w, l: np.stack([l, w], 1), pairs.chosen, pairs.rejected)
    ranking = Rankings(both, np.tile(np.array([5, 2], np.int32), (4, 1)), np.ones((4, 2), np.float32), np.stack([pairs.ref_rejected, pairs.ref_chosen], 1))
    a = tiny.gradient(preference.dpo(tiny.LLAMA))(params, pairs)
    b = tiny.gradient(ranked.pl_dpo(tiny.LLAMA))(params, ranking)
    np.testing.assert_allclose(b[0], a[0], rtol=1e-5)
    assert tiny.far(b[2], a[2]) < 1e-5
    for k in ("rewards/accuracies", "rewards/margins", "logps/chosen", "entropy"):
        np.testing.assert_allclose(b[1][k], a[1][k], rtol=1e-4, err_msg=k)


def test_rrhf_whole():
    """Mean log-probs, and cross entropy of the best answers alone: of prompt 2 both that share the first rank."""
    logps = -np.abs(R.standard_normal((24, 5))).astype(np.float32) - 0.1
    mask = (np.arange(5) < R.integers(1, 6, (24, 1))).astype(np.float32)
    rows = tiny.replay_rows(mask)
    batch = Rankings(jax.tree.map(lambda x: x.reshape(6, 4, -1), rows), RANK, VALID)
    terms = jax.jit(lambda p: ranked.rrhf(tiny.Replay()).loss(p, {}, (), batch, None, {}).terms)({"logps": logps})
    sums, n = ((x * mask).sum(1).reshape(6, 4) for x in (logps, np.ones_like(logps)))
    kept = [0, 1, 2, 3, 5]  # prompt 4 ranks nothing
    want = sum(by_loops((sums / n)[i], RANK[i], VALID[i])[1] for i in kept) / 5
    np.testing.assert_allclose(terms["preference"].total / terms["preference"].weight, want, rtol=1e-5)
    best = [(0, 0), (1, 1), (2, 0), (2, 1), (3, 3), (5, 0), (5, 2)]
    np.testing.assert_allclose(terms["nll"].total / terms["nll"].weight, -sum(sums[i] for i in best) / sum(n[i] for i in best), rtol=1e-5)
