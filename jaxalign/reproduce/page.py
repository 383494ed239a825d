"""Tables and the figure of a reproduction, for the terminal and for docs/reproductions.md."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np

from jaxalign.report import charts, style
from jaxalign.reproduce.runner import Claim, Reproduction, Row, interval
from jaxalign.types import UserError

# More arms than the page's style sheet has colours.
COLOURS = ("#2a6fd0", "#d9661f", "#0e8f72", "#7c4dcc", "#6b7280", "#c02626", "#b8860b", "#1aa3c7", "#c2418c", "#5a7d1f", "#8a5a3c", "#3d3f9e", "#d4799c", "#7f8f00")


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    return "\n".join(f"| {' | '.join(map(str, r))} |" for r in (head, ["---"] * len(head), *rows))


def number(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 10 else f"{x:.4g}"


def claimed(r: Reproduction, got: dict) -> list[tuple[str, list[Claim], str]]:
    """(figure, what is claimed of it, whether it was reached), first those of which something is. "yes" is of the mean over seeds and its
    whole interval, "mean" of the mean alone."""

    def verdict(values, claims):
        at = interval(values)
        if not all(c.low <= at[0] <= c.high for c in claims):
            return "no"
        return "yes" if all(c.low <= x <= c.high for x in at for c in claims) else "mean"

    of = {name: [c for c in r.claims if c.figure == name] for name in got["figures"]}
    return [(name, claims, verdict(got["figures"][name], claims)) for name, claims in sorted(of.items(), key=lambda x: not x[1])]


def results(r: Reproduction, got: dict) -> str:
    """Every figure with its interval over seeds, beside what is claimed of it."""
    rows = []
    for name, claims, reached in claimed(r, got):
        values = got["figures"][name]
        mean, low, high = interval(values)
        said = "; ".join(f"{number(c.low)} to {number(c.high)} ({c.source})" for c in claims) or "–"
        rows.append([name, f"{number(mean)} [{number(low)}, {number(high)}]", f"{number(min(values))} to {number(max(values))}", said, reached if claims else "–"])
    return table(["figure", "mean over seeds [95 %]", "least and most", "expected", "reached"], rows)


def cost(got: dict) -> str:
    parts = {k: v for k, v in got["seconds"].items() if k != "total"}
    return f"{got['seconds'].get('total', sum(parts.values())):.0f} s a seed: " + ", ".join(f"{k} {v:.0f}" for k, v in parts.items())


def comparison(rows: Sequence[Row]) -> str:
    return table(["", "now", "committed", "off", "tolerance", ""], [[x.name, number(x.now), number(x.then), number(x.off), number(x.tolerance), "" if x.within else "OFF"] for x in rows])


def figure(r: Reproduction, got: dict) -> str:
    """An SVG of its own: the mean over seeds of each curve, the least and the most of them as a band."""
    curves = {name: (np.array(c["x"]), np.array(c["y"])) for name, c in got["curves"].items()}
    frame = charts.Frame(np.concatenate([x for x, _ in curves.values()]), np.concatenate([y.ravel() for _, y in curves.values()]))
    body = []
    for i, (x, y) in enumerate(curves.values()):
        colour = COLOURS[i % len(COLOURS)]
        if len(y) > 1:
            around = frame.path(x, y.min(0)) + "L" + frame.path(x[::-1], y.max(0)[::-1])[1:] + "Z"
            body.append(charts.tag("path", d=around, style=f"fill: {colour}; stroke: none; opacity: .13"))
        body.append(charts.tag("path", d=frame.path(x, y.mean(0)), style=f"stroke: {colour}"))
        if len(x) <= 12:
            body += [charts.tag("circle", cx=frame.x(a), cy=frame.y(b), r=2.2, style=f"fill: {colour}") for a, b in zip(x, y.mean(0))]
    svg = str(frame.svg(body, r.title, r.x)).replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    svg = svg.replace(">", f"><style>{style.CSS} svg {{ background: var(--card) }}</style>", 1)
    beside = charts.WIDTH + 110  # the arms' names stand to the right of the plot
    svg = svg.replace(f'viewBox="0 0 {charts.WIDTH} {charts.HEIGHT}"', f'viewBox="0 0 {beside} {charts.HEIGHT}"')
    keys = [f'<text x="{charts.WIDTH + 4}" y="{22 + 14 * i}" style="fill: {COLOURS[i % len(COLOURS)]}">{charts.tag("tspan", name)}</text>' for i, name in enumerate(curves)]
    return svg.replace("</svg>", "".join(keys) + "</svg>")


def machine() -> str:
    import jax

    return f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, jax {jax.__version__}" if jax.default_backend() == "cpu" else f"{jax.devices()[0].device_kind}, jax {jax.__version__}"


def section(r: Reproduction, name: str, got: dict) -> str:
    """What stands between a reproduction's markers in docs/reproductions.md."""
    seeds = got["seeds"]
    return "\n\n".join(
        [
            f"Seeds {', '.join(map(str, seeds))}; {got['machine']}; {cost(got)}. Tolerance {r.tolerance:g}"
            + (f", of {len(r.tolerances)} figures one of their own (`jaxalign reproduce {name} --only_compare` says it beside each)." if r.tolerances else "."),
            results(r, got),
            f"![{r.title}: {r.y} over {r.x}](reproductions/{name}.svg)",
            f"{r.y}, over {r.x}: the mean over seeds, and from the least to the most of them.",
            *([r.notes] if r.notes else []),
        ]
    )


def overview(kept: Mapping[str, tuple[Reproduction, dict]]) -> str:
    """One line for each reproduction that was written down: how many of its claims were reached, which by the mean alone, and which not."""
    rows = []
    for name, (r, got) in kept.items():
        said = [(figure, reached) for figure, claims, reached in claimed(r, got) if claims]
        of = {v: [figure for figure, reached in said if reached == v] for v in ("yes", "mean", "no")}
        rows.append([f"`{name}`", r.title, len(got["seeds"]), f"{got['seconds']['total'] / 60:.0f}", len(said), len(of["yes"]), "; ".join(of["mean"]) or "–", "; ".join(of["no"]) or "–"])
    return table(["name", "", "seeds", "minutes a seed", "claims", "reached", "by the mean alone", "not reached"], rows)


def write(page: Path, name: str, text: str) -> None:
    """Puts text between NAME's markers. Raises UserError where the page has none."""
    begin, end = f"<!-- reproduce {name} begin -->", f"<!-- reproduce {name} end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise UserError(f"{page} lacks the markers {begin} and {end}; add them where the section is to stand")
    page.write_text(re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{text}\n{end}", old, flags=re.S), encoding="utf-8")
