"""What the methods without a critic make of rollouts and scores: TRL's recorded advantages, plain loops, and batches that are sampled
until they say something."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign import build, shard
from jaxalign.ops import advantage, masked
from jaxalign.ops.logprob import targets
from jaxalign.rl import reinforce
from jaxalign.rl.experience import IMPORTANCE, group_experience, importance, token_logps
from jaxalign.rl.online import OnlineSource
from jaxalign.rl.rollout import Sampling
from jaxalign.types import Prompts, Rollout, UserError

V = recordings.load("group_advantages.npz")
G, WEIGHTS = int(V["group_size"]), tuple(float(w) for w in V["reward_weights"])
MESH = shard.make_mesh({}, jax.devices()[:1])
close = lambda got, want, **k: np.testing.assert_allclose(got, want, **{"rtol": 1e-5, "atol": 1e-6, **k})  # noqa: E731


def recorded(truncated=None):
    """The recorded answers as a rollout of a network that replays their log-probs, one token being prompt."""
    rows = tiny.replay_rows(V["completion_mask"])
    cut = np.zeros(16, np.float32) if truncated is None else truncated
    return Rollout(*rows, tiny.shifted(V["policy_logps"] * V["completion_mask"]), np.arange(16, dtype=np.int32), np.int32(0), cut)


def made(scores, fn=group_experience, rollout=None, reference=True, **how):
    params = {"policy": {"logps": V["policy_logps"]}}
    ref = {"logps": V["ref_logps"]} if reference else None
    how = {"group": G, **({"max_new": 6} if fn is group_experience else {}), **how}
    exp, m = fn(tiny.Replay(), params, ref, rollout or recorded(), jnp.asarray(scores), **how)
    return exp, m, np.asarray(exp.advantages)[:, 1]  # of answers: at their first token


# -- advantages of TRL ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nan", ["", "__nan"])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "gdpo"])
def test_two_rewards(scale, nan):
    key = "gdpo_adv__normalize_then_sum" if scale == "gdpo" else f"grpo_adv__scale_{scale}"
    got = made(V["rewards_per_func" + nan.replace("__", "_")], scale_rewards=scale, reward_weights=WEIGHTS)[2]
    close(got, V[key + nan], atol=2e-6)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("nan", ["", "__nan"])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(beta, normalize, nan):
    """Leave-one-out baselines of rewards less beta times the answer's k1."""
    exp, m, got = made(V["rewards_per_func" + nan.replace("__", "_")], scale_rewards="rloo_batch" if normalize else "rloo", reward_weights=WEIGHTS, beta=beta)
    close(got, V[f"rloo_adv__beta{beta}__normalize{normalize}{nan}"], atol=2e-5)
    close((np.asarray(exp.logp) * np.asarray(exp.mask)).sum(1), V["rloo_old_logps"], rtol=1e-4)
    if beta:
        close(m["objective/kl"], ((V["policy_logps"] - V["ref_logps"]) * V["completion_mask"]).sum(1).mean(), rtol=1e-4)


def test_rloo_of_clipped_rewards():
    close(made(V["rewards_per_func"], scale_rewards="rloo", reward_weights=WEIGHTS, clip_score=0.5)[2], V["rloo_adv__beta0.0__clip0.5"])


def test_truncated_answers_are_not_trained_on():
    exp, m, _ = made(V["rewards_per_func"], rollout=recorded(1.0 - V["ends_with_eos"].astype(np.float32)), reward_weights=WEIGHTS, mask_truncated=True)
    np.testing.assert_array_equal(np.asarray(exp.mask)[:, 1:], V["mask_truncated__completion_mask"])
    assert exp.mask.sum() == V["mask_truncated__num_items"]
    close(m["completions/clipped_ratio"], 1 - V["ends_with_eos"].mean())
    lengths = V["completion_lengths"]
    close([m[f"completions/{k}_length"] for k in ("mean", "min", "max")], [lengths.mean(), lengths.min(), lengths.max()])


def test_the_soft_overlong_punishment():
    """max 10, the last 4 of them: 0 up to 6, then -1/4 a token, -1 from 10 on (paper: 16384 + 4096)."""
    close(advantage.overlong_penalty(jnp.array([1.0, 6, 7, 8, 10, 12]), 10, 4), [0, 0, -0.25, -0.5, -1, -1])
    r = (V["rewards_per_func"] * V["reward_weights"]).sum(1)
    length = V["completion_mask"].sum(1)
    exp, m, got = made(r.astype(np.float32), scale_rewards="none", overlong_buffer=4)
    want = r + np.clip((2 - length) / 4, -1, 0)
    close(m["reward"], want.mean())
    close(got, (want.reshape(-1, G) - want.reshape(-1, G).mean(1, keepdims=True)).reshape(-1), atol=1e-5)


def test_tokens_of_high_entropy():
    """Of a real policy the fifth of all answers' tokens with the largest entropy keep their advantage."""
    r = np.random.default_rng(0)
    x = tiny.rows(r, 8, 9)
    rollout = Rollout(*x, 0 * x.mask, np.arange(8, dtype=np.int32), np.int32(0), np.zeros(8, np.float32))
    params, scores = {"policy": tiny.init(tiny.LLAMA)}, jnp.asarray(r.standard_normal(8), jnp.float32)
    make = lambda **k: group_experience(tiny.LLAMA, params, None, rollout, scores, group=4, max_new=8, **k)[0]
    all_of_them, some = make(), make(top_entropy=0.2)
    mask = np.asarray(targets(x.mask, x.segments)) > 0
    entropy = np.asarray(token_logps(tiny.LLAMA, params["policy"], rollout).entropy)
    top = mask & (entropy >= np.quantile(entropy[mask], 0.8))
    np.testing.assert_array_equal(some.advantages, np.where(top, all_of_them.advantages, 0))
    np.testing.assert_array_equal(some.mask, all_of_them.mask)
    assert 0 < top.sum() < mask.sum() / 3


def test_answers_that_share_a_row():
    """Sequence KL, importance of answers, filtering and entropies with two answers a row are those of rows apart."""
    r = np.random.default_rng(1)
    P, N, B = 3, 5, 8
    prompt = np.repeat(r.integers(4, tiny.V, (2, P)), 4, 0)
    length = r.integers(1, N + 1, B)[:, None]
    t = np.arange(P + N)
    real = t < P + length
    tokens = np.where(real, np.concatenate([prompt, r.integers(4, tiny.V, (B, N))], 1), 0).astype(np.int32)
    mask = (real & (t >= P)).astype(np.float32)
    noise = (-2.7 + 0.3 * r.standard_normal(mask.shape)).astype(np.float32) * mask
    rollout = Rollout(tokens, mask, real.astype(np.int32), np.where(real, t, 0).astype(np.int32), noise, np.arange(B, dtype=np.int32), np.int32(0), (length[:, 0] == N).astype(np.float32))
    how = dict(group=4, max_new=N, scale_rewards="rloo", beta=0.3, importance_cap=1.1, importance_form="sequence_truncate", mask_truncated=True, top_entropy=0.5, overlong_buffer=2)
    scores = jnp.asarray(r.standard_normal(B), jnp.float32)
    apart, joint = (group_experience(tiny.LLAMA, {"policy": tiny.init(tiny.LLAMA)}, tiny.init(tiny.LLAMA, 9), rollout, scores, answers_per_row=k, **how) for k in (1, 2))
    for k, v in apart[1].items():
        close(joint[1][k], v, rtol=2e-4, atol=1e-4, err_msg=k)
    for f in ("mask", "advantages", "ref_logp"):
        a, b = np.asarray(getattr(apart[0], f))[:, P:] * mask[:, P:], np.asarray(getattr(joint[0], f))[:, P:].reshape(B, N) * mask[:, P:]
        close(b, a, rtol=2e-4, atol=2e-4, err_msg=f)


# -- advantages that know the token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_pp_by_loop(baseline):
    """Returns of -beta k1 per token and the score at the last, whitened over all tokens of the batch by the population's variance.
    An answer without a score stays out."""
    r = (V["rewards_per_func"] * V["reward_weights"]).sum(1).astype(np.float32)
    r[5] = np.nan
    exp, m, _ = made(r, reinforce.reinforce_experience, baseline=baseline, beta=0.1)
    score = r - np.nanmean(r.reshape(-1, G), 1).repeat(G) if baseline == "group" else r
    if baseline == "group":
        score[:G] = 0  # all equal
    mask, d = V["completion_mask"], V["policy_logps"] - V["ref_logps"]
    want = np.zeros_like(d)
    for b in range(16):
        back = score[b]
        for t in reversed(np.flatnonzero(mask[b])):
            back = back - 0.1 * d[b, t]
            want[b, t] = back
    ok = (mask > 0) & ~np.isnan(r)[:, None]
    want = (want - want[ok].mean()) / want[ok].std()
    close(np.asarray(exp.advantages)[:, 1:][ok], want[ok], rtol=1e-3, atol=1e-4)
    assert not np.asarray(exp.advantages)[5].any() and np.asarray(exp.mask)[5].any()
    close(m["objective/kl"], (d * mask).sum(1).mean(), rtol=1e-4)


def test_remax_baseline():
    """Three answers and, last, the greedy one: R - R(greedy), of the three alone; no scored greedy answer, no advantage."""
    r = np.arange(16, dtype=np.float32) ** 2
    r[7] = np.nan  # the second prompt's greedy answer
    exp, m, got = made(r, reinforce.remax_experience, group=3)
    want = (r.reshape(4, 4)[:, :3] - r.reshape(4, 4)[:, 3:]).reshape(-1)
    close(got, np.nan_to_num(want))
    np.testing.assert_array_equal(exp.tokens[:, 0], [i for i in range(16) if i % 4 != 3])
    close(m["reward_greedy"], np.nanmean(r[3::4]))
    close(np.asarray(exp.advantages)[0, 1:], np.nan_to_num(want)[0] * V["completion_mask"][0])  # gamma 1, no KL: the same at each token


def test_penalties_need_a_reference():
    for fn in (group_experience, reinforce.reinforce_experience):
        with pytest.raises(UserError, match="no reference"):
            made(np.zeros(16, np.float32), fn, reference=False, beta=0.1)
    with pytest.raises(UserError, match="several rewards"):
        made(np.zeros(16, np.float32), scale_rewards="gdpo")


@pytest.mark.parametrize("form", IMPORTANCE)
def test_importance(form):
    """Ratios of tokens or of answers (of two in a row, each its own), cut at the cap or dropped above it."""
    r = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1] * 7], np.int32)
    mask = np.array([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]], np.float32)
    a, b = (0.5 * r.standard_normal((2, 2, 7))).astype(np.float32)
    ratio = np.exp(a - b)
    if form.startswith("sequence"):
        whole = [[np.exp(((a - b) * mask)[i][segments[i] == s].sum()) for s in segments[i]] for i in range(2)]
        ratio = np.array(whole)
    want = np.minimum(ratio, 1.2) if form.endswith("truncate") else np.where(ratio <= 1.2, ratio, 0)
    got, m = importance(jnp.asarray(a), b, mask, 1.2, segments, form)
    close(np.asarray(got)[mask > 0], want[mask > 0], rtol=1e-4)
    close(m["sampling/importance_sampling_ratio/max"], (ratio * mask).max(), rtol=1e-4)
    assert ratio[mask > 0].max() > 1.2


def test_population_whitening():
    x, mask = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32), np.tri(3, 5, 1, np.float32)
    ok = mask > 0
    close(np.asarray(masked.population_whiten(x, mask))[ok], ((x - x[ok].mean()) / x[ok].std())[ok], rtol=1e-4)
    close(np.asarray(masked.population_whiten(x, mask, shift_mean=False))[ok], ((x - x[ok].mean()) / x[ok].std() + x[ok].mean())[ok], rtol=1e-4)


# -- dynamic sampling -----------------------------------------------------------------------------------------------


class PromptSource:
    """Batches of four prompts of one token; prompt i of all is row i."""

    at = 0

    def next(self, _):
        row = 4 * self.at + np.arange(4, dtype=np.int32)
        self.at += 1
        one = np.ones((4, 1), np.int32)
        return Prompts(4 + row[:, None] % 8, one, 0 * one, row, ())

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, d):
        self.at = d["at"]


def learner(seed=0):
    return SimpleNamespace(params={"policy": tiny.init(tiny.LLAMA, seed)}, key=jax.random.key(0), step=jnp.int32(seed))


def says(rollout, prompts):
    """Answers of a prompt whose row is a multiple of three differ in score; the score tells which answer it was."""
    row = np.asarray(rollout.row)
    return jnp.asarray(np.where(row // 2 % 3 == 0, row, 1).astype(np.float32))


HOW = Sampling(3, (3,))


def source(rounds, scorer=says, rival=None, mesh=MESH, **more):
    def keep(params, reference, rollout, scores, beta):
        exp, m = group_experience(tiny.LLAMA, params, None, rollout, scores, group=2 if rival is None else 3, max_new=3, scale_rewards="none")
        return exp._replace(ref_logp=jnp.asarray(rollout.row)[:, None] * jnp.ones((1, 4)), logp=exp.logp), m

    return OnlineSource(PromptSource(), tiny.LLAMA, scorer, HOW, mesh, keep, group=2, rounds=rounds, rival=rival, **more)


def rows(exp):
    return [int(r) for r in np.asarray(exp.ref_logp)[:, 0]]


def test_sampling_goes_on_until_the_batch_says_something():
    """Of prompts 0..11 in rounds of four those that say something are 0, 3 | 6 | 9: three rounds, in that order."""
    s = source(10)
    exp = s.next(learner())
    assert rows(exp) == [2 * p + g for p in (0, 3, 6, 9) for g in (0, 1)]
    m = s.metrics()
    assert m["dynamic_sampling/rounds"] == 3 and m["dynamic_sampling/discarded_groups"] == 8
    assert m["dynamic_sampling/left_over_groups"] == m["dynamic_sampling/missing_groups"] == m["frac_reward_zero_std"] == 0
    assert np.asarray(exp.advantages).any(1).all() and rows(s.next(learner()))[::2] == [24, 30, 36, 42]
    # Everything says something: nothing is moved. More than enough does: what is left over is counted.
    every = source(2, lambda rollout, prompts: jnp.asarray(rollout.row, jnp.float32))
    assert rows(every.next(learner())) == list(range(8)) and every.metrics()["dynamic_sampling/rounds"] == 1
    odd = source(2, lambda rollout, prompts: jnp.where(rollout.row < 2, 0.0, jnp.asarray(rollout.row, jnp.float32)))
    assert rows(odd.next(learner())) == list(range(2, 10)) and odd.metrics()["dynamic_sampling/left_over_groups"] == 3


def test_a_bound_ends_it():
    """After two rounds three of four groups are there: the fourth weighs nothing. With none at all it is an error that says so."""
    s = source(2)
    exp, m = s.next(learner()), s.metrics()
    assert m["dynamic_sampling/missing_groups"] == 1 and m["dynamic_sampling/rounds"] == 2
    assert s.events() == [{"kind": "short_batch", "groups": 3, "wanted": 4, "prompts": 8}] and s.events() == []
    mask = np.asarray(exp.mask)
    assert mask[:6].any(1).all() and not mask[6:].any() and not np.asarray(exp.advantages)[6:].any()
    close(m["completions/mean_length"], mask[:6].sum() / 6)
    close(m["reward"], np.mean([2 * p + g for p in (0, 3, 6) for g in (0, 1)]))
    assert np.isfinite(list(m.values())).all()
    with pytest.raises(UserError, match="of 12 prompts none"):
        source(3, lambda rollout, prompts: jnp.ones(8)).next(learner())
    with pytest.raises(UserError, match="two or more"):
        OnlineSource(PromptSource(), tiny.LLAMA, says, HOW, MESH, None, rounds=2)


def test_rounds_on_four_devices():
    """Rows move between devices where a batch is filled over several rounds, and come out the same."""
    mesh = shard.make_mesh({}, jax.devices()[:4])
    place = lambda s: SimpleNamespace(params=jax.device_put(s.params, shard.replicated(mesh)), key=s.key, step=s.step)
    scorer = lambda rollout, prompts: shard.place(np.asarray(says(rollout, prompts)), mesh)
    apart, alone = source(10, scorer, mesh=mesh), source(10)
    want, spread = alone.next(learner()), place(learner())
    with jax.set_mesh(mesh):
        got = apart.next(spread)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    close(got.advantages, want.advantages)
    assert len(got.tokens.devices()) == 4 and apart.metrics()["dynamic_sampling/rounds"] == 3


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("grpo", {"rl.group": 1}, "rl.group 1"),
        ("grpo", {"rl.importance_form": "token"}, "did you mean 'token_"),
        ("reinforce_pp", {"rl.baseline": "groups"}, "did you mean 'group'"),
        ("ppo", {"rl.scale_score": "std"}, "rl.scale_score 'std'"),
        ("ppo", {"rl.controller": "zieg"}, "rl.controller 'zieg'"),
        ("ppo", {"rl.whiten_form": "n"}, "rl.whiten_form 'n'"),
    ],
)
def test_what_could_never_run_is_refused(name, change, named):
    c = build.base("x")
    c.stage = build.stage(name, data={"path": "x.jsonl"})
    for k, v in change.items():
        section, field = k.split(".")
        c.stage[section][field] = v
    with pytest.raises(UserError, match=named):
        build.check(c)


def test_names_bring_their_own_defaults():
    """What the paper has and the family has not is said by the method, not left to a preset."""
    rl = {n: build.stage(n).rl for n in ("dapo", "rloo", "dr_grpo", "remax", "reinforce_pp_baseline", "a2c")}
    assert rl["dapo"].dynamic_rounds and rl["dapo"].mask_truncated and build.stage("dapo").objective.clip_high == 0.28
    assert (rl["rloo"].scale_rewards, rl["rloo"].beta, rl["dr_grpo"].scale_rewards) == ("rloo", 0.05, "none")
    assert (rl["remax"].group, rl["reinforce_pp_baseline"].baseline, rl["a2c"].epochs) == (1, "group", 1)


@pytest.mark.parametrize("staleness", [0, 1])
def test_it_goes_on_bitwise(staleness):
    """Between and within batches that took several rounds, with a rollout under way or none."""
    make = lambda: source(10, minibatches=2, staleness=staleness)
    for used in (2, 3):
        first, second = make(), make()
        for i in range(used):
            first.next(learner(i))
        d = first.state_dict()
        plain = json.loads(json.dumps({k: v for k, v in d.items() if k != "arrays"}))
        second.load_state_dict({**plain, "arrays": jax.tree.map(np.asarray, d.get("arrays", {}))})
        for i in range(used, used + 4):
            jax.tree.map(np.testing.assert_array_equal, first.next(learner(i)), second.next(learner(i)))
            assert first.metrics() == second.metrics()


def test_the_greedy_rival():
    """It is the most likely answer, whatever temperature and key, and stands last in its group."""
    prompts = PromptSource().next(None)
    args = (tiny.LLAMA, HOW, tiny.init(tiny.LLAMA), None, prompts)
    a, b = (reinforce.greedy(*args, jax.random.key(k), 0) for k in (0, 1))
    np.testing.assert_array_equal(a.tokens, b.tokens)
    x = tiny.LLAMA.hidden(args[2], *prompts[:3]).x[:, 0]
    first = jnp.argmax(x @ tiny.LLAMA.unembed(args[2]).weight.T, -1)
    np.testing.assert_array_equal(a.tokens[:, 1], first)
    exp = source(10, rival=reinforce.greedy).next(learner())
    greedy = {p: list(t) for p, t in zip(np.asarray(prompts.row), np.asarray(a.tokens))}
    assert list(np.asarray(exp.tokens)[2]) == greedy[0] and np.asarray(exp.tokens).shape[0] == 12
