"""Reward models as stages: what their scores are measured against, how members of an ensemble differ, who reads them in RL."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from jaxalign import build, shard, tree
from jaxalign.evals import policy
from jaxalign.models import heads
from jaxalign.ops import nn
from jaxalign.rl import rewards
from jaxalign.train import checkpoint
from jaxalign.types import UserError


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make = shard.make_mesh
    monkeypatch.setattr(shard, "make_mesh", lambda sizes: make({"data": 1}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def stage_of(where: Path, directory: Path, objective="reward", file="rankings", **sections):
    c = build.base("r", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    c.stage = build.stage(objective, **{"init": str(where / "start"), "data": {"path": f"{where}/{file}.jsonl", "batch_size": 8}, "train": {"steps": 3}, "optim": {"lr": 3e-3}, **sections})
    return build.make_stage(build.world(c, directory), "r", c.stage, directory)


def finished(s):
    params = s.finish(s.go())
    s.save(params)
    return params


def test_the_reference_policys_answers_have_mean_0_and_std_1(data, tmp_path):
    s = stage_of(data, tmp_path, normalisation=dict(by="reference", path=f"{data}/prompts.jsonl", samples=40, max_new=6))
    params = finished(s)
    # the same prompts and draws once more, and others: the former exactly, the latter nearly
    records = [json.loads(line) for line in (data / "prompts.jsonl").read_text().splitlines()]
    w, start = s.world, build.load_params(s.world, str(data / "start"), s.world.model.specs(), "")
    draw = lambda n, key: policy.reference_scores(
        w.model, start, build.sampling(w, build.ConfigDict({"max_new": 6, "temperature": 1.0})), build.prompt_rows(w, [records[i % len(records)] for i in range(n)], 40), s.model, params, key, w.mesh
    )
    same = draw(40, nn.fold(jax.random.key(0), "normalise", "r"))
    np.testing.assert_allclose([same.mean(), same.std()], [0, 1], atol=1e-5)
    others = draw(400, jax.random.key(7))
    assert abs(others.mean()) < 0.6 and 0.6 < others.std() < 1.6


def test_before_training_it_is_so_too_and_only_once(data, tmp_path):
    how = dict(by="candidates", before=True, path=f"{data}/prompts.jsonl", samples=40, max_new=6)
    s = stage_of(data, tmp_path, normalisation=how)
    raw = {k: np.asarray(x) for k, x in tree.flat(s.params).items()}
    want = np.asarray(build.normalised(s, "reference", s.params)["head"]["weight"])
    begin, seen = s.begin, []
    s.begin = lambda: (seen.append({k: np.array(x) for k, x in tree.flat(s.params).items()}), begin())[1]
    s.go()
    start = seen[0]
    np.testing.assert_allclose(start["head/weight"], want, rtol=1e-6)
    assert not np.allclose(start["head/weight"], raw["head/weight"]) and all(np.array_equal(start[k], raw[k]) for k in raw if k.startswith("trunk/"))
    again = stage_of(data, tmp_path, normalisation=how)
    begun, again.begin = again.begin, lambda: (seen.append(np.array(again.params["head"]["weight"])), begun())[1]
    again.go()  # there is a checkpoint now: nothing is sampled
    np.testing.assert_array_equal(seen[1], raw["head/weight"])


def test_demonstrations_have_mean_0_and_keep_their_scale(data, tmp_path):
    demonstrations = tmp_path / "sft.jsonl"
    demonstrations.write_text("".join(json.dumps({"prompt": f"{w}:", "completion": f" {w} {k}"}) + "\n" for k, w in enumerate(["tea", "soup", "rice", "fig", "oat"])))
    s = stage_of(data, tmp_path / "run", normalisation=dict(by="demonstrations", path=str(demonstrations)))
    trained = s.go()
    params = s.finish(trained)
    source = build.data_source(s.world, build.ConfigDict({"seq_len": 32, "packing": "pad"}), str(demonstrations), 8, 0, shuffle=False, kind="tokens")
    before, after = (policy.row_scores(s.model, p, source, s.world.mesh)[0] for p in (trained, params))
    assert len(after) == 5
    np.testing.assert_allclose(after, before - before.mean(), atol=1e-5)
    np.testing.assert_array_equal(params["head"]["weight"], trained["head"]["weight"])


@pytest.mark.parametrize(
    "sections, why",
    [
        (dict(normalisation=dict(by="reference")), "normalisation.path"),
        (dict(normalisation=dict(by="candidate")), "normalisation.by"),
        (dict(normalisation=dict(by="demonstrations", before=True, path="x")), "choose one"),
        (dict(objective="reward_steps", file="steps", normalise=True), "log-odds"),
    ],
)
def test_what_cannot_be_normalised_is_refused(data, tmp_path, sections, why):
    with pytest.raises(UserError, match=why):
        stage_of(data, tmp_path, **sections)


def test_members_of_an_ensemble(data, tmp_path):
    """One drawn head and other orders for those whose weights are averaged; one that goes on from a finished reward model has its."""
    a, b, c = (stage_of(data, tmp_path / n, head=head, data=dict(path=f"{data}/rankings.jsonl", batch_size=8, order=order)) for n, head, order in (("a", "shared", 0), ("b", "shared", 1), ("c", "", 1)))
    np.testing.assert_array_equal(a.params["head"]["weight"], b.params["head"]["weight"])
    assert not np.array_equal(a.params["head"]["weight"], c.params["head"]["weight"])
    first = [s.source.next(None).candidates.tokens for s in (a, b, c)]
    assert not np.array_equal(first[0], first[1]) and np.array_equal(first[1], first[2])
    members = [finished(stage_of(data, tmp_path / n, head="shared", data=dict(path=f"{data}/rankings.jsonl", batch_size=8, order=o))) for n, o in (("a", 0), ("b", 1))]
    on = stage_of(data, tmp_path / "d", init=str(tmp_path / "a"))
    jax.tree.map(np.testing.assert_array_equal, on.params, members[0])

    s = ppo_of(data, tmp_path / "ppo", reward=f"{tmp_path / 'a'},{tmp_path / 'b'}", combine="weights")
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *members)
    rollout = s.source.play_once()
    scores = said(s, rollout)
    np.testing.assert_allclose(scores, jax.jit(s_scalar(s).reward)(mean, rollout.tokens, rollout.segments, rollout.positions), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="functions"):
        ppo_of(data, tmp_path / "ppo", reward=f"{tmp_path / 'a'},runs:length_reward", combine="weights")


def test_a_process_model_judges_rollouts(data, tmp_path):
    params = finished(stage_of(data, tmp_path / "prm", objective="reward_steps", file="steps"))
    s = ppo_of(data, tmp_path / "ppo", reward=str(tmp_path / "prm"), steps="product")
    rollout, breaks = s.source.play_once(), np.arange(s.world.model.config.vocab) == s.world.tokenizer.encode("\n")[0]
    scores = {how: np.asarray(rewards.step_scores(s_scalar(s), params, rollout, breaks, how)) for how in ("min", "product", "last")}
    np.testing.assert_allclose(said(s, rollout), scores["product"], rtol=1e-5)
    each = ppo_of(data, tmp_path / "ppo", reward=str(tmp_path / "prm"), steps="each")
    tokens = said(each, rollout)
    assert tokens.shape == rollout.tokens.shape and np.isin(np.flatnonzero(tokens), np.flatnonzero(rollout.mask)).all()
    np.testing.assert_allclose(np.where(tokens > 0, tokens, 1).prod(1), scores["product"], rtol=1e-5)
    with jax.set_mesh(each.world.mesh):
        batch = each.source.next(each.begin()[0])  # PPO takes them as rewards of tokens
    assert np.isfinite(batch.returns).all() and np.abs(batch.returns).sum() > 0
    assert all(((0 < x) & (x < 1)).all() for x in scores.values())
    assert (scores["product"] <= scores["min"] + 1e-6).all() and (scores["min"] <= scores["last"] + 1e-6).all()
    with pytest.raises(UserError, match="rl.steps"):
        ppo_of(data, tmp_path / "ppo", reward=str(tmp_path / "prm"), steps="mean")


def said(s, rollout):
    return np.asarray(rewards.scored(s.source.scorer(rollout, None)).scores)


def s_scalar(s):
    return heads.Scalar(s.world.model)


def ppo_of(data, directory, **rl):
    c = build.base("p", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    c.stage = build.stage("ppo", init=str(data / "start"), data=dict(path=f"{data}/prompts.jsonl", batch_size=8), rl=rl, sampling=dict(max_new=8), train=dict(steps=1))
    s = build.make_stage(build.world(c, directory), "p", c.stage, directory)
    state = s.begin()[0]
    s.source.play_once = lambda: s.source._sample(state.params["policy"], s.source.prompts.next(None)._replace(records=()), jax.random.key(0), state.step)
    return s


def test_weights_tell_reward_models_apart(data, tmp_path):
    assert not checkpoint.holds(data / "start", "head") and not checkpoint.holds(tmp_path, "head")
