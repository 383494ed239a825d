"""Sums with a verifier: "47+38=" wants "85". As hard as one likes: digits of the operands, how many of them, which operations.

What is known: the answer to every problem, so a reward that no model of rewards comes near, and whether a problem was ever
trained on: the two splits share none, at any seed. Host only: numpy and the standard library.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxalign.tasks.characters import write_tokenizer
from jaxalign.tasks.reviews import write_jsonl

ALPHABET = "0123456789+-*="
EVAL_SHARE = 8  # one problem in eight is held out, chosen by its CRC-32


def solve(problem: str) -> int:
    """The value of "12+34*5=": whole numbers with + - *, products first. Raises ValueError for anything else."""
    if not re.fullmatch(r"\d+([+*-]\d+)*=?", problem):
        raise ValueError(f"{problem!r} is no sum of whole numbers")
    terms = re.findall(r"([+-]?)(\d+(?:\*\d+)*)", problem)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, product.split("*"))) for sign, product in terms)


def verify(prompt: str, completion: str, record: Mapping | None = None) -> float:
    """1 if the completion is the answer, written as one writes a number; else 0. A reward for configs."""
    return float(completion == str(solve(prompt)))


@dataclasses.dataclass(frozen=True)
class World:
    """Problems of `terms` operands below 10 ** digits, joined by any of `operations`. Whoever writes the demonstrations gets each
    digit of an answer wrong with probability `mistakes`."""

    seed: int = 0
    digits: int = 2
    terms: int = 2
    operations: str = "+"
    mistakes: float = 0.0

    def problems(self, n: int, seed: int, split: str = "train") -> list[dict]:
        """n draws (a problem may return) of {"prompt", "answer"}. No problem is in both splits, at any seed."""
        if split not in ("train", "eval"):
            raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
        rng = np.random.default_rng([self.seed, zlib.crc32(b"arithmetic"), seed])
        out: list[dict] = []
        while len(out) < n:
            numbers = rng.integers(0, 10**self.digits, self.terms).tolist()
            joined = rng.choice(list(self.operations), self.terms - 1).tolist()
            prompt = str(numbers[0]) + "".join(f"{o}{x}" for o, x in zip(joined, numbers[1:])) + "="
            if (zlib.crc32(prompt.encode()) % EVAL_SHARE == 0) == (split == "eval"):
                out.append({"prompt": prompt, "answer": str(solve(prompt))})
        return out

    def demonstrations(self, n: int, seed: int, split: str = "train") -> list[dict]:
        """n of {"prompt", "completion"}: the problems of `problems`, answered with the writers' mistakes."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"mistakes"), seed])
        slip = lambda c: str((int(c) + rng.integers(1, 10)) % 10) if c != "-" and rng.random() < self.mistakes else c
        return [{"prompt": p["prompt"], "completion": "".join(map(slip, p["answer"]))} for p in self.problems(n, seed, split)]

    def gold_rewards(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence | None = None) -> np.ndarray:
        return np.array([verify(p, c) for p, c in zip(prompts, completions, strict=True)])

    def demonstration_log_prob(self, prompt: str, completion: str) -> float:
        """Exact ln p(completion, then its end | prompt) of those who demonstrate."""
        right = str(solve(prompt))
        if len(right) != len(completion) or any((a == "-") != (b == "-") or not (b in ALPHABET[:10] or b == "-") for a, b in zip(right, completion)):
            return -math.inf
        chances = [1.0 if a == "-" else 1 - self.mistakes if a == b else self.mistakes / 9 for a, b in zip(right, completion)]
        return math.fsum(math.log(p) if p else -math.inf for p in chances)

    def log_prob(self, text: str) -> float:
        return -math.inf  # of a problem nobody asked for: not told here

    def write_all(self, directory: str | Path, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Path]:
        """Writes JSON Lines, and the tokenizer of 16 ids. sizes: rows of sft, more_sft and sft_eval (`demonstrations`), answers (the
        problems of more_sft, answered right), prompts and prompts_eval ({"prompt", "answer"})."""
        makers = {
            "sft": lambda n: self.demonstrations(n, 4 * seed),
            "more_sft": lambda n: self.demonstrations(n, 4 * seed + 1),
            "answers": lambda n: [{"prompt": p["prompt"], "completion": p["answer"]} for p in self.problems(n, 4 * seed + 1)],
            "prompts": lambda n: self.problems(n, 4 * seed + 1),
            "sft_eval": lambda n: self.demonstrations(n, 4 * seed + 2, "eval"),
            "prompts_eval": lambda n: self.problems(n, 4 * seed + 3, "eval"),
        }
        if unknown := set(sizes) - set(makers):
            raise ValueError(f"no file is called {sorted(unknown)}; there are {sorted(makers)}")
        write_tokenizer(directory, ALPHABET)
        return {name: write_jsonl(Path(directory) / f"{name}.jsonl", makers[name](n)) for name, n in sizes.items()}
