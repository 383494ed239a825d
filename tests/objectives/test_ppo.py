"""PPO's losses, statistics and gradients as TRL 0.11.4 has them, and the first minibatch."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import a2c, lm, ppo
from jaxalign.ops.logprob import logprob
from jaxalign.ops.masked import masked_var
from jaxalign.ops.nn import Unembed
from jaxalign.types import Experience

PPO = recordings.load("ppo.npz", "logps", "old_logps", "mask", "values", "vpreds", "logits", "advantages_whitened__gamma1_lam0.95", "returns__gamma1_lam0.95", "loss_*", "grad_*", "stat__*")
PARAMS = {"policy": {"logps": PPO["logps"], "values": PPO["vpreds"]}, "value": tiny.VALUE_HEAD}


def recorded(**over):
    """TRL's rollouts as an `Experience`: their T columns speak of tokens 1..T, ours of 0..T."""
    fields = {"logp": "old_logps", "values": "values", "advantages": "advantages_whitened__gamma1_lam0.95", "returns": "returns__gamma1_lam0.95"}
    return Experience(*tiny.replay_rows(PPO["mask"]), **{k: tiny.shifted(PPO[v]) for k, v in fields.items()})._replace(**over)


@pytest.mark.parametrize("clip, value_clip, coef", [(0.2, 0.2, 0.1), (0.1, 0.5, 1.0)])
def test_trl(clip, value_clip, coef):
    name = f"clip{clip}_vclip{value_clip}_vf{coef}"
    objective = ppo.ppo(tiny.Replay(), clip=clip, value_clip=value_clip, value_coef=coef)
    loss, m, grads = tiny.gradient(objective)(PARAMS, recorded())
    close = lambda got, key: np.testing.assert_allclose(got, PPO[key], rtol=1e-5, atol=1e-6)
    close(m["loss/policy"], f"loss_policy__{name}")
    close(m["loss/value"], f"loss_value_times_vf_coef__{name}")
    close(loss, f"loss_policy__{name}") if coef == 0 else np.testing.assert_allclose(loss, m["loss/policy"] + m["loss/value"], rtol=1e-6)
    np.testing.assert_allclose(grads["policy"]["logps"], PPO[f"grad_logps__{name}"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["policy"]["values"], PPO[f"grad_vpreds__{name}"], rtol=1e-4, atol=1e-6)
    close(m["policy/approxkl_avg"], f"stat__{name}__policy_approxkl")
    close(m["policy/clipfrac_avg"], f"stat__{name}__policy_clipfrac")
    close(m["val/clipfrac_avg"], f"stat__{name}__val_clipfrac")
    close(m["loss/policy_avg"], f"loss_policy__{name}")
    np.testing.assert_allclose(coef * m["loss/value_avg"], PPO[f"loss_value_times_vf_coef__{name}"], rtol=1e-5)
    for ours, theirs in {"policy/policykl_avg": "policy_policykl", "val/error": "val_error", "val/mean": "val_mean", "returns/mean": "returns_mean"}.items():
        close(m[ours], f"stat__{name}__{theirs}")
    mask = PPO["mask"]
    close(masked_var(PPO["values"], mask), f"stat__{name}__val_var")
    close(masked_var(PPO["returns__gamma1_lam0.95"], mask), f"stat__{name}__returns_var")


def test_trl_entropy():
    mask = PPO["mask"]
    out = jax.jit(lambda z: logprob(z, Unembed(np.eye(23, dtype=np.float32)), np.zeros((5, 8), np.int32), mask))(PPO["logits"])
    for name in ("clip0.2_vclip0.2_vf0.1", "clip0.1_vclip0.5_vf1.0", "ratio_threshold_skip"):
        np.testing.assert_allclose(out.entropy.sum() / mask.sum(), PPO[f"stat__{name}__policy_entropy"], rtol=1e-5)


def test_the_statistics_of_a_skipped_minibatch():
    """They are those of one that is not, recorded a second time."""
    skipped = [k for k in PPO.files if k.startswith("stat__ratio_threshold_skip")]
    assert len(skipped) == 10
    for k in skipped:
        np.testing.assert_array_equal(PPO[k], PPO[k.replace("ratio_threshold_skip", "clip0.2_vclip0.2_vf0.1")])


def test_the_ratio_threshold():
    """Above it TRL zeroes policy and value loss and their gradients, and still reports the statistics."""
    m = PPO["mask"]
    mean = (m * np.exp((PPO["logps"] - PPO["old_logps"]) * m)).sum() / m.sum()
    for threshold, dropped in ((mean * 0.999, 1.0), (mean * 1.001, 0.0)):
        loss, stats, grads = tiny.gradient(ppo.ppo(tiny.Replay(), ratio_threshold=float(threshold)))(PARAMS, recorded())
        assert stats["val/dropped"] == dropped
        np.testing.assert_allclose(stats["val/ratio"], mean, rtol=1e-5)
        assert (loss == 0) == bool(dropped)
        np.testing.assert_allclose(stats["policy/approxkl_avg"], PPO["stat__ratio_threshold_skip__policy_approxkl"], rtol=1e-5)
        flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
        assert np.isfinite(flat).all() and (not flat.any()) == bool(dropped)
        name = "ratio_threshold_skip" if dropped else "clip0.2_vclip0.2_vf0.1"
        for got, key in ((stats["loss/policy"], "loss_policy"), (stats["loss/value"], "loss_value_times_vf_coef")):
            np.testing.assert_allclose(got, PPO[f"{key}__{name}"], rtol=1e-5)
        for got, key in ((grads["policy"]["logps"], "grad_logps"), (grads["policy"]["values"], "grad_vpreds")):
            np.testing.assert_allclose(got, PPO[f"{key}__{name}"], rtol=1e-4, atol=1e-6)


def test_a_ratio_beyond_all_bounds_is_dropped_too():
    """exp(200) is infinite, and 0 x inf would be NaN."""
    batch = recorded()
    batch = batch._replace(logp=batch.logp - 200.0, advantages=-np.abs(batch.advantages))
    loss, stats, grads = tiny.gradient(ppo.ppo(tiny.Replay()))(PARAMS, batch)
    assert stats["val/dropped"] == 1 and loss == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_mixing_in_pretraining():
    """L = L_policy + c_v L_value - c_e H + c_ptx NLL, each over its own number of tokens."""
    batch = tiny.mixed(np.random.default_rng(0), 4, 8)
    objective, make, _ = tiny.CASES["ppo"]
    params = make()

    @jax.jit
    def both(params, batch):
        ce, n, _ = lm.cross_entropy(tiny.LLAMA, params["policy"], batch["ptx"])
        return ce.nll / n, n, objective.loss(params, {}, (), batch, None, {})

    nll, n, out = both(params, batch)
    m = {k: t / w for k, (t, w) in out.metrics.items()}
    mean = {k: t.scale * t.total / t.weight for k, t in out.terms.items()}
    want = {"policy": m["loss/policy_avg"] - 0.02 * m["policy/entropy_avg"], "value": 0.3 * m["loss/value_avg"], "ptx": 0.7 * nll}
    assert mean.keys() == want.keys()
    for k in want:
        np.testing.assert_allclose(mean[k], want[k], rtol=1e-5, err_msg=k)
    assert out.terms["ptx"].weight == n == batch["ptx"].mask.sum() != out.terms["policy"].weight == batch["ppo"].mask.sum()


def test_whitening_of_a_minibatch():
    """lm-human-preferences: (A - mean) / sqrt(population variance + 1e-8) over the minibatch, whatever its micro-batches; the loss is
    then that of those advantages."""
    batch = tiny.experience(np.random.default_rng(0), 8, 10)
    a, ok = batch.advantages, batch.mask > 0
    white = np.where(ok, (a - a[ok].mean()) / np.sqrt(a[ok].var() + 1e-8), 0).astype(np.float32)
    params = tiny.init(tiny.LLAMA, value=True)
    make = lambda **k: ppo.ppo(tiny.LLAMA, **k)
    want, _, wanted = tiny.gradient(make())(params, batch._replace(advantages=white))
    got, _, grads = tiny.gradient(make(whiten_minibatch=True), 4)(params, batch._replace(advantages=np.where(ok, a, np.inf).astype(np.float32)))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert tiny.far(grads, wanted) < 1e-3


def test_early_stop():
    """aux keeps the mean log(old / new) of the last update; 1.5 target_kl is the limit (TRL)."""
    objective = ppo.ppo(tiny.Replay(), target_kl=0.02)
    assert objective.init_aux(None)["policykl"] == 0
    aux = objective.update_aux(objective.init_aux(None), None, {"policy/policykl_avg": np.float32(0.031)}, 0)
    for value, over in ((0.031, True), (0.029, False), (-1.0, False)):
        assert ppo.went_too_far(0.02, SimpleNamespace(aux={"policykl": value})) == over
    assert ppo.went_too_far(0.02, SimpleNamespace(aux=aux))
    assert ppo.ppo(tiny.Replay()).init_aux is None


def test_a2c():
    """-A log p and (V - R)^2 without clips or halves, token means, by numpy; entropy through the model."""
    batch, m = recorded(), PPO["mask"]
    loss, said, grads = tiny.gradient(a2c.a2c(tiny.Replay()))(PARAMS, batch)
    a, r = PPO["advantages_whitened__gamma1_lam0.95"], PPO["returns__gamma1_lam0.95"]
    pg, vf = -(m * a * PPO["logps"]).sum() / m.sum(), (m * (PPO["vpreds"] - r) ** 2).sum() / m.sum()
    np.testing.assert_allclose([said["loss/policy_avg"], said["loss/value_avg"]], [pg, vf], rtol=1e-5)
    np.testing.assert_allclose(loss, pg + 0.5 * vf, rtol=1e-5)
    np.testing.assert_allclose(grads["policy"]["logps"], -m * a / m.sum(), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads["policy"]["values"], m * (PPO["vpreds"] - r) / m.sum(), rtol=1e-4, atol=1e-7)
    batch, params = tiny.experience(np.random.default_rng(0), 4, 8), tiny.init(tiny.LLAMA, value=True)
    with_bonus, said, _ = tiny.gradient(a2c.a2c(tiny.LLAMA, entropy_coef=0.3))(params, batch)
    np.testing.assert_allclose(with_bonus, said["loss/policy_avg"] + 0.5 * said["loss/value_avg"] - 0.3 * said["policy/entropy_avg"], rtol=1e-5)
