"""Sums that a small model can not do in its head, and a calculator that can: an environment whose answer needs a call of a tool.

    48*37+12=            ->  [calc(48*37+12)]  ->  1788  ->  1788

Reward 1 for the right number as the last of the final turn (7/2 or 3.5), 0 for another. A policy may answer without the tool, and is then right
about as often as it can multiply.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np

from jaxalign.types import UserError

_DO = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: lambda a, b: Fraction(a) / b, ast.UAdd: operator.pos, ast.USub: operator.neg}
LONGEST = 200  # characters of a sum: with + - * / alone, no result can then be large enough to hurt


def calc(expression: str) -> str:
    """The value of a sum of whole numbers with + - * / and brackets, exactly: "7/2" is "7/2", "6/2" is "3"."""
    if len(expression) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _DO:
            return _DO[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _DO:
            return _DO[type(node.op)](value(node.operand))
        raise ValueError("only whole numbers, + - * / and brackets")

    return str(value(ast.parse(expression.strip(), mode="eval").body))


class Calculator:
    """The record's "sum" (or one drawn from the seed) is the question; `calc` is the tool."""

    tools = {"calc": calc}

    def reset(self, record: dict, seed: int) -> str:
        self.sum = record.get("sum") or a_sum(np.random.default_rng(seed))
        try:
            self.value = calc(self.sum)
        except (ValueError, SyntaxError, TypeError, ZeroDivisionError) as e:
            raise UserError(f"calculator: the record's 'sum': {self.sum!r} has no value ({e}); mend or drop that row") from None
        return f"{self.sum}="

    def step(self, action: str) -> tuple[str, float, bool]:
        said = (re.findall(r"-?\d+(?:/\d+|\.\d+)?", action) or [""])[-1]
        right = said == self.value or "/" not in said != "" and Decimal(said) == Fraction(self.value)  # a fraction only in lowest terms: the sum itself is no answer
        return "", float(right), True


def a_sum(rng: np.random.Generator) -> str:
    """A product of two numbers of two digits, plus or less one more."""
    a, b, c = rng.integers(11, 100, 3)
    return f"{a}*{b}{rng.choice(['+', '-'])}{c}"


def conversation(sum_: str, *, tool: bool = True) -> dict:
    """A demonstration: {"messages"}, with the call or with the bare answer."""
    turns = [("user", f"{sum_}="), ("assistant", f"[calc({sum_})]"), ("user", f"<tool_response>\n{calc(sum_)}\n</tool_response>"), ("assistant", calc(sum_))]
    return {"messages": [{"role": r, "content": t} for r, t in (turns if tool else [turns[0], turns[3]])]}


class World:
    """What `jaxalign pipeline` writes before the first stage: demonstrations of which one in `every` uses the tool, and sums."""

    def __init__(self, seed: int = 0, every: int = 2):
        self.seed, self.every = seed, every

    def write_all(self, directory: Path, sizes: dict[str, int], seed: int) -> None:
        """demonstrations.jsonl (and demonstrations_eval.jsonl) and prompts.jsonl, `sizes` rows each."""
        rng = np.random.default_rng([self.seed, seed])
        directory.mkdir(parents=True, exist_ok=True)
        for name, n in sizes.items():
            sums = [a_sum(rng) for _ in range(n)]
            rows = [{"prompt": f"{s}=", "sum": s} if name == "prompts" else conversation(s, tool=i % self.every == 0) for i, s in enumerate(sums)]
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
