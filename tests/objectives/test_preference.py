"""DPO and its relatives: TRL's values, per-pair values, gradients and metrics, through the whole objective."""

import functools

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign import methods
from jaxalign.objectives import dpo_variants, kto, preference, ranked
from jaxalign.ops.logprob import LogProbs
from jaxalign.rl.reference import add_reference
from jaxalign.types import Labelled, Pairs, Rankings

DPO, SMOOTH = recordings.load("dpo.npz"), recordings.load("dpo_label_smoothing.npz")
CASES = [k.removeprefix("loss__") for k in DPO.files if k.startswith("loss__")]
REPLAY = tiny.Replay()
DIVERGENCES = {"forward_kl": preference.forward_kl, "js_divergence": preference.js_divergence}


def objective_of(case, beta):
    """The objective that a key of the vectors speaks of; a key that is not understood fails."""
    if case == "sft":
        return preference.of_pairs(REPLAY, lambda c, aux: {"sft": preference.token_nll(c)}, beta=0.1)
    name, _, *rest = case.split("__")
    rest = "".join(rest)
    if name == "mpo_sigmoid0.8_bco_pair0.2_sft1.0":
        return dpo_variants.mpo(REPLAY, beta=beta, shift="none")
    if rest.startswith("fdiv_alpha_divergence_coef"):  # TRL 1.16's coefficient is 1 - alpha, and 1 its limit
        alpha = 1 - float(rest.removeprefix("fdiv_alpha_divergence_coef"))
        return preference.f_dpo(REPLAY, beta=beta, divergence="alpha" if alpha else "reverse_kl", **({"alpha": alpha} if alpha else {}))
    if rest.startswith("fdiv_"):
        equation = {"sigmoid": preference.sigmoid_loss, "ipo": preference.ipo_loss, "hinge": preference.hinge_loss}[name]
        return preference.preference(REPLAY, preference.under(DIVERGENCES[rest.removeprefix("fdiv_")], equation), beta=beta)
    if rest == "wpo":
        return dpo_variants.wpo(REPLAY, beta=beta)
    if rest.startswith("ld_alpha"):
        return dpo_variants.ld_dpo(REPLAY, beta=beta, alpha=float(rest.removeprefix("ld_alpha")))
    make = {
        "sigmoid": preference.dpo, "hinge": preference.hinge, "ipo": preference.ipo, "nca_pair": preference.nca, "sppo_hard": preference.sppo, "apo_zero": preference.apo_zero,
        "apo_down": preference.apo_down, "discopop": preference.discopop, "sigmoid_norm": preference.dpo_norm, "exo_pair": preference.exo, "robust": preference.robust,
        "aot": dpo_variants.aot, "aot_unpaired": dpo_variants.aot_unpaired,
        "bco_pair": lambda *a, **k: dpo_variants.bco_pair(*a, shift="none", **k),
    }[name]  # fmt: skip
    return make(REPLAY, beta=beta, **({"smoothing": float(rest.removeprefix("ls"))} if rest else {}))


def trl_pairs(alpha=1.0):
    """alpha: what the longer answer has beyond the shorter counts so much in the reference."""
    n, mask = int(DPO["num_pairs"]), DPO["completion_mask"]
    length = mask.sum(1)
    least = np.tile(np.minimum(length[:n], length[n:]), 2)[:, None]
    ref = (DPO["ref_logps"] * mask * np.where(mask.cumsum(1) <= least, 1, alpha)).sum(1).astype(np.float32)
    return Pairs(tiny.replay_rows(mask[:n]), tiny.replay_rows(mask[n:], first=n), ref[:n], ref[n:], np.zeros(n, np.float32))


def slope(case, beta, params, batch):
    """((loss, metrics), gradient) of a case, op by op: what is compiled for one serves the others."""

    def loss(params):
        out = objective_of(case, beta).loss(params, {}, (), batch, None, {})
        return sum(t.scale * t.total / t.weight for t in out.terms.values()), out.metrics

    return jax.value_and_grad(loss, has_aux=True)(params)


def read_off(x, u, tokens, mask):
    """`logprob` of `tiny.Replay`, which has the log-probs in its hidden states."""
    return LogProbs(mask * x[..., 1], 0 * mask, 0 * mask)


@pytest.mark.parametrize("case", CASES)
def test_trl(case, monkeypatch):
    """policy_logps [2n,T] -> loss, its gradient, and the loss of each pair alone, by the whole objective with a network that replays them."""
    monkeypatch.setattr(dpo_variants, "log_sum_squares", lambda x, u, mask: mask * tiny.shifted(DPO["log_sum_sq_probs"]))
    if case != "sigmoid__beta0.1":  # this one goes through the true one
        monkeypatch.setattr(preference, "logprob", read_off)
    monkeypatch.setattr(dpo_variants, "logprob", read_off)
    run, params = functools.partial(slope, case, 0.5 if "beta0.5" in case else 0.1), {"logps": DPO["policy_logps"]}
    batch = trl_pairs(0.5 if "ld_alpha0.5" in case else 1.0)
    (loss, metrics), grads = run(params, batch)
    np.testing.assert_allclose(loss, DPO[f"loss__{case}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["logps"], DPO[f"grad__{case}"], rtol=1e-4, atol=1e-6)
    if f"per_pair__{case}" in DPO.files:
        for i, want in enumerate(DPO[f"per_pair__{case}"]):
            only = (np.arange(len(batch.ref_chosen)) == i)[:, None]
            alone = batch._replace(chosen=batch.chosen._replace(mask=batch.chosen.mask * only), rejected=batch.rejected._replace(mask=batch.rejected.mask * only))
            np.testing.assert_allclose(run(params, alone)[0][0], want, rtol=1e-5, atol=1e-5)
    if case == "sigmoid__beta0.1":
        for k in [k for k in DPO.files if k.startswith("metric__") and k != "metric__beta0.1__entropy"]:  # the next test's
            total, weight = metrics[k.removeprefix("metric__beta0.1__").replace("_", "/", 1)]
            np.testing.assert_allclose(total / weight, DPO[k], rtol=1e-4, atol=1e-6)


def test_trl_entropy(monkeypatch):
    """The mean over the tokens of both sides, of entropies that are not those of the two tokens of `tiny.Replay`."""
    replayed = lambda x, u, tokens, mask: read_off(x, u, tokens, mask)._replace(entropy=mask * tiny.shifted(DPO["entropy"])[np.asarray(tokens)[:, 0]])
    monkeypatch.setattr(preference, "logprob", replayed)
    total, weight = preference.dpo(REPLAY, beta=0.1).loss({"logps": DPO["policy_logps"]}, {}, (), trl_pairs(), None, {}).metrics["entropy"]
    np.testing.assert_allclose(total / weight, DPO["metric__beta0.1__entropy"], rtol=1e-5)


def test_trl_0_11():
    """Sequence-level inputs: label smoothing, IPO on sums, BCO with its running mean after one batch, AOT, divergences; every key."""
    w, l = SMOOTH["policy_chosen"], SMOOTH["policy_rejected"]
    x = w - SMOOTH["ref_chosen"], l - SMOOTH["ref_rejected"], 5.0, 9.0
    shift = 0.1 * (x[0].mean() + x[1].mean()) / 2
    p, one = preference, np.ones(len(w), np.float32)

    def aot(a, b):
        return p.sigmoid_loss(dpo_variants.quantile_gap(a, b, one)[0], 0.0, 1, 1, 0.1, 0.1)

    ours = {
        "sigmoid__beta0.1__ls0.0": lambda: p.sigmoid_loss(*x, 0.1),
        "sigmoid__beta0.1__ls0.1": lambda: p.sigmoid_loss(*x, 0.1, 0.1),
        "sigmoid__beta0.3__ls0.25": lambda: p.sigmoid_loss(*x, 0.3, 0.25),
        "sigmoid__beta0.1__ls0.0__reference_free": lambda: p.sigmoid_loss(w, l, 1, 1, 0.1),
        "sigmoid__beta0.1__ls0.0__js_divergence": lambda: p.under(p.js_divergence)(*x, 0.1),
        "sigmoid__beta0.1__ls0.0__alpha_divergence": lambda: p.under(lambda a: p.alpha_divergence(a, 0.5))(*x, 0.1),
        "robust__beta0.1__ls0.1": lambda: p.robust_loss(*x, 0.1, 0.1),
        "hinge__beta0.1__ls0.0": lambda: p.hinge_loss(*x, 0.1),
        "ipo__beta0.1__ls0.0": lambda: p.ipo_sum_loss(*x, 0.1),
        "exo_pair__beta0.1__ls0.001": lambda: p.exo_loss(*x, 0.1, 0.001),
        "apo_zero__beta0.1__ls0.0": lambda: p.apo_zero_loss(*x, 0.1),
        "apo_down__beta0.1__ls0.0": lambda: p.apo_down_loss(*x, 0.1),
        "nca_pair__beta0.1__ls0.0": lambda: p.nca_loss(*x, 0.1),
        "sppo_hard__beta0.1__ls0.0": lambda: p.sppo_loss(*x, 0.1),
        "aot__beta0.1__ls0.1": lambda: aot(w - l, SMOOTH["ref_chosen"] - SMOOTH["ref_rejected"]),
        "aot_pair__beta0.1__ls0.1": lambda: aot(x[0], x[1]),  # TRL 1.16 calls it aot_unpaired
        "bco_pair__beta0.1__ls0.0": lambda: p.bco_loss(*x, 0.1, shift),
    }
    keys = [k for k in SMOOTH.files if k.startswith("per_pair__")]
    assert sorted(keys) == sorted(f"per_pair__{k}" for k in ours)
    for k, got in jax.jit(lambda: {k: f() for k, f in ours.items()})().items():
        np.testing.assert_allclose(got, SMOOTH[f"per_pair__{k}"], rtol=2e-5, atol=1e-6, err_msg=k)
    np.testing.assert_allclose(0.1 * x[0], SMOOTH["chosen_rewards__beta0.1"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(0.1 * x[1], SMOOTH["rejected_rewards__beta0.1"], rtol=1e-5, atol=1e-6)


def test_far_apart_pairs_are_finite():
    """-log sigma(-1000) = 1000, where a written-out log(1/(1+exp(1000))) is infinite; its slope is -beta."""
    value, slope = jax.jit(jax.value_and_grad(lambda a: preference.sigmoid_loss(a, 0.0, 1, 1, 1.0, 0.0)))(-1000.0)
    assert value == 1000 and slope == -1


L2 = np.log(2)
# policy = reference, beta 0.2: a = b = 0. What is left of each equation then, on paper.
STARTS = {
    "dpo": (preference.dpo, L2), "cdpo": (preference.cdpo, L2), "robust": (preference.robust, L2), "ipo": (preference.ipo, 1 / (4 * 0.2**2)), "ipo_sum": (preference.ipo_sum, 1 / (4 * 0.2**2)),
    "hinge": (preference.hinge, 1), "dpo_norm": (preference.dpo_norm, L2), "nca": (preference.nca, 2 * L2), "sppo": (preference.sppo, 2 * 2.5**2), "apo_zero": (preference.apo_zero, 1),
    "apo_down": (preference.apo_down, 1), "discopop": (preference.discopop, 0.5 * L2 + 0.5), "f_dpo": (preference.f_dpo, L2), "exo": (preference.exo, -L2 - 0.5 * np.log(0.001 * 0.999)),
    "aot": (dpo_variants.aot, L2), "aot_unpaired": (dpo_variants.aot_unpaired, L2), "bco_pair": (dpo_variants.bco_pair, 2 * L2), "tr_dpo": (dpo_variants.tr_dpo, L2), "ld_dpo": (dpo_variants.ld_dpo, L2),
    "kto": (kto.kto, 0.5), "bco": (kto.bco, L2), "apo_zero_unpaired": (kto.apo_zero_unpaired, 0.5), "pl_dpo": (ranked.pl_dpo, np.log(6)),
}  # fmt: skip


def starts(policy, reference):
    """{name: loss} of batches of every kind, log-probs f32[24,6] replayed."""
    r = np.random.default_rng(1)
    mask = (np.arange(6) < r.integers(1, 7, (24, 1))).astype(np.float32)
    rows = lambda first, n: tiny.replay_rows(mask[first : first + n], first)
    zero = np.zeros(4, np.float32)
    three = jax.tree.map(lambda x: x.reshape(4, 3, -1), rows(12, 12))
    batches = {
        "pairs": Pairs(rows(0, 4), rows(4, 4), zero, zero, zero),
        "labelled": Labelled(rows(0, 4), np.float32([1, 0, 0, 1]), zero, rows(8, 4), zero),
        "rankings": Rankings(three, np.tile(np.array([2, 0, 1], np.int32), (4, 1)), np.ones((4, 3), np.float32)),  # -log 1/3 - log 1/2
    }
    out = {}
    for k, (make, _) in STARTS.items():
        objective = make(REPLAY, beta=0.2)
        batch = add_reference.__wrapped__(REPLAY, reference, batches[methods.OBJECTIVES[k].kind], objective.reference or preference.pair_logps)
        aux = objective.init_aux(reference) if objective.init_aux else ()
        stats = {n: t / w for n, (t, w) in objective.stats(policy, {}, aux, batch).items()} if objective.stats else {}
        terms = objective.loss(policy, {}, aux, batch, None, stats).terms
        out[k] = sum(t.scale * t.total / t.weight for t in terms.values())
    return out


def test_every_loss_starts_where_the_paper_says(monkeypatch):
    for module in (preference, dpo_variants):
        monkeypatch.setattr(module, "logprob", read_off)
    one, other = ({"logps": -np.random.default_rng(i).random((24, 6)).astype(np.float32)} for i in (2, 3))
    for k, got in starts(one, one).items():
        np.testing.assert_allclose(got, STARTS[k][1], rtol=1e-5, err_msg=k)
    assert all(abs(got - STARTS[k][1]) > 1e-4 for k, got in starts(other, one).items())  # and another policy elsewhere


def test_a_true_model_starts_there_too():
    """References by the training forward of the same model, with a pair that weighs nothing."""
    params, objective = tiny.init(tiny.LLAMA), preference.dpo(tiny.LLAMA, beta=0.2)
    batch = add_reference(tiny.LLAMA, params, tiny.pairs(np.random.default_rng(1), 8, 8))
    assert (np.asarray(batch.ref_chosen)[:7] < 0).all() and not np.array_equal(batch.ref_chosen, batch.ref_rejected)
    loss = tiny.gradient(objective)
    np.testing.assert_allclose(loss(params, batch)[0], L2, rtol=1e-6)
    assert abs(loss(tiny.loud(tiny.init(tiny.LLAMA, seed=5)), batch)[0] - L2) > 1e-3


def test_discopop_dips_left_of_the_start():
    """As its page says: at h = 0 the loss falls to the left, into a dip at -0.119, and only beyond 0.072 to the right."""
    f = lambda h: preference.discopop_loss(h, 0.0, 1, 1, 1.0)
    h = np.linspace(-0.5, 0.5, 2001).astype(np.float32)
    down = np.diff(np.asarray(f(h))) < 0
    turns = h[1:-1][down[1:] != down[:-1]]
    np.testing.assert_allclose(turns, [-0.119, 0.072], atol=1.5e-3)
    np.testing.assert_allclose(jax.grad(f)(0.0), 0.784, atol=1e-3)  # -1/4 - 5 ln 2 + 5 - 1/2
    assert np.isfinite([f(-1e4), jax.grad(f)(-1e4)]).all()


def test_a_pair_already_won_pulls_less():
    """The slope in h is -beta sigma(-beta h): at h = 20 and -20 with beta 0.1, sigma(-2) / sigma(2) = e^-2 apart."""
    slope = jax.jit(jax.vmap(jax.grad(lambda a: preference.sigmoid_loss(a, 0.0, 1, 1, 0.1, 0.0))))(np.array([20.0, -20.0]))
    np.testing.assert_allclose(slope[0] / slope[1], np.exp(-2), rtol=1e-5)
