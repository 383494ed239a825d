"""Models that teach or judge another one and have a shape of their own: teachers, and reward models. (What holds for every method is
in test_methods.py.)"""

import json
import shutil

import numpy as np
import pytest
import runs
from jaxalign import build
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
