"""One stage of a run on the page: its curves, what they cost, what it said, what it was told to do."""

from __future__ import annotations

import collections
import json
import math
from typing import Any, NamedTuple

from jaxalign.report import judged
from jaxalign.report.charts import Series, lines
from jaxalign.report.markup import Html, join, tag
from jaxalign.report.read import Stage, dig, number, show


class Panel(NamedTuple):
    title: str
    unit: str
    keys: tuple[str, ...]


# The curves that tell whether training works, most telling first. A stage shows those it has; the rest folds away.
PANELS = (
    Panel("Negative log-likelihood", "nats per token", ("nll", "eval/nll")),
    Panel("Reward of the rollouts", "per answer", ("objective/scores", "objective/rlhf_reward")),
    Panel("KL from the reference", "nats per answer", ("objective/kl", "objective/kl_k3")),
    Panel("Loss", "", ("loss", "eval/loss")),
    Panel("Accuracy", "of pairs", ("accuracy", "rewards/accuracies", "eval/accuracy", "eval/rewards/accuracies")),
    Panel("Margin", "", ("margin", "rewards/margins", "eval/margin", "eval/rewards/margins")),
    Panel("Implicit rewards", "", ("rewards/chosen", "rewards/rejected")),
    Panel("Log-probabilities", "nats per answer", ("logps/chosen", "logps/rejected")),
    Panel("Accuracy", "of tokens", ("mean_token_accuracy", "eval/mean_token_accuracy")),
    Panel("Entropy", "nats per token", ("entropy", "policy/entropy_avg")),
    Panel("Clipped", "share of tokens", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    Panel("Value loss", "", ("loss/value_avg",)),
    Panel("Gradient norm", "", ("grad_norm",)),
    Panel("Learning rate", "", ("learning_rate",)),
)
UNITS = {"tokens_per_second": "tokens/s", "steps_per_second": "steps/s", "flops_per_second": "FLOP/s", "mfu": "MFU"}
STATE = (*UNITS, "goodput", "peak_memory_bytes", "time")  # of a line of timings.jsonl: as it is now; the rest adds up


def section(s: Stage, title: str, evaluation: Any = None) -> Html:
    parts: list[Any] = [tag("h2", title, id=s.name)]
    parts += [tag("p", x, class_="missing") for x in s.problems]
    if not s.metrics:
        return join([*parts, tag("p", "No metrics: this stage has not run here, or not for long enough to write a line.", class_="missing")])
    said = dig(evaluation, s.name)
    known = [f"{k.replace('_', ' ')} {show(v)}" for k, v in said.items() if number(v) is not None] if isinstance(said, dict) else []
    parts.append(tag("p", f"{show(s.metrics[-1].get('step'), 7)} steps", Html("<br>On held-out data: ") if known else None, " · ".join(known), class_="soft"))
    parts.append(speed(s))
    curves, constant = series(s.metrics)
    main, rest = choose(curves)
    marks = references(s.name, evaluation)

    def charts(panels):
        return tag("div", *(lines(c, title=p.title, unit=p.unit, reference=next((marks[k] for k in p.keys if k in marks), None)) for p, c in panels), class_="charts")

    parts.append(charts(main))
    if figure := judged.calibration(said):
        parts.append(tag("div", figure, class_="charts"))
    if rest or constant:
        same = "Constant: " + ", ".join(f"{k} = {show(v)}" for k, v in constant.items()) if constant else None
        parts.append(fold(f"{len(rest) + len(constant)} more metrics", charts(rest), tag("p", same, class_="soft")))
    if s.samples:
        parts.append(fold("Samples while training", join(_sample(x) for x in s.samples[-12:])))
    parts += [fold(name, tag("pre", pretty(x))) for name, x in (("Config", s.config), ("Environment", s.environment)) if x is not None]
    return join(parts)


def series(metrics: list[dict]) -> tuple[dict[str, Series], dict[str, float]]:
    """({name: curve}, {name: value of those that never change}). A line may lack a metric; null is NaN."""
    points: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for i, row in enumerate(metrics, 1):
        step = number(row.get("step"))
        at = step if step is not None and abs(step) < 1e15 else i  # also of NaN
        for k, v in row.items():
            v = math.nan if v is None else number(v)
            if k != "step" and v is not None:
                points[k].append((at, v))
    curves = {k: Series(k, *zip(*p)) for k, p in points.items()}
    constant = {k: c.y[0] for k, c in curves.items() if len(c.y) > 1 and all(v == c.y[0] for v in c.y)}
    return {k: c for k, c in curves.items() if k not in constant}, constant


def choose(curves: dict[str, Series]) -> tuple[list, list]:
    """Two lists of (panel, its curves): those worth showing at once, and the others."""
    left, main = dict(curves), []
    for p in PANELS:
        # A total says less than the quantity it stands for.
        if p.title == "Loss" and ("nll" in curves or "objective/scores" in curves):
            continue
        if found := [left.pop(k) for k in p.keys if k in left]:
            main.append((p, [c._replace(colour=i) for i, c in enumerate(found)]))
    rest = [(Panel(k, "", (k,)), [c]) for k, c in sorted(left.items())]
    return main + [x for x in rest if x[0].title.startswith("eval/")], [x for x in rest if not x[0].title.startswith("eval/")]


def references(stage: str, evaluation: Any) -> dict[str, tuple[str, float]]:
    """{metric: (name, level)} of what bounds this stage's curves."""
    found = {
        "nll": ("entropy floor", dig(evaluation, stage, "floor")),
        "accuracy": ("gold reward", dig(evaluation, stage, "gold_accuracy")),
    }
    return {k: (name, v) for k, (name, x) in found.items() if (v := number(x)) is not None and math.isfinite(v)}


def speed(s: Stage) -> Html | None:
    """How fast, and where the time went: one row."""
    spent = timings(s.timings)
    seconds = {k.removeprefix("seconds/"): v for k, v in spent.items() if k.startswith("seconds/")}
    total = sum(seconds.values())
    cells = [(unit, show(spent[k], 3)) for k, unit in UNITS.items() if k in spent]
    cells += [("goodput", f"{100 * spent['goodput']:.0f} %")] if math.isfinite(spent.get("goodput", math.nan)) else []
    cells += [(f"{k}, s", tag("span", show(v, 3), tag("small", f"{100 * v / total:.0f} %"))) for k, v in sorted(seconds.items(), key=lambda kv: -kv[1]) if total > 0]
    cells += [("compiled", show(spent["compilations"], 6))] if "compilations" in spent else []
    cells += [("peak MiB", show(spent["peak_memory_bytes"] / 2**20, 4))] if "peak_memory_bytes" in spent else []
    if not cells:
        return None
    head, row = (tag("tr", *(tag(t, c[i], class_="n") for c in cells)) for i, t in enumerate(("th", "td")))
    return tag("div", tag("table", tag("thead", head), tag("tbody", row)), class_="scroll")


def timings(rows: list[dict]) -> dict[str, float]:
    """The last rates, and the seconds of each phase over all processes: their clocks start anew after a resume."""
    before: dict[str, float] = collections.defaultdict(float)
    last: dict[str, float] = {}
    state: dict[str, float] = {}
    for row in rows:
        now = {k: v for k, x in row.items() if k != "step" and (v := number(x)) is not None}
        state |= {k: v for k, v in now.items() if k in STATE}
        clocks = {k: v for k, v in now.items() if k not in STATE}
        if any(clocks.get(k, 0) < v for k, v in last.items()):
            for k, v in last.items():
                before[k] += v
        last = clocks
    return {**{k: before[k] + last.get(k, 0) for k in {**before, **last}}, **state}


def happened(s: Stage) -> dict[str, int]:
    """{kind of event: how often}. A step skipped again after a resume is one skipped step."""
    seen = {(str(e.get("kind")), str(e.get("step")) if e.get("kind") == "skipped_step" else i) for i, e in enumerate(s.events)}
    return dict(collections.Counter(kind for kind, _ in seen))


def fold(summary: str, *children: Any) -> Html:
    return tag("details", tag("summary", summary), *children)


def pretty(x: Any) -> str:
    return json.dumps(x, indent=2, ensure_ascii=False)


def text(x: Any, class_: str = "text") -> Html:
    """Words of a model or of a data set: they may hold anything."""
    return tag("div", x if isinstance(x, str) else pretty(x), class_=class_, dir="auto")


def _sample(row: dict) -> Html:
    score = [f"{k} {show(row[k], 3)}" for k in ("step", "score", "gold") if number(row.get(k)) is not None]
    known = [text(row[k], "text prompt" if k == "prompt" else "text") for k in ("prompt", "completion") if k in row]
    return tag("div", tag("small", " · ".join(score), class_="soft"), *(known or [text(row)]), class_="sample")
