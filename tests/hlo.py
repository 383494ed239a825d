"""Reads what a compiled program holds and says to other devices, from its text."""

import math
import re
from typing import NamedTuple

ARRAY = re.compile(r"\b(?:pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# An instruction's result type stands between "=" and the name of what makes it; "-start" is the asynchronous form, whose
# "-done" would count it twice.
MADE = re.compile(r"= (\(.*?\)|\S+) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(([^\n]*)")


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of what it makes, per device

    @property
    def size(self) -> int:
        return max(map(math.prod, self.shapes), default=0)


def shapes(text: str) -> set[tuple[int, ...]]:
    """Of every array that a program names, per device."""
    return {tuple(map(int, s.split(","))) if s else () for s in ARRAY.findall(text)}


def collectives(text: str) -> list[Collective]:
    return [Collective(kind, tuple(shapes(made))) for made, kind, _ in MADE.findall(text)]
