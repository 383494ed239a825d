"""KL controllers, scales of scores, the end of answers and of rollouts: what a rollout is bounded and shaped by."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.rl import rewards
from jaxalign.rl.control import KL, Moments, ScoreScale
from jaxalign.rl.engine import generate as engine
from jaxalign.rl.experience import make_experience
from jaxalign.rl.rollout import Sampling, ends, generate
from jaxalign.types import Prompts, Rollout, UserError

STATS = recordings.load("masked_stats.npz", "running_*", "responses", "first_stop_index", "truncated_*")


def test_running_moments_of_trl():
    """Batch after batch: mean, std, variance and count so far."""
    m = Moments()
    for batch, (_, _, mean, std, var, count) in zip(STATS["running_batches"], STATS["running_after__bmean_bstd_mean_std_var_count"]):
        m = m.update(float(batch.mean()), float(batch.var()), len(batch))
        np.testing.assert_allclose([m.mean, m.std, m.var, m.count], [mean, std, var, count], rtol=1e-5)
    assert Moments().std == 0


def test_scores_are_clipped_then_scaled():
    """running: by all so far. first: by the first rollout's, for good. Neither minds what is not scored, nor scores that are all equal."""
    batches = [jnp.asarray(b) for b in STATS["running_batches"]]
    cut = jnp.zeros(6)
    running, first = ScoreScale("running"), ScoreScale("first", lambda s, t: jnp.clip(s, -0.5, 0.5))
    for i, b in enumerate(batches):
        np.testing.assert_allclose(running(b, cut), STATS["running_after__bmean_bstd_mean_std_var_count"][i, 3], rtol=1e-5)
        np.testing.assert_allclose(first(b, cut), np.clip(batches[0], -0.5, 0.5).std(ddof=1), rtol=1e-5)
    again = ScoreScale("running")
    again.load_state_dict(running.state_dict())
    assert again(batches[0], cut) == running(batches[0], cut)
    assert ScoreScale("running")(jnp.ones(6), cut) == 1
    np.testing.assert_allclose(ScoreScale("running")(batches[0].at[2].set(jnp.nan), cut), np.delete(batches[0], 2).std(ddof=1), rtol=1e-5)
    with pytest.raises(UserError, match="scale_score 'ran'"):
        ScoreScale("ran")


def test_what_a_missing_stop_costs():
    s, cut = jnp.array([2.0, -3.0, 0.5]), jnp.array([0.0, 1.0, 1.0])
    np.testing.assert_allclose(rewards.adjust(s, cut, missing_eos_value=-1.0), [2, -1, -1])  # replaced, whatever it was
    np.testing.assert_allclose(rewards.adjust(s, cut, missing_eos_penalty=1.0, clip=2.5), [2, -2.5, -0.5])  # less 1, then clipped


def test_controllers():
    """Target 2, observed 6: e = clip(2, 0.2) = 0.2. Ziegler, 50 of 100 episodes: x 1.1; RL4LMs: x 1.02, whatever the episodes."""
    seen = {"objective/kl": 6.0, "objective/kl_k3": 1.9, "objective/kl_per_token": 6.0}
    go = lambda name: (c := KL(0.5, 2.0, 100.0, name)).update(0.5, c.observed(seen), 50)  # noqa: E731
    np.testing.assert_allclose([go("ziegler"), go("rl4lms"), go("trlx")], [0.55, 0.51, 0.5 * (1 - 0.05 * 0.5)])
    with pytest.raises(UserError, match="rl.controller"):
        KL(controller="pid")


@pytest.mark.parametrize("controller, episodes, refused", [("ziegler", 499, False), ("ziegler", 500, True), ("trlx", 1000, True), ("rl4lms", 1000, False)])
def test_a_horizon_too_short_for_its_rollouts_is_refused(controller, episodes, refused):
    """At five horizons of episodes in a rollout the coefficient could turn to zero, beyond them negative: refused whatever the KL."""
    kl = KL(0.2, 6.0, 100.0, controller)
    if not refused:
        assert 0 < kl.update(0.2, 0.0, episodes) < 0.2
        return
    for observed in (0.0, 6.0, 60.0):
        with pytest.raises(UserError, match="rl.horizon 100.*data.batch_size"):
            kl.update(0.2, observed, episodes)


def test_a_config_with_such_a_horizon_is_refused_before_it_samples(tmp_path):
    import runs

    data = runs.prepared(tmp_path / "data")
    with pytest.raises(UserError, match="ppo.*rl.horizon 1: "):
        runs.train(runs.config("ppo", data, **{"rl.horizon": 1.0}), tmp_path / "run")


def test_unscored_answers_and_scales_in_an_experience():
    """An answer whose score is NaN has no mask; scores are divided after the clip; the KL per token is over all tokens."""
    x = tiny.rows(np.random.default_rng(0), 8, 9)
    rollout = Rollout(*x, 0 * x.mask, np.arange(8, dtype=np.int32), np.int32(0), np.zeros(8, np.float32))
    params, scores = tiny.init(tiny.LLAMA, value=True), np.arange(8, dtype=np.float32)
    make = lambda s, d, **k: make_experience(tiny.LLAMA, None, params, tiny.init(tiny.LLAMA, 9), rollout, s, 0.0, d, whiten_advantages=False, lam=1.0, **k)  # noqa: E731
    exp, m = make(np.where(scores == 3, np.nan, scores).astype(np.float32), 2.0, clip_score=5.0)
    mask = np.asarray(exp.mask)
    assert not mask[3].any() and mask[4].any() and np.isfinite(np.asarray(exp.advantages)).all()
    # lam = gamma = 1 and beta 0: every return is the score, clipped and halved
    want = (np.minimum(scores, 5) / 2)[:, None] * mask
    np.testing.assert_allclose(exp.returns, want, atol=1e-4)
    np.testing.assert_allclose(m["objective/scores"], np.delete(scores, 3).mean(), rtol=1e-6)
    kl = m["objective/kl"] * 7 / mask.sum()  # a mean over the seven that have a score
    np.testing.assert_allclose(m["objective/kl_per_token"], kl, rtol=1e-4)


def test_stop_tokens_count_from_stop_after_on():
    """TRL's first_true_indices, of the whole row; and with a start: the first stop at or after it, in every sampler."""
    t = jnp.arange(9)
    last = lambda row, after: next((i for i, e in enumerate(ends(Sampling(9, (2,), stop_after=after), row, t)) if e), 9)  # noqa: E731
    assert [last(row, 0) for row in STATS["responses"]] == list(STATS["first_stop_index"])
    want = [next((i for i, token in enumerate(row) if token == 2 and i >= 3), 9) for row in STATS["responses"]]
    assert [last(row, 3) for row in STATS["responses"]] == want != list(STATS["first_stop_index"])
    cut = np.where(np.arange(9) < STATS["first_stop_index"][:, None], STATS["responses"], 0)  # TRL drops the stop token, we keep it
    np.testing.assert_array_equal(cut, np.where(STATS["truncated_stop2_pad0"] == 2, 0, STATS["truncated_stop2_pad0"]))
    with pytest.raises(UserError, match="stop_after"):
        Sampling(4, stop_after=4)
    one = np.ones((6, 1), np.int32)
    prompts, stop = Prompts(4 + np.arange(6, dtype=np.int32)[:, None], one, 0 * one, np.arange(6, dtype=np.int32)), tuple(range(0, 12))
    args = tiny.LLAMA, tiny.init(tiny.LLAMA), prompts, jax.random.key(0)
    outs = [f(args[0], Sampling(6, stop, stop_after=3, **k), *args[1:]) for f, k in ((generate, {}), (engine, {"slots": 2}), (engine, {"draft": "ngram", "draft_tokens": 2}))]
    for out in outs:
        mask, tokens = np.asarray(out.mask), np.asarray(out.tokens)
        assert (mask.sum(1) >= 4).all() and (mask.sum(1) < 6).any()
        for b in range(6):
            said = tokens[b][mask[b] > 0]
            assert bool(out.truncated[b]) == (said[-1] not in stop) and not any(t in stop for t in said[3:-1])
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


def test_the_rest_of_a_rollout_is_skipped():
    """The source asks after each update; a yes brings the next rollout, whatever is left of this one."""
    from test_group_methods import learner, source

    s = source(0, minibatches=2, epochs=3, stop=lambda state: bool(state.aux))
    state = lambda far: SimpleNamespace(**learner().__dict__, aux=far)  # noqa: E731
    s.next(state(True))  # before the first rollout there is nothing to skip
    assert s.iteration == 1 and s.used == 1
    s.next(state(False))
    assert s.iteration == 1 and s.used == 2
    s.next(state(True))
    assert s.iteration == 2 and s.used == 1


def test_a_run_with_all_of_it_killed_and_resumed(tmp_path, monkeypatch):
    """Early stops, running scales, an average of the weights: killed at 4, back to 3, the bytes of a run that was not."""
    import runs
    from jaxalign.train.log import read_jsonl

    data = runs.prepared(tmp_path / "data")
    over = {"objective.target_kl": 1e-6, "objective.whiten_minibatch": True, "rl.scale_score": "running", "rl.clip_score": 1.5, "optim.ema": 0.9, "sampling.stop_after": 2, "rl.controller": "rl4lms"}
    c = lambda: runs.config("ppo", data, **over)  # noqa: E731
    with runs.devices(1):
        runs.train(c(), tmp_path / "whole")

        runs.killed(4, lambda: runs.train(c(), tmp_path / "cut"))
        runs.train(c(), tmp_path / "cut")
    assert runs.facts(tmp_path / "cut") == runs.facts(tmp_path / "whole")
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    collected = [i for i, r in enumerate(rows) if "objective/score_scale" in r]
    # A rollout is left as soon as an update of it was too far away, the next step collects: never after one that was not.
    far = [r["policy/policykl_avg"] > 1.5e-6 for r in rows]
    assert any(far) and len(collected) > 2
    for i in range(1, len(rows)):
        left = i - max(k for k in collected if k < i)  # updates of the rollout before this one
        assert (i in collected) == (far[i - 1] or left == 4), i
    assert len({rows[i]["objective/score_scale"] for i in collected}) > 1
