"""PPO's losses, statistics and gradients as TRL 0.11.4 has them, and the first minibatch."""

from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jaxalign.objectives import ppo
from jaxalign.ops.logprob import logprob
from jaxalign.ops.nn import Unembed
from jaxalign.types import Experience

PPO = np.load(Path(__file__).parents[1] / "vectors/ppo.npz")
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


def test_trl_entropy():
    mask = PPO["mask"]
    out = jax.jit(lambda z: logprob(z, Unembed(np.eye(23, dtype=np.float32)), np.zeros((5, 8), np.int32), mask))(PPO["logits"])
    np.testing.assert_allclose(out.entropy.sum() / mask.sum(), PPO["stat__clip0.2_vclip0.2_vf0.1__policy_entropy"], rtol=1e-5)


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
    assert PPO["loss_policy__ratio_threshold_skip"] == 0 and not PPO["grad_logps__ratio_threshold_skip"].any()


def test_mixing_in_pretraining():
    """L = L_policy + c_v L_value - c_e H + c_ptx NLL, each over its own number of tokens."""
    batch = tiny.mixed(np.random.default_rng(0), 4, 8)
    params = tiny.init(tiny.LLAMA, value=True)
    kinds = [ppo.ppo(tiny.LLAMA, value_coef=0.3, **k) for k in ({}, {"entropy_coef": 0.02}, {"ptx_coef": 0.7})]
    plain, ent, ptx = (tiny.gradient(k)(params, batch) for k in kinds)
    np.testing.assert_allclose(ent[0], plain[0] - 0.02 * plain[1]["policy/entropy_avg"], rtol=1e-5)
    nll, _, lm_grad = tiny.gradient(tiny.CASES["lm"][0])(params["policy"], batch["ptx"])
    np.testing.assert_allclose(ptx[1]["loss/ptx_avg"], nll, rtol=1e-6)
    np.testing.assert_allclose(ptx[0], plain[0] + 0.7 * nll, rtol=1e-5)
    want = jax.tree.map(lambda g, l: g + 0.7 * l, plain[2]["policy"], lm_grad)
    assert tiny.far(ptx[2]["policy"], want) < 1e-5
    assert tiny.far(ptx[2]["value"], plain[2]["value"]) < 1e-6  # pretraining does not touch the critic's head
