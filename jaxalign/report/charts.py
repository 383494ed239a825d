"""Line charts and one plane of points, as SVG that needs nothing else. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from typing import NamedTuple, Sequence

import numpy as np

from jaxalign.report.markup import Html, tag
from jaxalign.report.read import show

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 372, 12, 184  # of the plot within


class Series(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]  # NaN and infinities leave a gap
    colour: int = 0  # index of the style sheet's --c0, --c1, ...


class Mark(NamedTuple):
    name: str
    x: float
    y: float
    colour: int


def lines(series: Sequence[Series], *, title: str, x: str = "step", unit: str = "", reference: tuple[str, float] | None = None) -> Html:
    """A figure with one curve per series: smoothed, the raw one faint behind it. `reference`: a dashed level with its name."""
    curves = [(s, np.asarray(s.x, float), _drawable(s.y)) for s in series]
    ys = np.concatenate([y[np.isfinite(y)] for _, _, y in curves])
    gaps = sum(len(y) for _, _, y in curves) - len(ys)
    keys = [tag("span", s.name if len(series) > 1 else "last ", tag("b", show(s.y[-1])), class_=f"key s{s.colour}") for s in series if len(s.y)]
    if gaps:
        keys.append(tag("span", f"{gaps} not finite", class_="bad"))
    if not len(ys):
        return _figure(title, unit, keys, tag("p", "No finite value to draw.", class_="missing"))
    frame = Frame(np.concatenate([a for _, a, _ in curves]), np.append(ys, reference[1]) if reference else ys)
    body = []
    if reference:
        at = frame.y(reference[1])
        body.append(tag("line", class_="reference", x1=LEFT, x2=RIGHT, y1=at, y2=at))
        keys.append(tag("span", reference[0], tag("b", show(reference[1])), class_="key reference"))
    for s, a, b in curves:
        soft = smooth(b)
        if soft is not b:
            body.append(tag("path", class_=f"raw s{s.colour}", d=frame.path(*thin(a, b))))
        body.append(tag("path", class_=f"curve s{s.colour}", d=frame.path(*thin(a, soft))))
        if len(a) <= 12:
            body += [tag("circle", class_=f"dot s{s.colour}", cx=frame.x(p), cy=frame.y(q), r=2.6) for p, q in zip(a, b) if np.isfinite(q)]
    return _figure(title, unit, keys, frame.svg(body, title, x))


def plane(marks: Sequence[Mark], curve: Sequence[tuple[float, float]], *, title: str, x: str, unit: str, curve_name: str) -> Html:
    """A figure of named points, and the line through `curve`, (x, y) each."""
    points = np.array([(m.x, m.y) for m in marks] + list(curve), float)
    frame = Frame(np.append(points[:, 0], 0), points[:, 1], pad=0.1)
    body = [tag("path", class_="frontier", d=frame.path(*zip(*sorted(curve))))] if curve else []
    body += [tag("circle", class_="frontier", cx=frame.x(p), cy=frame.y(q), r=2.0) for p, q in curve]
    for m in marks:
        px, py = frame.x(m.x), frame.y(m.y)
        left, below = px > RIGHT - 50, py < TOP + 20
        body.append(tag("circle", tag("title", f"{m.name}: {show(m.x, 3)}, {show(m.y, 3)}"), class_=f"mark s{m.colour}", cx=px, cy=py, r=5.5))
        body.append(tag("text", m.name, class_="label", x=px + (-6.0 if left else 6.0), y=py + (18.0 if below else -9.0), text_anchor="end" if left else "start"))
    return _figure(title, unit, [tag("span", curve_name, class_="key reference")] if curve else [], frame.svg(body, title, x))


def _figure(title: str, unit: str, keys: list[Html], body: Html) -> Html:
    caption = tag("figcaption", title, " ", tag("span", unit, class_="unit"))
    return tag("figure", caption, tag("div", *keys, class_="keys"), body, class_="chart")


class Frame:
    """Axes: data coordinates to pixels, ticks at 1, 2 or 5 times a power of ten."""

    def __init__(self, xs: np.ndarray, ys: np.ndarray, pad: float = 0.05):
        self.left, self.right = _range(xs, 0)
        self.low, self.high = _range(ys, pad)

    def x(self, v: float) -> float:
        return float(LEFT + (v - self.left) / (self.right - self.left) * (RIGHT - LEFT))

    def y(self, v: float) -> float:
        return float(BOTTOM - (v - self.low) / (self.high - self.low) * (BOTTOM - TOP))

    def path(self, xs, ys) -> str:
        """Lines between neighbours, pen up at every gap; a point alone between gaps shows as a dot, by its round cap."""
        out, down = [], False
        for a, b in zip(xs, ys):
            finite = bool(np.isfinite(b))
            if finite:
                out.append(f"{'L' if down else 'M'}{self.x(a):.1f} {self.y(b):.1f}{'' if down else 'h0'}")
            down = finite
        return "".join(out)

    def svg(self, body: Sequence[Html], title: str, x: str) -> Html:
        out = []
        for v, label in ticks(self.low, self.high, 4):
            out.append(tag("line", class_="grid", x1=LEFT, x2=RIGHT, y1=self.y(v), y2=self.y(v)))
            out.append(tag("text", label, x=LEFT - 6, y=self.y(v) + 3.5, text_anchor="end"))
        for v, label in ticks(self.left, self.right, 5):
            at = self.x(v)
            out.append(tag("line", class_="axis", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 4))
            # The outermost labels stay inside the picture.
            out.append(tag("text", label, x=at, y=BOTTOM + 16, text_anchor="end" if at > RIGHT - 8 else "middle"))
        out.append(tag("line", class_="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
        out.append(tag("text", x, class_="name", x=(LEFT + RIGHT) / 2, y=HEIGHT - 5, text_anchor="middle"))
        return tag("svg", *out, *body, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title)


def ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    """(value, label) at round numbers within [low, high], roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    largest, scale, suffix = max(abs(low), abs(high)), 1.0, ""
    if 1e4 <= largest < 1e15:
        thousands = math.floor(math.log10(largest) / 3)
        scale, suffix = 1000.0**thousands, " kMGT"[thousands]
    elif not 1e-2 <= largest < 1e15:
        tens = math.floor(math.log10(largest))
        scale, suffix = 10.0**tens, f"e{tens}"
    decimals = min(9, max(0, -math.floor(math.log10(step / scale) + 1e-9)))
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v / scale:.{decimals}f}{suffix}".replace("-", "−", v < 0) if v else "0") for v in values]


def smooth(y: np.ndarray) -> np.ndarray:
    """A bell-weighted line through 1/25 of the curve around each point: no lag, and ends that do not bend.

    Curves under 50 points are left as they are.
    """
    if len(y) < 50:
        return y
    finite = np.isfinite(y)
    reach = len(y) // 50
    bell, d = np.hanning(2 * reach + 3)[1:-1], np.arange(-reach, reach + 1)
    moments = [np.convolve(v, bell * d**p, "same") for v, p in ((finite, 0), (finite, 1), (finite, 2), (np.where(finite, y, 0), 0), (np.where(finite, y, 0), 1))]
    w, wd, wdd, wy, wdy = moments
    below = w * wdd - wd**2
    return np.where(finite, np.where(below > 1e-9, (wdd * wy - wd * wdy) / np.maximum(below, 1e-9), y), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """About `most` points that look like all of them: the lowest and the highest of every bucket stay, and so do gaps."""
    if len(x) <= most:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), most // 2):
        finite = np.isfinite(y[part])
        if finite.any():
            keep |= {int(part[finite][y[part][finite].argmin()]), int(part[finite][y[part][finite].argmax()])}
        if not finite.all():
            keep.add(int(part[~finite][0]))
    at = sorted(keep)
    return x[at], y[at]


def _drawable(y: Sequence[float]) -> np.ndarray:
    """What has no place on a screen is a gap, or nothing: 1e300 would overflow the axis, and 1e-300 its ticks."""
    y = np.asarray(y, float)
    return np.where(np.abs(y) < 1e100, np.where(np.abs(y) > 1e-100, y, 0), np.nan)


def _range(v: np.ndarray, pad: float) -> tuple[float, float]:
    low, high = float(v.min()), float(v.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant sits in the middle
        room = abs(low) / 2 or 1.0
        return low - room, high + room
    return low - pad * (high - low), high + pad * (high - low)
