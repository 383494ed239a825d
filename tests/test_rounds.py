"""Pipelines of rounds: answers, labels, reward model, policy, again; stopped in the middle; with people; what came from what."""

import json
import zlib

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build, config
from jaxalign.cli import lineage, pipeline, rounds
from jaxalign.models import heads
from jaxalign.ops import nn
from jaxalign.train import checkpoint
from jaxalign.train.log import RunLog
from jaxalign.types import UserError


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with runs.devices(1):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """No two prompts alike."""
    data = runs.prepared(tmp_path_factory.mktemp("data"))
    (data / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{word} {n}:"}) + "\n" for n, word in enumerate(["bread", "soup", "tea"] * 8)))
    return data


def taste(prompt, completion, record):
    """No two texts alike."""
    return zlib.crc32(completion.encode()) / 2**32


def conf(data, *order, **over):
    """An sft stage of 2 steps, then rounds of tiny stages."""
    c = build.base("rounds", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    c.order = ("sft",)
    few = dict(train=dict(steps=2, save_every=1), optim=dict(lr=3e-3))
    rest = dict(labeller="test_rounds:taste", prompts=f"{data}/prompts.jsonl", each=8, candidates=3, sampling=dict(max_new=6))
    c.rounds = build.rounds(*order, **{**rest, **over})
    known = {
        "sft": build.stage("lm", init=str(data / "start"), data=dict(path=f"{data}/sft.jsonl", eval_path=f"{data}/sft.jsonl", batch_size=8, seq_len=32), **few),
        "reward": build.stage("reward", init="sft", data=dict(path="data/rankings_{rounds}.jsonl", batch_size=4), **few),
        "ppo": build.stage("ppo", init="{policy}", data=dict(path=f"{data}/prompts.jsonl", batch_size=8), rl=dict(reward="reward_{round}", reference="sft", epochs=2), sampling=dict(max_new=6), **few),
        "dpo": build.stage("dpo", init="{policy}", data=dict(path="data/best_{round}.jsonl", batch_size=4), **few),
        "first": build.stage("lm", init="{policy}", data=dict(path="data/kept_{rounds}_1.jsonl", batch_size=4, seq_len=48), **few),
        "second": build.stage("lm", init="first_{round}", data=dict(path="data/kept_{round}_2.jsonl", batch_size=4, seq_len=48), **few),
    }
    c.stages = {n: known[n] for n in ("sft", *order)}
    return c


def contents(workdir):
    """All that must be the same, whatever happened on the way."""
    stages = sorted(p.parent.parent.name for p in workdir.glob("*/params/manifest.json"))
    files = [*sorted((workdir / "data").glob("*.jsonl")), workdir / "lineage.jsonl"]
    return {**{s: runs.weights(workdir / s / "params") for s in stages}, **{f.name: f.read_text().replace(str(workdir), "") for f in files}}


class Killed(BaseException):
    pass


def test_two_rounds_killed_in_the_second(data, tmp_path, monkeypatch, capsys):
    """Killed where the policy of round 2 has done one step; gone on with, the very same bits; and the lineage says what came from what."""
    c = conf(data, "reward", "ppo")
    c.stages.reward.data.eval_path, c.rounds.held_out = "data/held_{round}.jsonl", 4
    assert list(build.stages(c)) == ["sft", "reward_1", "ppo_1", "reward_2", "ppo_2"]
    pipeline.run(c, tmp_path / "whole")
    log = RunLog.metrics

    def metrics(self, step, values):
        log(self, step, values)
        if self.workdir.name == "ppo_2":
            raise Killed

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(RunLog, "metrics", metrics)
        pipeline.run(c, tmp_path / "torn")
    assert not (tmp_path / "torn/ppo_2/params").exists() and (tmp_path / "torn/reward_2/params").exists()
    pipeline.run(c, tmp_path / "torn")
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "torn") == whole
    assert json.dumps(whole["ppo_1"]) != json.dumps(whole["ppo_2"]) and whole["samples_1.jsonl"] != whole["samples_2.jsonl"]

    lines = lineage.read(tmp_path / "whole")
    assert list(lines) == ["sft", "rankings_1", "held_1", "reward_1", "ppo_1", "rankings_2", "held_2", "reward_2", "ppo_2"]
    weights = {n: e.get("weights") for n, e in lines.items()}
    of = lambda n: {"from": n, "weights": weights[n]}  # noqa: E731
    assert lines["ppo_2"]["parents"] == {"init": of("ppo_1"), "rl.reference": of("sft"), "rl.reward": of("reward_2")}
    assert lines["rankings_2"]["parents"] == {"policy": of("ppo_1"), "labeller": {"from": "test_rounds:taste"}}
    assert list(lines["reward_2"]["data"]) == ["data/held_2.jsonl", "data/rankings_1.jsonl", "data/rankings_2.jsonl"]
    assert lines["reward_2"]["data"]["data/rankings_1.jsonl"] == lines["rankings_1"]["data"]["data/rankings_1.jsonl"] == lineage.file_hash(tmp_path / "whole/data/rankings_1.jsonl")
    assert "files" in lines["sft"]["parents"]["init"] and len(set(weights.values()) - {None}) == 5
    last = [json.loads(line) for line in (tmp_path / "whole/reward_2/metrics.jsonl").read_text().splitlines()][-1]
    assert lines["reward_2"]["held_out"]["accuracy"] == last["eval/accuracy"] and "held_out" not in lines["ppo_2"]
    assert lines["reward_1"]["held_out"] != lines["reward_2"]["held_out"] and lines["held_2"]["parents"]["policy"] == of("ppo_1")
    asked = [[json.loads(line)["prompt"] for line in (tmp_path / f"whole/data/{n}.jsonl").read_text().splitlines()] for n in ("held_samples_1", "held_samples_2")]
    prompts = [json.loads(line)["prompt"] for line in (data / "prompts.jsonl").read_text().splitlines()]
    assert asked == [prompts[:-5:-1], prompts[-5:-9:-1]]
    page = (tmp_path / "whole/report.html").read_text()
    assert f"held-out accuracy {lines['reward_2']['held_out']['accuracy']:.3g}".rstrip("0.") in page
    assert "Lineage" in page and weights["ppo_1"][:8] in page and "labels by test_rounds:taste" in page

    # A round's stage is opened by its directory as any other; what has changed since is said.
    w, name, _ = build.trained(str(tmp_path / "whole/ppo_2"), writes=True)
    assert name == "ppo_2"
    with pytest.raises(UserError, match="reward model"):
        build.trained(str(tmp_path / "whole/reward_1"), writes=True)
    path = tmp_path / "torn/data/rankings_1.jsonl"
    path.write_text(path.read_text() + "\n")
    w = build.world(c, tmp_path / "torn")
    capsys.readouterr()
    for name in ("reward_1", "ppo_1"):
        lineage.check(w, name, build.stages(c)[name])
    said = capsys.readouterr().out
    assert "reward_1: warning: changed since it was trained: data data/rankings_1.jsonl" in said and "ppo_1" not in said
    other = build.stages(c)["ppo_1"]
    other.optim.lr, other.train.log_every = 1e-9, 7  # how often it logs shapes nothing
    lineage.check(w, "ppo_1", other)
    assert "ppo_1: warning: changed since it was trained: setting optim.lr;" in capsys.readouterr().out


def asked(c, w, name):
    """What the pipeline does before a stage of a round begins."""
    rounds.write(w, None, c, build.stages(c)[name])
    rounds.note(w, c, build.stages(c)[name])
    return lambda n: [json.loads(line) for line in (w.workdir / f"data/{n}.jsonl").read_text().splitlines()]


def test_what_is_held_out_was_never_asked(data, tmp_path):
    c = conf(data, "reward", start=str(data / "start"), held_out=5)  # of 24 prompts, 2 x 8 are learned from
    c.stages.reward.data.eval_path = "data/held_{round}.jsonl"
    with pytest.raises(UserError, match=r"8 of 24 prompts are none that 2 rounds of 8 ask, and 5 to judge each of them by need 10"):
        asked(c, build.world(c, tmp_path), "reward_1")
    with c.unlocked():
        c.rounds.held_out, c.rounds.labeller = 4, "people"
    w = build.world(c, tmp_path)
    (tmp_path / "data/rankings_1.jsonl").unlink()
    with pytest.raises(UserError, match=r"to_rank_1\.jsonl holds \d prompts.* in .*/rankings_1\.jsonl\nround 1 .*to_rank_held_1\.jsonl holds \d prompts.* in .*/held_1\.jsonl\n.*\"ranks\""):
        asked(c, w, "reward_1")  # both at one stop
    (tmp_path / "data/rankings_1.jsonl").write_text((tmp_path / "data/samples_1.jsonl").read_text().replace("}", ', "ranks": [0, 1, 2]}'))
    with pytest.raises(UserError, match=r"to_rank_held_1\.jsonl holds \d prompts(.|\n)*held_1\.jsonl"):
        asked(c, w, "reward_1")


def test_what_is_held_out_reads_like_nothing_that_is_ranked(data, tmp_path):
    """A file whose last rows say again what the first ones ask."""
    prompts = (data / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join(prompts + prompts[:12]) + "\n")
    c = conf(data, "reward", start=str(data / "start"), prompts=str(tmp_path / "twice.jsonl"), held_out=4)
    c.stages.reward.data.eval_path = "data/held_{round}.jsonl"
    held = asked(c, build.world(c, tmp_path), "reward_1")("held_samples_1")
    assert [r["prompt"] for r in held] == [json.loads(p)["prompt"] for p in prompts[:-5:-1]]


def test_people_label(data, tmp_path):
    c = conf(data, "reward", labeller="people", start=str(data / "start"))
    w = build.world(c, tmp_path)
    with pytest.raises(UserError, match=r"round 1 waits for labels: .*to_rank_1\.jsonl holds \d prompts"):
        asked(c, w, "reward_1")
    rows = [json.loads(line) for line in (tmp_path / "data/to_rank_1.jsonl").read_text().splitlines()]
    rows = [{**r, "ranks": list(range(len(r["completions"])))} for r in rows]
    answer = tmp_path / "data/rankings_1.jsonl"
    fill = lambda rows: answer.write_text("".join(json.dumps(r) + "\n" for r in rows))  # noqa: E731
    fill(rows[1:])  # nobody could judge the first
    assert not rounds.missing(w, c, build.stages(c)["reward_1"])
    assert len(asked(c, w, "reward_1")("rankings_1")) == len(rows) - 1 and lineage.read(tmp_path)["rankings_1"]["labeller"] == "people"
    fill([{**rows[0], "completions": ["something", "else", "entirely"]}])
    with pytest.raises(UserError, match=r"rankings_1\.jsonl:1: this is no row of .*to_rank_1"):
        rounds._rankings(w, None, c, 1)


def test_a_reward_model_chooses_with_rising_thresholds(data, tmp_path):
    """Best against worst by the reward model of the round; demonstrations of all rounds, and of this one the better half."""
    c = conf(data, "reward", "dpo", "first", "second", scorer="reward_{round}", start=str(data / "start"), count=1, keep=dict(quantiles=(0.0, 0.6), cap=2))
    w = build.world(c, tmp_path)
    model = heads.Scalar(w.model)
    checkpoint.save_tree(tmp_path / "reward_1/params", tiny.loud(nn.init(model.specs(), jax.random.key(3))), {})
    for name in ("dpo_1", "first_1", "second_1"):
        read = asked(c, w, name)
    samples, best, some, few = read("samples_1"), read("best_1"), read("kept_1_1"), read("kept_1_2")
    scores = rounds._scores(w, "reward_1", samples)
    pick = lambda f, s, x: s["completions"][x.index(f(x))]  # noqa: E731
    assert [(r["chosen"], r["rejected"]) for r in best] == [(pick(max, s, x), pick(min, s, x)) for s, x in zip(samples, scores) if max(x) > min(x)]
    texts = lambda rows: {(r["prompt"], r["completion"]) for r in rows}  # noqa: E731
    assert texts(few) < texts(some) and {(r["prompt"], r["chosen"]) for r in best} <= texts(some)
    # One at a time as the model reads it
    ids = w.tokenizer.encode
    s = samples[0]
    for text, want in zip(s["completions"], scores[0]):
        tokens = np.array([[w.tokenizer.bos_id, *ids(s["prompt"]), *ids(text), w.tokenizer.eos_id]])
        one = model.reward(build.load_params(w, "reward_1", model.specs(), ""), tokens, np.ones_like(tokens), np.arange(tokens.size)[None])
        np.testing.assert_allclose(float(one[0]), want, rtol=1e-4, atol=1e-5)
    lines = lineage.read(tmp_path)
    assert lines["best_1"]["parents"]["labeller"]["from"] == "reward_1" and len(lines["kept_1_2"]["data"]) == 2


def test_what_is_kept():
    samples = [{"prompt": "p", "completions": ["a", "b", " b", "c"]}, {"prompt": "q", "completions": ["d", "e"]}]
    scores = [[0.0, 2.0, 2.0, 1.0], [0.0, 0.0]]
    texts = lambda **k: [(r["prompt"], r["completion"]) for r in rounds.kept(samples, scores, **k)]  # noqa: E731
    assert texts() == [("p", "b"), ("q", "d")]
    assert texts(cap=0) == [("p", "b"), ("p", "c"), ("p", "a"), ("q", "d"), ("q", "e")]
    assert texts(cap=0, quantile=0.5) == [("p", "b")]  # what scores lowest of all is never kept
    assert texts(cap=0, quantile=0.4, of="round") == [("p", "b"), ("p", "c")]
    assert texts(cap=0, threshold=1.0) == [("p", "b"), ("p", "c")]
    assert rounds.best_pairs(samples, scores) == [{"prompt": "p", "chosen": "b", "rejected": "a"}]
    with pytest.raises(UserError, match="quantiles"):
        texts(quantile=1.0)


def hint(record):
    return record["prompt"] + " yes"


def says(prompt, completion, record):
    return float(len(completion) % 2)


def test_a_hint_where_nothing_was_right(data, tmp_path, monkeypatch):
    """STaR: prompts without a right answer are asked once more with a hint, and the right answers are kept under the prompt itself."""
    c = conf(data, "first", scorer="test_rounds:says", hint="test_rounds:hint", count=1, candidates=2, keep=dict(threshold=1.0))
    asked = []

    def watched(w, config, k, records, key, what="round"):
        asked.append((what, [r["prompt"] for r in records]))
        return [["ab", "cd"] if what == "round" and i % 2 else ["abc", "d"] for i, _ in enumerate(records)]

    monkeypatch.setattr(rounds, "_answers", watched)
    w = build.world(c, tmp_path)
    rounds.write(w, None, c, build.stages(c)["first_1"])
    (_, first), (what, second) = asked
    kept = [json.loads(line) for line in (tmp_path / "data/kept_1_1.jsonl").read_text().splitlines()]
    solved = set(first[::2])
    assert what == "hint" and second == [p + " yes" for i, p in enumerate(first) if p not in solved]
    assert {r["prompt"] for r in kept} == set(first) and {r["completion"] for r in kept} == {"abc"}


def test_names_that_are_not_there():
    c = build.base("x", dim=16, layers=1, heads=2, hidden=32)
    c.order, c.stages = ("sft",), {"sft": build.stage("lm"), "dpo": build.stage("dpo", init="{policy}", data=dict(path="data/best_{rounds}.jsonl"))}
    c.rounds = build.rounds("dpo", count=3)
    at = config.stages(c)
    assert [at[n].init for n in ("dpo_1", "dpo_3")] == ["sft", "dpo_2"]
    assert at["dpo_2"].data.path == "data/best_1.jsonl,data/best_2.jsonl" and c.stages.dpo.init == "{policy}"
    c.rounds.order = ("dqo",)
    with pytest.raises(UserError, match="did you mean 'dpo'"):
        config.stages(c)
    with pytest.raises(UserError, match="rounds.candidate is unknown"):
        build.rounds("dpo", candidate=3)
    assert np.array_equal(build.rounds("dpo").keep.quantiles, (0.0,))


def test_settings_that_a_stage_resolved_are_no_change(tmp_path):
    """A policy that begins at model.path notes that as its init; the config still says nothing there."""
    c = build.base("here", family="gpt2", vocab=23, dim=8, layers=1, heads=2, max_len=16)
    c.model.path = "models/hf"
    stage = build.stage("lm", data=dict(path="x.jsonl", batch_size=4, seq_len=8), train=dict(steps=2))
    c.stages, c.order = {"sft": stage}, ("sft",)
    said = {**build.plain(c), "stage": "sft", "section": {**build.plain(build.stages(c)["sft"]), "init": "models/hf"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    section = build.stages(c)["sft"]
    assert lineage.changed_settings(tmp_path, c, section) == []
    section.init, section.train.steps = "pretrain", 3
    assert lineage.changed_settings(tmp_path, c, section) == ["init", "train.steps"]
