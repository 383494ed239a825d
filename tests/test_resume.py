"""Stopped anywhere and gone on with: the same bytes as a run that was never stopped."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import runs
from jaxalign import tree
from jaxalign.train import checkpoint
from jaxalign.train.log import RunLog, read_jsonl
from jaxalign.types import UserError

@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with runs.devices(2):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """kind -> (directory, facts) of a run that nothing interrupted."""
    done = {}

    def run(kind):
        if kind not in done:
            directory = tmp_path_factory.mktemp(kind)
            runs.train(runs.config(kind, data), directory)
            done[kind] = directory, runs.facts(directory)
        return done[kind]

    return run


class Killed(BaseException):
    """What no handler of the program catches: as if the process were gone."""


@pytest.fixture
def at_line(monkeypatch):
    """at_line(k, act): calls act() right after the metric line of step k is on disk, before anything else."""
    original = RunLog.metrics
    todo = {}

    def metrics(self, step, values):
        original(self, step, values)
        if act := todo.pop(step, None):
            act()

    monkeypatch.setattr(RunLog, "metrics", metrics)
    return todo.__setitem__


def kill():
    raise Killed


def events(directory: Path, kind: str) -> list[dict]:
    return [e for e in read_jsonl(directory / "events.jsonl") if e["kind"] == kind]


@pytest.mark.parametrize("kind, deaths", [("lm", (2, 5, 7)), ("reward", (5,)), ("dpo", (5,)), ("ppo", (5, 7)), ("grpo", (5,))])
def test_killed_and_resumed(kind, deaths, data, whole, at_line, tmp_path):
    """Saves are at 3, 6 and 7. Death at 2: nothing saved, all anew. At 5: back to 3, which in PPO and GRPO is the middle of an
    epoch (4 steps an iteration). At 7: back to 6."""
    for step in deaths:
        at_line(step, kill)
        with pytest.raises(Killed):
            runs.train(runs.config(kind, data), tmp_path)
        assert len(read_jsonl(tmp_path / "metrics.jsonl")) == step
    runs.train(runs.config(kind, data), tmp_path)
    assert [e["step"] for e in events(tmp_path, "resume")] == [step - 2 if step == 5 else step - 1 for step in deaths if step > 2]
    facts, straight = runs.facts(tmp_path), whole(kind)[1]
    assert facts == straight
    assert facts["metrics.jsonl"].count(b"\n") == runs.STEPS
    if kind == "ppo":
        rows = read_jsonl(tmp_path / "metrics.jsonl")
        betas = [r["objective/beta"] for r in rows if "objective/beta" in r]
        assert len(betas) == 2 and betas[0] != betas[1]  # the controller moved, and its state came back
        assert all("loss/ptx_avg" in r for r in rows) and facts["samples.jsonl"].count(b"\n") == 4


def test_terminated_in_the_middle_of_a_ppo_epoch(data, whole, at_line, tmp_path):
    """SIGTERM in step 5, the first minibatch of the second iteration: saved there, exit code 143, gone on from there."""
    at_line(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as e:
        runs.train(runs.config("ppo", data), tmp_path)
    assert e.value.code == 143
    points = checkpoint.Checkpoints(tmp_path / "checkpoints")
    assert points.latest() == 5 and points.meta(5)["source"]["used"] == 1
    assert points.structure(5, "source")["experience"]["tokens"].shape[0] == 16  # the experience in flight
    runs.train(runs.config("ppo", data), tmp_path)
    assert [e["step"] for e in events(tmp_path, "resume")] == [5]
    assert runs.facts(tmp_path) == whole("ppo")[1]


def flip(directory: Path) -> Path:
    """One bit, in the middle of the largest file of a checkpoint."""
    path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_checkpoint_falls_back(data, whole, at_line, tmp_path):
    at_line(7, kill)
    with pytest.raises(Killed):
        runs.train(runs.config("ppo", data), tmp_path)
    flip(tmp_path / "checkpoints/6")
    runs.train(runs.config("ppo", data), tmp_path)
    assert [e["step"] for e in events(tmp_path, "damaged_checkpoint")] == [6]
    assert [e["step"] for e in events(tmp_path, "resume")] == [3]
    assert runs.facts(tmp_path) == whole("ppo")[1]


def test_all_damaged_is_an_error_and_touches_nothing(data, whole, tmp_path):
    shutil.copytree(whole("lm")[0], tmp_path, dirs_exist_ok=True)
    for step in (6, 7):
        flip(tmp_path / f"checkpoints/{step}")
    before = runs.snapshot(tmp_path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="none is intact"):
        runs.train(runs.config("lm", data), tmp_path)
    assert runs.snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ("lm", "ppo"))
def test_a_completed_run_stays_as_it_is(kind, data, whole, tmp_path):
    shutil.copytree(whole(kind)[0], tmp_path, dirs_exist_ok=True)
    _, params = runs.train(runs.config(kind, data), tmp_path)
    assert runs.facts(tmp_path) == whole(kind)[1]
    assert events(tmp_path, "already_complete") and len(tree.flat(params)) == len(runs.weights(tmp_path / "params"))


@pytest.mark.parametrize(
    "kind, change, named",
    [
        ("lm", {"optim.lr": 0.5}, r"optim\.lr"),
        ("lm", {"train.steps": 9}, r"train\.steps"),
        ("lm", {"data.batch_size": 16}, "batch_size"),
        ("dpo", {"objective.beta": 0.7}, r"objective\.beta"),
        ("ppo", {"rl.minibatches": 1}, r"rl\.minibatches"),
        ("ppo", {"sampling.temperature": 0.5}, r"sampling\.temperature"),
    ],
)
def test_another_config_is_refused_by_name(kind, change, named, data, whole, tmp_path):
    shutil.copytree(whole(kind)[0], tmp_path, dirs_exist_ok=True)
    before = runs.snapshot(tmp_path)
    with pytest.raises(UserError, match=named):
        runs.train(runs.config(kind, data, **change), tmp_path)
    assert runs.snapshot(tmp_path) == before


def test_what_does_not_shape_training_may_change(data, whole, at_line, tmp_path):
    """How often to save, and how many checkpoints to keep."""
    at_line(5, kill)
    with pytest.raises(Killed):
        runs.train(runs.config("lm", data), tmp_path)
    runs.train(runs.config("lm", data, **{"train.save_every": 2, "train.keep": 5}), tmp_path)
    assert runs.facts(tmp_path) == whole("lm")[1]


def test_edited_data_is_refused(data, whole, tmp_path):
    shutil.copytree(whole("lm")[0], tmp_path / "run")
    shutil.copytree(data, tmp_path / "data")
    runs.train(runs.config("lm", tmp_path / "data"), tmp_path / "run")  # the same bytes elsewhere are the same data
    with open(tmp_path / "data/text.jsonl", "a") as f:
        f.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match="changed files"):
        runs.train(runs.config("lm", tmp_path / "data"), tmp_path / "run")
