"""Models that teach or judge another one and have a shape of their own: teachers, and reward models. (What holds for every method is
in test_methods.py.)"""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
from jaxalign import build
from jaxalign.objectives import distill
from jaxalign.rl import given
from jaxalign.train import step
from jaxalign.types import UserError

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data of all kinds, a start, and a finished teacher that is wider and deeper."""
    directory = runs.prepared(tmp_path_factory.mktemp("data"))
    c = runs.config("lm", directory)
    c.model.update(dim=24, layers=2, hidden=40)
    c.stage.train.steps = 2
    with runs.devices(2):
        runs.train(c, directory / "teacher")
    return directory


def test_learns_from_a_teacher_of_another_shape(data, tmp_path):
    """And is evaluated with it, while it trains and as `jaxalign eval` reads a finished run back."""
    with runs.devices(2):
        s, params = runs.train(runs.config("distill", data), tmp_path)
        rows = [json.loads(r) for r in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["divergence"] < rows[0]["divergence"]
        finished = s.evaluate(s.begin()[0].replace(params=params), whole=True)
        assert finished["divergence"] == pytest.approx(rows[-1]["eval/divergence"], rel=1e-6)


def test_what_teaches_nothing_is_refused(data, tmp_path):
    with runs.devices(1):
        for value, match in (("", "needs a teacher"), (str(data / "nobody"), "distill.teacher")):
            c = runs.config("distill", data, teacher=value)
            with pytest.raises(UserError, match=match):
                build.make_stage(build.world(c, tmp_path), "distill", c.stage, tmp_path)
        shutil.copytree(data / "teacher", tmp_path / "other")
        said = json.loads((tmp_path / "other/config.json").read_text())
        said["tokenizer"] |= {"train_on": str(data / "text.jsonl"), "kind": "bpe"}
        said["model"]["vocab"] = 300
        (tmp_path / "other/config.json").write_text(json.dumps(said))
        c = runs.config("distill", data, teacher=str(tmp_path / "other"))
        with pytest.raises(UserError, match="another tokenizer"):
            build.make_stage(build.world(c, tmp_path), "distill", c.stage, tmp_path)


def mixed(data, share, max_new=8):
    """On-policy distillation of prompts with answers, `share` of the batches sampled."""
    c = build.base("gkd", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    c.stage = build.stage(
        "on_policy_distill", init=str(data / "start"), teacher=str(data / "teacher"), data=dict(path=f"{data}/sft.jsonl", batch_size=8), rl=dict(on_policy=share),
        sampling=dict(max_new=max_new), train=dict(steps=6, save_every=2), optim=dict(lr=3e-3),
    )  # fmt: skip
    return c


def rows(directory):
    return [json.loads(r) for r in (directory / "metrics.jsonl").read_text().splitlines()]


def test_which_batches_are_sampled():
    """One draw a batch, of the seed and the batch's number: the share is right, runs of either kind are those of coin tosses."""
    for share in (0.0, 0.25, 0.7, 1.0):
        drawn = np.array([given.sampled(3, i, share) for i in range(4000)])
        assert abs(drawn.mean() - share) <= 4 * (share * (1 - share) / 4000) ** 0.5
        assert abs((drawn[1:] != drawn[:-1]).mean() - 2 * share * (1 - share)) <= 0.04
    other = [given.sampled(4, i, 0.5) for i in range(100)]
    assert other != [given.sampled(3, i, 0.5) for i in range(100)]


def test_given_answers_take_the_place_of_sampled_ones(data, tmp_path):
    """As often as drawn, and with the same bits where the run is killed and goes on, between batches of either kind."""
    with runs.devices(2):
        runs.train(mixed(data, 0.5), tmp_path / "whole")
        runs.killed(3, lambda: runs.train(mixed(data, 0.5), tmp_path / "killed"))
        runs.train(mixed(data, 0.5), tmp_path / "killed")
    assert runs.facts(tmp_path / "whole") == runs.facts(tmp_path / "killed")
    said = rows(tmp_path / "whole")
    drawn = [given.sampled(0, i, 0.5) for i in range(6)]
    assert [r["on_policy"] for r in said] == drawn and len(set(drawn)) == 2
    assert [("completions/mean_length" in r) for r in said] == drawn
    assert all(r["divergence"] > 0 for r in said)


def test_the_two_ends(data, tmp_path):
    """Share 1 is the method without a file of answers; at share 0 a batch is rows of the file, and the loss that of `distill` on them."""
    with runs.devices(1):
        s = build.make_stage(build.world(c := mixed(data, 0.0, 24), tmp_path), "gkd", c.stage, tmp_path)
        state, _ = s.begin()
        batch = s.source.next(state)
        assert batch.tokens.shape[0] == 8 and s.source.iteration == 0
        texts = {(r["prompt"] + r["completion"]) for r in map(json.loads, (data / "sft.jsonl").read_text().splitlines())}
        assert {s.world.decode(t[g > 0]) for t, g in zip(np.asarray(batch.tokens), np.asarray(batch.segments))} <= texts
        run = lambda o, p: jax.jit(lambda p, f, b: step.gradient(o, p, f, (), b, state.key)[0])(p, s.frozen, batch)
        want = run(distill.distill(s.model, build.opened(str(data / "teacher"))[0].model, beta=0.5, alpha=1.0), state.params["policy"])
        np.testing.assert_allclose(run(s.objective, state.params), want, rtol=1e-6)
        s = build.make_stage(build.world(c := mixed(data, 1.0), tmp_path), "gkd", c.stage, tmp_path)
        assert not isinstance(s.source, given.InTurns)
        for share, path, match in ((1.2, "sft", "rl.on_policy 1.2"), (0.5, "prompts", "completion")):
            c = mixed(data, share)
            c.stage.data.path = f"{data}/{path}.jsonl"
            with pytest.raises(UserError, match=match):
                build.make_stage(build.world(c, tmp_path), "gkd", c.stage, tmp_path)


def test_a_reward_model_of_another_size(data, tmp_path):
    """Of its own shape, as its run directory says; with another tokenizer it is refused."""
    with runs.devices(1):
        c = runs.config("reward", data)
        c.model.update(dim=24, layers=2, hidden=40)
        c.stage.train.steps = 1
        runs.train(c, tmp_path / "judge")
        p = runs.config("grpo", data)
        p.stage.rl.reward, p.stage.train.steps = str(tmp_path / "judge"), 1
        s, _ = runs.train(p, tmp_path / "policy")
        row = json.loads((tmp_path / "policy/metrics.jsonl").read_text().splitlines()[-1])
        assert np.isfinite(row["reward"]) and row["reward_std"] > 0 and s.model.config.dim == 16
        said = json.loads((tmp_path / "judge/config.json").read_text())
        said["tokenizer"] |= {"train_on": str(data / "text.jsonl"), "kind": "bpe"}
        said["model"]["vocab"] = 300
        (tmp_path / "judge/config.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match="tokenizer"):
            build.make_stage(build.world(p, tmp_path / "again"), "grpo", p.stage, tmp_path / "again")
