"""The random walks are trlX's, to the last digit that was measured of them, and the metric is its metric."""

import json
import math

import numpy as np
import pytest

from jaxalign.data import tokenizers
from jaxalign.tasks import randomwalks as r


def close(a, b):
    return a == pytest.approx(b, abs=6e-5)


def test_the_data_is_that_of_seed_1000():
    g = r.graph()
    scores = np.array([r.optimality(w) for w in g.walks])
    assert g.edges[1:].sum() == 51 and len(g.walks) == 1000 and (g.shortest[1:] < r.LENGTH).all()  # 51 edges, all starts reach the goal
    assert close(scores.mean(), 0.35151) and (scores == 1).mean() == 0.184 and (scores == 0).mean() == 0.495
    assert np.mean([w.endswith("a") for w in g.walks]) == 0.56
    assert {(a, b) for w in g.walks for a, b in zip(w, w[1:])} == {(r.LETTERS[a], r.LETTERS[b]) for a, b in zip(*np.nonzero(g.edges)) if a}
    best = {s: max(r.optimality(w) for w in g.walks if w[0] == s) for s in r.STARTS}
    assert close(np.mean(list(best.values())), 0.99167) and close(best["m"], 0.83333)


def test_the_default_seed_of_its_function_is_another_graph():
    g = r.graph(1002)
    assert close(np.mean([r.optimality(w, g) for w in g.walks]), 0.79018)


def test_exact_walkers():
    assert close(r.value(r.uniform()), 0.34623) and close(r.value(r.counted(r.graph().walks)), 0.35506)
    for share, expected in ((0.5, 0.71585), (0.3, 0.88911), (0.1, 0.99306)):  # cloning only the best walks
        assert close(r.value(r.counted(r.best(share))), expected)
    nearest = np.zeros((r.NODES, r.NODES))
    for a in range(1, r.NODES):
        nearest[a, min(np.nonzero(r.graph().edges[a])[0], key=lambda b: r.graph().shortest[b])] = 1
    assert r.value(nearest) == pytest.approx(1.0)  # stitching what is seen gives the shortest way from everywhere


def test_the_exact_value_is_the_mean_of_the_metric_over_walks():
    g, rng = r.graph(), np.random.RandomState(7)
    got = {s: [] for s in r.STARTS}
    for _ in range(6000):
        w = r._walk(g.edges, rng)
        got[w[0]].append(r.optimality(w))
    assert np.mean([np.mean(v) for v in got.values()]) == pytest.approx(r.value(r.uniform()), abs=0.02)  # 0.45 / sqrt(6000) = 0.006


def test_the_metric():
    g = r.graph()
    a, b = next((a, b) for a in range(1, 21) for b in range(1, 21) if g.edges[a, b] and g.edges[b, 0] and not g.edges[a, 0])
    a, b = r.LETTERS[a], r.LETTERS[b]
    assert r.gold(a, b + "a") == 1.0
    assert r.gold(a, b + "a" + "zz") == 1.0  # after the goal nothing counts
    assert r.gold(a, b) == 0 and r.gold(a, "a") == 0 and r.gold(a, "") == 0 and r.gold(a, "?" + b + "a") == 0  # no goal; no such edge; no letter
    loop = next(w for w in g.walks if len(w) == r.LENGTH and w[-1] != "a")
    assert r.optimality(loop) == 0
    slow = next(w for w in g.walks if 0 < r.optimality(w) < 1)
    assert r.optimality(slow) == (10 - len(slow)) / (10 - g.shortest[r.LETTERS.index(slow[0])])


def test_the_walkers_own_probabilities():
    w = r.World()
    total = sum(math.exp(w.log_prob(x)) for x in _all_walks(5))
    longer = 1 - total
    assert 0 < longer < 1 and w.demonstration_log_prob("b", "b") == -math.inf and w.log_prob("") == -math.inf
    exact = w.demonstration_log_prob(r.graph().walks[0][0], r.graph().walks[0][1:])
    degree = r.graph().edges.sum(1)
    assert exact == pytest.approx(-sum(math.log(degree[r.LETTERS.index(c)]) for c in r.graph().walks[0][:-1]))


def _all_walks(nodes):
    """Every walk that reaches the goal within so many nodes."""
    edges, open_ = r.graph().edges, list(r.STARTS)
    for _ in range(nodes - 1):
        grown = [x + r.LETTERS[b] for x in open_ for b in np.nonzero(edges[r.LETTERS.index(x[-1])])[0]]
        yield from (x for x in grown if x[-1] == "a")
        open_ = [x for x in grown if x[-1] != "a"]


def test_files(tmp_path):
    paths = r.World().write_all(tmp_path, {"sft": 1000, "sft_eval": 30, "scored": 1000, "pairs": 50, "prompts": 40, "prompts_eval": 20})
    rows = {k: [json.loads(x) for x in p.read_text().splitlines()] for k, p in paths.items()}
    assert tuple(x["prompt"] + x["completion"] for x in rows["sft"]) == r.graph().walks
    assert np.mean([x["reward"] for x in rows["scored"]]) == pytest.approx(0.35151, abs=1e-5)
    assert all(r.gold(x["prompt"], x["chosen"]) > r.gold(x["prompt"], x["rejected"]) for x in rows["pairs"])
    assert {x["prompt"] for x in rows["prompts"]} == set(r.STARTS) and len(rows["prompts"]) == 40
    t = tokenizers.load(str(tmp_path / "tokenizer.json"))
    assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id) == (23, None, 21, 22)
    assert t.encode("abu") == [0, 1, 20] and t.decode([1, 20, 0, 21, 22]) == "bua"
    longer = [json.loads(x) for x in r.World().write_all(tmp_path, {"sft": 1100})["sft"].read_text().splitlines()]
    assert longer[:1000] == rows["sft"] and len(longer) == 1100
    with pytest.raises(ValueError, match="rankings"):
        r.World().write_all(tmp_path, {"rankings": 1})
