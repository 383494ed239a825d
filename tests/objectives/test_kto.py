"""Losses on labels: TRL's KTO and APO through the whole objective, and BCO in closed form."""

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import kto
from jaxalign.types import Labelled, UserError

KTO = recordings.load("kto.npz")
CASES = sorted({k.removeprefix("loss__").split("__", 1)[1] for k in KTO.files if k.startswith("loss__")})
BATCHES = ["mixed", "negative_kl", "all_desirable", "all_undesirable"]


def batch_of(name):
    """Rows 0 to 6 of `tiny.Replay` are the answers, 7 to 13 the mismatched ones."""
    get = lambda k: KTO[f"{name}__{k}"]
    ref, ref_kl = ((get(f"{k}ref_logps") * get(f"{k}mask")).sum(1) for k in ("", "kl_"))
    batch = Labelled(tiny.replay_rows(get("mask")), get("label").astype(np.float32), ref, tiny.replay_rows(get("kl_mask"), first=7), ref_kl)
    return {"logps": np.concatenate([get("policy_logps"), get("kl_policy_logps")])}, batch


def test_every_key_is_compared():
    assert {f"{what}__{b}__{c}" for what in ("loss", "grad", "kl") for b in BATCHES for c in CASES} == {k for k in KTO.files if k.split("__")[0] in ("loss", "grad", "kl")}


@pytest.mark.parametrize("case", CASES)
def test_trl(case):
    """Loss, the clamped KL, and the gradient: none of it reaches the mismatched rows."""
    name, *numbers = case.split("__")
    beta, desirable, undesirable = (float(x.removeprefix(p)) for x, p in zip(numbers, ("beta", "dw", "uw")))
    objective = {"kto": kto.kto, "apo_zero_unpaired": kto.apo_zero_unpaired}[name](tiny.Replay(), beta=beta, desirable=desirable, undesirable=undesirable)
    run = tiny.gradient(objective)
    for b in BATCHES:
        loss, metrics, grads = run(*batch_of(b))
        np.testing.assert_allclose(loss, KTO[f"loss__{b}__{case}"], rtol=1e-5, err_msg=b)
        np.testing.assert_allclose(metrics.get("kl", 0.0), KTO[f"kl__{b}__{case}"], rtol=1e-5, err_msg=b)
        np.testing.assert_allclose(grads["logps"][:7], KTO[f"grad__{b}__{case}"], rtol=1e-4, atol=1e-7, err_msg=b)
        assert (grads["logps"][7:] == 0).all()


def test_the_kl_is_of_the_whole_step_before_it_is_clamped():
    """Micro-batches whose own KL is below zero and above it: clamped one by one they would give another loss."""
    params, batch = batch_of("mixed")
    batch = jax.tree.map(lambda x: x[:6], batch)
    batch = batch._replace(ref_mismatched=batch.ref_mismatched + np.array([9, -9] * 3, np.float32))
    run = lambda n: tiny.gradient(kto.kto(tiny.Replay()), n)(params, batch)
    logp = (params["logps"][7:13] * batch.mismatched.mask[:, 1:]).sum(1) - batch.ref_mismatched
    assert logp[::2].mean() < 0 < logp.mean() < logp[1::2].mean()
    (loss, metrics, grads), (loss2, metrics2, grads2) = run(1), run(2)
    np.testing.assert_allclose(metrics["kl"], logp.mean(), rtol=1e-5)
    np.testing.assert_allclose([loss2, metrics2["kl"]], [loss, metrics["kl"]], rtol=1e-6)
    np.testing.assert_allclose(grads2["logps"], grads["logps"], rtol=1e-5, atol=1e-8)


def test_bco_shifts_by_the_mean_of_all_batches_before():
    """The first batch is not shifted; the third by the mean of the first two. log(1 + e^-x) written out."""
    params, batch = batch_of("mixed")
    objective = kto.bco(tiny.Replay(), beta=0.5)
    reward = 0.5 * ((params["logps"][:7] * batch.rows.mask[:, 1:]).sum(1) - batch.ref)
    aux = objective.init_aux(params)
    loss = jax.jit(lambda aux, batch: objective.loss(params, {}, aux, batch, None, {}))
    shift = 0.0
    for i, ref in enumerate((batch.ref, batch.ref + 1, batch.ref - 2)):
        now = 0.5 * (batch.ref - ref) + reward
        out = loss(aux, batch._replace(ref=ref))
        want = np.log1p(np.exp(-np.where(batch.label > 0, 1, -1) * (now - shift))).mean()
        np.testing.assert_allclose(out.terms["preference"].total / 7, want, rtol=1e-5)
        metrics = {k: t / w for k, (t, w) in out.metrics.items()}
        np.testing.assert_allclose(metrics["rewards/mean"], now.mean(), rtol=1e-5)
        aux = objective.update_aux(aux, params, metrics, i)
        shift = (shift * i + now.mean()) / (i + 1)
    np.testing.assert_allclose(aux["mean"], shift, rtol=1e-5)
    assert kto.bco(tiny.Replay(), shift="none").init_aux is None


def test_the_density_ratio_of_two_kinds_of_prompt():
    """Of prompts of two kinds it is the ratio of their shares among good and among bad rows, whatever the numbers of these; clipped."""
    kind = np.repeat([0, 1, 0, 1], [2400, 600, 300, 1200])
    good = np.repeat([True, True, False, False], [2400, 600, 300, 1200])
    x = 7 * np.eye(2)[kind] + 100
    ratio = kto.density_ratio(x, good, 0.0, 99.0)(7 * np.eye(2) + 100)
    np.testing.assert_allclose(ratio, [(2400 / 3000) / (300 / 1500), (600 / 3000) / (1200 / 1500)], rtol=0.02)
    np.testing.assert_array_equal(kto.density_ratio(x, good, 0.5, 3.0)(7 * np.eye(2) + 100), [3.0, 0.5])
    even = kto.density_ratio(x, np.arange(4500) % 3 > 0)(x)
    np.testing.assert_allclose(even, 1, atol=0.02)
    with pytest.raises(UserError, match="all are bad"):
        kto.density_ratio(x, good & False)


def test_the_density_ratio_by_newton():
    """The same minimum by another road: 1/2 |w|^2 + the balanced log losses, centred, at a mean square norm of 1; written out."""
    r = np.random.default_rng(0)
    x, good = r.standard_normal((90, 7)) * 3 + 1, r.random(90) < 0.3
    x[good] += 1.5 * r.standard_normal(7)
    z = x - x.mean(0)
    z = np.column_stack([z / np.sqrt((z**2).sum() / 90), np.ones(90)])
    c = np.where(good, 90 / (2 * good.sum()), 90 / (2 * (~good).sum()))
    v, prior = np.zeros(8), np.diag([1.0] * 7 + [0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ v))
        v = v - np.linalg.solve(prior + (z.T * (c * p * (1 - p))) @ z, prior @ v + z.T @ (c * (p - good)))
    p = 1 / (1 + np.exp(-z @ v))
    np.testing.assert_allclose(kto.density_ratio(x, good, 0, 1e9)(x), p / (1 - p), rtol=1e-4)


def test_weights_multiply_and_do_not_divide():
    """TRL: the mean over rows of weight x loss."""
    params, batch = batch_of("mixed")
    weight = np.where(batch.label > 0, 1, np.linspace(0.5, 3, 7)).astype(np.float32)
    objective = kto.bco_matched(tiny.Replay(), beta=0.5, shift="none")
    loss, said, _ = tiny.gradient(objective)(params, batch._replace(weight=weight))
    reward = 0.5 * ((params["logps"][:7] * batch.rows.mask[:, 1:]).sum(1) - batch.ref)
    want = weight * np.log1p(np.exp(-np.where(batch.label > 0, 1, -1) * reward))
    np.testing.assert_allclose(loss, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(said["weights"], weight[batch.label == 0].mean(), rtol=1e-6)
    with pytest.raises(UserError, match="min_ratio 2"):
        kto.bco_matched(tiny.Replay(), min_ratio=2.0, max_ratio=1.0)
