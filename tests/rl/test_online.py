"""The online source without a critic: groups, stale rollouts, devices that only sample, and what of it is in the state."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build, shard, tree
from jaxalign.objectives import grpo
from jaxalign.ops import nn
from jaxalign.ops.advantage import group_advantages
from jaxalign.rl import rewards
from jaxalign.rl.experience import group_experience, token_logps
from jaxalign.rl.online import OnlineSource, repeated
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train.log import read_jsonl
from jaxalign.types import Prompts, UserError

MESH = shard.make_mesh({}, jax.devices()[:1])
HOW = Sampling(5, (3,), temperature=0.7)
G, P = 4, 4


class PromptSource:
    """Batches of two prompts, each its own."""

    at = 0

    def next(self, _):
        self.at += 1
        r = np.random.default_rng(self.at)
        real = np.arange(P) < r.integers(1, P + 1, (2, 1))
        where = lambda x: np.where(real, x, 0).astype(np.int32)
        row = 2 * self.at + np.arange(2, dtype=np.int32)
        return Prompts(where(r.integers(4, tiny.V, (2, P))), where(1), where(np.arange(P)), row, tuple({"id": int(i)} for i in row))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, d):
        self.at = d["at"]


def learner(seed):
    """As much of a TrainState as a source reads: another policy for every seed."""
    return SimpleNamespace(params={"policy": tiny.init(tiny.LLAMA, seed)}, key=jax.random.key(0), step=jnp.int32(seed))


def value(prompt, completion, record):
    return len(completion.split()) + record["id"] % 3 / 10


words = lambda ids: " ".join(map(str, ids))  # noqa: E731
ON_HOST = rewards.python(value, words, MESH)


def source(scorer=ON_HOST, beta=0.1, mesh=MESH, options=(), **more):
    how = {"group": G, "max_new": HOW.max_new, "temperature": HOW.temperature, **dict(options)}
    make = lambda params, reference, rollout, scores, _: group_experience(tiny.LLAMA, params, reference, rollout, scores, **how)
    return OnlineSource(PromptSource(), tiny.LLAMA, scorer, HOW, mesh, make, group=G, reference=tiny.init(tiny.LLAMA, 9) if beta else None, **more)


def sampled(iteration, seed):
    """What iteration `iteration` samples with the policy `seed`, without a source."""
    prompts = PromptSource()
    prompts.at = iteration
    batch = repeated(prompts.next(None), G)
    return generate(tiny.LLAMA, HOW, tiny.init(tiny.LLAMA, seed), batch._replace(records=()), nn.fold(jax.random.key(0), "rollout", iteration)), batch


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_group_is_its_own_baseline():
    """Each prompt G times, in order, every copy with draws of its own; advantages by numpy; old and reference log-probs are
    those of the training forward, and the first update has ratio 1."""
    s, state = source(), learner(0)
    exp = s.next(state)
    rollout, batch = sampled(0, 0)
    same(exp.tokens, rollout.tokens)
    assert len(set(batch.row)) == 2 * G and len({t.tobytes() for t in np.asarray(rollout.tokens)[:G]}) > 1
    scores = np.asarray(ON_HOST(rollout, batch)).reshape(-1, G)
    want = (scores - scores.mean(1, keepdims=True)) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
    mask = np.asarray(exp.mask)
    np.testing.assert_allclose(exp.advantages, want.reshape(-1, 1) * mask, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exp.logp, exp.sampled, atol=1e-4)
    np.testing.assert_allclose(exp.ref_logp, token_logps(tiny.LLAMA, tiny.init(tiny.LLAMA, 9), rollout, temperature=0.7).logp, atol=1e-5)
    m = s.metrics()
    np.testing.assert_allclose([m["reward"], m["reward_std"], m["completions/mean_length"]], [scores.mean(), scores.std(ddof=1), mask.sum(1).mean()], rtol=1e-5)
    assert m["logprob_gap"] < 1e-4 and m["completions/max_length"] == mask.sum(1).max()
    gradient = tiny.gradient(grpo.grpo(tiny.LLAMA, beta=0.1, temperature=0.7))
    loss, stats, grads = gradient(state.params, exp)
    # "current" old log-probs: one forward less, the same update
    other = source(options={"old_logp": "current"}).next(state)
    assert other.logp is None
    loss2, stats2, grads2 = gradient(state.params, other)
    np.testing.assert_allclose(loss2, loss, atol=1e-6)
    assert tiny.far(grads2, grads) < 1e-4 and stats2["clip_ratio/region_mean"] == 0
    assert source(options={"old_logp": "rollout"}).next(state).logp is not None


def test_without_a_penalty_no_reference_runs(monkeypatch):
    from jaxalign.rl import experience

    ran = []
    monkeypatch.setattr(experience, "token_logps", lambda *a, **k: ran.append(1) or token_logps(*a, **k))
    # a shape of its own, so that nothing is compiled yet
    exp = source(beta=0, options={"old_logp": "current", "clip_score": 7.0}).next(learner(0))
    assert exp.ref_logp is None and exp.logp is None and not ran
    source(options={"old_logp": "current", "clip_score": 7.5}).next(learner(0))
    assert len(ran) == 1


def test_equal_rewards_teach_nothing():
    s = source(lambda rollout, prompts: jnp.full(2 * G, 0.1))
    exp = s.next(learner(0))
    assert not np.asarray(exp.advantages).any() and s.metrics()["frac_reward_zero_std"] == 1


# -- stale rollouts -------------------------------------------------------------------------------------------------

DEVICE = rewards._where("device", lambda rollout, prompts: jnp.asarray(rollout.mask).sum(1))
STALE = functools.partial(source, staleness=2, options={"importance_cap": 1.5})


@pytest.mark.parametrize("scorer", [ON_HOST, DEVICE, lambda rollout, prompts: jnp.asarray(rollout.mask).sum(1)], ids=["host", "device", "neither"])
def test_stale_rollouts(scorer):
    """Iteration i trains on what the policy of i - 2 sampled (that of 0 before), with importance weights of the policy of i."""
    s = STALE(scorer)
    for i in range(4):
        exp, m = s.next(learner(i)), s.metrics()
        rollout, batch = sampled(i, max(0, i - 2))
        same(exp.tokens, rollout.tokens)
        assert m["staleness"] == min(i, 2) and int(rollout.version) == 0
        now = np.asarray(token_logps(tiny.LLAMA, tiny.init(tiny.LLAMA, i), rollout, temperature=0.7).logp)
        mask = np.asarray(exp.mask)
        ratio = np.where(mask > 0, np.exp(now - np.asarray(rollout.logp)), 0)
        plain = np.asarray(group_advantages(jnp.asarray(scorer(rollout, batch)), G))[:, None]
        np.testing.assert_allclose(exp.advantages, plain * np.minimum(ratio, 1.5) * mask, rtol=2e-4, atol=1e-5)
        name = "sampling/importance_sampling_ratio"
        np.testing.assert_allclose(m[f"{name}/mean"], np.minimum(ratio, 1.5).sum() / mask.sum(), rtol=1e-4)
        np.testing.assert_allclose(m[f"{name}/max"], ratio.max(), rtol=1e-4)
        np.testing.assert_allclose(m["logprob_gap"], np.abs(mask * (now - np.asarray(rollout.logp))).max(), rtol=1e-3, atol=1e-4)
        assert (ratio.max() > 1.01) == (i > 0)


@pytest.mark.parametrize("scorer", [ON_HOST, DEVICE], ids=["host", "device"])
@pytest.mark.parametrize("used", [2, 3])
def test_a_stale_source_goes_on_bitwise(scorer, used):
    """Between iterations and in the middle of one: the rollouts under way are in the state, and are not sampled anew."""
    first = STALE(scorer, epochs=1, minibatches=2)
    for i in range(used):
        first.next(learner(i))
    d = first.state_dict()
    assert set(d["arrays"]) == {"rollout_0", "rollout_1"} | ({"experience"} if used % 2 else set())
    plain = json.loads(json.dumps({k: v for k, v in d.items() if k != "arrays"}))
    second = STALE(scorer, epochs=1, minibatches=2)
    second.load_state_dict({**plain, "arrays": jax.tree.map(np.asarray, d["arrays"])})
    for i in range(used, used + 6):
        same(first.next(learner(i)), second.next(learner(i)))
        assert first.metrics() == second.metrics()


def test_a_bad_reward_in_the_thread_is_named():
    bad = rewards.python(lambda prompt, completion, record: float("nan"), words, MESH)
    with pytest.raises(UserError, match="finite number"):
        STALE(bad).next(learner(0))


def test_devices_that_only_sample():
    """Four of the eight sample for the other four: the same experience, where it belongs, and the state without them."""
    train, rollout = shard.make_mesh({}, jax.devices()[4:]), shard.make_mesh({}, jax.devices()[:4])
    place = lambda s: SimpleNamespace(params=jax.device_put(s.params, shard.replicated(train)), key=s.key, step=s.step)  # noqa: E731
    apart, together = (source(DEVICE, mesh=m, staleness=1, rollout_mesh=r, beta=0) for m, r in ((train, rollout), (MESH, None)))
    on = lambda x: set(x.devices())  # noqa: E731
    for i in range(3):
        b = together.next(learner(i))
        with jax.set_mesh(train):
            a = apart.next(place(learner(i)))
        same(a.tokens, b.tokens)
        np.testing.assert_allclose(a.advantages, b.advantages, rtol=1e-5, atol=1e-6)
        assert on(a.tokens) == set(jax.devices()[4:]) and on(apart._queue[0]["rollout"].tokens) == set(jax.devices()[:4])
    assert all(on(x) == set(jax.devices()[4:]) for x in tree.flat(apart.state_dict()["arrays"]).values())


def test_a_run_on_split_devices_killed_and_resumed(tmp_path, monkeypatch):
    """rl.rollout_devices and rl.staleness from a config: killed at 5, back to 3, the bytes of a run that was not."""
    data = runs.prepared(tmp_path / "data")
    c = lambda: runs.config("grpo", data, **{"rl.staleness": 1, "rl.rollout_devices": 4})  # noqa: E731
    runs.train(c(), tmp_path / "whole")

    runs.killed(5, lambda: runs.train(c(), tmp_path / "cut"))
    runs.train(c(), tmp_path / "cut")
    assert runs.facts(tmp_path / "cut") == runs.facts(tmp_path / "whole")
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [r["staleness"] for r in rows if "staleness" in r] == [0, 1] and "sampling/importance_sampling_ratio/mean" in rows[4]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rl.group": 1}, "rl.group 1"),
        ({"rl.scale_rewards": "grup"}, "did you mean 'group'"),
        ({"rl.old_logp": "current"}, "rl.old_logp 'current'"),
        ({"rl.staleness": -1}, "rl.staleness -1"),
        ({"rl.importance_cap": 0.0}, "importance_cap 0.0"),
        ({"data.batch_size": 3}, "with rl.group 4 answers each"),
        ({"rl.rollout_devices": 3, "data.batch_size": 10}, "must divide the 40 answers"),
        ({"rl.rollout_devices": 99}, "more devices"),
    ],
)
def test_what_could_never_run_is_refused(change, named, tmp_path):
    with pytest.raises(UserError, match=named):
        build.check(runs.config("grpo", tmp_path, **{"data.batch_size": 8, "rl.minibatches": 1, **change}))
