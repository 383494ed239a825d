"""Rewards that can be checked: numbers, expressions, patterns, JSON, code, forms and lengths.

Each is a function (prompt, completion, record) -> float in [0, 1] that a config names by import path ("jaxalign.rl.verify:number"); what
is right stands in the row of the data: "answer", "pattern", "schema", "tests" or "cases". Your own need one line more: a module with
`strict = functools.partial(...)`. Imports no jax: the processes that score start quickly.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from fractions import Fraction
from typing import Any

from jaxalign.rl import expressions, sandbox
from jaxalign.types import UserError

_NUMBER = re.compile(  # sign, whole of a mixed number, number, below its bar, percent
    r"((?<![\w)\]])[-+])?(?:(\d+)[ \t]+(?=\d+\s*/\s*\d))?((?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d{1,3})?)(?:\s*/\s*(\d+))?\s*(%?)"
)
_FENCE = re.compile(r"^[ \t]*+(?:(?=`)|(?:(?!```).)*(?=`{3,}[ \t]*+\w*+[ \t]*+$))(`{3,})[ \t]*+([^`\n]*)$", re.MULTILINE)  # behind other text only with one word or none


def _wanted(record: dict, *names: str) -> Any:
    for n in names:
        if record.get(n) is not None:
            return record[n]
    raise ValueError(f"the record has no {' or '.join(map(repr, names))} to check the answer against; its fields are {sorted(record)}")


# -- where the answer stands ------------------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, brackets inside it and all; None where there is none (or it never closes)."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start + 7 : i].strip()
    return None


def marked(text: str) -> str | None:
    """What follows the last "####" on its line (GSM8K's form)."""
    _, found, rest = text.rpartition("####")
    return rest.strip().split("\n")[0].strip() or None if found else None


def tagged(text: str) -> str | None:
    """What the last <answer> ... </answer> holds."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def final_answer(text: str) -> str:
    """The answer in a text: boxed, marked, tagged, in this order; else the text itself."""
    return next((x for x in (boxed(text), marked(text), tagged(text)) if x is not None), text)


# -- numbers and expressions ------------------------------------------------------------------------------------------


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly: 1,234.50, -3, 3/4, \\frac{3}{4}, 2 1/2, 12%, 6.02e23. None where there is none."""
    text = re.sub(r"(\\[dtc]?frac)\s*\{\s*-", r"-\1{", text)
    text = re.sub(r"\\[dtc]?frac" + expressions.DIGITS * 2, r"\1\2/\3\4", expressions.numerals(text))
    found = [m for m in _NUMBER.finditer(text) if m[3]]
    if not found:
        return None
    sign, whole, top, bottom, percent = found[-1].groups()
    try:
        size = Fraction(top.replace(",", "")) / Fraction(bottom or 1)
        size += int(whole) if whole and size < 1 else 0
    except (ValueError, ZeroDivisionError):  # also of more digits than Python turns into a number
        return None
    return (-size if sign == "-" else size) / (100 if percent else 1)


def _readings(said: str, wanted: str) -> list[str]:
    """50% is a half; where one of the two has a percent sign and the other has none, 50 is meant as often."""
    if ("%" in said) == ("%" in wanted):
        return [said]
    return [said, re.sub(r"\\?%", "", said) if "%" in said else said.rstrip(". ") + "%"]


def number(prompt: str, completion: str, record: dict) -> float:
    """1 if the last number of the final answer is that of record["answer"] (or "solution", "target"; a text that ends with it, as
    GSM8K's, will do); within record["tolerance"] of it, relative, where that is given, else exactly."""
    want = _wanted(record, "answer", "solution", "target")
    answer = final_answer(str(want))
    want, got = last_number(answer), [last_number(x) for x in _readings(final_answer(completion), answer)]
    if want is None:
        raise ValueError(f"the record's answer holds no number: {record}")
    within = Fraction(str(record.get("tolerance", 0))) * abs(want)
    return float(any(x is not None and abs(x - want) <= within for x in got))


def number_in_form(prompt: str, completion: str, record: dict) -> float:
    """`number`, and 0 where the answer is neither boxed nor marked by "####" nor tagged: guessing by rambling does not pay."""
    return number(prompt, completion, record) if any(f(completion) is not None for f in (boxed, marked, tagged)) else 0.0


def expression(prompt: str, completion: str, record: dict) -> float:
    """1 if the final answer is the same expression as record["answer"]: 2(x+1) and 2x + 2, \\frac{1}{2} and 0.5 (`expressions.equal`);
    50% and 50 too."""
    want = final_answer(str(_wanted(record, "answer", "solution", "target")))
    return float(any(expressions.equal(x, want) for x in _readings(final_answer(completion), want)))


# -- patterns, JSON and forms -----------------------------------------------------------------------------------------


def regex(prompt: str, completion: str, record: dict) -> float:
    """1 if record["pattern"] is found in the completion. A pattern that backtracks for ever is ended by rl.reward_timeout."""
    return float(re.search(_wanted(record, "pattern"), completion, re.DOTALL) is not None)


def fenced(text: str, *languages: str) -> str:
    """The last ```-block of one of the languages, else the last that names none, else the text itself. A block ends at a line of as
    many backticks or more and nothing else; without one at the first line that ends in them, else with the text."""
    named, unnamed, at = None, None, 0
    text = text.replace("\r\n", "\n")
    while m := _FENCE.search(text, at):
        ends = (re.compile(rf"^({start}){m[1]}`*[ \t]*$", re.MULTILINE).search(text, m.end() + 1) for start in (r"[ \t]*", ".*?"))
        end = next(filter(None, ends), None)
        body = textwrap.dedent(text[m.end() + 1 : end.end(1) if end else len(text)])
        at = end.end() if end else len(text)
        if re.match(r"[^\s,:]*", m[2])[0].lower() in languages:
            named = body
        elif not m[2]:
            unnamed = body
    return next((x for x in (named, unnamed) if x is not None), text)


def json_schema(prompt: str, completion: str, record: dict) -> float:
    """1 if the completion (or its last ```json block) is JSON that record["schema"] allows; without a schema any JSON. References
    to other documents are not followed."""
    try:
        value = json.loads(fenced(completion, "json"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    if record.get("schema") is None:
        return 1.0
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise UserError('rewards by JSON schema need jsonschema: pip install "jaxalign[metrics]"') from None
    kind = jsonschema.validators.validator_for(record["schema"], default=jsonschema.Draft202012Validator)
    kind.check_schema(record["schema"])
    return float(kind(record["schema"], registry=referencing.Registry()).is_valid(value))


def _refuse(name: str):
    raise ValueError(f"{name} is no JSON")


_THINK = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)


def think_answer(prompt: str, completion: str, record: dict) -> float:
    """1 if the completion is <think> ... </think> <answer> ... </answer> and nothing else, each once (DeepSeek-R1, 2501.12948)."""
    return float(_THINK.fullmatch(completion) is not None)


def think_tags(prompt: str, completion: str, record: dict) -> float:
    """A quarter for each of the four tags that stands there exactly once: a slope towards `think_answer`."""
    return sum(completion.count(t) == 1 for t in ("<think>", "</think>", "<answer>", "</answer>")) / 4


# -- lengths ----------------------------------------------------------------------------------------------------------


def words(prompt: str, completion: str, record: dict) -> float:
    """1 with record["min_words"] to record["max_words"] words (either may be missing), falling to 0 at none or at twice as many."""
    n, least, most = len(completion.split()), record.get("min_words") or 0, record.get("max_words")
    most = math.inf if most is None else most
    return n / least if n < least else (max(0.0, 2 - n / most) if most else 0.0) if n > most else 1.0


def soft_overlong(length: int, most: int, cache: int) -> float:
    """DAPO's punishment (2503.14476, eq. 13): 0 up to most - cache tokens, falling to -1 at `most`, -1 beyond."""
    return 0.0 if length <= most - cache else -1.0 if length > most else (most - cache - length) / cache


def overlong(prompts: list[str], completions: list[str], records: list[dict], completion_ids: list[list[int]]) -> list[float]:
    """`soft_overlong` of each completion's tokens, with record["max_tokens"] and record["cache"] (a fifth of it, as in the paper)."""
    most = [int(_wanted(r, "max_tokens")) for r in records]
    return [soft_overlong(len(ids), m, int(r.get("cache") or max(1, m // 5))) for ids, m, r in zip(completion_ids, most, records)]


# -- code -------------------------------------------------------------------------------------------------------------


def code(prompt: str, completion: str, record: dict) -> float:
    """Runs the completion's last ```python block in `sandbox.run`: 1 if record["tests"] (asserts that follow it) pass, or the share of
    record["cases"], [{"input": ..., "output": ...}], whose output it prints before it ends without an error. record["seconds"] is what one run may take (5)."""
    program, seconds = fenced(completion, "python", "py", "python3"), float(record.get("seconds", 5.0))
    if record.get("tests") is not None:
        return float(sandbox.passes(program, str(record["tests"]), seconds=seconds))
    cases = _wanted(record, "cases", "tests")
    if not cases:
        raise UserError("the record's 'cases' is empty, so no program can be checked by it: give it [{'input': ..., 'output': ...}] or 'tests', or leave the row out")
    lines = lambda s: [x.rstrip() for x in str(s).rstrip().split("\n")]
    ran = [(sandbox.run(program, str(c["input"]), seconds=seconds), lines(c["output"])) for c in cases]
    return sum(r.code == 0 and not r.overran and lines(r.stdout) == want for r, want in ran) / len(cases)
