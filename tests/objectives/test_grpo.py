"""Policy gradients without a critic: losses, metrics and gradients as TRL 1.16 has them; averages against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import answers, grpo
from jaxalign.objectives.grpo import answer_gradient, constant, policy_gradient, sequence_mean, token_mean
from jaxalign.ops.logprob import LogProbs, logprob
from jaxalign.ops.masked import top_share
from jaxalign.types import GroupExperience, Loss, Objective, Term, UserError

V, RLOO = recordings.load("grpo_loss.npz"), recordings.load("rloo_loss.npz")
PARAMS = {"policy": {"logps": V["logps"]}}
MAX, TOKENS = int(V["max_completion_length"]), float(V["mask"].sum())
M = tiny.Replay()


def recorded(on_policy=False, **over):
    wide = lambda x: tiny.shifted(x * V["mask"])
    advantages = wide(np.broadcast_to(V["advantages"][:, None], V["mask"].shape))
    old = None if on_policy else wide(V["old_logps"])
    return GroupExperience(*tiny.replay_rows(V["mask"]), advantages, wide(V["old_logps"]), old, wide(V["ref_logps"]))._replace(**over)


def sparse(share=0.2):
    """`top_entropy` of the experience: the advantages of all but the tokens of the highest entropy are 0."""
    return lambda batch: batch._replace(advantages=batch.advantages * tiny.shifted(top_share(V["entropies"], V["mask"], share)))


def gspo_by(average):
    shares = lambda logp, old, advantages, rows: answers._answers_clipped(logp, advantages, rows, answers.answer_mean(logp - old, rows), 0.2, 0.2)
    return answer_gradient(M, lambda *x: answers.gspo_loss(*x, 0.2, 0.2), average, shares=shares)


TYPES = {"grpo": grpo.grpo, "dapo": grpo.token_grpo, "bnpo": grpo.token_grpo, "dr_grpo": lambda m, **k: grpo.dr_grpo(m, max_new=MAX, **k)}
same = lambda batch: batch  # noqa: E731
# what TRL recorded -> (our objective, what is done to the batch, our loss times this is theirs)
CASES = {f"{t}__{name}": (make(M, clip=0.2, clip_high=high, beta=beta), same, 1.0) for t, make in TYPES.items() for name, high, beta in [("eps0.2", None, 0.0), ("eps0.2_0.28__beta0.04", 0.28, 0.04)]}
CASES |= {
    "grpo__eps0.2__beta0.04": (grpo.grpo(M), same, 1.0),
    "grpo__eps0.2__beta0.04__bias_corrected_kl": (grpo.grpo(M, kl="k3_corrected"), same, 1.0),
    "dapo__eps0.2_0.28__delta1.5": (grpo.dapo(M, delta=1.5), same, 1.0),
    "gspo_grpo__eps0.0003_0.0004": (answers.gspo(M), same, 1.0),
    "gspo_grpo__eps0.2__beta0.04": (answers.gspo(M, clip=0.2, clip_high=None, beta=0.04), same, 1.0),
    # TRL's other averages of a ratio of answers are reductions that no name stands for here:
    "gspo_dapo__eps0.2": (gspo_by(token_mean), same, 1.0),
    "luspo_sequence__eps0.2": (gspo_by(grpo.sequence_sum), same, 1.0),
    "cispo__epshigh5.0": (grpo.cispo(M), same, 1.0),
    "cispo__epshigh1.2": (grpo.cispo(M, cap=1.2), same, 1.0),
    "sapo__tau1.0_1.05": (grpo.sapo(M), same, 1.0),
    "vespo": (answers.vespo(M), same, 1.0),
    "dapo__eps0.2__entropy_coef0.01": (grpo.token_grpo(M, entropy_coef=0.01), same, 1.0),
    "dapo__eps0.2__top_entropy0.2": (grpo.token_grpo(M), sparse(), 1.0),
    "grpo__eps0.2__off_policy_mask0.1": (grpo.grpo(M, beta=0.0, off_policy=0.1), same, 1.0),
    "gmpo__eps0.4": (answers.gmpo(M), same, 1.0),
    # The divisors of TRL's micro-batches and of num_items_in_batch; ours is the step's own count of tokens or answers.
    "grpo__eps0.2__grad_accum4": (grpo.grpo(M, beta=0.0), same, 1 / 4),
    "dapo__eps0.2__num_items100": (grpo.token_grpo(M), same, TOKENS / 100),
}  # fmt: skip
RECORDED = [k.removeprefix("loss__") for k in V.files if k.startswith("loss__")]


def recorded_entropies(x, u, tokens, mask, extra, f, *, entropy=False, temperature=1.0):
    """`token_loss` of `tiny.Replay` whose entropies are the recorded ones: over two tokens the log-prob would say what they are."""
    assert entropy
    h = jnp.asarray(tiny.shifted(V["entropies"] * V["mask"]))
    return jnp.where(mask > 0, f(x[..., 1], h, extra), 0.0).sum(), LogProbs(*jax.lax.stop_gradient((mask * x[..., 1], h, 0 * h)))


@pytest.mark.parametrize("name", RECORDED)
def test_trl(name, monkeypatch):
    if "entropy_coef" in name:
        monkeypatch.setattr(grpo, "token_loss", recorded_entropies)
    objective, change, scale = CASES[name.removesuffix("__on_policy")]
    batch = change(recorded(name.endswith("__on_policy")))
    loss, m, grads = tiny.gradient(objective)(PARAMS, batch)
    np.testing.assert_allclose(scale * loss, V[f"loss__{name}"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scale * grads["policy"]["logps"], V[f"grad__{name}"], rtol=1e-4, atol=1e-6)
    metrics = {k.removeprefix(f"metric__{name}__"): V[k] for k in V.files if k.startswith(f"metric__{name}__") and k.count("__") == name.count("__") + 2}
    # TRL counts the clips of tokens whose advantage `sparse` made 0 too.
    said = tiny.gradient(objective)(PARAMS, recorded())[1] if metrics and change is not same else m
    for theirs, value in metrics.items():
        np.testing.assert_allclose(said[theirs.replace("clip_ratio_", "clip_ratio/") if theirs.startswith("clip") else theirs], value, rtol=1e-5, atol=1e-7, err_msg=theirs)
    gap = np.abs(V["logps"] - V["old_logps"])[V["mask"] > 0].mean()
    np.testing.assert_allclose(m["sampling/sampling_logp_difference/mean"], gap, rtol=1e-4)
    assert ("kl" in m) == ("beta" in name)
    if batch.logp is None and "clip_ratio/region_mean" in m:
        assert m["clip_ratio/region_mean"] == 0


def test_every_recording_has_a_case():
    assert {n.removesuffix("__on_policy") for n in RECORDED} == set(CASES)


@pytest.mark.parametrize("make", [grpo.grpo, answers.gmpo], ids=lambda f: f.__name__)
def test_entropy_bonus(make):
    """Whatever the policy's loss is a mean over, the bonus is the mean over the step's tokens: on a real model, in micro-batches of
    unequal weight, by a second objective of the entropy alone."""
    params, batch = {"policy": tiny.init(tiny.LLAMA)}, tiny.grouped(np.random.default_rng(0), 8, 10)

    def entropy(params, frozen, aux, batch, key, stats):
        rows, x = grpo.read(tiny.LLAMA, params, batch, 0.0)
        out = logprob(x, tiny.LLAMA.unembed(params["policy"]), batch.tokens, rows.mask)
        return Loss({"entropy": Term(out.entropy.sum(), rows.mask.sum())}, {})

    (a, m, ga), (b, _, gb), (h, _, gh) = (tiny.gradient(o, n)(params, batch) for o, n in ((make(tiny.LLAMA, entropy_coef=0.3), 4), (make(tiny.LLAMA), 1), (Objective(entropy), 1)))
    np.testing.assert_allclose(m["entropy"], h, rtol=1e-5)
    np.testing.assert_allclose(a, b - 0.3 * h, rtol=1e-4, atol=1e-6)
    assert tiny.far(ga, jax.tree.map(lambda x, y: x - 0.3 * y, gb, gh)) < 1e-3


def test_soft_clips():
    """SAPO: the slope in r is A at r = 1 for either tau, and fades on both sides. VESPO: weight 1 at W = 1, largest at k / lambda."""
    slope = jax.vmap(jax.grad(lambda d, a: grpo.sapo_loss(d, 0.0, a, 1.0, 3.0)), (0, None))
    for a, tau in ((2.0, 1.0), (-2.0, 3.0)):
        got = slope(jnp.log(jnp.array([0.5, 1.0, 1.5])), a) / jnp.array([0.5, 1.0, 1.5])
        p = 1 / (1 + np.exp(-tau * np.array([-0.5, 0, 0.5])))
        np.testing.assert_allclose(got, -a * 4 * p * (1 - p), rtol=1e-4)
    assert np.isfinite(slope(jnp.array([-300.0, 300.0]), -1.0)).all()
    w = np.array([1e-30, 0.5, 2 / 3, 1.0, 1.5, 3.0, 1e30])
    got = answers.vespo_weight(jnp.log(w), jnp.array([[1.0], [0.0], [-1.0]]), 2.0, 3.0, 3.0, 2.0)
    np.testing.assert_allclose(got, [np.exp(2 * np.log(w) + 3 - 3 * w)] * 2 + [np.exp(3 * np.log(w) + 2 - 2 * w)], rtol=1e-4, atol=1e-30)
    assert np.argmax(got, 1).tolist() == [2, 2, 4] and not np.any(got[:, -1])


def test_gmpo_clips_a_token_without_advantage_on_its_answers_side():
    """`rl.top_entropy` takes the advantage off some tokens; they still are factors of the answer's ratio."""
    d, mask, segments = jnp.array([[1.0, -1.0, 0.1, -1.0]]), jnp.ones((1, 4)), jnp.ones((1, 4), jnp.int32)
    rows = grpo.Rows(mask, segments, None, None, None, None)
    for a, clipped in ((1.0, [0.4, -1.0, 0.1, -1.0]), (-1.0, [1.0, -0.4, 0.1, -0.4])):
        some = a * jnp.array([[1.0, 0.0, 1.0, 0.0]])
        got = answers.gmpo_loss(d, jnp.zeros_like(d), some, rows, 0.4, 0.4)
        np.testing.assert_allclose(got, -some * np.exp(np.mean(clipped)), rtol=1e-6)


def test_masks_of_trl():
    np.testing.assert_array_equal(top_share(V["entropies"], V["mask"], 0.2) > 0, V["high_entropy_mask__threshold0.8"])
    rows, _ = grpo.read(M, PARAMS, recorded(), 0.0)
    keep = np.asarray(grpo.in_policy(jnp.asarray(tiny.shifted(V["logps"])), rows.advantages, rows, 0.1))
    want = np.broadcast_to(V["off_policy_keep_mask__threshold0.1"], V["mask"].shape)
    np.testing.assert_array_equal(keep[:, 1:][V["mask"] > 0], want[V["mask"] > 0])
    drops = np.asarray(grpo.in_policy(jnp.asarray(tiny.shifted(V["logps"])), rows.advantages, rows, -1e9))[:, 1:]
    np.testing.assert_array_equal((drops == 0).any(1), V["advantages"] < 0)  # a mask that the recorded one does not show: it drops


def rloo_batch(old):
    """The recorded log-prob of an answer, laid on its first token."""
    wide = lambda x: tiny.shifted(x * RLOO["mask"])
    first = RLOO["mask"] * (np.cumsum(RLOO["mask"], 1) == 1)
    logp = wide(first * RLOO["old_logps_sequence"][:, None]) if old else None
    return GroupExperience(*tiny.replay_rows(RLOO["mask"]), wide(np.broadcast_to(RLOO["advantages"][:, None], RLOO["mask"].shape)), 0 * wide(RLOO["mask"]), logp)


def test_rloo():
    """Rollouts that are used again: TRL's clipped ratio of answers. Used once: the gradient of -A log p(answer), mean over answers."""
    params = {"policy": {"logps": RLOO["logps"]}}
    loss, m, grads = tiny.gradient(answers.rloo(M))(params, rloo_batch(True))
    np.testing.assert_allclose(loss, RLOO["loss__eps0_2"], rtol=1e-5)
    np.testing.assert_allclose(grads["policy"]["logps"], RLOO["grad__eps0_2"], rtol=1e-4, atol=1e-6)
    rho = np.exp((RLOO["logps"] * RLOO["mask"]).sum(1) - RLOO["old_logps_sequence"])
    np.testing.assert_allclose(m["clip_ratio/high_mean"], ((rho > 1.2) & (RLOO["advantages"] > 0)).mean(), rtol=1e-6)
    loss, _, grads = tiny.gradient(answers.rloo(M))(params, rloo_batch(False))
    np.testing.assert_allclose(loss, -(RLOO["advantages"] * (RLOO["logps"] * RLOO["mask"]).sum(1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(grads["policy"]["logps"], -RLOO["advantages"][:, None] * RLOO["mask"] / 6, rtol=1e-4, atol=1e-7)


def test_gspo_by_token_has_the_value_and_the_gradient_of_gspo():
    a, b = (tiny.gradient(make(M, clip=0.1, clip_high=0.1, beta=0.04))(PARAMS, recorded()) for make in (answers.gspo, answers.gspo_token))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    assert tiny.far(b[2], a[2]) < 1e-5
    # With an advantage of its own for each token it is sum_t s A_t / |y|, every token moved by its own A_t only.
    own = np.random.default_rng(0).standard_normal(V["mask"].shape).astype(np.float32)
    loss, _, grads = tiny.gradient(answers.gspo_token(M, clip=0.9, clip_high=9.0))(PARAMS, recorded(advantages=tiny.shifted(own * V["mask"])))
    n = V["mask"].sum(1, keepdims=True)
    s = np.exp(((V["logps"] - V["old_logps"]) * V["mask"]).sum(1, keepdims=True) / n)
    want = -V["mask"] * s * own / n / len(own)
    np.testing.assert_allclose(loss, want.sum(), rtol=1e-4)
    np.testing.assert_allclose(grads["policy"]["logps"], want, rtol=1e-4, atol=1e-6)


def test_remax_and_reinforce_pp():
    """ReMax: -A log p, no ratio, summed over answers. REINFORCE++: the clipped token ratio with a mean over tokens, KL being in the advantages."""
    A = np.broadcast_to(V["advantages"][:, None], V["mask"].shape) * V["mask"]
    loss, m, grads = tiny.gradient(grpo.remax(M))(PARAMS, recorded())
    np.testing.assert_allclose(loss, -(A * V["logps"]).sum() / 6, rtol=1e-5)
    np.testing.assert_allclose(grads["policy"]["logps"], -A / 6, rtol=1e-4, atol=1e-7)
    assert "clip_ratio/region_mean" not in m
    np.testing.assert_allclose(tiny.gradient(grpo.reinforce_pp(M))(PARAMS, recorded())[0], V["loss__dapo__eps0.2"], rtol=1e-5)


@pytest.mark.parametrize("kl", ["k1", "k2", "abs"])
def test_other_penalties(kl):
    """With advantages 0 the loss is beta times the estimate, and its gradient the estimate's own: 1, d, sign(d)."""
    d = (V["logps"] - V["ref_logps"]) * V["mask"]
    value, slope = {"k1": (d, 1.0), "k2": (d**2 / 2, d), "abs": (abs(d), np.sign(d))}[kl]
    loss, m, grads = tiny.gradient(grpo.token_grpo(M, beta=0.5, kl=kl))(PARAMS, recorded(advantages=0 * recorded().advantages))
    np.testing.assert_allclose(loss, 0.5 * value.sum() / TOKENS, rtol=1e-4)
    np.testing.assert_allclose(m["kl"], value.sum() / TOKENS, rtol=1e-4)
    np.testing.assert_allclose(grads["policy"]["logps"], 0.5 * V["mask"] * slope / TOKENS, rtol=1e-3, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(UserError, match="objective.kl 'k4'"):
        grpo.grpo(M, kl="k4")
    with pytest.raises(UserError, match="objective.delta 1.1"):
        grpo.dapo(M, delta=1.1)
    with pytest.raises(UserError, match="objective.tau_pos 0"):
        grpo.sapo(M, tau_pos=0.0)
    with pytest.raises(UserError, match="lambda_neg 0"):
        answers.vespo(M, lambda_neg=0.0)
    with pytest.raises(UserError, match="no reference"):
        tiny.gradient(grpo.grpo(M, beta=0.1))(PARAMS, recorded(ref_logp=None))
    a, b = (tiny.gradient(grpo.grpo(M, beta=0.0))(PARAMS, recorded(ref_logp=r))[0] for r in (None, recorded().ref_logp))
    assert a == b


def test_averages_of_packed_rows():
    """Two answers in a row, one of them cut short, and a row of padding: weights and divisors by a loop over answers."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [0] * 8, [3, 3, 3, 3, 3, 0, 0, 0]], np.int32)
    mask = np.array([[0, 1, 1, 0, 0, 1, 0, 0], [0] * 8, [0, 1, 1, 1, 1, 0, 0, 0]], np.float32)
    want = np.zeros((3, 8))
    for b, s in [(0, 1), (0, 2), (2, 3)]:
        here = (segments[b] == s) & (mask[b] > 0)
        want[b, here] = 1 / here.sum()
    w, n = jax.jit(sequence_mean)(mask, segments)
    np.testing.assert_allclose(w, want, rtol=1e-6)
    np.testing.assert_allclose(n, 3, rtol=1e-6)
    np.testing.assert_allclose(token_mean(mask, segments)[1], 7)
    w, n = constant(10)(jnp.asarray(mask), segments)
    np.testing.assert_allclose(n, 30, rtol=1e-6)
    np.testing.assert_array_equal(w, mask)
    rows = grpo.Rows(mask, segments, None, None, None, None)
    x = np.arange(24, dtype=np.float32).reshape(3, 8)
    np.testing.assert_allclose(answers.answer_mean(x, rows)[0, [1, 5]], [1.5, 5.0])


@pytest.mark.parametrize("make", [answers.gspo, answers.gmpo, answers.vespo, answers.rloo, lambda m: grpo.grpo(m, off_policy=0.01)], ids=["gspo", "gmpo", "vespo", "rloo", "off_policy"])
def test_a_real_model_and_any_split(make):
    """Gradients through `logprob` and not `token_loss`: whole, or in four pieces."""
    params, batch = {"policy": tiny.init(tiny.LLAMA)}, tiny.grouped(np.random.default_rng(0), 8, 10)
    (a, _, ga), (b, _, gb) = (tiny.gradient(make(tiny.LLAMA), n)(params, batch) for n in (1, 4))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert tiny.far(gb, ga) < 1e-3 and any(np.any(g) for g in jax.tree.leaves(ga))


def test_policy_gradient_is_the_shape_of_them_all():
    a = tiny.gradient(policy_gradient(M, grpo.reinforce_loss, token_mean))(PARAMS, recorded())[0]
    b = tiny.gradient(answer_gradient(M, lambda logp, old, advantages, rows: grpo.reinforce_loss(logp, old, advantages), token_mean))(PARAMS, recorded())[0]
    np.testing.assert_allclose(a, b, rtol=1e-6)
