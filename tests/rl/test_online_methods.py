"""Online DPO, XPO, Nash-MD and RAFT as whole stages: they train, a killed run goes on to the same bits, and impossible settings are refused."""

import numpy as np
import pytest
import runs
from jaxalign import build
from jaxalign.train.log import read_jsonl
from jaxalign.types import UserError


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with runs.devices(2):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def longer(prompt, first, second, record):
    """A judge, by import path."""
    return 0.5 + 0.4 * np.sign(len(first) - len(second))


def vowels(prompt, completion, record):
    return float(sum(c in "aeiou" for c in completion))


METHODS = {
    "online_dpo": dict(group=4, reward="runs:length_reward", epochs=2, minibatches=2),
    "online_hinge": dict(judge="test_online_methods:longer", staleness=1),
    "raft": dict(reward="runs:length_reward", group=4, keep=2, epochs=2, minibatches=2),
}


def config(name, files, rl=None, **more):
    c = build.base(name, vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    sections = dict(data=dict(path=f"{files}/prompts.jsonl", batch_size=4), train=dict(steps=5, save_every=3), optim=dict(lr=3e-3, warmup=2), sampling=dict(max_new=8))
    c.stage = build.stage(name, init=str(files / "start"), **{**sections, **more}, rl=METHODS[name] if rl is None else rl)
    return c


@pytest.mark.parametrize("name", METHODS)
def test_killed_and_resumed(name, data, tmp_path, monkeypatch):
    """Saved after 3 steps, killed after the 4th; where a rollout serves several steps, that is in the middle of one."""
    runs.train(config(name, data), tmp_path / "whole")
    runs.killed(4, lambda: runs.train(config(name, data), tmp_path / "torn"))
    runs.train(config(name, data), tmp_path / "torn")
    assert runs.facts(tmp_path / "torn") == runs.facts(tmp_path / "whole")
    rows = read_jsonl(tmp_path / "whole/metrics.jsonl")
    assert len(rows) == 5 and all(np.isfinite(r["loss"]) for r in rows) and any(r["grad_norm"] > 0 for r in rows)
    first = rows[0]
    if name == "online_dpo":
        np.testing.assert_allclose([first["loss"], first["rewards/margins"]], [np.log(2), 0], atol=1e-4)  # the policy is its own reference
    if name == "online_hinge":
        np.testing.assert_allclose(first["loss"], 1, atol=1e-4)
    if name == "raft":
        assert first["kept/scores"] > first["objective/scores"] and 0 < first["kept/share"] <= 0.5


@pytest.mark.parametrize(
    "name, rl, said",
    [
        ("online_dpo", dict(), "rl.reward is empty"),
        ("online_dpo", dict(reward="runs:length_reward", judge="test_online_methods:longer"), "rl.judge are both set"),
        ("online_dpo", dict(reward="runs:length_reward", group=1), "2 or more"),
        ("online_dpo", dict(reward="runs:length_reward", minibatches=4), "data.batch_size 4"),
        ("xpo", dict(reward="runs:length_reward", group=2), "one answer of the policy"),
        ("raft", dict(reward="runs:length_reward", group=4, keep=5), "rl.keep 5"),
    ],
)
def test_what_cannot_be_is_refused_before_it_runs(name, rl, said, data, tmp_path):
    with pytest.raises(UserError, match=said):
        c = config(name, data, rl=rl)
        build.make_stage(build.world(c, tmp_path), name, c.stage, tmp_path)


def test_raft_climbs(data, tmp_path):
    """Five of 259 bytes are wanted, so there is an order of magnitude to gain: seeds differ in how far they get, not in whether."""
    c = config("raft", data, rl=dict(reward="test_online_methods:vowels", group=8), data=dict(path=f"{data}/prompts.jsonl", batch_size=8), train=dict(steps=16), optim=dict(lr=2e-2), sampling=dict(max_new=8))
    runs.train(c, tmp_path)
    scores = [r["objective/scores"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert np.mean(scores[-4:]) > 2 * np.mean(scores[:4])
