"""Losses on labels: TRL's KTO and APO through the whole objective, and BCO in closed form."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jaxalign.objectives import kto
from jaxalign.types import Labelled

KTO = np.load(Path(__file__).parents[1] / "vectors/kto.npz")
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
