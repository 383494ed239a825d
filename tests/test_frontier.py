"""`jaxalign eval --frontier`: points of KL and reward read from runs with a known turn, or asked of the checkpoints that a run kept."""

import json
import math
import xml.etree.ElementTree as xml

import numpy as np
import pytest
import runs
from absl import flags
from jaxalign import build, report
from jaxalign.cli import eval as verb
from jaxalign.cli import frontier
from jaxalign.cli import main as cli
from jaxalign.evals import overoptimisation as forms
from jaxalign.report.frontier import measured
from jaxalign.report.read import show
from jaxalign.types import UserError

A, B, START = 1.2, 0.5, 0.3
TURN = math.exp(A / B - 1) ** 2  # nats, where d (a - b log d) is highest


@pytest.fixture(autouse=True)
def one_device():
    with runs.devices(1):
        yield


def curve(kl):
    d = np.sqrt(kl)
    return START + d * (A - B * np.log(d))


def said(capsys, *args):
    fv = flags.FlagValues()
    verb.define(fv)
    verb.main(fv, cli.parse(fv, ["jaxalign eval", *map(str, args)]))
    return capsys.readouterr().out


def write(directory, rows):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory


def over_optimised(directory, seed=0):
    """A stage whose gold turns over at TURN while what it is trained on rises; evaluated every fifth step, from step 5 on."""
    noise, kl = np.random.default_rng(seed).normal(0, 0.02, 400), np.linspace(0.05, 3 * TURN, 400)
    rows = [{"step": i + 1, "loss": 0.1, "objective/kl": k - 0.1, "objective/scores": 2 * math.sqrt(k) + n} for i, (k, n) in enumerate(zip(kl, noise))]
    for r, k, n in list(zip(rows, kl, noise))[4::5]:
        r |= {"eval/kl": k, "eval/gold": curve(k) + n}
    return write(directory, rows)


def test_a_known_turn(tmp_path, capsys):
    stage = over_optimised(tmp_path / "run" / "ppo")
    write(tmp_path / "run" / "sft", [{"step": 1, "nll": 2.0, "eval/gold": 0.3}])
    text = said(capsys, f"--frontier={tmp_path / 'run'}")  # of a whole run those stages that have points
    got = json.loads((tmp_path / "run" / "frontier.json").read_text())
    assert list(got) == ["ppo"] and got["ppo"]["missing"] == [] and got["ppo"]["directory"] == str(stage)
    gold, scores = got["ppo"]["gold"], got["ppo"]["scores"]
    assert len(gold["points"]) == len(scores["points"]) == 50 and gold["points"][-1][0] == 400
    assert gold["turned"] and abs(gold["turn"]["kl"] / TURN - 1) < 0.5 and abs(gold["turn"]["reward"] - curve(TURN)) < 0.05
    assert abs(gold["lost"] - (curve(TURN) - curve(3 * TURN))) < 0.06 and abs(gold["end"]["kl"] - 3 * TURN) < 0.1 * TURN
    fit = gold["fit"]
    assert fit["r2"] > 0.9 and abs(fit["turnover"] / TURN - 1) < 0.2 and abs(fit["a"] - A) < 0.15 and abs(fit["b"] - B) < 0.08 and abs(fit["start"] - START) < 0.15
    assert not scores["turned"] and scores["turn"]["step"] == 400 and scores["points"][0][1] >= 0
    assert "yes" in text and "not seen" in text and "frontier.svg" in text
    page = report.write(tmp_path / "run").read_text()
    assert page.count("</figure>") > 2 and "Reward against KL" in page and f"{show(gold['end']['reward'], 3)} at the end" in page
    assert "Reward against KL" not in report.write(write(tmp_path / "other" / "sft", [{"step": 1, "nll": 2.0}])).read_text()
    svg = xml.fromstring((tmp_path / "run" / "frontier.svg").read_text())
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}svg"))) == 3  # a panel for each reward
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 102


def test_stages_side_by_side_and_what_is_missing(tmp_path, capsys):
    one, other = over_optimised(tmp_path / "a" / "ppo"), over_optimised(tmp_path / "b" / "ppo", 1)
    lone = write(tmp_path / "a" / "dpo", [{"step": k, "eval/gold": 1.0} for k in range(3)])
    text = said(capsys, "--frontier=ppo,dpo," + str(other), f"--workdir={tmp_path / 'a'}", f"--out={tmp_path / 'out'}")
    got = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert list(got) == ["a/ppo", "dpo", "b/ppo"] and "gold" not in got["dpo"] and got["a/ppo"]["directory"] == str(one)
    assert "set world.watch.reference" in text and "0 checkpoints are kept" in text
    with pytest.raises(UserError, match="no stage has points(.|\n)*world.watch.reference(.|\n)*objective/kl(.|\n)*checkpoints"):
        said(capsys, f"--frontier={lone}")
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        said(capsys, f"--frontier={tmp_path}/nowhere")


def test_stages_of_a_sweep_have_names_of_their_own(tmp_path):
    for path in ("dpo/seed0/ppo", "kto/seed0/ppo", "kto/seed1/ppo", "kto/seed0/sft"):
        write(tmp_path / path, [{"step": 1, "eval/kl": 1.0, "eval/gold": 1.0}])
    named = ["dpo/seed0/ppo", "kto/seed0/ppo", "kto/seed1/ppo", "kto/seed0/sft"]
    got = frontier.stages(named, str(tmp_path))
    assert {name: str(p.relative_to(tmp_path)) for name, p in got.items()} == dict(zip(["dpo/seed0/ppo", "kto/seed0/ppo", "seed1/ppo", "sft"], named))


def test_methods_without_a_critic_call_it_reward():
    rows = [{"step": k, "objective/kl": 0.5 * k, "reward": 1.0 + k} for k in range(6)]
    assert measured(rows)["scores"]["points"] == [[k, 0.5 * k, 1.0 + k] for k in range(6)]
    assert "scores" not in measured([{"step": 1, "reward": 1.0}])  # GRPO, whose KL is in the loss


def test_few_points_and_noise_are_no_turn(tmp_path, capsys):
    rows = [{"step": k, "eval/kl": float(k), "eval/gold": 1.0} for k in range(3)]
    said(capsys, f"--frontier={write(tmp_path / 'few', rows)}")
    got = json.loads((tmp_path / "frontier.json").read_text())["few"]["gold"]
    assert "fit" not in got and "four different KLs" in got["no_fit"] and not got["turned"]
    assert not any(forms.turn(np.arange(n), -np.arange(n)).turned for n in (1, 2, 3)) and forms.turn(np.arange(9), -np.arange(9)).turned
    noise = np.random.default_rng(0).standard_normal((500, 40))
    plateau = [forms.turn(np.arange(40.0), y).turned for y in 1 + 0.1 * noise]
    fell = [forms.turn(np.arange(40.0), y).turned for y in 0.1 * noise - np.linspace(-1, 1, 40) ** 2]
    assert np.mean(plateau) < 0.05 and np.mean(fell) > 0.95


def test_the_start_is_fitted_where_nobody_measured_it():
    kl = np.array([0.5, 1, 2, 4, 8, 16])
    start, fit = forms.fit_rl_and_start(kl, curve(kl))
    known = forms.fit_rl(kl, curve(kl) - START)
    np.testing.assert_allclose([start, *fit], [START, *known], rtol=1e-6)
    np.testing.assert_allclose(fit.turnover, TURN)
    for bad in ([0.5, 0.5, 1, 2], [-0.1, 1, 2, 3]):
        with pytest.raises(ValueError, match="four different KLs"):
            forms.fit_rl_and_start(bad, [1, 2, 3, 4])


def test_checkpoints_are_asked_where_a_run_wrote_nothing(tmp_path, capsys):
    data = runs.prepared(tmp_path / "data")
    c = runs.config("dpo", data, **{"train.keep": 3, "optim.lr": 0.03})
    s = build.make_stage(build.world(c, tmp_path / "dpo"), "dpo", c.stage, tmp_path / "dpo")
    s.save(s.go())
    with pytest.raises(UserError, match="name one with --reward"):
        said(capsys, f"--frontier={tmp_path / 'dpo'}")
    text = said(capsys, f"--frontier={tmp_path / 'dpo'}", "--reward=runs:length_reward", f"--prompts={data / 'prompts.jsonl'}", "--samples=2", "--max_new=4")
    gold = json.loads((tmp_path / "frontier.json").read_text())["dpo"]["gold"]
    assert "eval/gold" not in text and "no objective/kl with objective/scores" in text
    assert [p[0] for p in gold["points"]] == [0, 3, 6, 7] and gold["points"][0][1] < 1e-6 < gold["points"][-1][1]

    # One that goes on from there, and whose reference is what that one started from.
    more = runs.config("dpo", data, **{"init": str(tmp_path / "dpo"), "reference": str(data / "start"), "train.steps": 2, "train.save_every": 1, "train.keep": 3, "optim.lr": 1e-6})
    s = build.make_stage(build.world(more, tmp_path / "more"), "dpo", more.stage, tmp_path / "more")
    s.save(s.go())
    said(capsys, f"--frontier={tmp_path / 'more'}", "--reward=runs:length_reward", f"--prompts={data / 'prompts.jsonl'}", "--samples=2", "--max_new=4")
    asked = json.loads((tmp_path / "frontier.json").read_text())["more"]["gold"]
    np.testing.assert_allclose([p[1] for p in asked["points"]], gold["points"][-1][1], rtol=0.6)  # by other samples
