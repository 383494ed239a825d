"""A reproduction end to end: two seeds of a few steps, written, compared, found right, found wrong; and its arithmetic on numbers."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxalign import build
from jaxalign.cli import main as cli
from jaxalign.reproduce import page, runner
from jaxalign.types import UserError

import runs

sys.path.insert(0, str(Path(__file__).parent))


def reproduce(*args, code=0):
    """`jaxalign reproduce ARGS` in this process; it must end with this exit code."""
    with runs.devices(1):
        if code == 0:
            return cli.run(["jaxalign", "reproduce", *args])
        with pytest.raises(SystemExit) as e:
            cli.run(["jaxalign", "reproduce", *args])
        assert e.value.code == code


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(workdir, docs) after both seeds were run and written."""
    work, docs = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("docs")
    (docs / "reproductions.md").write_text("# Here\n<!-- reproduce overview begin --><!-- reproduce overview end -->\n<!-- reproduce short begin -->\nold\n<!-- reproduce short end -->\nafter\n")
    sys.modules["jaxalign.reproduce.short"] = __import__("short")
    cli_args = ["short", f"--workdir={work}", f"--docs={docs}"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runner, "names", lambda: ["short"])
        reproduce(*cli_args, "--write")
    yield work, docs
    del sys.modules["jaxalign.reproduce.short"]


@pytest.fixture
def args(written, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "names", lambda: ["short"])
    return ["short", f"--workdir={written[0]}", f"--docs={written[1]}"]


def test_what_was_written(written):
    work, docs = written
    kept = json.loads((docs / "reproductions/short.json").read_text())
    assert kept["seeds"] == [0, 1] and set(kept["figures"]) == {"grpo", "loss"}
    rows = [json.loads(x) for x in (work / "seed-1/sft/metrics.jsonl").read_text().splitlines()]
    assert kept["figures"]["loss"][1] == pytest.approx(rows[0]["loss"], rel=1e-5) != kept["figures"]["loss"][0]
    seen = [r["eval/gold"] for r in rows if "eval/gold" in r]
    assert kept["curves"]["bc"] == {"x": [2.0, 4.0], "y": [pytest.approx([r["eval/gold"] for r in map(json.loads, (work / f"seed-{s}/sft/metrics.jsonl").read_text().splitlines()) if "eval/gold" in r]) for s in (0, 1)]}
    assert len(seen) == 2 and kept["curves"]["kl"]["x"][0] != 0  # of the mean KL of the seeds
    text = (docs / "reproductions.md").read_text()
    assert "old" not in text and text.endswith("end -->\nafter\n") and "| loss |" in text and "(nobody) | no |" in text
    assert "| `short` | A short one | 2 | 0 | 1 | 0 | – | loss |" in text
    assert (docs / "reproductions/short.svg").read_text().startswith("<svg xmlns")


def test_it_finds_the_same_again_and_trains_nothing(args, capsys):
    reproduce(*args)
    out = capsys.readouterr().out
    assert out.count("already done") == 4 and "within the tolerance" in out and "OFF" not in out
    reproduce(*args, "--seeds=1", "--only_compare")  # of fewer seeds: beside the same ones of the committed file
    assert "within the tolerance" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["figure", "curve"])
def test_it_finds_what_is_off(written, args, tmp_path, capsys, what):
    kept = json.loads((written[1] / "reproductions/short.json").read_text())
    if what == "figure":
        kept["figures"]["grpo"] = [v + 0.02 for v in kept["figures"]["grpo"]]
    else:
        kept["curves"]["bc"]["y"][1][0] += 0.1  # a tenth at one point of two, in one seed of two: 0.025 of the curve
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions/short.json").write_text(json.dumps(kept))
    reproduce(*args[:2], f"--docs={tmp_path}", "--only_compare", code=1)
    out = capsys.readouterr().out
    assert out.count("OFF") == 1 and ("off by more than the tolerance: grpo" if what == "figure" else "tolerance: curve bc") in out


def test_a_killed_run_goes_on(written, args, tmp_path, capsys):
    """The second stage of the second seed lost: what is trained again is the same to the bit."""
    import shutil

    work = shutil.copytree(written[0], tmp_path / "work")
    before = (work / "seed-1/grpo/metrics.jsonl").read_bytes()
    shutil.rmtree(work / "seed-1/grpo")
    assert not runner.complete(runner.load("short"), work, 1) and runner.complete(runner.load("short"), work, 0)
    reproduce(args[0], f"--workdir={work}", args[2])
    assert capsys.readouterr().out.count("already done") == 3
    assert (work / "seed-1/grpo/metrics.jsonl").read_bytes() == before


def test_runs_of_other_settings_do_not_count(args, monkeypatch, capsys):
    r = runner.load("short")
    c = r.get_config()
    c.stages.sft.optim.lr = 3e-3
    monkeypatch.setattr(sys.modules["short"], "REPRODUCTION", dataclasses.replace(r, get_config=lambda arg=None: c))
    for more in ((), ("--only_compare",)):
        reproduce(*args, *more, code=2)
        assert "sft was trained with other settings than the reproduction now has: optim.lr; delete it" in capsys.readouterr().err


def test_refusals(args, tmp_path, capsys):
    reproduce("shirt", code=2)
    assert "did you mean 'short'?" in capsys.readouterr().err
    reproduce("short", f"--workdir={tmp_path}", "--only_compare", code=2)
    assert "holds no finished seed" in capsys.readouterr().err
    reproduce(*args[:2], f"--docs={tmp_path}", "--only_compare", code=2)
    assert "there is no" in capsys.readouterr().err
    reproduce("short", "long", code=2)


def test_interval_is_the_bootstrap_over_seeds():
    mean, low, high = runner.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # of 5**5 draws the mean has std sqrt(2) / sqrt(5) = 0.63: 1.96 of them to each side, in steps of 0.2
    assert mean == 3 and low == pytest.approx(3 - 1.24, abs=0.21) and high == pytest.approx(3 + 1.24, abs=0.21)
    assert runner.interval([2.0]) == (2.0, 2.0, 2.0)


def test_compare_on_numbers():
    r = runner.Reproduction("t", None, {"c": None}, {"f": None}, "x", "y", tolerance=0.1)
    then = {"seeds": [0, 1, 2], "figures": {"f": [1.0, 2.0, 9.0]}, "curves": {"c": {"x": [1, 2], "y": [[0, 0], [1, 1], [5, 5]]}}}
    now = {"seeds": [0, 1], "figures": {"f": [1.1, 2.0]}, "curves": {"c": {"x": [1, 2], "y": [[0.5, 0], [1, 1]]}}}
    figure, line = runner.compare(r, now, then)
    assert (figure.now, figure.then) == (1.55, 1.5) and figure.within  # seeds 0 and 1 of both
    assert line.off == pytest.approx(0.125) and not line.within  # (0.25 + 0) / 2
    with pytest.raises(UserError, match="none of"):
        runner.compare(r, {**now, "seeds": [7, 8]}, then)
    with pytest.raises(UserError, match="only one"):
        runner.compare(r, {**now, "figures": {}}, then)
    short = {**now, "curves": {"c": {"x": [1], "y": [[0.0], [1.0]]}}}
    assert not runner.compare(r, short, then)[1].within  # a curve of another length is another curve


def test_every_reproduction_is_a_config_and_reads_what_it_writes():
    for name in runner.names():
        r = runner.load(name)
        stages = {run: build.stages(runner.config(r, run, 3)) for run in r.runs}
        assert r.get_config(None).seed == 0 and runner.config(r, r.runs[0], 3).seed == 3 and all(stages.values())
        assert {c.figure for c in r.claims} <= set(r.figures) and r.tolerance > 0 and r.seeds >= 5
        text = Path(runner.__file__).with_name(f"{name}.py").read_text()
        assert "jaxalign pipeline --config=jaxalign/reproduce/" in text  # by hand
        docs = (Path(runner.__file__).parents[2] / "docs/reproductions.md").read_text()
        assert f"<!-- reproduce {name} begin -->" in docs


def test_the_figure_names_its_curves():
    r = runner.Reproduction("A <title>", None, {}, {}, "x", "y", tolerance=0.1)
    svg = page.figure(r, {"curves": {"a<b": {"x": [0, 1], "y": [[0, 1], [1, 2]]}, "other": {"x": [0, 1], "y": [[0, 0], [1, 1]]}}})
    import xml.etree.ElementTree as tree

    words = ["".join(t.itertext()) for t in tree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "other"} <= set(words)
    assert np.isfinite([float(x) for x in tree.fromstring(svg).attrib["viewBox"].split()]).all()


def test_the_page_says_what_the_committed_files_say():
    """Each section and the overview, word by word; a claim or a setting that changes asks for a new run, or a new page."""
    docs = Path(__file__).parents[2] / "docs"
    text, kept = (docs / "reproductions.md").read_text(encoding="utf-8"), runner.committed(docs / "reproductions")
    assert set(kept) == set(runner.names())
    for name, (r, got) in kept.items():
        assert page.section(r, name, got) in text and len(got["seeds"]) >= r.seeds >= 5, name
        assert (docs / f"reproductions/{name}.svg").read_text(encoding="utf-8") == page.figure(r, got), name
    assert page.overview(kept) in text
