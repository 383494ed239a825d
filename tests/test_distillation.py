"""Distillation as training runs it: a teacher of another shape, held-out numbers, killed and gone on with, on eight devices."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build, shard
from jaxalign.models import decoder
from jaxalign.objectives import distill
from jaxalign.train import step
from jaxalign.types import UserError

KINDS = ["distill", "on_policy_distill"]


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


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_goes_on_where_it_was(kind, data, tmp_path):
    with runs.devices(2):
        c = runs.config(kind, data)
        s, params = runs.train(c, tmp_path / "whole")
        rows = [json.loads(r) for r in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
        assert len(rows) == runs.STEPS and all(np.isfinite(r["divergence"]) and r["skipped"] == 0 for r in rows)
        if kind == "distill":
            assert rows[-1]["divergence"] < rows[0]["divergence"]
            finished = s.evaluate(s.begin()[0].replace(params=params), whole=True)  # as `jaxalign eval` reads a run back: with its teacher
            assert finished["divergence"] == pytest.approx(rows[-1]["eval/divergence"], rel=1e-6)
        else:
            assert rows[0]["reward"] == 0 and rows[0]["completions/mean_length"] > 0
        shutil.copytree(tmp_path / "whole", tmp_path / "again")
        kept = max(int(p.name) for p in (tmp_path / "again/checkpoints").iterdir() if p.name.isdigit())
        shutil.rmtree(tmp_path / "again/checkpoints" / str(kept))  # as if it had died after the one before, in the middle of an epoch
        shutil.rmtree(tmp_path / "again/params")
        runs.train(runs.config(kind, data), tmp_path / "again")
        assert runs.facts(tmp_path / "again") == runs.facts(tmp_path / "whole")


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


def test_pieces_of_the_vocabulary():
    """Both unembeddings cut over eight devices: the loss and gradient of one."""
    teacher = decoder.model(vocab=tiny.V, dim=8, layers=1, heads=2, hidden=16)
    params, frozen = tiny.init(tiny.LLAMA), {"teacher": tiny.init(teacher, 1)}
    batch = tiny.rows(np.random.default_rng(0), 8, 12)
    objective = distill.distill(tiny.LLAMA, teacher, beta=0.4, alpha=0.7, tau=1.5)
    run = jax.jit(lambda p, f, b: step.gradient(objective, p, f, (), b, jax.random.key(0)))
    one = run(params, frozen, batch)
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    put = lambda tree, specs: jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), tree, shard.shardings(specs, mesh))
    with jax.set_mesh(mesh):
        many = run(put(params, tiny.LLAMA.specs()), {"teacher": put(frozen["teacher"], teacher.specs())}, shard.place(batch, mesh))
    for k in one[1]:
        np.testing.assert_allclose(one[1][k], many[1][k], rtol=1e-5)
    assert tiny.far(many[2], one[2]) < 1e-5


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
