"""Reads what a compiled program holds and says to other devices, from its text."""

import math
import re
from typing import NamedTuple

ARRAY = re.compile(r"\b(?:pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# An instruction's result type stands between "=" and the name of what makes it; "-start" is the asynchronous form, whose
# "-done" would count it twice.
MADE = re.compile(r"= (\(.*?\)|\S+) (" + "|".join(COLLECTIVES) + r")(?:-start)?\(")
# How a TPU program spells a reduce-scatter: a computation of this name, an all-reduce of which each device keeps its part.
FUSED = "%all-reduce-scatter"


class Collective(NamedTuple):
    kind: str
    shapes: frozenset[tuple[int, ...]]  # of what it makes, per device, without dimensions of 1

    @property
    def size(self) -> int:
        return max(map(math.prod, self.shapes), default=0)


def shapes(text: str) -> set[tuple[int, ...]]:
    """Of every array that a program names, per device."""
    return {tuple(map(int, s.split(","))) if s else () for s in ARRAY.findall(text)}


def collectives(text: str) -> set[Collective]:
    out, fused = set(), False
    make = lambda kind, made: out.add(Collective(kind, frozenset(tuple(n for n in s if n != 1) for s in shapes(made))))
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            if fused := line.startswith(FUSED):
                make("reduce-scatter", line.rsplit("->", 1)[1])
        elif not fused and (m := MADE.search(line)):
            make(m[2], m[1])
    return out
