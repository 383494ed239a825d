"""Best of n: what is sampled, scored and chosen, and what it is said to cost; also from the command line."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import build, shard
from jaxalign.cli import main as cli
from jaxalign.data import sources, tokenizers
from jaxalign.evals import best, stats
from jaxalign.models import decoder
from jaxalign.ops import nn
from jaxalign.rl import rewards
from jaxalign.rl.rollout import Sampling
from jaxalign.train import checkpoint

MESH = shard.make_mesh({}, jax.devices()[:2])
MODEL = decoder.model(vocab=259, dim=16, layers=1, heads=2, hidden=24)
N = 5


def letters(prompt, completion, record):
    return sum(c.isalpha() for c in completion) + record["bonus"]


def test_the_best_and_what_it_costs():
    """Three prompts in batches of two: the last one is filled up with a row that counts for nothing."""
    params = tiny.loud(nn.init(MODEL.specs(), jax.random.key(0)))
    records = [{"prompt": p, "bonus": 100 * i} for i, p in enumerate(("tea", "rice and peas", "salt"))]
    source = sources.prompts_source(records, tokenizers.Bytes(), max_prompt_len=None, batch_size=2, seed=0, shuffle=False)
    decode = lambda ids: tokenizers.Bytes().decode([int(i) for i in ids])  # noqa: E731
    got = best.best_of(MODEL, params, Sampling(12, (258,)), source, decode, rewards.python(letters, decode, MESH), jax.random.key(1), MESH, N)
    want = np.array([[letters("", t, r) for t in texts] for r, texts in zip(records, got.completions)])
    np.testing.assert_allclose(got.scores, want)
    np.testing.assert_array_equal(got.best, want.argmax(1))
    assert got.scores.shape == (3, N) and all(len(set(texts)) > 1 for texts in got.completions)
    curve = got.curve(gold=-got.scores)
    assert [row["n"] for row in curve] == [1, 2, 4, 5]
    for row in curve:
        assert row["score"] == stats.best_of_n(want, want, row["n"]) and row["gold"] == pytest.approx(-row["score"]) and row["kl"] == stats.best_of_n_kl(row["n"])
    assert curve[0]["score"] == pytest.approx(want.mean()) and curve[-1]["score"] == pytest.approx(want.max(1).mean()) and curve[0]["kl"] == 0
    # Of a prompt that cannot be scored nothing is said, and what it answers is its first.
    lost = got._replace(scores=np.where(np.arange(3)[:, None] == 1, np.nan, got.scores))
    assert lost.curve()[0]["score"] == pytest.approx(want[[0, 2]].mean())


def test_from_the_command_line(tmp_path, capsys):
    runs.write_data(tmp_path)
    with runs.devices(1):
        for kind in ("lm", "reward"):  # finished stages, untrained
            c = runs.config(kind, tmp_path)
            checkpoint.save_tree(tmp_path / kind / "params", build.make_stage(build.world(c, tmp_path), kind, c.stage, tmp_path).params, {})
            (tmp_path / kind / "config.json").write_text(json.dumps({**build.plain(c), "stage": kind, "objective": kind}))

        def sample(*flags):
            cli.run(["jaxalign", "sample", f"--run={tmp_path / 'lm'}", "--prompt=tea:", "--prompt=rice:", "--max_new=8", "--json", *flags])
            out = capsys.readouterr()
            return [json.loads(line) for line in out.out.splitlines()], out.err

        every, _ = sample("--n=4")
        rows, said = sample("--best_of=4", "--reward=runs:length_reward")
        assert [r["prompt"] for r in rows] == ["tea:", "rice:"] and len(every) == 8
        assert "n    4" in said and f"{stats.best_of_n_kl(4):.3f} nats" in said
        for r in rows:
            assert r["score"] == pytest.approx(runs.length_reward(r["prompt"], r["completion"], {}))
        learned, _ = sample("--best_of=2", f"--reward={tmp_path / 'reward'}")
        assert all(np.isfinite(r["score"]) for r in learned)
        for flags, text in ((["--best_of=2"], "go together"), (["--best_of=2", f"--reward={tmp_path / 'lm'}"], "holds a policy"), (["--best_of=2", "--n=2", "--reward=runs:length_reward"], "--n")):
            with pytest.raises(SystemExit):
                cli.run(["jaxalign", "sample", f"--run={tmp_path / 'lm'}", "--prompt=tea:", *flags])
            assert text in capsys.readouterr().err
