"""A reproduction: one pipeline config, whose stages are the arms, run for several seeds; curves and figures read off the run
directories; their mean and interval over seeds; and whether they are still what the committed file says.

Nothing here trains by itself: a seed is an ordinary run of `jaxalign pipeline`, resumable like any other, and `jaxalign
pipeline --config=jaxalign/reproduce/NAME.py` makes the same one by hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from jaxalign import build, reproduce
from jaxalign.cli import lineage, pipeline
from jaxalign.evals import stats
from jaxalign.train import checkpoint
from jaxalign.train.log import read_jsonl
from jaxalign.types import UserError


class Seed(NamedTuple):
    """A finished seed: the run directory of each of the reproduction's configs, by their argument."""

    number: int
    runs: dict[str, Path]

    def rows(self, stage: str, run: str = "") -> list[dict]:
        """metrics.jsonl of a stage."""
        return read_jsonl(self.runs[run] / stage / "metrics.jsonl")


Curve = Callable[[Seed], Sequence[tuple[float, float]]]
Figure = Callable[[Seed], float]


def curve(stage: str, y: str, x: str = "step", run: str = "") -> Curve:
    """(x, y) of every row of a stage's metrics that has both."""
    return lambda seed: [(r[x], r[y]) for r in seed.rows(stage, run) if x in r and y in r]


def last(stage: str, metric: str, n: int = 4, run: str = "") -> Figure:
    """The mean of the last n values of a metric: one evaluation alone is noisy, and a policy gradient dips now and then."""

    def figure(seed: Seed) -> float:
        values = [r[metric] for r in seed.rows(stage, run) if metric in r][-n:]
        if not values:
            raise UserError(f"{seed.runs[run] / stage}: no row of metrics.jsonl has {metric!r}")
        return float(np.mean(values))

    return figure


def best(stage: str, metric: str, run: str = "") -> Figure:
    """The largest value of a metric: what a curve reached, not where it ended."""
    return lambda seed: max(float(r[metric]) for r in seed.rows(stage, run) if metric in r)


def first(stage: str, metric: str, run: str = "") -> Figure:
    """The first value of a metric."""
    return lambda seed: next(float(r[metric]) for r in seed.rows(stage, run) if metric in r)


class Claim(NamedTuple):
    """What is said of a figure: that its mean over seeds lies in [low, high], and who says so."""

    figure: str
    low: float
    high: float
    source: str


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """get_config(arg) gives the config of a run; `runs` are the args, one run directory of each seed each ("" alone: one
    config). then(seed): what else is to be made of a finished seed, into its directories; it may be called again.

    tolerance: how far the mean of a figure, and a curve on average over its points, may be from the committed one, in the
    figure's own unit. `tolerances` says it for single figures or curves.
    """

    title: str
    get_config: Callable[[str], Any]
    curves: dict[str, Curve]
    figures: dict[str, Figure]
    x: str
    y: str
    tolerance: float
    claims: tuple[Claim, ...] = ()
    runs: tuple[str, ...] = ("",)
    tolerances: dict[str, float] = dataclasses.field(default_factory=dict)
    seeds: int = 5
    then: Callable[[Seed], None] | None = None
    notes: str = ""  # what the page says below the figure


def names() -> list[str]:
    """Every reproduction there is: the modules of this package that say REPRODUCTION."""
    return sorted(m.name for m in pkgutil.iter_modules(reproduce.__path__) if m.name not in ("runner", "page", "reviews"))


def load(name: str) -> Reproduction:
    """By its name, or by the import path of a module of one's own ("package.module")."""
    if "." not in name and name not in names():
        raise UserError(f"there is no reproduction {name!r};{build.nearest(name, names())}")
    try:
        return importlib.import_module(name if "." in name else f"jaxalign.reproduce.{name}").REPRODUCTION
    except (ImportError, AttributeError) as e:
        raise UserError(f"reproduction {name!r}: {e}; name a module that says REPRODUCTION = Reproduction(...)") from None


# -- running --------------------------------------------------------------------------------------------------------


def committed(folder: Path) -> dict[str, tuple[Reproduction, dict]]:
    """Those that have been written down: name -> (what it is, what it gave)."""
    return {name: (load(name), json.loads(path.read_text())) for name in names() if (path := folder / f"{name}.json").exists()}


def seed_of(r: Reproduction, workdir: Path, number: int) -> Seed:
    return Seed(number, {run: workdir / f"seed-{number}" / run for run in r.runs})


def config(r: Reproduction, run: str, number: int):
    c = r.get_config(run or None)
    c.seed = number
    return c


def run(r: Reproduction, workdir: Path, seeds: Sequence[int], say: Callable[[str], None] = print) -> None:
    """Trains what is not trained yet, seed by seed; each seed says what it reached."""
    import jax

    for number in seeds:
        complete(r, workdir, number)  # or says why what is there does not count
        seed = seed_of(r, workdir, number)
        for arg, directory in seed.runs.items():
            directory.mkdir(parents=True, exist_ok=True)
            with checkpoint.lock(directory, jax.process_index()):
                pipeline.trained(config(r, arg, number), directory)
        if r.then is not None:
            r.then(seed)
        say(f"seed {number}: " + ", ".join(f"{k} {f(seed):.4g}" for k, f in r.figures.items()) + f" ({_seconds(seed)['total']:.0f} s)")


def _seconds(seed: Seed) -> dict[str, float]:
    """Seconds by stage, over all of the seed's runs."""
    out: dict[str, float] = {}
    for directory in seed.runs.values():
        for k, v in json.loads((directory / "seconds.json").read_text()).items():
            out[k] = out.get(k, 0.0) + v
    return out


def complete(r: Reproduction, workdir: Path, number: int) -> bool:
    """Whether every stage of every run of a seed is there. Raises UserError where one was trained with settings that are not the
    reproduction's any more."""
    done = True
    for arg, d in seed_of(r, workdir, number).runs.items():
        c = config(r, arg, number)
        for name, section in build.stages(c).items():
            done = done and (d / name / "params" / "manifest.json").exists()
            if changed := lineage.changed_settings(d / name, c, section, also=("world",)):
                raise UserError(f"{d / name} was trained with other settings than the reproduction now has: {', '.join(changed)}; delete it, and what came after it, to train it anew")
    return done


# -- what came out --------------------------------------------------------------------------------------------------


def measure(r: Reproduction, workdir: Path, seeds: Sequence[int]) -> dict:
    """JSON: {"seeds", "figures": {name: [a value per seed]}, "curves": {name: {"x": [points], "y": [seeds][points]}}, "seconds":
    {stage: mean over seeds}}. A curve's x is the mean over seeds, and its length that of the shortest."""
    all_of = [seed_of(r, workdir, n) for n in seeds]
    curves = {}
    for name, f in r.curves.items():
        lines = [f(s) for s in all_of]
        n = min(map(len, lines))
        xy = np.array([line[:n] for line in lines], float).reshape(len(lines), n, 2)
        curves[name] = {"x": _rounded(xy[..., 0].mean(0)), "y": [_rounded(y) for y in xy[..., 1]]}
    seconds = [_seconds(s) for s in all_of]
    return {
        "seeds": list(seeds),
        "figures": {name: _rounded([f(s) for s in all_of]) for name, f in r.figures.items()},
        "curves": curves,
        "seconds": {k: round(float(np.mean([s.get(k, 0.0) for s in seconds])), 1) for k in seconds[0]},
    }


def _rounded(x) -> list[float]:
    return [float(f"{v:.6g}") for v in np.asarray(x, float)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % bootstrap interval over seeds; of one seed the value itself."""
    mean = float(np.mean(values))
    return (mean, *(stats.bootstrap(values) if len(values) > 1 else (mean, mean)))


class Row(NamedTuple):
    """A figure or a curve beside the committed one."""

    name: str
    now: float
    then: float
    off: float  # of a curve: mean distance over its points
    tolerance: float

    @property
    def within(self) -> bool:
        return math.isfinite(self.off) and self.off <= self.tolerance


def compare(r: Reproduction, got: dict, committed: dict) -> list[Row]:
    """What was measured beside the committed file, over the seeds that both have. Raises UserError where they share none, or the
    committed file lacks a figure or a curve."""
    shared = [s for s in got["seeds"] if s in committed["seeds"]]
    if not shared:
        raise UserError(f"the committed file has the seeds {committed['seeds']}, and none of {got['seeds']}; run one of them, or write a new file with --write")
    pick = lambda d, values: [values[d["seeds"].index(s)] for s in shared]
    rows = []
    for kind in ("figures", "curves"):
        if lacking := sorted(set(got[kind]) ^ set(committed[kind])):
            raise UserError(f"{kind} {', '.join(lacking)} are in only one of the two, what was measured and the committed file; write a new file with --write")
    for name in got["figures"]:
        now, then = (float(np.mean(pick(d, d["figures"][name]))) for d in (got, committed))
        rows.append(Row(name, now, then, abs(now - then), r.tolerances.get(name, r.tolerance)))
    for name in got["curves"]:
        now, then = (np.mean(pick(d, d["curves"][name]["y"]), axis=0) for d in (got, committed))
        off = float(np.abs(now - then).mean()) if now.shape == then.shape else math.inf
        rows.append(Row(f"curve {name}", float(now.mean()), float(then.mean()), off, r.tolerances.get(f"curve {name}", r.tolerance)))
    return rows
