"""What a run says of its speed: phases that add up, goodput over restarts, FLOPs by hand, a trace that opens."""

import io
import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import pytest
import runs
from jaxalign import build
from jaxalign.models import decoder
from jaxalign.train import flops, progress
from jaxalign.train.log import RunLog, read_jsonl
from jaxalign.train.progress import Phases, Progress, Trace
from jaxalign.types import UserError


class Tty(io.StringIO):
    def isatty(self):
        return True


def test_progress_leaves_the_compile_and_pauses_out():
    now, out = [0.0], io.StringIO()
    bar = Progress("sft", 100, stream=out, clock=lambda: now[0], flops_per_token=2e9, peak_flops=1e13)
    now[0] = 60.0  # compiling
    assert bar.update(1, 5.0, tokens=1000) == {}
    for step in range(2, 12):
        now[0] += 0.5
        if step == 5:
            with bar.paused():
                now[0] += 30
        rates = bar.update(step, 4.0, tokens=1000)
    # 10 steps in 5 s = 2 steps/s = 2000 tokens/s = 4e12 FLOP/s of 1e13 = 40 %
    assert rates == pytest.approx({"steps_per_second": 2, "tokens_per_second": 2000, "flops_per_second": 4e12, "mfu": 0.4})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2  # step 1, and step 5 after the pause of 30 s
    assert lines[-1].startswith("sft 5/100 | loss 4.0000 |") and "2 steps/s | 2k tokens/s | MFU 40.0%" in lines[-1] and "ETA 0:00:4" in lines[-1]


def test_progress_on_a_terminal_and_without_a_peak():
    now, out = [0.0], Tty()
    bar = Progress("ppo", 3, stream=out, clock=lambda: now[0], flops_per_token=1e9)
    for step in (1, 2, 3):
        now[0] += 1
        bar.update(step, 1.0, tokens=10)
    bar.close("all done")
    assert out.getvalue().count("\r") == 3 and out.getvalue().endswith("\nppo: all done\n") and "10GFLOP/s" in out.getvalue() and "MFU" not in out.getvalue()
    quiet = io.StringIO()
    bar = Progress("x", 1, process_index=1, stream=quiet)
    bar.update(1)
    bar.close("nothing")
    assert quiet.getvalue() == ""


def test_phases_add_up():
    """10 s of data, of which 4 sampling, of which 1 scoring and 0.5 compiling; 2 s of steps, 0.25 of them compiling."""
    now = [0.0]
    phases = Phases(lambda: now[0])

    def spend(s):
        now[0] += s

    compiled = lambda s: (spend(s), phases.compiled("/jax/core/compile/backend_compile_duration", s))
    with phases("data"):
        spend(5)
        with phases("rollout"):
            spend(2.5)
            compiled(0.5)
            with phases("score"):
                spend(1)
        spend(1)
        phases.compiled("/jax/core/compile/jaxpr_trace_duration", 77.0)  # another event
    with pytest.raises(KeyError), phases("step"):
        spend(1.75)
        compiled(0.25)
        raise KeyError
    assert phases.seconds == {"data": 6, "rollout": 2.5, "score": 1, "compile": 0.75, "step": 1.75} and now[0] == 12
    assert phases.compilations == 2 and phases.productive() == 2.5 + 1 + 1.75


def test_compiling_is_heard_while_inside():
    f = lambda x, n: jax.jit(lambda x: x * 2.5 + n)(x)
    x = jnp.ones(3)
    f(x, 0)
    with Phases() as phases, phases("step"):
        f(x, 1)
    heard = phases.compilations
    f(x, 2)
    assert heard == phases.compilations == 1 and phases.seconds["compile"] > 0 < phases.seconds["step"]


def test_flops_by_hand():
    """D 8, F 16, V 32, one layer of one head, rows of 10: weights of the layer 4*64 + 3*128 = 640, unembedding 256. A forward
    pass is 2 per weight and, of causal attention, 2 D T = 160: 1952; without the unembedding 1440."""
    f = flops.of(decoder.model(vocab=32, dim=8, layers=1, heads=1, hidden=16), 10)
    norms = 2 * (8 + 8)  # counted as weights, too
    assert f.forward() == 1952 + norms and f.forward(unembed=False) == 1440 + norms
    assert f.training() == 3 * f.forward() and f.training(adapted=True, unembed=False) == 2 * (1440 + norms)
    # four epochs; sampled, old log-probs, reference, two rewards and a critic's values once per token
    a, b = f.forward(), f.forward(unembed=False)
    assert f.online(False, 4, critic=True, rewards=2) == pytest.approx(3 * a + 3 * b + (3 * a + 3 * b) / 4)
    assert f.online(True, 1, critic=False, rewards=0) == pytest.approx(2 * a + 3 * a)
    assert flops.of(object(), 10) is None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with runs.devices(1):
        return runs.prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ppo(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ppo")
    began = time.time()
    with runs.devices(1):
        c = runs.config("ppo", data, **{"train.steps": 6, "train.save_every": 4, "train.log_every": 2})
        runs.train(c, directory)
    return c, directory, time.time() - began


def test_every_run_says_where_its_time_went(ppo):
    _, directory, wall = ppo
    first, *rows = read_jsonl(directory / "timings.jsonl")
    assert first.keys() == {"step", "time"} and first["step"] == 0
    assert [r["step"] for r in rows if r["step"] % 2 == 0] == [2, 4, 6]
    for r in rows:
        seconds = {k.removeprefix("seconds/"): v for k, v in r.items() if k.startswith("seconds/")}
        assert seconds.keys() >= {"data", "rollout", "score", "experience", "step", "compile"} and min(seconds.values()) >= 0
        assert sum(seconds.values()) <= wall and 0 < r["goodput"] < 1 and r["peak_memory_bytes"] > 2**20 and r["compilations"] >= 3
        productive = sum(seconds[k] for k in ("rollout", "score", "experience", "step"))
        assert r["goodput"] == pytest.approx(productive / (r["time"] - first["time"]), rel=0.02)
    assert rows[-1]["seconds/save"] > 0 and rows[-1]["flops_per_second"] > 0


def test_what_a_rollout_says_is_kept_whatever_log_every_is(ppo):
    """4 updates of each: rollouts are collected in steps 1 and 5, and every second step has a line."""
    rows = read_jsonl(ppo[1] / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 4, 5, 6]
    assert [r["step"] for r in rows if "objective/scores" in r] == [1, 5]


def test_every_evaluation_is_kept_whatever_log_every_is(data, tmp_path):
    with runs.devices(1):
        c = runs.config("lm", data, **{"data.eval_path": f"{data}/text.jsonl", "train.steps": 7, "train.eval_every": 3, "train.log_every": 5})
        runs.train(c, tmp_path / "lm")
    rows = read_jsonl(tmp_path / "lm/metrics.jsonl")
    assert {r["step"]: "eval/nll" in r for r in rows} == {3: True, 5: False, 6: True, 7: True}


def test_goodput_over_restarts(ppo, monkeypatch):
    """A run that died after its checkpoint of step 4 and lay idle for an hour: steps 5 and 6 of then are lost, the hour counts."""
    c, directory, _ = ppo
    first, *rows = read_jsonl(directory / "timings.jsonl")
    before = next(r for r in rows if r["step"] == 4)
    saved = json.loads((directory / "checkpoints/4/meta.json").read_text())["productive"]
    assert saved == pytest.approx(sum(v for k, v in before.items() if k.startswith("seconds/") and k.split("/")[1] not in progress.OVERHEAD))
    for gone in ("checkpoints/6", "params"):
        shutil.rmtree(directory / gone)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3600)
    with runs.devices(1):
        runs.train(c, directory)
    last = read_jsonl(directory / "timings.jsonl")[-1]
    own = sum(v for k, v in last.items() if k.startswith("seconds/") and k.split("/")[1] not in progress.OVERHEAD)
    assert last["step"] == 6 and last["time"] - first["time"] > 3600
    assert last["goodput"] == pytest.approx((saved + own) / (last["time"] - first["time"]), rel=0.02)


def test_the_flops_of_stages(data):
    with runs.devices(1):
        made = {}
        for kind in ("lm", "dpo", "reward", "ppo"):
            c = runs.config(kind, data)
            made[kind] = build.make_stage(build.world(c, data / "x"), kind, c.stage, data / "x")
        f = lambda kind, length: flops.of(made[kind].world.model, length)
        assert made["lm"].flops_per_token == f("lm", 32).training()
        longest = made["dpo"].source.source.report()["max_length"]
        assert made["dpo"].flops_per_token == f("dpo", longest).training()  # its reference is computed before the steps
        assert made["reward"].flops_per_token == f("reward", made["reward"].source.report()["max_length"]).training(unembed=False)
        longest = made["ppo"].source.prompts.report()["max_length"] + 8
        assert made["ppo"].flops_per_token == pytest.approx((3 + 3 / 2) * f("ppo", longest).forward())  # two epochs, a head, a reward in Python


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(jax.profiler, "start_trace", begun.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: begun.append("end"))
    for where, want in (("", []), (f"{tmp_path}", [3, "end at 6"]), (f"{tmp_path}:1-1", [1, "end at 2"]), (f"{tmp_path}:8-9", [8, "end"])):
        seen = []
        with Trace(where, "sft") as trace:
            for n in range(1, 9):
                begun.clear()
                trace.at(n)
                seen += [n if b == str(tmp_path / "sft") else f"end at {n}" for b in begun]
            begun.clear()
        assert seen + begun == want, where
    with pytest.raises(UserError, match="write DIR or DIR:3-5"):
        Trace(f"{tmp_path}:5-3")


def test_profile_writes_what_xprof_opens(data, tmp_path):
    with runs.devices(1):
        c = runs.config("lm", data, **{"train.steps": 3})
        build.make_stage(build.world(c, tmp_path / "run"), "lm", c.stage, tmp_path / "run").go(f"{tmp_path}/trace:2-2")
    (found,) = (tmp_path / "trace/lm/plugins/profile").rglob("*.xplane.pb")
    assert b"PjitFunction(step)" in found.read_bytes()


def test_the_first_line_says_when_the_run_began(tmp_path):
    with RunLog(tmp_path) as log:
        assert abs(log.began() - time.time()) < 60
        log.timings(0, {"time": 12.5})
        log.timings(1, {"time": 99.5})
        assert log.began() == 12.5
    with RunLog(tmp_path, process_index=1) as log:
        assert log.began() > 99.5
    assert re.match(r"\S+ in a 75%, b 25% \| 2k tokens/s \| goodput 50% \| 3 programs compiled \| peak 2 MiB$", progress.summary({"seconds/a": 3.0, "seconds/b": 1.0, "tokens_per_second": 2e3, "goodput": 0.5, "compilations": 3, "peak_memory_bytes": 2**21}))
