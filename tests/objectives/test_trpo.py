"""The trust region: its loss by a plain loop, what its estimate of the KL is an estimate of, and how the multiplier moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import trpo
from jaxalign.train import step
from jaxalign.types import Experience, UserError

PPO = recordings.load("ppo.npz", "logps", "old_logps", "mask", "values", "vpreds", "advantages_whitened__gamma1_lam0.95", "returns__gamma1_lam0.95")
PARAMS = {"policy": {"logps": PPO["logps"], "values": PPO["vpreds"]}, "value": tiny.VALUE_HEAD}
FIELDS = {"logp": "old_logps", "values": "values", "advantages": "advantages_whitened__gamma1_lam0.95", "returns": "returns__gamma1_lam0.95"}


def gradient(objective, aux, params, batch):
    return jax.jit(lambda p, a, b: step.gradient(objective, p, {}, a, b, jax.random.key(0)))(params, aux, batch)


def test_by_a_plain_loop():
    """Value, gradient in every log-prob and value, and metrics, at two multipliers: of the recorded rollouts, token by token."""
    batch, m = Experience(*tiny.replay_rows(PPO["mask"]), **{k: tiny.shifted(PPO[v]) for k, v in FIELDS.items()}), PPO["mask"]
    old, new, a = PPO["old_logps"].astype(float), PPO["logps"].astype(float), PPO[FIELDS["advantages"]].astype(float)
    for multiplier in (0.0, 3.5):
        pg, kl, vf, slope = 0.0, 0.0, 0.0, np.zeros_like(new)
        for i, t in zip(*np.nonzero(m)):
            r = np.exp(new[i, t] - old[i, t])
            pg, kl = pg - a[i, t] * r, kl + r - 1 - np.log(r)
            slope[i, t] = -a[i, t] * r + multiplier * (r - 1)
            v, v0, ret = (float(PPO[k][i, t]) for k in ("vpreds", "values", FIELDS["returns"]))
            vf += 0.5 * max((v - ret) ** 2, (min(max(v, v0 - 0.2), v0 + 0.2) - ret) ** 2)
        n = m.sum()
        loss, said, grads = gradient(trpo.trpo(tiny.Replay(), value_coef=0.3), {"multiplier": np.float32(multiplier)}, PARAMS, batch)
        np.testing.assert_allclose(loss, (pg + multiplier * kl + 0.3 * vf) / n, rtol=1e-5)
        np.testing.assert_allclose(grads["policy"]["logps"], slope / n, rtol=1e-4, atol=1e-7)
        names = ("loss/policy_avg", "policy/kl_avg", "loss/value_avg", "policy/kl_multiplier")
        np.testing.assert_allclose([said[k] for k in names], [pg / n, kl / n, vf / n, multiplier], rtol=1e-5)


def test_the_estimate_is_of_old_against_new():
    """Its mean over what the old policy samples is the KL over the whole vocabulary, and so is its gradient; no sample is negative."""
    z = np.random.default_rng(0).standard_normal((2, 11)).astype(np.float32)
    old = jax.nn.log_softmax(z[0])
    p = jnp.exp(old)
    exact = lambda z: (p * (old - jax.nn.log_softmax(z))).sum()
    every = lambda z: trpo.penalised(jax.nn.log_softmax(z), old, 0.0, 1.0)[1]
    np.testing.assert_allclose((p * every(z[1])).sum(), exact(z[1]), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda z: (p * every(z)).sum())(z[1]), jax.grad(exact)(z[1]), rtol=1e-4, atol=1e-7)
    assert (every(z[1]) >= 0).all() and not np.any(every(z[0]))
    assert np.isfinite(trpo.penalised(0.0, -200.0, 1.0, 1.0)).all()


def test_the_multiplier():
    """Once a rollout, by the KL its last update began with: doubled, halved or left; never far from where it started."""
    o = trpo.trpo(tiny.LLAMA, max_kl=0.02, multiplier=4.0, updates=3)
    aux = o.init_aux(None)
    assert aux["multiplier"] == 4
    after = lambda aux, kl, step: float(o.update_aux(aux, None, {"policy/kl_avg": np.float32(kl)}, step)["multiplier"])
    assert [after(aux, 1.0, s) for s in range(7)] == [4, 4, 8, 4, 4, 8, 4]
    assert [after(aux, kl, 2) for kl in (0.031, 0.029, 0.014, 0.013, 0.0)] == [8, 4, 4, 2, 2]
    for kl, end in ((0.0, 4 / trpo.RANGE), (9.0, 4 * trpo.RANGE)):
        now = aux
        for s in range(60):
            now = o.update_aux(now, None, {"policy/kl_avg": np.float32(kl)}, s)
        assert now["multiplier"] == end


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_it_holds_a_policy_back(rate):
    """Twelve arms, one better than the next: at two learning rates rollouts come to end near max_kl from where they began, where without
    a multiplier they go several times as far; the policy comes to take the best arms all the same."""
    o = trpo.trpo(tiny.LLAMA, max_kl=0.01, updates=16)
    value, r = np.linspace(-1, 1, 12), np.random.default_rng(0)
    move = jax.jit(lambda z, old, arm, a, mult: z - rate * jax.grad(lambda z: trpo.penalised(jax.nn.log_softmax(z)[arm], old[arm], a, mult)[0].mean())(z))
    gone = jax.jit(lambda z, old, arm: trpo.penalised(jax.nn.log_softmax(z)[arm], old[arm], 0.0, 1.0)[1].mean())

    def trained(z, update_aux, aux):
        """(z, KL of each rollout's last update)."""
        ends = []
        for k in range(40):
            old = jax.nn.log_softmax(z)
            p = np.exp(old, dtype=float)
            arm = r.choice(12, 400, p=p / p.sum())
            a = (value[arm] - value[arm].mean()) / (value[arm].std() + 1e-8)
            for _ in range(16):
                kl, z = gone(z, old, arm), move(z, old, arm, a, aux["multiplier"])
            aux = update_aux(aux, None, {"policy/kl_avg": kl}, 16 * k + 15)
            ends.append(float(kl))
        return z, ends

    assert np.median(trained(jnp.zeros(12), lambda aux, *_: aux, {"multiplier": 0.0})[1][:6]) > 0.04
    z, ends = trained(jnp.zeros(12), o.update_aux, o.init_aux(None))
    assert 0.004 < np.median(ends[5:20]) < 0.02
    assert (jax.nn.softmax(z) * value).sum() > 0.8


@pytest.mark.parametrize("bad, said", [(dict(max_kl=0.0), "max_kl"), (dict(multiplier=-1.0), "multiplier"), (dict(updates=1), "rl.epochs x rl.minibatches")])
def test_refused(bad, said):
    with pytest.raises(UserError, match=said):
        trpo.trpo(tiny.LLAMA, **bad)
