"""Reproductions on the embedded reviews: their configs, and their arithmetic on run directories whose numbers are known."""

import json

import numpy as np
import pytest
import runs
from jaxalign import build
from jaxalign.evals import scaling as laws
from jaxalign.reproduce import overoptimisation, rankings, reviews, runner, scaling, sentiment


@pytest.mark.parametrize("name", runner.names())
def test_configs_and_claims(name):
    """Every run's config can be run, and what is claimed or tolerated is of a figure that there is."""
    r = runner.load(name)
    for arg in r.runs:
        c = r.get_config(arg or None)
        with runs.devices(1):
            build.check(c)
        assert set(c.order) <= set(c.stages.keys())
    assert {c.figure for c in r.claims} <= set(r.figures)
    assert set(r.tolerances) <= set(r.figures) | {f"curve {k}" for k in r.curves}


def seed_of(r, tmp_path, rows):
    """A seed whose run directories hold these metrics: {(run, stage): [row]}."""
    seed = runner.seed_of(r, tmp_path, 0)
    for (run, stage), lines in rows.items():
        (seed.runs[run] / stage).mkdir(parents=True, exist_ok=True)
        (seed.runs[run] / stage / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return seed


def test_scaling_finds_the_law_of_its_runs(tmp_path):
    law = laws.Law(0.7, 8.0, 90.0, 0.36, 0.42)
    rows = {}
    for name, (flops, shape) in scaling.RUNS.items():
        steps = scaling.steps_of(flops, shape)
        tokens = steps * scaling.BATCH * scaling.SEQ_LEN
        assert 6 * shape.parameters * tokens == pytest.approx(flops, rel=0.02)
        rows[name, "pretrain"] = [{"step": steps, "eval/nll": float(laws.loss(law, shape.parameters, tokens))}]
    assert len(scaling.RUNS) >= 12
    seed = seed_of(scaling.REPRODUCTION, tmp_path, rows)
    a = laws.exponents(law)[0]
    assert scaling.parametric(seed) == pytest.approx(a, abs=0.02)
    assert scaling.isoflop(seed) == pytest.approx(a, abs=0.08)
    low, high = (scaling.bound("isoflop", i)(seed) for i in (0, 2))
    assert low <= scaling.isoflop(seed) <= high
    line = scaling.REPRODUCTION.curves["8.0e+10 FLOPs"](seed)
    assert len(line) == 4 and line[0][0] < line[-1][0]


def test_overoptimisation_finds_the_turn(tmp_path):
    """RL that follows d (a - b log d) exactly, with its top at a known KL, and best of n by a proxy that is right up to a point."""
    kl = np.linspace(0, 30, 25)
    d = np.sqrt(np.maximum(kl, 1e-9))
    gain = d * (1.2 - 0.6 * np.log(d))  # highest at d = e
    rows = {("rl", f"ppo_{p}"): [{"step": i, "objective/scores": 0.1 * i, "eval/kl": k, "eval/gold": 0.5 + g} for i, (k, g) in enumerate(zip(kl, gain))] for p in overoptimisation.PROXIES}
    seed = seed_of(overoptimisation.REPRODUCTION, tmp_path, rows)
    r = np.random.default_rng(0)
    proxy = r.standard_normal((40, overoptimisation.BEST_OF))
    gold = 0.5 + proxy - 0.25 * proxy**2  # the best by the proxy are not the best
    gold = gold - gold.mean() + 0.5
    (seed.runs["base"]).mkdir(parents=True)
    (seed.runs["base"] / "best_of_n.json").write_text(json.dumps({"gold": gold.tolist(), "proxies": {p: proxy.tolist() for p in overoptimisation.PROXIES}}))
    p = "dim8"
    assert overoptimisation.turnover(p)(seed) == pytest.approx(np.e**2, abs=1.3)
    assert overoptimisation.lost(p)(seed) == pytest.approx(gain.max() - gain[-1], abs=0.05)
    assert overoptimisation.gained(p)(seed) > 1
    assert overoptimisation.r2(overoptimisation.rl_form)(p)(seed) == pytest.approx(1.0, abs=1e-6)
    points = overoptimisation.points_bon(seed, p)
    assert points[0] == pytest.approx([0, 0], abs=1e-9) and points[:, 1].argmax() not in (0, len(points) - 1)
    assert overoptimisation.r2(overoptimisation.bon_form)(p)(seed) > 0.8
    assert overoptimisation.root(overoptimisation.rl_form)(p)(seed) == pytest.approx(np.e, abs=1e-3)
    assert all(np.isfinite(f(seed)) for name, f in overoptimisation.REPRODUCTION.figures.items() if "accuracy" not in name)


def test_rankings_by_epoch(tmp_path):
    held_out = {"together": [0.70, 0.74, 0.75, 0.75], "shuffled": [0.72, 0.73, 0.71, 0.69]}
    at = lambda e: e * rankings.STEPS
    rows = {("", a): [x for e, y in enumerate(ys, 1) for x in ({"step": at(e) - 1, "accuracy": 0.6 + e / 10}, {"step": at(e), "eval/accuracy": y})] for a, ys in held_out.items()}
    seed = seed_of(rankings.REPRODUCTION, tmp_path, rows)
    got = {k: f(seed) for k, f in rankings.REPRODUCTION.figures.items()}
    assert got["together, epoch 1"] == 0.70 and got["shuffled, epoch 4"] == 0.69
    assert got["together less shuffled, epoch 4"] == pytest.approx(0.06)
    assert got["shuffled, trained on less held out"] == pytest.approx(1.0 - 0.69)
    assert rankings.REPRODUCTION.curves["together"](seed)[0] == (1.0, 0.70)


def test_frontiers(tmp_path):
    """The upper hull of all strengths: a worse point below it changes nothing, and beyond the last rising corner it is flat."""
    points = [(0.0, 0.0), (4.0, 2.0), (1.0, 1.0), (2.0, 0.2), (6.0, 1.0)]
    assert [reviews.at_kl(points, k) for k in (0.0, 0.5, 1.0, 2.5, 4.0, 9.0)] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.0])
    rows = {("", "sft"): [{"step": 1, "eval/gold": 0.5}]}
    for m in sentiment.STRENGTHS:
        rows |= {("", a): [{"step": i, "eval/kl": float(i) + 0.1 * j, "eval/gold": 0.5 + i * (1 + (m == "dpo"))} for i in range(3)] for j, a in enumerate(sentiment.arms(m))}
    seed = seed_of(sentiment.REPRODUCTION, tmp_path, rows)
    assert sentiment.more("dpo", "ppo", 1.0)(seed) == pytest.approx(1.0)
    assert sentiment.frontier("dpo")(seed)[0] == (0.0, 0.5) and sentiment.at("dpo", 4.0)(seed) == pytest.approx(4.5)
