"""Two tasks of RL4LMs (2210.01241) whose rewards are rules: numbers that increase, and texts that contain a date.

There the policy starts from GPT-2 and the prompt is its start of text; here each task brings a small corpus of its own to start
from, and the prompt is one character. Host only: numpy and the standard library.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxalign.tasks.characters import write_tokenizer
from jaxalign.tasks.reviews import write_jsonl

PROMPT = ">"


def increasing(text: str, min_tokens: int = 20) -> float:
    """Length of the increasing run that begins with the first number, over max(words of the text, min_tokens / 2): other words are
    passed over but count, the run ends at the first number that does not exceed the one before. 0 without a number."""
    words = text.split()
    numbers = [x for x in map(_number, words) if x is not None]
    run = 0
    while run < len(numbers) and (run == 0 or numbers[run] > numbers[run - 1]):
        run += 1
    return run / max(len(words), min_tokens / 2)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def increasing_numbers(prompt: str, completion: str, record: Mapping | None = None) -> float:
    """`increasing` of the completion: a reward for configs."""
    return increasing(completion)


def date(prompt: str, completion: str, record: Mapping | None = None) -> float:
    """1 if the completion holds four digits, two and two, joined by hyphens, anywhere; else 0. A reward for configs."""
    return float(re.search(r"\d{4}-\d{2}-\d{2}", completion) is not None)


@dataclasses.dataclass(frozen=True)
class _World(abc.ABC):
    seed: int = 0
    reward: ClassVar = None
    alphabet: ClassVar[str] = ""

    def gold_rewards(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence | None = None) -> np.ndarray:
        return np.array([type(self).reward(p, c) for p, c in zip(prompts, completions, strict=True)])

    def demonstration_log_prob(self, prompt: str, completion: str) -> float:
        return -math.inf  # the corpus has a floor, but nobody has written it down

    log_prob = demonstration_log_prob

    @abc.abstractmethod
    def sentence(self, rng: np.random.Generator) -> str:
        """What the corpus says after the prompt."""

    def write_all(self, directory: str | Path, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Path]:
        """Writes JSON Lines, and a tokenizer of the characters. sizes: rows of sft, sft_eval ({"prompt", "completion"}), prompts,
        prompts_eval (the one prompt, again and again)."""
        if unknown := set(sizes) - {"sft", "sft_eval", "prompts", "prompts_eval"}:
            raise ValueError(f"no file is called {sorted(unknown)}; there are sft, sft_eval, prompts, prompts_eval")
        write_tokenizer(directory, self.alphabet)
        out = {}
        for name, n in sizes.items():
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), seed])
            rows = [{"prompt": PROMPT} | ({"completion": self.sentence(rng)} if name.startswith("sft") else {}) for _ in range(n)]
            out[name] = write_jsonl(Path(directory) / f"{name}.jsonl", rows)
        return out


class Increasing(_World):
    """Numbers below 100 in no order: about one in two exceeds the one before."""

    reward = staticmethod(increasing_numbers)
    alphabet = PROMPT + " 0123456789"

    def sentence(self, rng: np.random.Generator) -> str:
        return " ".join(map(str, rng.integers(0, 100, rng.integers(6, 13))))


class Dates(_World):
    """Short sentences about when something was; one in ten writes the date as the reward wants it."""

    reward = staticmethod(date)
    alphabet = PROMPT + " 0123456789-." + "abcdefghijklmnopqrstuvwxyz"

    def sentence(self, rng: np.random.Generator) -> str:
        day, month, year = int(rng.integers(1, 29)), int(rng.integers(1, 13)), int(rng.integers(1900, 2030))
        names = "january february march april may june july august september october november december".split()
        when = (f"{year}-{month:02d}-{day:02d}", f"{day} {names[month - 1]}", f"{names[month - 1]} {year}", "a monday", "a friday")
        what = rng.choice(["the fair", "the storm", "her visit", "our trip", "the sale"])
        return f"{what} was on {when[rng.choice(5, p=[0.1, 0.3, 0.2, 0.2, 0.2])]}."
