"""DPO and its relatives: TRL's values, per-pair values, gradients and metrics, through the whole objective."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jaxalign.objectives import preference
from jaxalign.rl.reference import add_reference
from jaxalign.types import Pairs

VECTORS = Path(__file__).parents[1] / "vectors"
DPO, SMOOTH = np.load(VECTORS / "dpo.npz"), np.load(VECTORS / "dpo_label_smoothing.npz")
EQUATIONS = {"sigmoid": preference.sigmoid_loss, "hinge": preference.hinge_loss, "ipo": preference.ipo_loss}


def trl_pairs():
    n, mask = int(DPO["num_pairs"]), DPO["completion_mask"]
    ref = (DPO["ref_logps"] * mask).sum(1)
    return Pairs(tiny.replay_rows(mask[:n]), tiny.replay_rows(mask[n:], first=n), ref[:n], ref[n:], np.zeros(n, np.float32))


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_trl(kind, beta):
    """policy_logps [2n,T] -> loss and d loss / d policy_logps, by `preference` with a network that replays them."""
    objective = preference.preference(tiny.Replay(), EQUATIONS[kind], beta=beta)
    loss, metrics, grads = tiny.gradient(objective)({"logps": DPO["policy_logps"]}, trl_pairs())
    np.testing.assert_allclose(loss, DPO[f"loss__{kind}__beta{beta}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["logps"], DPO[f"grad__{kind}__beta{beta}"], rtol=1e-4, atol=1e-6)
    if beta == 0.1:
        for ours, theirs in {"rewards/chosen": "rewards_chosen", "rewards/rejected": "rewards_rejected", "rewards/accuracies": "rewards_accuracies", "rewards/margins": "rewards_margins"}.items():
            np.testing.assert_allclose(metrics[ours], DPO[f"metric__beta0.1__{theirs}"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["logps/chosen"], DPO["metric__beta0.1__logps_chosen"], rtol=1e-5)
        np.testing.assert_allclose(metrics["logps/rejected"], DPO["metric__beta0.1__logps_rejected"], rtol=1e-5)


@pytest.mark.parametrize("kind", EQUATIONS)
def test_trl_per_pair(kind):
    n, m = int(DPO["num_pairs"]), DPO["completion_mask"]
    d, length = ((DPO["policy_logps"] - DPO["ref_logps"]) * m).sum(1), m.sum(1)
    for beta in (0.1, 0.5):
        got = jax.jit(EQUATIONS[kind])(d[:n], d[n:], length[:n], length[n:], beta)
        np.testing.assert_allclose(got, DPO[f"per_pair__{kind}__beta{beta}"], rtol=1e-5, atol=1e-5)


def test_trl_label_smoothing_and_ipo_on_sums():
    a = SMOOTH["policy_chosen"] - SMOOTH["ref_chosen"]
    b = SMOOTH["policy_rejected"] - SMOOTH["ref_rejected"]
    run = jax.jit(lambda a, b: (
        preference.sigmoid_loss(a, b, 1, 1, 0.1), preference.sigmoid_loss(a, b, 1, 1, 0.1, 0.1), preference.sigmoid_loss(a, b, 1, 1, 0.3, 0.25),
        preference.hinge_loss(a, b, 1, 1, 0.1), preference.ipo_sum_loss(a, b, 5, 9, 0.1),
    ))  # fmt: skip
    keys = ["sigmoid__beta0.1__ls0.0", "sigmoid__beta0.1__ls0.1", "sigmoid__beta0.3__ls0.25", "hinge__beta0.1__ls0.0", "ipo__beta0.1__ls0.0"]
    for got, key in zip(run(a, b), keys):
        np.testing.assert_allclose(got, SMOOTH[f"per_pair__{key}"], rtol=1e-5, atol=1e-6)
    free = run(SMOOTH["policy_chosen"], SMOOTH["policy_rejected"])[0]  # reference-free: the reference is 0
    np.testing.assert_allclose(free, SMOOTH["per_pair__sigmoid__beta0.1__ls0.0__reference_free"], rtol=1e-5)


def test_far_apart_pairs_are_finite():
    """-log sigma(-1000) = 1000, where a written-out log(1/(1+exp(1000))) is infinite; its slope is -beta."""
    value, slope = jax.jit(jax.value_and_grad(lambda a: preference.sigmoid_loss(a, 0.0, 1, 1, 1.0, 0.0)))(-1000.0)
    assert value == 1000 and slope == -1


def test_every_loss_starts_where_the_paper_says():
    """policy = reference: h = 0, so -log sigma(0) = ln 2 for DPO and cDPO, 1 for the hinge, 1/(4 beta^2) for IPO."""
    batch = tiny.pairs(np.random.default_rng(1), 4, 8)
    params = tiny.init(tiny.LLAMA)
    batch = add_reference(tiny.LLAMA, params, batch)
    assert (np.asarray(batch.ref_chosen) < 0).all() and not np.array_equal(batch.ref_chosen, batch.ref_rejected)
    kinds = {"dpo": (preference.dpo, np.log(2)), "cdpo": (preference.cdpo, np.log(2)), "ipo": (preference.ipo, 1 / (4 * 0.2**2)), "hinge": (preference.hinge, 1.0)}

    @jax.jit
    def losses(params, batch):
        terms = {k: make(tiny.LLAMA, beta=0.2).loss(params, {}, (), batch, None, {}).terms["preference"] for k, (make, _) in kinds.items()}
        return {k: t.total / t.weight for k, t in terms.items()}

    for k, got in losses(params, batch).items():
        np.testing.assert_allclose(got, kinds[k][1], rtol=1e-6)
    # and another policy starts elsewhere
    assert all(abs(got - kinds[k][1]) > 1e-3 for k, got in losses(tiny.loud(tiny.init(tiny.LLAMA, seed=5)), batch).items())


def test_a_pair_already_won_pulls_less():
    """The slope in h is -beta sigma(-beta h): at h = 20 and -20 with beta 0.1, sigma(-2) / sigma(2) = e^-2 apart."""
    slope = jax.jit(jax.vmap(jax.grad(lambda a: preference.sigmoid_loss(a, 0.0, 1, 1, 0.1, 0.0))))(np.array([20.0, -20.0]))
    np.testing.assert_allclose(slope[0] / slope[1], np.exp(-2), rtol=1e-5)
