"""SIGKILL to the command in the middle of a save and of a PPO epoch: the same bits. `benchmarks/resume.py`, in short."""

import random
import subprocess
import sys

import pytest
import runs


@pytest.fixture
def resume(monkeypatch):
    monkeypatch.syspath_prepend(runs.ROOT / "benchmarks")
    yield __import__("resume")
    sys.modules.pop("resume")


def test_ppo_killed_while_saving_and_between_minibatches(resume, tmp_path):
    data = tmp_path / "data"
    runs.write_data(data)
    runs.start(data)
    at = lambda d: runs.command("train", f"--config={runs.__file__}:ppo:{data}", f"--workdir={d}", "--config.stage.train.steps=24")  # noqa: E731
    argv, env = at(tmp_path / "whole")
    assert subprocess.run(argv, env=env).returncode == 0
    seed = random.randrange(2**32)
    rng, hits = random.Random(seed), []
    for kind in ("epoch", "save"):
        for _ in range(3):
            kill = resume.draw("ppo", kind, rng, steps=24)
            argv, env = at(tmp_path / "torn")
            resume.strike(argv, tmp_path / "torn", kill, env)
            print(f"seed {seed}: {kill}")
            if kill.hit:
                hits.append(kind)
                break
            if resume.finished(tmp_path / "torn"):
                break
    argv, env = at(tmp_path / "torn")
    assert subprocess.run(argv, env=env).returncode == 0
    assert runs.facts(tmp_path / "torn") == runs.facts(tmp_path / "whole")
    assert "epoch" in hits  # a save is over in milliseconds and may be missed
    # Run again, it has nothing to do and changes nothing.
    before = runs.facts(tmp_path / "torn")
    assert subprocess.run(argv, env=env).returncode == 0 and runs.facts(tmp_path / "torn") == before
