"""GRPO's losses, metrics and gradients as TRL 1.16 has them; averages against plain loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign.objectives import grpo
from jaxalign.types import GroupExperience, UserError

V = np.load(Path(__file__).parents[1] / "vectors/grpo_loss.npz")
PARAMS = {"policy": {"logps": V["logps"]}}
MAX = int(V["max_completion_length"])


def recorded(on_policy=False, **over):
    wide = lambda x: tiny.shifted(x * V["mask"])
    advantages = wide(np.broadcast_to(V["advantages"][:, None], V["mask"].shape))
    old = None if on_policy else wide(V["old_logps"])
    return GroupExperience(*tiny.replay_rows(V["mask"]), advantages, wide(V["old_logps"]), old, wide(V["ref_logps"]))._replace(**over)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("case, high, beta", [("eps0.2", None, 0.0), ("eps0.2_0.28__beta0.04", 0.28, 0.04)])
@pytest.mark.parametrize(
    "loss_type, make", [("grpo", grpo.grpo), ("dapo", grpo.token_grpo), ("bnpo", grpo.token_grpo), ("dr_grpo", lambda *a, **k: grpo.dr_grpo(*a, max_new=MAX, **k))]
)
def test_trl(loss_type, make, case, high, beta, on_policy):
    name = f"{loss_type}__{case}" + ("__on_policy" if on_policy else "")
    loss, m, grads = tiny.gradient(make(tiny.Replay(), clip=0.2, clip_high=high, beta=beta))(PARAMS, recorded(on_policy))
    np.testing.assert_allclose(loss, V[f"loss__{name}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads["policy"]["logps"], V[f"grad__{name}"], rtol=1e-4, atol=1e-6)
    for ours, theirs in {"kl": "kl", **{f"clip_ratio/{k}_mean": f"clip_ratio_{k}_mean" for k in ("low", "high", "region")}}.items():
        if (key := f"metric__{name}__{theirs}") in V.files:
            np.testing.assert_allclose(m[ours], V[key], rtol=1e-5, atol=1e-7)
    gap = np.abs(V["logps"] - V["old_logps"])[V["mask"] > 0].mean()
    np.testing.assert_allclose(m["sampling/sampling_logp_difference/mean"], gap, rtol=1e-4)
    assert ("kl" in m) == (beta > 0)
    if on_policy:
        assert m["clip_ratio/region_mean"] == 0


def test_averages_of_packed_rows():
    """Two answers in a row, one of them cut short, and a row of padding: weights and divisors by a loop over answers."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [0] * 8, [3, 3, 3, 3, 3, 0, 0, 0]], np.int32)
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 0], [0] * 8, [0, 1, 1, 1, 1, 0, 0, 0]], np.float32)
    want = np.zeros((3, 8))
    for b, s in [(0, 1), (0, 2), (2, 3)]:
        here = (segments[b] == s) & (mask[b] > 0)
        want[b, here] = 1 / here.sum()
    w, n = jax.jit(grpo.sequence_mean)(mask, segments)
    np.testing.assert_allclose(w, want, rtol=1e-6)
    np.testing.assert_allclose(n, 3, rtol=1e-6)
    np.testing.assert_allclose(grpo.token_mean(mask, segments)[1], 7)
    w, n = grpo.constant(10)(jnp.asarray(mask), segments)
    np.testing.assert_allclose(n, 30, rtol=1e-6)
    np.testing.assert_array_equal(w, mask)


def test_a_penalty_needs_a_reference():
    with pytest.raises(UserError, match="no reference"):
        tiny.gradient(grpo.grpo(tiny.Replay(), beta=0.1))(PARAMS, recorded(ref_logp=None))
    a, b = (tiny.gradient(grpo.grpo(tiny.Replay(), beta=0.0))(PARAMS, recorded(ref_logp=r))[0] for r in (None, recorded().ref_logp))
    assert a == b
