"""Reward against KL: what the rows of a stage say of it, and its picture, of several stages, for the page and as an SVG of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jaxalign.evals import overoptimisation as forms
from jaxalign.report import style
from jaxalign.report.charts import HEIGHT, LEFT, TOP, WIDTH, Frame
from jaxalign.report.markup import Html, join, tag
from jaxalign.report.read import number, show

# what is measured -> (metric of the KL, of the reward, by its first name or its other, what the reward is, what a stage without them would have to do)
KINDS = {
    "gold": ("eval/kl", ("eval/gold",), "Gold reward of held-out answers", "set world.watch and train.eval_every for a world's own reward while a stage trains"),
    "scores": ("objective/kl", ("objective/scores", "reward"), "Reward that was trained on", "online stages that measure a KL write them, at the first update after each rollout"),
}  # fmt: skip
POINTS = 50  # of a stage, at most: more rows are averaged, neighbours together
KEYS = 150  # pixels to the right of an SVG of its own, for the stages' names


def measured(rows: list[dict]) -> dict:
    """Of each of `KINDS` that the metrics of a stage have: see `summary`; and "missing": a sentence for each that they lack."""
    out: dict = {"missing": []}
    for kind, (kl, (reward, *other), _, remedy) in KINDS.items():
        rewards = [next((r[k] for k in (reward, *other) if k in r), None) for r in rows]
        every = np.array([p for r, earned in zip(rows, rewards) if None not in (p := tuple(map(number, (r.get("step"), r.get(kl), earned)))) and all(math.isfinite(x) and abs(x) < 1e15 for x in p)]).reshape(-1, 3)
        every = np.where(np.abs(every) > 1e-100, every, 0)  # what no axis could show
        if len(every):
            out[kind] = summary(every)
        elif kind == "gold" and any(reward in r for r in rows):
            out["missing"].append(f"{reward} without {kl}: nobody said from where the KL counts; set world.watch.reference to the stage that this one started from")
        else:
            out["missing"].append(f"no {kl} with {reward} in metrics.jsonl; {remedy}")
    return out


def summary(points: np.ndarray) -> dict:
    """{"points", "turn", "end", "lost", "noise", "turned", "frontier", "fit" or "no_fit"} of f64[N,3]: step, KL and reward in the order of
    training. An estimate of a KL may be a little below 0, a KL not."""
    if len(points) > POINTS:
        points = np.array([[part[-1, 0], *part[:, 1:].mean(0)] for part in np.array_split(points, POINTS)])
    step, kl, reward = points.clip([-np.inf, 0, -np.inf], None).T
    t = forms.turn(kl, reward)
    out = {
        "points": [[int(s), k, r] for s, k, r in zip(step, kl.tolist(), reward.tolist())],
        "turn": {"step": int(step[t.at]), "kl": t.kl, "reward": t.reward},
        "end": {"step": int(step[-1]), "kl": t.end_kl, "reward": t.end_reward},
        "lost": t.reward - t.end_reward,
        "noise": t.noise,
        "turned": t.turned,
        "frontier": forms.hull(kl, reward),
    }
    try:
        start, fit = forms.fit_rl_and_start(kl, reward)
    except ValueError as e:
        return out | {"no_fit": str(e)}
    return out | {"fit": {k: v for k, v in {"start": start, **fit._asdict()}.items() if math.isfinite(v)}}


def section(stages: dict[str, list[dict]]) -> Html | None:
    """The pictures for the page, of {stage: its metrics}; None where no stage has a KL and a reward."""
    got = {n: m for n, rows in stages.items() if (m := measured(rows)).keys() & KINDS.keys()}
    if not got:
        return None
    figures = []
    for kind, (of, colour) in _panels(got).items():
        keys = [tag("span", n, tag("b", f"{show(s['turn']['reward'], 3)} at {show(s['turn']['kl'], 3)} nats" + (f", {show(s['end']['reward'], 3)} at the end" if s["turned"] else "")), class_=f"key {colour[n]}") for n, s in of.items()]
        figures.append(tag("figure", tag("figcaption", KINDS[kind][2]), tag("div", *keys, class_="keys"), _plane(of, colour, KINDS[kind][2]), class_="chart"))
    about = tag("p", "Each point an evaluation, or a few together, as training went on; lines: R0 + d (a − b log d), d the root of the KL, as far as there are points for it; marked: where the mean of three was highest.", class_="soft")
    return join([tag("h3", "Reward against KL"), tag("div", *figures, class_="charts"), about])


def document(got: dict[str, Any]) -> str:
    """An SVG of its own: a panel for each kind that a stage of {stage: {kind: `summary`}} has."""
    drawn = _panels(got)
    panels, colour = [], next(iter(drawn.values()))[1]
    for i, (kind, (of, _)) in enumerate(drawn.items()):
        title = tag("text", KINDS[kind][2], class_="label", x=LEFT + 4, y=TOP)
        panels.append(_plane(of, colour, KINDS[kind][2], title).replace("<svg", f'<svg x="0" y="{i * (HEIGHT + 20)}" width="{WIDTH}" height="{HEIGHT + 16}"', 1))
    names = [n for n in got if any(n in of for of, _ in drawn.values())]
    legend = [tag("path", class_=colour[n], d=f"M{WIDTH + 6} {24 + 16 * i}h14") + tag("text", n, x=WIDTH + 26, y=28 + 16 * i) for i, n in enumerate(names)]
    legend.append(tag("text", "line: R0 + d (a − b log d)", x=WIDTH + 6, y=36 + 16 * len(names)))
    box = f"0 0 {WIDTH + KEYS} {max(len(drawn) * (HEIGHT + 20), 60 + 16 * len(names))}"
    # Not by `tag`: `viewBox` and `xmlns` are what they are.
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}"><style>{style.CSS} svg {{ background: var(--card) }}</style>{join(map(Html, (*panels, *legend)))}</svg>\n'


def _panels(got: dict[str, Any]) -> dict[str, tuple[dict, dict]]:
    """{kind: ({stage: summary}, {stage: colour})} of the kinds that any stage has."""
    colour = {n: f"s{i % 5}" for i, n in enumerate(got)}
    each = {k: {n: g[k] for n, g in got.items() if k in g} for k in KINDS}
    return {k: (of, colour) for k, of in each.items() if of}


def _plane(stages: dict[str, dict], colour: dict[str, str], what: str, *more: Html) -> Html:
    points = np.concatenate([np.array(s["points"], float)[:, 1:] for s in stages.values()])
    frame = Frame(np.append(points[:, 0], 0.0), points[:, 1], pad=0.1)
    body = list(more)
    for name, s in stages.items():
        c, at = colour[name], s["turn"]
        body += [tag("circle", class_=f"dot {c}", cx=frame.x(x), cy=frame.y(y), r=1.8, opacity=".55") for _, x, y in s["points"]]
        if "fit" in s:
            x, y = _fitted(s)
            seen = (y >= frame.low) & (y <= frame.high)  # a fit may leave the picture where there are no points
            body.append(tag("path", class_=c, d=frame.path(x, np.where(seen, y, np.nan))))
        body.append(tag("circle", tag("title", f"{name}: {at['reward']:.3g} at KL {at['kl']:.3g}"), class_=f"mark {c}", cx=frame.x(at["kl"]), cy=frame.y(at["reward"]), r=4.5))
    return frame.svg(body, what, "KL from the start, nats per answer")


def _fitted(s: dict) -> tuple[np.ndarray, np.ndarray]:
    kl = np.array([p[1] for p in s["points"]])
    x, f = np.linspace(kl.min(), kl.max(), 80), s["fit"]
    return x, f["start"] + forms.rl_form(forms.Fit(f["a"], f["b"], 0.0, 0.0, 0.0), x)
