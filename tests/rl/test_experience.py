"""From a rollout to PPO's batch: TRL's numbers, the first minibatch, the source and its state."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign import shard
from jaxalign.objectives import ppo
from jaxalign.rl import rewards
from jaxalign.rl.control import KL
from jaxalign.rl.experience import answers, group_experience, kl_tokens, make_experience
from jaxalign.rl.online import OnlineSource
from jaxalign.rl.reinforce import reinforce_experience
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import Experience, Prompts, Rollout, UserError

PPO = recordings.load("ppo.npz", "mask", "old_logps", "ref_logps", "values", "scores", "kl_tokens__kl", "kl_tokens__full", "full_*", "rewards__kl_coef0.15__kl", "adaptive_kl__*", "advantages_whitened__gamma1_lam0.95",
                       "advantages_whitened__gamma0.99_lam0.9", "returns__gamma1_lam0.95", "returns__gamma0.99_lam0.9")  # fmt: skip
MESH = shard.make_mesh({}, jax.devices()[:1])


# -- against TRL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam, name", [(1.0, 0.95, "gamma1_lam0.95"), (0.99, 0.9, "gamma0.99_lam0.9")])
def test_trl(gamma, lam, name):
    """Log-probs, values and scores in; per-token rewards, GAE and whitening come out where TRL has them (shifted by one)."""
    mask, rows = PPO["mask"], tiny.replay_rows(PPO["mask"])
    rollout = Rollout(*rows, jnp.asarray(tiny.shifted(PPO["old_logps"] * mask)), np.arange(5), np.int32(0), np.zeros(5, np.float32))
    params = {"policy": {"logps": PPO["old_logps"], "values": PPO["values"]}, "value": tiny.VALUE_HEAD}
    exp, m = make_experience(tiny.Replay(), None, params, {"logps": PPO["ref_logps"]}, rollout, PPO["scores"], 0.15, gamma=gamma, lam=lam)
    valid = rows.mask > 0
    for field, want in {"logp": PPO["old_logps"], "values": PPO["values"], "advantages": PPO[f"advantages_whitened__{name}"], "returns": PPO[f"returns__{name}"]}.items():
        got = np.asarray(getattr(exp, field))
        np.testing.assert_allclose(got[valid], tiny.shifted(want)[valid], rtol=1e-5, atol=2e-6, err_msg=field)
        assert not got[~valid].any()
    kl = (PPO["kl_tokens__kl"] * mask).sum(1).mean()
    np.testing.assert_allclose(m["objective/kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(m["objective/non_score_reward"], -0.15 * kl, rtol=1e-4)
    np.testing.assert_allclose(m["objective/scores"], PPO["scores"].mean(), rtol=1e-5)
    np.testing.assert_allclose(m["objective/rlhf_reward"], (PPO["rewards__kl_coef0.15__kl"] * mask).sum(1).mean(), rtol=1e-4)
    assert m["logprob_gap"] < 1e-5


def test_the_whole_kl_of_trl():
    """rl.kl_estimator full: TRL's kl_penalty of that name, token by token, and what PPO and RLOO take off for it."""
    mask, rows = PPO["mask"], tiny.replay_rows(PPO["mask"])
    rows = rows._replace(tokens=np.zeros_like(rows.tokens))
    model = tiny.ReplayLogits(PPO["full_policy_logps"].shape[-1])
    own, ref = ({"logits": jnp.pad(PPO[f"full_{who}_logps"], ((0, 0), (0, 1), (0, 0)))} for who in ("policy", "ref"))
    got = kl_tokens(model, own, ref, rows, None, None, "full")
    np.testing.assert_allclose(np.asarray(got)[:, 1:] * mask, PPO["kl_tokens__full"] * mask, rtol=1e-4, atol=1e-6)
    want = (PPO["kl_tokens__full"] * mask).sum(1).mean()
    rollout = Rollout(*rows, np.zeros(rows.mask.shape, np.float32), np.arange(5), np.int32(0), np.zeros(5, np.float32))
    params = {"policy": own, "value": {"weight": jnp.zeros(model.vocab), "bias": jnp.zeros(())}}
    scores = np.arange(5, dtype=np.float32)
    _, m = make_experience(model, None, params, ref, rollout, scores, 0.15, kl_estimator="full")
    np.testing.assert_allclose(m["objective/non_score_reward"], -0.15 * want, rtol=1e-4)
    for make in (group_experience, reinforce_experience):
        more = {"max_new": 4} if make is group_experience else {}
        np.testing.assert_allclose(make(model, params, ref, rollout, scores, group=5, beta=0.1, kl_estimator="full", **more)[1]["objective/kl"], want, rtol=1e-4)


def test_a_metric_is_one_number():
    """`reward_std` of those that compare answers and of those that do not: TRL's, over all of them, unbiased."""
    rows, r = tiny.rows(np.random.default_rng(0), 6, 10), np.arange(6, dtype=np.float32) ** 2
    rollout = Rollout(*rows, np.zeros((6, 10), np.float32), np.arange(6, dtype=np.int32), np.int32(0), np.zeros(6, np.float32))
    params = {"policy": tiny.init(tiny.LLAMA)}
    _, of = answers(tiny.LLAMA, params, None, rollout, jnp.asarray(r), group=2, max_new=4)
    _, other = group_experience(tiny.LLAMA, params, None, rollout, jnp.asarray(r), group=2, max_new=4)
    np.testing.assert_allclose(of["reward_std"], r.std(ddof=1), rtol=1e-5)
    assert of.items() <= other.items()


def test_trl_adaptive_kl():
    init, target, horizon = map(float, PPO["adaptive_kl__init_target_horizon"])
    control, beta = KL(init, target, horizon), init
    for observed, n, want in zip(PPO["adaptive_kl__observed"], PPO["adaptive_kl__n_steps"], PPO["adaptive_kl__coef_after"]):
        beta = control.update(beta, float(observed), int(n))
        np.testing.assert_allclose(beta, want, rtol=1e-6)
    assert KL(0.3).update(0.2, 100.0, 10**6) == 0.2  # without a target it stays
    with pytest.raises(UserError):
        KL(0.1, target=0.0)


# -- the first minibatch --------------------------------------------------------------------------------------------

HOW = Sampling(6, (3,), temperature=0.7)
PROMPT = 5


def prompt_rows(seed=0, B=8):
    r = np.random.default_rng(seed)
    length = r.integers(1, PROMPT + 1, B)[:, None]
    t = np.arange(PROMPT)
    real = t < length
    where = lambda x: np.where(real, x, 0).astype(np.int32)
    return Prompts(where(r.integers(4, tiny.V, (B, PROMPT))), where(1), where(t), np.arange(B, dtype=np.int32))


@pytest.mark.parametrize("critic", ["head", "network"])
def test_the_first_minibatch_has_ratio_one(critic):
    """Policy = reference, temperature 0.7, prompts and completions of many lengths: KL 0, ratio 1, approxkl 0, nothing
    clipped; sampler and trainer agree to 1e-4. At the wrong temperature none of this holds."""
    value = None if critic == "head" else tiny.SCALAR
    params = tiny.init(tiny.LLAMA, value=True)
    if value is not None:
        params = {**params, "value": tiny.init(tiny.SCALAR, seed=2)}
    rollout = generate(tiny.LLAMA, HOW, params["policy"], prompt_rows(), jax.random.key(1))
    assert len(set(np.asarray(rollout.mask).sum(1))) > 1
    exp, m = make_experience(tiny.LLAMA, value, params, params["policy"], rollout, np.arange(8, dtype=np.float32), 0.1, temperature=0.7)
    assert m["logprob_gap"] <= 1e-4 and abs(m["objective/kl"]) <= 1e-5
    loss, stats, grads = tiny.gradient(ppo.ppo(tiny.LLAMA, value, temperature=0.7, value_coef=0.5))(params, exp)
    assert abs(stats["val/ratio"] - 1) <= 1e-5 and stats["policy/approxkl_avg"] <= 1e-10
    assert stats["policy/clipfrac_avg"] == 0 and stats["val/clipfrac_avg"] == 0
    # at ratio 1 the policy loss is minus the mean of whitened advantages: 0; its gradient is not
    assert abs(stats["loss/policy"]) < 1e-5 and max(np.abs(g).max() for g in jax.tree.leaves(grads["policy"])) > 1e-3
    # V = V_old: half the mean squared distance to the returns
    mask = np.asarray(exp.mask)
    want = 0.5 * (mask * (np.asarray(exp.values) - np.asarray(exp.returns)) ** 2).sum() / mask.sum()
    np.testing.assert_allclose(stats["loss/value_avg"], want, rtol=1e-5)
    if critic == "head":
        _, off = make_experience(tiny.LLAMA, value, params, params["policy"], rollout, np.zeros(8, np.float32), 0.1, temperature=1.0)
        assert off["logprob_gap"] > 1e-2


def test_score_adjustments():
    """A missing stop costs its penalty before the clip: 3 - 1 = 2 -> 1.5; -5 -> -1.5; 1 stays."""
    got = jax.jit(lambda s, t: rewards.adjust(s, t, missing_eos_penalty=1.0, clip=1.5))(np.array([3.0, -5.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(got, [1.5, -1.5, 1.0])


# -- the source -----------------------------------------------------------------------------------------------------


class PromptSource:
    """Batches of eight prompts, each its own; row ids count up."""

    def __init__(self):
        self.at = 0

    def next(self, _):
        self.at += 1
        p = prompt_rows(self.at)
        return p._replace(row=p.row + 8 * self.at, records=tuple({"id": int(i)} for i in p.row + 8 * self.at))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, d):
        self.at = d["at"]


def learner(seed):
    """As much of a TrainState as a source reads."""
    return SimpleNamespace(params=tiny.init(tiny.LLAMA, seed, value=True), key=jax.random.key(0), step=jnp.int32(seed))


def source(scorer=None, **more):
    by_length = lambda rollout, prompts: jnp.asarray(rollout.mask).sum(1)
    reference = tiny.init(tiny.LLAMA, 9)
    make = lambda params, reference, rollout, scores, beta: make_experience(tiny.LLAMA, None, params, reference, rollout, scores, beta, temperature=HOW.temperature)
    options = {"epochs": 2, "minibatches": 4, "kind": Experience, "reference": reference, **more}
    return OnlineSource(PromptSource(), tiny.LLAMA, scorer or by_length, HOW, MESH, make, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_epoch_visits_every_row_once():
    s, state = source(), learner(0)
    for iteration in range(2):
        batches = [s.next(state) for _ in range(8)]
        whole = np.asarray(s.experience.tokens)
        keys = [row.tobytes() for row in whole]
        assert len(set(keys)) == 8  # rows are told apart by their tokens
        orders = []
        for epoch in range(2):
            rows = [row.tobytes() for b in batches[4 * epoch : 4 * epoch + 4] for row in np.asarray(b.tokens)]
            assert sorted(rows) == sorted(keys) and all(b.tokens.shape == (2, PROMPT + 6) for b in batches)
            orders.append(rows)
        assert orders[0] != orders[1] and orders[0] != keys  # shuffled, each time anew
        assert s.prompts.at == iteration + 1 == s.iteration


def test_metrics_come_with_the_rollout_only():
    s, state = source(), learner(0)
    seen = []
    for _ in range(9):
        s.next(state)
        seen.append(bool(s.metrics()))
    assert seen == [True] + [False] * 7 + [True]


@pytest.mark.parametrize("used", [3, 8, 0])
def test_a_source_goes_on_bitwise(used):
    """Stopped in the middle of an epoch, after the last minibatch, before the first. The policy has moved on by then, so
    experience that was sampled anew would differ; beta moves too."""
    old, new = learner(0), learner(1)
    kl = KL(0.2, target=0.5, horizon=50.0)
    first = source(kl=kl)
    for _ in range(used):
        first.next(old)
    d = first.state_dict()
    assert ("arrays" in d) == (used == 3)  # the experience in flight, and only while there is one
    plain = json.loads(json.dumps({k: v for k, v in d.items() if k != "arrays"}))
    second = source(kl=kl)
    second.load_state_dict({**plain, "arrays": jax.tree.map(np.asarray, d["arrays"]) if "arrays" in d else None})
    for _ in range(10):
        same(first.next(new), second.next(new))
    assert first.beta == second.beta != 0.2


def test_mixing_keeps_its_place():
    class Rows:
        at = 0

        def next(self, _):
            self.at += 1
            return tiny.rows(np.random.default_rng(self.at), 4, 8)

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, d):
            self.at = d["at"]

    a, b, state = source(mix=Rows()), source(mix=Rows()), learner(0)
    for _ in range(3):
        batch = a.next(state)
    assert set(batch) == {"ppo", "ptx"}
    b.load_state_dict(a.state_dict())
    same(a.next(state), b.next(state))
    assert b.mix.at == 4


def test_beta_follows_the_controller():
    """Each collection moves beta by control.KL with the sequence KL it saw and its 8 episodes; rewards use beta before."""
    kl = KL(0.2, target=0.5, horizon=50.0)
    s, state, beta = source(kl=kl, epochs=1, minibatches=1), learner(0), 0.2
    for _ in range(3):
        s.next(state)
        m = s.metrics()
        assert m["objective/beta"] == np.float32(beta)
        want = beta * (1 + np.clip(m["objective/kl"] / 0.5 - 1, -0.2, 0.2) * 8 / 50)
        np.testing.assert_allclose(s.beta, want, rtol=1e-6)
        assert s.beta != beta
        beta = s.beta


# -- Python rewards -------------------------------------------------------------------------------------------------


def words(ids):
    return " ".join(map(str, ids))


def test_python_rewards_see_their_rows_in_order():
    seen = []

    def reward(prompt, completion, record):
        seen.append((prompt, completion, record["id"]))
        return len(completion.split())

    s = source(rewards.python(reward, words, MESH), epochs=1, minibatches=1)
    batch = s.next(learner(0))
    p = prompt_rows(1)
    assert [i for *_, i in seen] == list(range(8, 16))
    assert [a for a, *_ in seen] == [words(t[g > 0]) for t, g in zip(p.tokens, p.segments)]
    assert [b for _, b, _ in seen] == [words(t[m > 0]) for t, m in zip(np.asarray(batch.tokens), np.asarray(batch.mask))]
    np.testing.assert_allclose(s.metrics()["objective/scores"], np.asarray(batch.mask).sum(1).mean(), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.5", [1.0]])
def test_bad_python_rewards_are_refused(bad):
    def unit_tests_pass(prompt, completion, record):
        return bad if record["id"] == 11 else 1.0

    with pytest.raises(UserError, match=r"unit_tests_pass returned .* for row 11 .*finite number"):
        source(rewards.python(unit_tests_pass, words, MESH)).next(learner(0))


def test_a_reward_model_scores_the_last_token():
    """`learned` is the model's reward of the whole row; `normalise` folds mean 0 and std 1 into its head."""
    params = tiny.init(tiny.SCALAR)
    rows = tiny.rows(np.random.default_rng(0), 8, 8)
    scores = np.asarray(rewards.learned(tiny.SCALAR, params)(rows, None))
    at = (rows.segments != 0).sum(1) - 1
    every = np.asarray(jax.jit(tiny.SCALAR.scores)(params, rows.tokens, rows.segments, rows.positions))
    np.testing.assert_allclose(scores, every[np.arange(8), at], rtol=1e-6)
    after = np.asarray(rewards.learned(tiny.SCALAR, rewards.normalise(params, scores))(rows, None))
    np.testing.assert_allclose([after.mean(), after.std()], [0, 1], atol=1e-5)
    shifted = np.asarray(rewards.learned(tiny.SCALAR, rewards.normalise(params, scores, scale=False))(rows, None))
    np.testing.assert_allclose(shifted, scores - scores.mean(), atol=1e-5)
    with pytest.raises(UserError, match="same score"):
        rewards.normalise(params, np.ones(8))


def test_an_ensemble_combines_what_its_members_say():
    rollout = tiny.rows(np.random.default_rng(0), 4, 8)
    members = [tiny.init(tiny.SCALAR, seed) for seed in range(3)]
    scorers = [rewards.learned(tiny.SCALAR, p) for p in members]
    each = np.stack([s(rollout, None) for s in scorers])
    assert each.std(0).min() > 0
    wants = {"mean": each.mean(0), "min": each.min(0), "median": np.median(each, 0), "mean_less_variance": each.mean(0) - 0.7 * each.var(0), "mean_less_std": each.mean(0) - 0.7 * each.std(0), "apart": each.T}
    assert wants.keys() == rewards.COMBINE.keys()
    for how, want in wants.items():
        np.testing.assert_allclose(rewards.ensemble(scorers, how, 0.7)(rollout, None), want, rtol=1e-5)
    assert rewards.ensemble(scorers[:1], "min") is scorers[0]


def test_averaged_weights_score_as_the_mean_where_a_model_is_linear_in_what_differs():
    """WARM: members that differ in their heads alone have the mean of their scores; trunks are averaged too."""
    a, b = tiny.init(tiny.SCALAR, 0), tiny.init(tiny.SCALAR, 1)
    rollout = tiny.rows(np.random.default_rng(0), 4, 8)
    score = lambda p: np.asarray(rewards.learned(tiny.SCALAR, p)(rollout, None))
    other = {"trunk": a["trunk"], "head": b["head"]}
    np.testing.assert_allclose(score(rewards.averaged([a, other])), (score(a) + score(other)) / 2, rtol=1e-5)
    got = rewards.averaged([a, b, a, a])
    jax.tree.map(lambda g, x, y: np.testing.assert_allclose(g, 0.75 * x + 0.25 * y, rtol=1e-5, atol=1e-7), got, a, b)


def test_a_process_model_scores_answers_by_their_steps():
    rows = tiny.rows(np.random.default_rng(3), 6, 12)
    params, breaks = tiny.init(tiny.SCALAR), np.arange(tiny.V) % 4 == 0
    logits = np.asarray(jax.jit(tiny.SCALAR.scores)(params, rows.tokens, rows.segments, rows.positions))
    got = np.asarray(rewards.process(tiny.SCALAR, params, breaks, "product")(rows, None))
    each = np.asarray(rewards.step_rewards(tiny.SCALAR, params, rows, breaks))
    for r in range(6):
        answer = np.flatnonzero(rows.mask[r])
        broken = [t for t in answer if breaks[rows.tokens[r, t]]]
        ends = [t for t in broken if t + 1 in answer and t + 1 not in broken and t + 1 != answer[-1]] + [answer[-1]]
        p = 1 / (1 + np.exp(-logits[r, ends]))
        np.testing.assert_allclose(got[r], p.prod(), rtol=1e-5)
        np.testing.assert_allclose(each[r, ends], p, rtol=1e-5)
        assert not np.delete(each[r], ends).any()
    assert rewards.line_breaks(lambda ids: chr(ids[0]), 11, 13).tolist() == [i == 10 for i in range(13)]
