"""The run directory survives kills, and equal numbers are equal bytes."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from jaxalign.train import disk, log
from jaxalign.types import UserError


def test_metrics_are_bytes_one_can_compare(tmp_path):
    values = {"loss": np.float32(0.1), "b": 3, "a": float("nan"), "z": float("-inf"), "tiny": 5e-324}
    with log.RunLog(tmp_path / "x") as x, log.RunLog(tmp_path / "y") as y:
        x.metrics(1, values)
        y.metrics(1, dict(reversed(values.items())))  # the order of the dict does not show
    line = (tmp_path / "x/metrics.jsonl").read_text()
    # float(np.float32(0.1)) = 0.10000000149011612 exactly; repr round-trips every double
    assert line == '{"step": 1, "a": null, "b": 3, "loss": 0.10000000149011612, "tiny": 5e-324, "z": -1e999}\n'
    assert line == (tmp_path / "y/metrics.jsonl").read_text()
    (read,) = log.read_jsonl(tmp_path / "x/metrics.jsonl")
    assert read["z"] == -math.inf and read["loss"] == float(np.float32(0.1))


def test_floats_survive_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**63, 200, dtype=np.uint64).view(np.float64)
    bits = bits[np.isfinite(bits)]
    with log.RunLog(tmp_path) as run:
        for i, x in enumerate(bits):
            run.metrics(i, {"x": x})
    read = np.array([r["x"] for r in log.read_jsonl(tmp_path / "metrics.jsonl")])
    assert read.tobytes() == bits.tobytes()


def test_only_numbers_are_metrics(tmp_path):
    with log.RunLog(tmp_path) as run:
        with pytest.raises(TypeError, match="'loss'"):
            run.metrics(1, {"loss": np.zeros(2)})
        with pytest.raises(TypeError, match="'note'"):
            run.metrics(1, {"note": "x"})


def test_truncate_rewinds_numbers_and_keeps_history(tmp_path):
    with log.RunLog(tmp_path) as run:
        run.metrics(1, {"loss": 1.0})
        run.samples(1, [{"prompt": "a\nb", "completion": "é"}])
        run.timings(1, {"s": 1.0})
        run.event("start", score=float("nan"), array=np.arange(2))
        offsets = json.loads(json.dumps(run.offsets()))
        run.metrics(2, {"loss": 2.0})
        run.samples(2, [{"completion": "c"}])
        run.timings(2, {"s": 1.0})
        run.event("skip")
    with log.RunLog(tmp_path) as run:
        run.truncate(offsets)
        run.metrics(2, {"loss": 3.0})
    assert [r["loss"] for r in log.read_jsonl(tmp_path / "metrics.jsonl")] == [1.0, 3.0]
    assert log.read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "a\nb", "completion": "é"}]
    assert [r["step"] for r in log.read_jsonl(tmp_path / "timings.jsonl")] == [1, 2]
    events = log.read_jsonl(tmp_path / "events.jsonl")
    assert [e["kind"] for e in events] == ["start", "skip"] and events[0]["array"] == [0, 1] and events[0]["score"] == "nan"
    with log.RunLog(tmp_path) as run:
        run.truncate({})
        assert run.offsets()["metrics.jsonl"] == 0 and run.offsets()["events.jsonl"] > 0


def test_truncate_refuses_what_it_cannot_mend(tmp_path):
    with log.RunLog(tmp_path) as run:
        run.metrics(1, {"loss": 1.0})
        run.samples(1, [{"completion": "c"}])
        offsets = run.offsets()
        run.metrics(2, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").unlink()
    with log.RunLog(tmp_path) as run, pytest.raises(UserError, match="samples.jsonl has 0 bytes"):
        run.truncate(offsets)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before  # refused before anything was cut
    with log.RunLog(tmp_path) as run, pytest.raises(UserError, match="not the end of a line"):
        run.truncate({"metrics.jsonl": offsets["metrics.jsonl"] - 1})


@pytest.mark.parametrize("tail", [b'{"step": 2, "lo', b"x" * 200_000])
def test_half_lines(tmp_path, tail):
    with log.RunLog(tmp_path) as run:
        run.metrics(1, {"loss": 1.0})
        run.event("start")
    for name in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / name, "ab") as f:
            f.write(tail)
    assert len(log.read_jsonl(tmp_path / "metrics.jsonl")) == 1
    with log.RunLog(tmp_path) as run:
        run.event("resume")
        run.metrics(2, {"loss": 1.0})
    assert [e["kind"] for e in log.read_jsonl(tmp_path / "events.jsonl")] == ["start", "resume"]
    assert [e["step"] for e in log.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_damage_inside_a_file_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        log.read_jsonl(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="No such file"):
        log.read_jsonl(tmp_path / "n.jsonl")


def test_every_line_survives_sigkill(tmp_path):
    code = (
        "import os, signal, sys; from jaxalign.train.log import RunLog\n"
        "run = RunLog(sys.argv[1])\n"
        "for i in range(100): run.metrics(i, {'x': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=os.getcwd()).returncode == -signal.SIGKILL
    assert [r["x"] for r in log.read_jsonl(tmp_path / "metrics.jsonl")] == list(range(100))


def test_other_processes_write_nothing(tmp_path):
    with log.RunLog(tmp_path / "x", process_index=1) as run:
        run.snapshot({})
        run.metrics(1, {"a": 1})
        run.event("x")
        run.truncate({"metrics.jsonl": 5})
        assert run.offsets() == {}
    assert not (tmp_path / "x").exists()


def test_snapshot_tells_what_changed_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    config = {"lr": 1e-3, "hf_token": "hf_" + "b" * 30, "max_tokens": 5, "url": "https://me:pw123@host/x", "tracker": {"api_key": "k"}}
    with log.RunLog(tmp_path) as run:
        run.snapshot(config, mesh={"data": 8})
        run.snapshot(config | {"lr": 2e-3}, mesh={"data": 4})
        run.event("alert", text="used hf_" + "c" * 30)
    text = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "aaaaaa" not in text and "bbbbbb" not in text and "cccccc" not in text and "pw123" not in text
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["lr"] == 2e-3 and saved["max_tokens"] == 5 and saved["tracker"]["api_key"] == "[redacted]"
    env = json.loads((tmp_path / "environment.json").read_text())
    assert env["platform"] == "cpu" and env["devices"] == 8 and env["jax"] and "host_platform_device_count" in env["XLA_FLAGS"]
    changes = {e["kind"]: e["changes"] for e in log.read_jsonl(tmp_path / "events.jsonl") if "changes" in e}
    assert changes == {"config_changed": {"lr": [1e-3, 2e-3]}, "environment_changed": {"mesh.data": [8, 4]}}


class Flaky:
    def __init__(self, good: int):
        self.good, self.seen = good, 0

    def metrics(self, step, values):
        self.seen += 1
        if self.seen > self.good:
            raise ConnectionError("no network, token hf_" + "d" * 30)

    def close(self):
        raise OSError("late")


def test_a_failing_mirror_never_stops_training(tmp_path):
    bad, fine = Flaky(1), Flaky(100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with log.RunLog(tmp_path, mirrors=[bad, fine]) as run:
            for i in range(5):
                run.metrics(i, {"x": i})
    assert bad.seen == 2 and fine.seen == 5  # one failure is the last call; the other mirror goes on
    assert len(caught) == 2 and "no network" in str(caught[0].message) and "ddd" not in str(caught[0].message)
    assert len(log.read_jsonl(tmp_path / "metrics.jsonl")) == 5
    assert [e["error"][:15] for e in log.read_jsonl(tmp_path / "events.jsonl")] == ["ConnectionError", "OSError: late"]


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    with log.RunLog(tmp_path, mirrors=[log.TensorBoard(tmp_path / "tb")]) as run:
        run.metrics(1, {"loss": np.float32(2.0)})
    assert list((tmp_path / "tb").iterdir()) and not log.read_jsonl(tmp_path / "events.jsonl")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"jaxalign\[tensorboard\]"):
        log.TensorBoard(tmp_path)


def test_lock_names_the_holder_and_dies_with_it(tmp_path):
    code = (
        "import sys, time; from jaxalign.train.disk import lock\n"
        "with lock(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf'"pid": {holder.pid}'), disk.lock(tmp_path):
            pass
        with disk.lock(tmp_path, process_index=1):  # the other processes of a run do not compete
            pass
    finally:
        holder.kill()
        holder.wait()
    with disk.lock(tmp_path), pytest.raises(UserError, match="in use"), disk.lock(tmp_path):
        pass
