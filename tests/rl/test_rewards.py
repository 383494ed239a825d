"""Reward functions: groups, sums, token rewards, and every way to misbehave."""

import concurrent.futures
import json
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign import shard
from jaxalign.ops import advantage
from jaxalign.rl import functions, rewards
from jaxalign.rl.experience import make_experience
from jaxalign.rl.functions import Limits
from jaxalign.types import Prompts, Rollout, UserError

GROUPS = recordings.load("group_advantages.npz", "group_size", "rewards_per_func*", "reward_weights", "grpo_adv__scale_group*")
MESH = shard.make_mesh({}, jax.devices()[:1])
B, T = 8, 10
words = lambda ids: " ".join(map(str, ids))  # noqa: E731


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def rows(seed=0):
    x = tiny.rows(np.random.default_rng(seed), B, T)
    rollout = Rollout(*x, np.zeros((B, T), np.float32), np.arange(B, dtype=np.int32), np.int32(0), np.zeros(B, np.float32))
    return rollout, Prompts(*x[:1], *x[2:], rollout.row, tuple({"id": i, "answer": str(i)} for i in range(B)))


def scorer(name, **limits):
    limits = {"seconds": 20.0, **limits}
    return rewards.python(f"reward_functions:{name}", words, MESH, limits=Limits(**limits))


def score(name, **limits):
    return np.asarray(rewards.scored(scorer(name, **limits)(*rows())).scores)


def lengths():
    return np.asarray(rows()[0].mask).sum(1)


def test_a_function_in_a_process_says_what_it_says_here():
    import reward_functions

    here = rewards.python(reward_functions.count, words, MESH)(*rows())
    np.testing.assert_array_equal(score("count"), here)
    np.testing.assert_allclose(here, lengths() + np.arange(B) / 100, rtol=1e-6)


def test_several_processes_keep_the_order():
    np.testing.assert_array_equal(score("slow_first", workers=4), np.arange(B))


def test_groups_fields_and_tokens():
    whole = score("of_group")
    assert np.isnan(whole[1::2]).all() and not np.isnan(whole[::2]).any()
    for name in ("by_field", "of_trl", "of_trl_with_a_field"):
        np.testing.assert_array_equal(score(name), np.arange(B))
    for name in ("of_ids", "names_of_its_own"):
        np.testing.assert_array_equal(score(name), lengths())
    rollout, _ = rows()
    got = score("of_tokens")
    np.testing.assert_array_equal(got, np.where(rollout.mask > 0, rollout.tokens % 5, 0))
    with pytest.raises(UserError, match="short returned a list of 1 for 8 rows"):
        score("short")


@pytest.mark.parametrize(
    "name, row, says",
    [
        ("raises", 3, "raised ValueError: no such thing .*reward_functions.py:"),
        ("hangs", 2, "did not end within 0.5 seconds"),
        ("backtracks", 2, "did not end within 0.5 seconds"),
        ("dies", 5, r"broke the process that it ran in \(exit 7\)"),
    ],
)
def test_a_function_that_fails_is_stopped_and_named(name, row, says):
    """By default it stops the run; else its row alone has no score, or the one asked for, and is counted and told."""
    seconds = {} if name in ("raises", "dies") else {"seconds": 0.5}
    with pytest.raises(UserError, match=rf"reward function {name} {says.split(' .*')[0]}.* for row {row} "):
        score(name, **seconds)
    s = scorer(name, on_error="nan", **seconds)
    got = s(*rows())
    bad = np.arange(B) == row
    np.testing.assert_array_equal(got.scores, np.where(bad, np.nan, 1))
    np.testing.assert_array_equal(got.failed[name], bad)
    (event,) = s.events()
    assert (event["kind"], event["row"], event["function"]) == ("reward_failed", row, name) and not s.events()
    np.testing.assert_array_equal(score(name, on_error="-2", workers=2, **seconds), np.where(bad, -2, 1))


def test_a_function_that_only_hangs_does_not_take_the_whole_night(monkeypatch):
    monkeypatch.setattr(functions, "HANGS", 3)
    begin = time.monotonic()
    with pytest.raises(UserError, match="most rows hang"):
        score("always_hangs", seconds=0.2, on_error="nan")
    assert time.monotonic() - begin < 60  # not 600 a row; the bound is what matters, not the speed


def test_without_an_import_path_a_thread_is_abandoned():
    def forgets(prompt, completion, record):
        if record["id"] == 1:
            time.sleep(30)
        return 2.0

    got = rewards.python(forgets, words, MESH, limits=Limits(seconds=0.3, on_error="0"))(*rows())
    np.testing.assert_array_equal(got.scores, np.where(np.arange(B) == 1, 0, 2))


def test_children_end_with_their_scorer():
    s = rewards.python("reward_functions:count", words, MESH, limits=Limits(seconds=5.0))
    s(*rows())
    pool = next(c.cell_contents for c in rewards.halves(s)[0].__closure__[0].cell_contents.__closure__ if isinstance(c.cell_contents, functions.Pool))
    child = pool._free[0]._child
    assert child.poll() is None
    del s, pool
    import gc

    gc.collect()
    assert child.wait(10) is not None


def test_settings_are_refused():
    for bad in (dict(on_error="perhaps"), dict(seconds=-1.0), dict(workers=0)):
        with pytest.raises(UserError):
            Limits(**bad)
    with pytest.raises(UserError, match="cannot import"):
        rewards.python("reward_functions:nobody", words, MESH)


def test_a_weighted_sum_logs_its_parts():
    """2 x count - 1 x rank where there is one; a row without any score has none. Mean and unbiased std of each part, over the
    rows that have it."""
    names = rewards.short_names(["a.b:count", "of_group"])
    s = rewards.several({"count": scorer("count"), "of_group": scorer("of_group")}, (2.0, -1.0))
    got = s(*rows())
    a, b = score("count"), score("of_group")
    np.testing.assert_allclose(got.scores, 2 * a - np.nan_to_num(b), rtol=1e-6)
    m = rewards.summary(got._replace(scores=None))
    np.testing.assert_allclose([m["rewards/count/mean"], m["rewards/count/std"]], [a.mean(), a.std(ddof=1)], rtol=1e-5)
    np.testing.assert_allclose([m["rewards/of_group/mean"], m["rewards/of_group/std"]], [b[::2].mean(), b[::2].std(ddof=1)], rtol=1e-5)
    assert names == ["count", "of_group"] and rewards.short_names(["m:f", "n:f", "runs/f"]) == ["f", "f_2", "f_3"]
    assert s.where == "host"
    nothing = rewards.several({"none": scorer("none"), "of_group": scorer("of_group")}, (1.0, 1.0))(*rows())
    np.testing.assert_array_equal(np.isnan(nothing.scores), np.isnan(b))


@pytest.mark.parametrize("instead", ["0.5", "nan"])
def test_processes_agree_whether_tokens_are_scored(instead, monkeypatch):
    """One of two processes, where every row failed: nothing that it saw says whether the function scores tokens, but the other one knows."""
    from jax.experimental import multihost_utils

    others, threads = 0, []

    def gathered(x):
        threads.append(threading.current_thread())
        return np.array([x, others])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    rollout, prompts = rows()
    failing = scorer("group_raises", on_error=instead)
    assert failing(rollout, prompts).scores.shape == (B,)
    others = 1
    got = failing(rollout, prompts)
    np.testing.assert_array_equal(got.scores, advantage.at_last(np.full(B, float(instead), np.float32), rollout.mask))
    assert got.failed["group_raises"].all()
    both = rewards.several({"of_tokens": scorer("of_tokens"), "group_raises": failing}, (1.0, 1.0))
    call, finish = rewards.halves(both)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # as an online source does, whose step may be talking meanwhile
        said = thread.submit(call, rollout, prompts).result()
    assert finish(rollout, said).scores.shape == (B, T)
    others = 2
    with pytest.raises(UserError, match="of_tokens failed in another process"):
        scorer("of_tokens")(rollout, prompts)
    said = scorer("group_raises").halves[0](rollout, prompts)  # raises only once the others have been told
    told = len(threads)
    with pytest.raises(UserError, match="group_raises raised ValueError: for all of them for row 0"):
        scorer("group_raises").halves[1](rollout, said)
    assert len(threads) == told + 1 and set(threads) == {threading.main_thread()}


def test_tokens_and_answers_add_up():
    """A score of the answer stands at its last token, beside those of its tokens."""
    rollout, prompts = rows()
    got = np.asarray(rewards.several({"count": scorer("count"), "of_tokens": scorer("of_tokens")}, (1.0, 0.5))(rollout, prompts).scores)
    want = 0.5 * score("of_tokens")
    last = np.array([np.flatnonzero(m)[-1] for m in rollout.mask])
    want[np.arange(B), last] += score("count")
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_sum_in_trls_numbers():
    """Weighted rewards with gaps against `group_advantages.npz`: the sum that TRL's advantages come from."""
    group = int(GROUPS["group_size"])
    for inputs, name in (("rewards_per_func", "grpo_adv__scale_group"), ("rewards_per_func_nan", "grpo_adv__scale_group__nan")):
        total = rewards.weighted_sum([jnp.asarray(x) for x in GROUPS[inputs].T], GROUPS["reward_weights"].tolist())
        got = advantage.group_advantages(total, group)
        np.testing.assert_allclose(got, GROUPS[name], rtol=1e-4, atol=1e-5)


def test_ppo_reads_scores_of_tokens_and_leaves_out_rows_without():
    """Scores at last tokens alone are the scores of answers; elsewhere the return to go at token t is the sum of what comes at or
    after it (gamma = lambda = 1, no KL). A row without a score changes nothing but the number of rows."""
    rollout, _ = rows()
    params = tiny.init(tiny.LLAMA, value=True)
    how = dict(whiten_advantages=False, lam=1.0, missing_eos_penalty=0.5)
    scores = np.linspace(-1, 1, B).astype(np.float32)
    rollout = rollout._replace(truncated=(np.arange(B) % 2).astype(np.float32))
    make = lambda r, s: make_experience(tiny.LLAMA, None, params, params["policy"], r, jnp.asarray(s), 0.0, **how)  # noqa: E731
    (a, m), (b, n) = make(rollout, scores), make(rollout, advantage.at_last(jnp.asarray(scores), rollout.mask))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
    np.testing.assert_allclose(m["objective/scores"], n["objective/scores"], rtol=1e-5)
    each = np.random.default_rng(1).standard_normal((B, T)).astype(np.float32) * np.asarray(rollout.mask)
    got, _ = make(rollout._replace(truncated=np.zeros(B, np.float32)), each)
    want = np.cumsum(each[:, ::-1], 1)[:, ::-1] * np.asarray(rollout.mask)
    np.testing.assert_allclose(got.returns, want, atol=1e-5)
    gap = np.where(np.arange(B) == 2, np.nan, scores).astype(np.float32)
    c, o = make(rollout, gap)
    assert not np.asarray(c.mask)[2].any() and all(np.isfinite(x).all() for x in jax.tree.leaves(c)) and np.isfinite(list(o.values())).all()
    keep = np.arange(B) != 2
    np.testing.assert_allclose(np.asarray(c.advantages)[keep], np.asarray(a.advantages)[keep], atol=1e-6)
    np.testing.assert_allclose(o["objective/scores"], scores[keep].mean(), atol=1e-6)


def test_worker_file_stands_alone():
    """Started as a script it imports nothing but the standard library and the function's module."""
    import subprocess

    from jaxalign.rl import worker

    lines = json.dumps({"function": "reward_functions:count", "path": [str(Path(__file__).parent), *sys.path]}) + "\n"
    out = subprocess.run([sys.executable, "-P", worker.__file__], input=lines, capture_output=True, text=True, timeout=60)
    assert json.loads(out.stdout) == {"group": False}
