"""A run directory, read with tolerance: what is missing is None or [], what is damaged becomes a sentence for the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.train.log import read_jsonl
from jaxalign.types import UserError

STAGES = ("pretrain", "sft", "reward", "ppo", "dpo")
POLICIES = ("sft", "ppo", "dpo")


class Stage(NamedTuple):
    name: str
    metrics: list[dict]
    timings: list[dict]
    events: list[dict]
    samples: list[dict]
    config: Any
    environment: Any
    problems: list[str]


def stage(directory: Path, name: str) -> Stage:
    """Never raises for what the directory holds or lacks."""
    problems: list[str] = []
    rows = [read_rows(directory / f"{x}.jsonl", problems) for x in ("metrics", "timings", "events", "samples")]
    return Stage(name, *rows, *(document(directory / f"{x}.json", problems) for x in ("config", "environment")), problems)


def document(path: Path, problems: list[str]) -> Any:
    """The JSON of a file; None if there is none, or none that can be read (then `problems` says so)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        problems.append(f"{path.name} cannot be read: {e}")
        return None


def read_rows(path: Path, problems: list[str]) -> list[dict]:
    """The objects of a JSON Lines file; [] if there is none, or none that can be read (then `problems` says so)."""
    if not path.exists():
        return []
    try:
        return [row for row in read_jsonl(path) if isinstance(row, dict)]
    except (UserError, RecursionError) as e:
        problems.append(f"{path.name} cannot be read: {e}")
        return []


def dig(x: Any, *keys: str) -> Any:
    """x[k1][k2]...; None as soon as something is missing or no dict."""
    for key in keys:
        x = x.get(key) if isinstance(x, dict) else None
    return x


def policies(evaluation: Any) -> dict[str, dict]:
    """{name: figures} of the policies that were evaluated, the road's own first."""
    found = dig(evaluation, "policies")
    found = found if isinstance(found, dict) else {}
    return {p: found[p] for p in dict.fromkeys([*POLICIES, *found]) if isinstance(found.get(p), dict)}


def number(x: Any) -> float | None:
    """A float, also of the "nan" and "inf" that JSON cannot say otherwise; None for what is no number."""
    if isinstance(x, str) and x.lstrip("-") in ("nan", "inf"):
        return float(x)
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        return None
    try:
        return float(x)
    except OverflowError:  # an integer of JSON may have any length
        return math.inf if x > 0 else -math.inf


def show(x: Any, digits: int = 4, places: int | None = None) -> str:
    """A number for people: `digits` significant ones or `places` decimals, thousands apart, a dash for None."""
    x = number(x)
    if x is None:
        return "–"
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else "∞" if x > 0 else "−∞"
    if places is not None and abs(x) < 1e15:
        text = f"{x:,.{places}f}"
    elif x and not 1e-3 <= abs(x) < 1e15:
        mantissa, exponent = f"{x:.{max(0, digits - 2)}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - (math.floor(math.log10(abs(x))) if x else 0))
        text = f"{x:,.{min(decimals, digits)}f}"
        text = text.split(".")[0] if x == int(x) else text
    return text.replace("-", "−", 1) if x < 0 else text
