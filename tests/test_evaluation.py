"""`jaxalign eval` on finished stages of every kind of reward, on long documents, and on prompts with answers."""

import json
import math

import jax
import numpy as np
import pytest
import runs
from jaxalign import build, shard
from jaxalign.cli import answers
from jaxalign.cli import eval as verb
from jaxalign.data.sources import eval_batches
from jaxalign.evals import passes, perplexity, policy, stats
from jaxalign.types import UserError


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make = shard.make_mesh
    monkeypatch.setattr(shard, "make_mesh", lambda sizes: make({"data": 1}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.prepared(tmp_path_factory.mktemp("data"))


def evaluated(where, directory, objective, rows, stride=0, **sections):
    """(world, stage's config, evaluation) of a stage's weights as they were drawn, on held-out rows of its own."""
    held = directory / "held.jsonl"
    held.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c = build.base("r", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    sections["data"] = {"batch_size": 4, "eval_path": str(held), **sections["data"]}
    c.stage = build.stage(objective, **{"init": str(where / "start"), **sections})
    w = build.world(c, directory)
    s = build.make_stage(w, "r", c.stage, directory)
    s.save(jax.tree.map(lambda x: x * 3, s.params))  # louder than drawn, and untrained: what is judged here is the judging
    return w, c.stage, verb.evaluate(w, None, c, stride=stride)["r"]


def scored(w, c, directory):
    """[(rewards, ranks)] of the held-out rows."""
    from jaxalign.models import heads

    scalar = heads.Scalar(w.model)
    params = build.load_params(w, str(directory.absolute()), scalar.specs(), "r")
    return scalar, params, build.data_source(w, c.data, c.data.eval_path, 4, 0, shuffle=False)


def test_comparisons(data, tmp_path):
    words = ["tea", "soup", "rice", "fig", "oat", "plum"]
    rows = [
        {"prompt": f"{w}:", "chosen": f" {w} {v} yes" * (1 + k % 3), "rejected": f" {v} no", "rating": ("better", "unsure")[k % 2], "subset": "abc"[k % 3], "votes": [True, k % 3 > 0, True]}
        for k, (w, v) in enumerate((w, v) for w in words for v in words)
    ]
    w, c, got = evaluated(data, tmp_path, "reward_pairs", rows, data=dict(path=f"{data}/pairs.jsonl"))
    scalar, params, source = scored(w, c, tmp_path)
    pairs = [s for s, _ in policy.candidate_scores(scalar, params, source, w.mesh)]
    d = np.array([a - b for a, b in pairs])
    right = (d > 0) + 0.5 * (d == 0)
    assert got["accuracy"] == pytest.approx(right.mean()) and got["pairs"] == got["prompts"] == 36
    for k, of in (("rating", ("better", "unsure")), ("subset", "abc")):
        for name, part in got[f"by_{k}"].items():
            assert part["accuracy"] == pytest.approx(right[[r[k] == name for r in rows]].mean()) and part["pairs"] == 36 // len(of)
    assert got["mean_of_subsets"] == pytest.approx(np.mean([p["accuracy"] for p in got["by_subset"].values()]))
    assert sum(b["pairs"] for b in got["reliability"]) == 36
    lengths = [(len(r["chosen"].encode()), len(r["rejected"].encode())) for r in rows]  # bytes are tokens; the stop is in both
    within = lambda each: np.concatenate([np.array(x, float) - np.mean(x) for x in each])
    assert got["length_correlation"] == pytest.approx(stats.pearson(within(pairs), within(lengths)), abs=1e-6)
    # two of three prompts have votes of one mind: P = (24 + 12 / 3) / 36 = 7/9; no: 12 of 108 votes
    assert got["labellers_kappa"] == pytest.approx((7 / 9 - (96 / 108) ** 2 - (12 / 108) ** 2) / (1 - (96 / 108) ** 2 - (12 / 108) ** 2))
    json.dumps(got, allow_nan=False)


def test_the_best_of_several_is_judged_as_pairs_against_it(data, tmp_path):
    rows = [{"prompt": "tea:", "completions": [f" {k}", " b", " c"], "best": 0} for k in range(6)]
    got = evaluated(data, tmp_path, "reward_best", rows, data=dict(path=f"{data}/rankings.jsonl"))[2]
    assert got["pairs"] == 12 and got["prompts"] == 6


def test_scores(data, tmp_path):
    rows = [{"prompt": f"{p}:", "completion": f" {p} {k}", "score": k} for k, p in enumerate(["tea", "soup", "rice", "fig", "oat"])]
    w, c, got = evaluated(data, tmp_path, "reward_regression", rows, data=dict(path=f"{data}/labelled.jsonl"))
    scores, labels = policy.row_scores(*scored(w, c, tmp_path), w.mesh)
    assert labels.tolist() == [0, 1, 2, 3, 4] and got["answers"] == 5
    assert got["mean_squared_error"] == pytest.approx(((scores - labels) ** 2).mean(), rel=1e-6) and got["spearman"] == pytest.approx(stats.spearman(scores, labels))


def test_steps(data, tmp_path):
    rows = [{"prompt": "tea:", "steps": ["a" * (k + 1), "b", "c"], "labels": [True, k % 2 == 0, None if k == 1 else False]} for k in range(5)]
    w, c, got = evaluated(data, tmp_path, "reward_steps", rows, data=dict(path=f"{data}/steps.jsonl"))
    scalar, params, source = scored(w, c, tmp_path)
    right, found, n = 0, 0, 0
    for batch in eval_batches(source):
        s = np.asarray(jax.jit(scalar.scores)(params, *(batch.rows[i] for i in (0, 2, 3))))
        for row, mask, label in zip(s, batch.rows.mask, batch.label):
            said, true = row[mask > 0] < 0, label[mask > 0] < 0.5
            right, n = right + (said == true).sum(), n + mask.sum()
            if len(said):
                found += (list(said).index(True) if said.any() else None) == (list(true).index(True) if true.any() else None)
    assert got["steps"] == n == 14 and got["accuracy"] == pytest.approx(right / 14) and got["first_error_found"] == found / 5


def test_long_documents(data, tmp_path):
    """Longer than the window: the strided loss is that of all tokens, bits per byte of all bytes."""
    text = "bread soup tea rice salt plum fig oat " * 3
    w, c, got = evaluated(data, tmp_path, "lm", [{"text": text}, {"text": "tea"}], stride=8, data=dict(path=f"{data}/text.jsonl", seq_len=32))
    assert got["strided_tokens"] == len(text) + 3 + 2 - (0 if w.tokenizer.bos_id is not None else 2) and got["tokens"] < got["strided_tokens"]
    assert "bits_per_byte" not in got  # the plain figure was cut off at 32 tokens
    assert got["strided_bits_per_byte"] == pytest.approx(perplexity.bits_per_byte(got["strided_tokens"] * math.log(got["strided_perplexity"]), len(text) + 3))
    again = evaluated(data, tmp_path, "lm", [{"text": "tea soup"}], data=dict(path=f"{data}/text.jsonl", seq_len=32))[2]
    assert again["bits_per_byte"] == pytest.approx(again["nll"] * again["tokens"] / math.log(2) / 8)


def last_letter(completion):
    return completion[-1:] or None


def is_even(prompt, completion, record):
    return float(len(completion) % 2 == 0)


def test_prompts_with_answers(data, tmp_path):
    w = build.world(runs.config("lm", data), tmp_path)
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in (("tea:", "x"), ("soup:", ["a", "e", 5]), ("oat:", 7))))
    go = lambda **how: answers.evaluate(w, str(data / "start"), str(path), samples=6, ks=[1, 4], max_new=4, temperature=1.0, **how)
    got = go(reward=is_even)
    assert got["problems"] == 3 and got["pass@k"]["1"]["value"] == pytest.approx(got["accuracy"]) and got["pass@k"]["4"]["value"] >= got["accuracy"]
    assert 0 <= got["interval"][0] <= got["accuracy"] <= got["interval"][1] <= 1 and set(got["maj@k"]) == {"1", "4"}
    exact = go(extract=last_letter)
    assert exact["accuracy"] <= 1 and len(exact["examples"]) == 3
    # the untrained model never answers with the whole word: nothing right, and an interval that still admits some
    none = go()
    assert none["accuracy"] == 0 and none["interval"][1] > 0
    path.write_text('{"prompt": "tea:"}\n')
    with pytest.raises(UserError, match="--reward"):
        go()
    assert passes.normalised(" A  b. ") == "a b"


@pytest.mark.parametrize(
    "record, want",
    [({"answer": x}, want) for x, want in ((1234567.0, "1234567"), (3.14159265, "3.14159265"), (100000.5, "100000.5"), (1e6, "1000000"), (1e16, "10000000000000000"), (-2.0, "-2"), (1e-7, "0.0000001"), (7, "7"), ("x", "x"))]
    + [({"answer": None, "reference": "x"}, "x"), ({"answers": [2.0, "two", 2]}, ["2", "two", "2"]), ({"answer": 0}, "0")],
)
def test_what_an_answer_is_compared_with(record, want):
    """As somebody would write it: every digit that it has, and none that it has not."""
    assert answers._reference(record, "rows.jsonl") == want


@pytest.mark.parametrize("record", [{"answer": None}, {"prompt": "a"}, {"answer": {}}, {"answer": True}])
def test_a_row_without_an_answer_is_refused(record):
    with pytest.raises(UserError, match="rows.jsonl: a row has no answer"):
        answers._reference(record, "rows.jsonl")


def test_the_command(data, tmp_path, capsys):
    from absl import flags
    from jaxalign.cli import main as cli

    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "tea:", "answer": "x"}\n')

    def run(*more):
        fv = flags.FlagValues()
        verb.define(fv)
        verb.main(fv, cli.parse(fv, ["jaxalign eval", f"--config={runs.ROOT}/tests/runs.py:lm:{data}", f"--workdir={tmp_path}", f"--prompts={path}", *more]))
        return json.loads(capsys.readouterr().out)

    assert run(f"--policy={data}/start", "--max_new=3")["pass@k"].keys() == {"1"}
    for more, why in ((("--k=2",), "--samples=2"), (("--k=x",), "whole numbers"), ((), "no finished stage")):
        with pytest.raises(UserError, match=why):
            run(*more)
