"""The page is well-formed, safe whatever the models say, and says what is missing."""

import html.parser
import json
import math
import re

import numpy as np
import pytest

from jaxalign.report import console, write
from jaxalign.report.charts import Frame, Series, lines, smooth, thin, ticks
from jaxalign.report.markup import Html, tag
from jaxalign.report.read import STAGES, show
from jaxalign.report.stage import series, timings
from jaxalign.report.verdict import headline, verdicts
from jaxalign.train.log import RunLog
from jaxalign.types import UserError

HOSTILE = "</div><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp; \u202eabc\x00\x1b[31m \ud800"
EVALUATION = {
    "stages": ["pretrain", "sft", "reward", "ppo", "dpo"],
    "pretrain": {"nll": 1.2437, "floor": 1.2203, "ratio": 1.01918, "tokens": 65536},
    "sft": {"nll": 0.9821, "floor": 0.9514},
    "reward": {"accuracy": 0.868, "gold_accuracy": 0.8775, "pairs": 2000, "interval": [0.852, 0.883], "ece": 0.021, "reliability": [{"confidence": 0.55, "accuracy": 0.5}, {"confidence": 0.8, "accuracy": 0.9}]},
    "policies": {
        "sft": {"gold": 0.412, "kl": 0.0, "length": 21.3, "distinct_2": 0.4321, "elo": 951.0, "samples": [{"prompt": "the soup was", "completion": HOSTILE, "gold": -0.5}]},
        "ppo": {"gold": 1.934, "win_rate": 0.8125, "win_interval": [0.779, 0.845], "kl": 6.31, "length": 23.8, "samples": [{"prompt": "the soup was", "completion": "excellent .", "gold": 2.25}]},
        "dpo": {"gold": 1.711, "win_rate": 0.7741, "win_interval": [0.739, 0.808], "kl": 4.87, "length": 22.9, "samples": []},
    },
    "best_of_n": [{"n": 1, "kl": 0.0, "gold": 0.4, "proxy": 0.0}, {"n": 4, "kl": 0.64, "gold": 0.9, "proxy": 1.1}],
    "frontier": [{"beta": b, "gold": 0.4 + 0.75 * math.sqrt(k), "kl": k, "ess": 40.0} for b, k in ((2, 0.5), (1, 2), (0.5, 4), (0.25, 8))],
    "seconds": {"data": 4.1, "tokenizer": 2.2, "pretrain": 101.4, "sft": 22.0, "reward": 18.3, "ppo": 74.9, "dpo": 21.7, "evaluation": 12.9, "total": 257.5},
    "peak_rss_mib": 1843,
}  # fmt: skip


def synthesise(workdir, steps=400):
    """A pipeline's run directory whose curves are made up."""
    rng = np.random.default_rng(0)
    for name in STAGES:
        with RunLog(workdir / name) as log:
            log.snapshot({"stage": name, "note": HOSTILE})
            for i in range(1, steps + 1):
                t, noise = i / steps, rng.normal()
                row = {"loss": 0.69 - 0.4 * t + 0.05 * noise, "grad_norm": math.exp(0.3 * rng.normal()), "learning_rate": 3e-4 * (1 - t), "skipped": 0.0, "num_tokens": 4096}
                if name in ("pretrain", "sft"):
                    row |= {"nll": 1.22 + 4 * math.exp(-9 * t) + 0.03 * noise, "mean_token_accuracy": 0.6 - 0.5 * math.exp(-9 * t), "entropy": 1.2 + 4 * math.exp(-9 * t)}
                    if i % 100 == 0:
                        row["eval/nll"] = 1.23 + 4 * math.exp(-9 * t)
                if name == "reward":
                    row |= {"accuracy": 0.88 - 0.38 * math.exp(-6 * t) + 0.04 * noise, "margin": 2 * t + 0.1 * noise, "mean_reward": 0.1 * noise, "tie_rate": 0.0}
                if name == "dpo":
                    row |= {"rewards/chosen": t, "rewards/rejected": -2 * t + 0.1 * noise, "rewards/margins": 3 * t, "rewards/accuracies": 0.5 + 0.4 * t, "logps/chosen": -20 - t, "logps/rejected": -22 - 5 * t, "entropy": 1.1}
                if name == "ppo":
                    row |= {"policy/entropy_avg": 1.2 - 0.3 * t, "policy/clipfrac_avg": 0.1 * rng.random(), "val/clipfrac_avg": 0.0, "loss/value_avg": math.exp(-3 * t), "val/ratio": 1 + 0.01 * noise, "loss/policy_avg": 0.01 * noise}
                    if i % 4 == 1:
                        row |= {"objective/scores": 2 * t + 0.1 * noise, "objective/rlhf_reward": 1.7 * t + 0.1 * noise, "objective/kl": 6 * t + 0.2 * noise, "objective/kl_k3": 6.1 * t, "objective/beta": 0.05}
                        log.samples(i, [{"prompt": "p", "completion": HOSTILE, "score": 1.5}])
                log.metrics(i, row)
            log.event("resume", step=200)
            log.timings(200, {"time": 7.0, "seconds/data": 1.0, "seconds/save": 2.0, "compilations": 2, "tokens_per_second": 9e4, "goodput": 0.5})
            log.timings(200, {"time": 9.0})  # started again
            log.timings(400, {"time": 9.5, "seconds/data": 0.5, "seconds/save": 1.0, "compilations": 1, "tokens_per_second": 1.234e5, "goodput": 0.75, "peak_memory_bytes": 600 * 2**20})
            if name == "ppo":
                log.event("skipped_step", step=17, loss=float("nan"), grad_norm=float("inf"), in_a_row=1)
                log.event("skipped_step", step=17, loss=float("nan"), grad_norm=float("inf"), in_a_row=1)
                log.event("damaged_checkpoint", step=300, reason=HOSTILE)
    (workdir / "config.json").write_text(json.dumps({"name": "demo", "nested": {"x": [1, 2]}}))
    (workdir / "evaluation.json").write_text(json.dumps(EVALUATION))
    return workdir


class Checker(html.parser.HTMLParser):
    """Every tag closes in order; collects tags, attributes and text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.text, self.ids, self.links = [], set(), set(), [], [], []

    def handle_starttag(self, name, attributes):
        self.tags.add(name)
        self.attributes |= {k for k, _ in attributes}
        self.ids += [v for k, v in attributes if k == "id"]
        self.links += [v for k, v in attributes if k in ("href", "src", "action", "xlink:href")]
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def check(path) -> Checker:
    page = Checker()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base"}
    assert not any(a.startswith("on") for a in page.attributes)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)  # nothing leaves the page
    assert len(page.ids) == len(set(page.ids))
    page.text = "".join(page.text)
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthesise(tmp_path_factory.mktemp("runs") / "demo")


def test_a_pipeline(whole):
    path = write(whole)
    assert path == whole / "report.html"
    page = check(path)
    for figure in ("All 8 targets met", "1.019", "≤ 1.03", "0.868", "≥ 0.8575", "0.812", "0.774", "6.31", "4.87", "258 s", "1,843 MiB", "nll 0.9821", "ece 0.0210", "0.779 to 0.845"):
        assert figure in page.text, figure
    for title in ("Pretraining", "Supervised fine-tuning", "Reward model", "PPO", "DPO", "Gold reward against KL", "entropy floor1.220", "gold reward0.8775"):
        assert title in page.text, title
    assert "tokens/sgoodputsave, sdata, scompiledpeak MiB123,40075 %367 %1.5033 %3600" in page.text  # 1.0 s of data before the resume, 0.5 after
    raw = path.read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"<(style|pre).*?</\1>", "", raw, flags=re.S)  # in no coordinate
    assert "http:" not in raw and "https:" not in raw and "url(" not in raw and "@import" not in raw
    assert len(raw) < 3_000_000


def test_hostile_text_is_only_text(whole):
    path = write(whole)
    page = check(path)
    # As written, but for the control characters, which are made visible, and the lone surrogate, which UTF-8 cannot hold.
    assert "</div><script>alert(1)</script><img src=x onerror='alert(2)'>\"&amp; \u202eabc\u2400\u241b[31m ?" in page.text
    assert "<script" not in path.read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_page(whole):
    assert write(whole).read_bytes() == write(whole).read_bytes()


def test_a_single_stage(whole):
    page = check(write(whole / "reward"))
    assert "Margin" in page.text and "Reliability" in page.text and "400 steps" in page.text and "targets" not in page.text


def test_whatever_is_missing(whole, tmp_path):
    (tmp_path / "empty").mkdir()
    page = check(write(tmp_path / "empty"))
    assert page.text.count("No metrics: this stage has not run") == 5 and "Nothing has been evaluated yet" in page.text
    # every key of the evaluation in turn, at both levels, replaced by nothing, or by something else entirely
    cuts = [(k,) for k in EVALUATION] + [(k, j) for k, v in EVALUATION.items() if isinstance(v, dict) for j in v]
    for n, cut in enumerate(cuts):
        for m, value in enumerate((None, "text", [], [1], {}, True, 10**400, "nan")):
            evaluation = json.loads(json.dumps(EVALUATION))
            at = evaluation if len(cut) == 1 else evaluation[cut[0]]
            at[cut[-1]] = value
            if m < 1:
                del at[cut[-1]]
            work = tmp_path / f"{n}-{m}"
            work.mkdir()
            (work / "evaluation.json").write_text(json.dumps(evaluation))
            check(write(work))
            console(evaluation)


def test_damage_is_named(tmp_path):
    run = tmp_path / "pretrain"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnonsense\n{"step": 3}\n')
    (tmp_path / "evaluation.json").write_text('{"pretrain": ')
    page = check(write(tmp_path))
    (tmp_path / "dpo").mkdir()
    for text in ("[" * 99_999 + "\n", '{"kind": [], "step": {}}\n{"kind": "skipped_step", "step": []}\n', '{"step": 1e999, "loss": 1}\n{"step": "x", "loss": 2}\n'):
        for name in ("metrics", "timings", "events", "samples"):
            (tmp_path / "dpo" / f"{name}.jsonl").write_text(text)
        check(write(tmp_path))
    assert "metrics.jsonl, line 2: not JSON" in page.text and "evaluation.json cannot be read" in page.text
    with pytest.raises(UserError, match="not a directory"):
        write(tmp_path / "nowhere")


def test_values_that_are_not_numbers(tmp_path):
    with RunLog(tmp_path) as log:
        for i, x in enumerate([1.0, math.nan, math.inf, 1e300, 5e-324, -2.0], 1):
            log.metrics(i, {"loss": x, "only_nan": math.nan, "tiny": 5e-324 * i, "grad_norm": 1.0})
    page = check(write(tmp_path))
    assert "3 not finite" in page.text and "No finite value to draw." in page.text and "grad_norm = 1" in page.text


def test_verdicts():
    rows = {r.what: r for r in verdicts(EVALUATION)}
    assert all(r.passed is True for r in rows.values()) and headline(list(rows.values())) == ("All 8 targets met", True)
    worse = json.loads(json.dumps(EVALUATION))
    worse["pretrain"]["ratio"] = math.nan  # NaN meets nothing
    worse["policies"]["ppo"]["kl"] = 10.001
    worse["reward"]["accuracy"] = 0.8574  # below 0.8775 - 0.02
    del worse["policies"]["dpo"]
    rows = {r.what: r.passed for r in verdicts(worse)}
    assert [k for k, v in rows.items() if v is False] == ["Pretraining NLL / entropy floor", "Reward model accuracy", "PPO KL from SFT"]
    assert [k for k, v in rows.items() if v is None] == ["DPO win rate against SFT", "DPO KL from SFT"]
    assert headline(verdicts(worse)) == ("3 of 8 targets missed, 2 of 8 not measured", False)
    assert headline(verdicts(None)) == ("Nothing has been evaluated yet", None)


def test_a_pipeline_of_other_stages_has_its_own_figures(tmp_path):
    """Targets were set for pretraining, SFT, reward model, PPO and DPO: no other pipeline is held against them, nor asked for what it has not."""
    mine = {"world": "w", "stages": ["pretrain", "sft", "reward_1", "ppo_1"], "pretrain": EVALUATION["pretrain"] | {"perplexity": 3.4}, "reward_1": EVALUATION["reward"], "policies": {"ppo_1": EVALUATION["policies"]["ppo"]}, "seconds": {"total": 1000.0}}
    for evaluation in (mine, {k: v for k, v in mine.items() if k != "stages"}):
        rows = verdicts(evaluation)
        assert [r.what for r in rows] == ["pretrain: held-out perplexity", "reward_1: held-out accuracy", "Wall clock"] and not any(r.target for r in rows)
    (tmp_path / "evaluation.json").write_text(json.dumps(mine))
    for name in ("pretrain", "ppo_1"):
        with RunLog(tmp_path / name) as log:
            log.snapshot({"stage": name, "order": ["pretrain", "sft"]})
            log.metrics(1, {"loss": 1.0})
    page = check(write(tmp_path))
    assert "target" not in page.text.split("Policies")[0] and "not measured" not in page.text and "FAIL" not in console(mine)
    assert page.text.count("No metrics: this stage has not run") == 1  # sft, which is planned; of a reward model and DPO nobody spoke
    assert verdicts({**EVALUATION, "stages": ["pretrain", "dpo"]})[0].target == ""


def test_console():
    text = console(EVALUATION)
    assert text.splitlines()[0].startswith("pass  Pretraining NLL / entropy floor") and text.endswith("All 8 targets met")
    assert "FAIL" not in text and "FAIL  Wall clock" in console(EVALUATION | {"seconds": {"total": 361}})
    assert console({"stages": EVALUATION["stages"]}).count("not measured") == 8 and console(None) == "Nothing has been evaluated yet"
    # A run without a world has figures, and nothing to hold them against.
    mine = console({"world": None, "pretrain": {"nll": 4.0, "perplexity": 54.6}, "reward": {"accuracy": 0.61, "interval": [0.55, 0.66]}, "seconds": {"total": 900}})
    assert "54.6" in mine and "0.610" in mine and "900 s" in mine and not any(w in mine for w in ("FAIL", "pass", "?", "≤"))


def test_ticks_are_round_and_within():
    assert ticks(0, 1, 4) == [(0, "0"), (0.2, "0.2"), (0.4, "0.4"), (pytest.approx(0.6), "0.6"), (0.8, "0.8"), (1, "1.0")]
    assert [label for _, label in ticks(0, 3e-4, 3)] == ["0", "1e-4", "2e-4", "3e-4"]
    assert [label for _, label in ticks(0, 20000, 4)] == ["0", "5k", "10k", "15k", "20k"]
    assert [label for _, label in ticks(-25, -20, 5)] == ["−25", "−24", "−23", "−22", "−21", "−20"]
    rng = np.random.default_rng(0)
    for low, size in zip(rng.normal(size=300) * 10 ** rng.uniform(-8, 8, 300), 10 ** rng.uniform(-8, 8, 300)):
        marks = ticks(low, low + size, 4)
        assert 2 <= len(marks) <= 8 and len({label for _, label in marks}) == len(marks) or size < 1e-6 * abs(low)
        assert all(low - 1e-6 * size <= v <= low + size * (1 + 1e-6) for v, _ in marks)


def test_smoothing_keeps_lines_gaps_and_ends():
    x = np.arange(200.0)
    # A local line leaves a line as it is, also at the ends, where the window has one side only, and beside a gap.
    line = np.where(x == 3, np.nan, 3 * x - 7)
    np.testing.assert_allclose(smooth(line), line, rtol=1e-9)
    np.testing.assert_array_equal(smooth(np.where(x % 20 == 0, x, np.nan))[::20], x[::20])  # lone points are themselves
    np.testing.assert_allclose(smooth(np.full(200, 0.7)), 0.7)
    y = np.where(x == 50, np.nan, 1.0)
    assert np.isnan(smooth(y)[50]) and np.isfinite(smooth(y)).sum() == 199
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise).std() < 0.25 * noise.std()


def test_thinning_keeps_spikes_and_gaps():
    y = np.zeros(100_000)
    y[77_777], y[33_333] = 9, np.nan
    a, b = thin(np.arange(100_000), y)
    assert len(a) < 700 and 77_777 in a and np.isnan(b[list(a).index(33_333)]) and a[0] == 0 and a[-1] == 99_999


def test_paths_lift_the_pen():
    f = Frame(np.array([0.0, 4.0]), np.array([0.0, 1.0]))
    path = f.path([0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0])
    assert path.count("M") == 2 and path.count("L") == 2
    assert "<script" not in lines([Series("<script>", [1], [1])], title="<script>", unit="<script>", reference=("<script>", 1.0))


def test_series_of_sparse_metrics():
    curves, constant = series([{"step": 10, "a": 1.0, "c": 5}, {"step": 20, "c": 5}, {"step": 30, "a": None, "c": 5, "text": "x"}])
    assert curves["a"].x == (10, 30) and curves["a"].y[0] == 1 and math.isnan(curves["a"].y[1])
    assert constant == {"c": 5} and "text" not in curves


def test_timings_add_up_over_processes():
    rows = [{"step": 1, "data": 1.0, "mfu": 0.1}, {"step": 2, "data": 3.0, "mfu": 0.4}, {"step": 2, "data": 0.5, "mfu": 0.2}, {"step": 3, "data": 2.0, "mfu": 0.3}]
    assert timings(rows) == {"data": 5.0, "mfu": 0.3}


@pytest.mark.parametrize(
    "x, text",
    [(0.8125, "0.8125"), (1234567.0, "1,234,567"), (12, "12"), (0, "0"), (3e-4, "3.00e-4"), (-0.25, "−0.2500"), (None, "–"), ("x", "–"), (math.nan, "NaN"), ("inf", "∞"), (True, "–"), (360, "360"), (100.0, "100"), (257.5, "257.5")],
)  # fmt: skip
def test_numbers_for_people(x, text):
    assert show(x) == text


def test_markup_escapes_all_but_itself():
    assert tag("p", "<b>", tag("i", "&"), None, class_='"x"', cx=1.25, r=2) == '<p class="&quot;x&quot;" cx="1.2" r="2">&lt;b&gt;<i>&amp;</i></p>'
    assert isinstance(tag("p"), Html)


def test_what_else_was_judged(tmp_path):
    evaluation = json.loads(json.dumps(EVALUATION))
    evaluation["policies"]["grpo"] = {"gold": 1.5, "kl": 3.0, "alignment_tax": 0.0123, "samples": [{"prompt": "p", "completion": "c", "gold": 1.0}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    with RunLog(tmp_path / "reward") as log:
        for i in range(3):
            log.metrics(i + 1, {"loss": 1.0 / (i + 1)})
    page = check(write(tmp_path))
    for word in ("Calibration", "Best of n by the learned reward", "distinct-2", "0.432", "alignment tax", "0.0123", "GRPO"):
        assert word in page.text, word
