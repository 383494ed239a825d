"""A language model as the judge: of one answer by a rubric, or of two against one another, each pair in both orders.

The judge is a model of ours (`Own`: the probabilities of its verdicts, by one forward pass) or whoever answers behind an
OpenAI-compatible address (`Endpoint`: what it writes, read by a pattern). Nothing is sent anywhere unless an address is named.

As a reward `rl.reward=judge=DIR` is a model of ours, and "jaxalign.rl.judge:rubric" an address, named by the environment:
JAXALIGN_JUDGE_ADDRESS ("http://127.0.0.1:8000/v1"), JAXALIGN_JUDGE_MODEL and, where one is wanted, OPENAI_API_KEY.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import http.client
import json
import os
import re
import time
import urllib.parse
from typing import Callable, Sequence

import numpy as np

from jaxalign.types import UserError

RUBRIC = "Is the answer correct, complete and helpful, and no longer than it needs to be?"
RATINGS = ("1", "2", "3", "4", "5")


def rating_prompt(prompt: str, completion: str, rubric: str = "") -> str:
    return (
        f"Rate an answer from 1 (bad) to 5 (excellent).\n{rubric or RUBRIC}\n\n[Question]\n{prompt}\n[End of question]\n\n[Answer]\n{completion}\n[End of answer]\n\n"
        "End with one line that holds the rating alone, as a number from 1 to 5.\nRating:"
    )


def pair_prompt(prompt: str, a: str, b: str, rubric: str = "") -> str:
    return (
        f"Which of two answers is better?\n{rubric or RUBRIC}\n\n[Question]\n{prompt}\n[End of question]\n\n[Answer A]\n{a}\n[End of answer A]\n\n[Answer B]\n{b}\n[End of answer B]\n\n"
        "End with one line that holds the verdict alone: A, B or tie.\nVerdict:"
    )


_MARKS = str.maketrans("", "", "*_`#>\"'[]{}")
_OF = r"\s*(?:stars?|points?)?\s*\(?(?:/|out of)\s*"
_RATING = rf"(?<![\w.,/-])([1-4](?:\.\d+)?|5(?:\.0+)?)(?![\w%]|[.,-]\d|{_OF}(?!5\b)\d)"
_VERDICT = r"(?:answer )?\b(A|B|tie)\b"
_ENDS = r"(?=\s*(?:[.,;:!(–—]|- |\n|$|because\b|since\b))"


def _plain(text: str) -> str:
    """Without markdown, quotes and square brackets; [[x]], as judges are often taught to end (2306.05685, appendix A), is labelled as a verdict is."""
    text = re.sub(r"</\w{1,20}>", "\n", re.sub(r"<(\w{1,20})>", r"\n\1: ", text))
    lines = re.sub(r"\[\[(.{1,9}?)\]\]", r"\nVerdict: \1\n", text).translate(_MARKS).splitlines()
    return "\n".join(" ".join(x.split()) for x in lines if x.strip())  # with single blanks, for the patterns' time grows with the cube of a run of them


def rating(text: str) -> float:
    """(r - 1) / 4 of the rating r from 1 to 5 that is the last line, else of the last after "Rating:" or "Score:", or in [[ ]], else of the only one "out of
    5" or /5, else of the only number from 1 to 5; ValueError where there is none, or several."""
    plain = re.sub(r"\b1 ?(?:to|-|–) ?5\b", "", _plain(text))  # the scale is no rating
    ways = (
        re.findall(rf"(?:^|\n)[\s(]*{_RATING}(?:{_OF}5)?[\s.!)]*$", plain),
        re.findall(rf"\b(?:rating|verdict|score)\b\W*{_RATING}", plain, re.I)[-1:],
        re.findall(rf"{_RATING}{_OF}5\b", plain),
        re.findall(_RATING, re.sub(rf"[\d.]*{_OF}\d+", "", plain)),
    )
    found = {float(x) for x in next(filter(None, ways), ())}
    if len(found) != 1:
        raise ValueError(f"the judge gave no rating, or several: {text[:200]!r}")
    return (found.pop() - 1) / 4


def verdict(text: str) -> float:
    """1 for A, 0 for B, 1/2 for a tie and for no verdict. The verdict is what the last line holds alone, else what last stands after
    "Verdict:", "Winner:", "the better answer is" and their like, or in [[ ]], else what whole sentences are, if they agree. What is only said in prose ("A is better than B", "A, but B") is none."""
    plain = _plain(text)
    ways = (
        re.findall(rf"(?:^|\n)[\s(]*{_VERDICT}[\s.!)]*$", plain, re.I),
        re.findall(rf"\b(?:(?:verdict|winner|answer|choice)(?:\s*[:–—-]| is)|I (?:choose|pick|prefer))\s*{_VERDICT}{_ENDS}", plain, re.I)[-1:],
        re.findall(rf"(?:^|\n){_VERDICT}(?= because\b)", plain, re.I)[-1:],
        [m[1] for x in re.split(r"[.\n]", plain) if (m := re.fullmatch(_VERDICT, x.strip(), re.I))],
    )
    found = {x.lower() for x in next(filter(None, ways), ())}
    return {"a": 1.0, "b": 0.0}.get(found.pop(), 0.5) if len(found) == 1 else 0.5


def compare(prefers: Callable[[list[str]], Sequence[float]], prompts: Sequence[str], a: Sequence[str], b: Sequence[str], rubric: str = "") -> np.ndarray:
    """f64[N]: 1 where the answer of `a` is better, 0 where that of `b` is, 1/2 for a tie. `prefers` says of judge prompts how much
    A is preferred, 0 to 1. Every pair is shown both ways; where the two verdicts contradict one another, it is a tie (judges favour
    a place: 2306.05685, section 3.3). For `evals.stats`: win_rate(compare(...), np.full(N, 0.5))."""
    one = np.array(prefers([pair_prompt(p, x, y, rubric) for p, x, y in zip(prompts, a, b)]), float)
    two = 1 - np.array(prefers([pair_prompt(p, y, x, rubric) for p, x, y in zip(prompts, a, b)]), float)
    lean = np.sign(one - 0.5) + np.sign(two - 0.5)
    return (np.sign(lean) + 1) / 2


# -- behind an address ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Asks an OpenAI-compatible server for chat completions, several at a time; answers in the order of the questions.

    A call that meets 408, 429 or 5xx, a refused or broken connection or silence is tried again, `retries` times, `pause` seconds
    later, then twice that, ... (or what Retry-After says, up to 30); then ConnectionError. The key is read from the environment variable
    `key_from` at every call and is never part of an error.
    """

    address: str  # up to and with /v1
    model: str
    key_from: str = "OPENAI_API_KEY"
    timeout: float = 30.0  # seconds of silence
    retries: int = 3
    pause: float = 1.0
    temperature: float = 0.0
    max_tokens: int = 512
    workers: int = 8

    def __post_init__(self):
        parts = urllib.parse.urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UserError(f"the judge's address is http(s)://HOST[:PORT]/PATH, without a name or a password, not {self.address.split('@')[-1]!r}")

    def __call__(self, questions: Sequence[str]) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._ask, questions))

    def ratings(self, prompts: Sequence[str], completions: Sequence[str], rubric: str = "") -> list[float]:
        return [rating(x) for x in self([rating_prompt(p, c, rubric) for p, c in zip(prompts, completions)])]

    def prefers(self, questions: Sequence[str]) -> list[float]:
        return [verdict(x) for x in self(questions)]

    def _ask(self, question: str) -> str:
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": self.temperature, "max_tokens": self.max_tokens})
        why, wait = "", 0.0
        for attempt in range(self.retries + 1):
            time.sleep(wait)
            wait = self.pause * 2**attempt
            try:
                status, after, text = self._post(body)
            except (OSError, http.client.HTTPException) as e:  # TimeoutError is one
                why = f"{type(e).__name__}: {e}"
                continue
            if status == 200:
                try:
                    return str(json.loads(text)["choices"][0]["message"]["content"] or "")
                except (ValueError, KeyError, IndexError, TypeError):
                    raise ConnectionError(f"the judge at {self.address} answers no chat completion: {text[:200]!r}") from None
            why = f"status {status}: {text[:200]!r}"
            if status not in (408, 429) and status < 500:
                break
            if after and after.isdigit():
                wait = min(float(after), 30.0)
        raise ConnectionError(f"the judge at {self.address} does not answer after {attempt + 1} attempts; the last: {why}")

    def _post(self, body: str) -> tuple[int, str | None, str]:
        parts = urllib.parse.urlsplit(self.address)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_from):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request("POST", parts.path.rstrip("/") + "/chat/completions", body.encode(), headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Retry-After"), answer.read(1 << 22).decode("utf-8", "replace")
        finally:
            connection.close()


@functools.cache
def _endpoint(address: str, model: str) -> Endpoint:
    return Endpoint(address, model)


def rubric(prompt: str, completion: str, record: dict) -> float:
    """A reward, 0 to 1: the rating of one answer by the address of the environment, by record["rubric"] where there is one. Asks
    one at a time; rl.reward_workers says how many ask at once."""
    address, model = (os.environ.get(f"JAXALIGN_JUDGE_{x}", "") for x in ("ADDRESS", "MODEL"))
    if not address or not model:
        raise UserError("jaxalign.rl.judge:rubric asks who is named in JAXALIGN_JUDGE_ADDRESS and JAXALIGN_JUDGE_MODEL; set both")
    return _endpoint(address, model).ratings([prompt], [completion], str(record.get("rubric", "")))[0]
