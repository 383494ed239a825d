"""Reward against KL as an SVG of its own: of every stage its points, the form that was fitted, and where it was highest."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxalign.evals import overoptimisation as forms
from jaxalign.report import style
from jaxalign.report.charts import HEIGHT, LEFT, TOP, WIDTH, Frame
from jaxalign.report.markup import Html, join, tag

KEYS = 150  # pixels to the right, for the stages' names


def document(got: dict[str, Any], kinds: dict[str, str]) -> str:
    """got: {stage: {kind: what `cli.frontier.summary` gives}}; kinds: {kind: what its reward is}. A panel for each kind that a stage has."""
    colour = {name: f"s{i % 5}" for i, name in enumerate(got)}
    shown = [k for k in kinds if any(k in g for g in got.values())]
    panels = [_panel({n: g[k] for n, g in got.items() if k in g}, colour, kinds[k]).replace("<svg", f'<svg x="0" y="{i * (HEIGHT + 20)}" width="{WIDTH}" height="{HEIGHT + 16}"', 1) for i, k in enumerate(shown)]
    keys = [(name, colour[name], tag("tspan", name)) for name, g in got.items() if any(k in g for k in shown)]
    legend = [tag("path", class_=c, d=f"M{WIDTH + 6} {24 + 16 * i}h14") + tag("text", text, x=WIDTH + 26, y=28 + 16 * i) for i, (_, c, text) in enumerate(keys)]
    legend.append(tag("text", "line: R0 + d (a − b log d)", x=WIDTH + 6, y=36 + 16 * len(keys)))
    box = f"0 0 {WIDTH + KEYS} {len(shown) * (HEIGHT + 20)}"
    # Not by `tag`: `viewBox` and `xmlns` are what they are.
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}"><style>{style.CSS} svg {{ background: var(--card) }}</style>{join(map(Html, (*panels, *legend)))}</svg>\n'


def _panel(stages: dict[str, dict], colour: dict[str, str], what: str) -> Html:
    points = np.concatenate([np.array(s["points"], float)[:, 1:] for s in stages.values()])
    curves = {n: _fitted(s) for n, s in stages.items() if "fit" in s}
    frame = Frame(np.append(points[:, 0], 0.0), points[:, 1], pad=0.1)
    body = [tag("text", what, class_="label", x=LEFT + 4, y=TOP)]
    for name, s in stages.items():
        c = colour[name]
        body += [tag("circle", class_=f"dot {c}", cx=frame.x(x), cy=frame.y(y), r=1.8, opacity=".55") for _, x, y in s["points"]]
        if name in curves:
            x, y = curves[name]
            seen = (y >= frame.low) & (y <= frame.high)  # a fit may leave the picture where there are no points
            body.append(tag("path", class_=c, d=frame.path(x, np.where(seen, y, np.nan))))
        at = s["turn"]
        body.append(tag("circle", tag("title", f"{name}: {at['reward']:.3g} at KL {at['kl']:.3g}"), class_=f"mark {c}", cx=frame.x(at["kl"]), cy=frame.y(at["reward"]), r=4.5))
    return frame.svg(body, what, "KL from the start, nats per answer")


def _fitted(s: dict) -> tuple[np.ndarray, np.ndarray]:
    kl = np.array([p[1] for p in s["points"]])
    x, f = np.linspace(kl.min(), kl.max(), 80), s["fit"]
    return x, f["start"] + forms.rl_form(forms.Fit(f["a"], f["b"], 0.0, 0.0, 0.0), x)
