"""Records -> canonical examples: which schema is this, and is it whole?

    text        {"text"}
    completion  {"prompt", "completion"}
    chat        {"messages"}                                     (or ShareGPT's "conversations" of from / value)
    preference  {"chosen", "rejected"} and "prompt", or with the prompt as the common beginning of both: of two lists of
                messages, of two HH-RLHF dialogues ("\\n\\nHuman: ...\\n\\nAssistant: ..."), or of any two strings. It may bring a
                "margin", a "rating" (see examples.MARGINS), and the "probability" that the chosen one is better
    ranking     {"prompt", "completions", "ranks"}               (or "responses", "ranking"); rank 0 is better than 1. "best",
                one index, in place of the ranks: all others are equal
    label       {"prompt", "completion", "label"}, or {"messages", "label"}, whose last turn is meant: true, false or a number.
                A number may be called "score"; as it often is a column that nobody trains on, it makes a label only where those are asked for
    trajectory  a completion or a chat with what it earned: {"reward"} at the end, {"rewards"} or a message's "reward" turn by turn
    steps       {"prompt", "steps", "labels"}                    (or "completions" for "steps"); a label is true, false, a number from 0 to
                1, or null. Or "ratings" as PRM800K has them: -1, 0, 1, of which only -1 is wrong. Steps end with a line break
    prompt      {"prompt"}

A prompt is a string or a list of messages; a completion is a string or the messages that follow. Another format is a
function ``record -> example``, given as ``format=``.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from typing import Callable

from jaxalign.data.examples import (
    EXAMPLES, Chat, Completion, Example, Label, Message, Preference, Prompt, Ranking, Said, Steps, Text, Trajectory, Unusable,
    check, number, string, turns,
)  # fmt: skip
from jaxalign.data.messages import follow, messages_of, prompt_of, said_of, with_tools
from jaxalign.data.rows import Rows, given, read
from jaxalign.types import UserError

__all__ = [
    "Chat", "Completion", "Example", "Label", "Message", "Preference", "Prompt", "Ranking", "Rows", "Said", "Steps", "Text",
    "Trajectory", "Unusable", "canonical", "detect", "given", "read",
]  # fmt: skip


SCHEMAS = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "preference": ("chosen", "rejected"),
    "ranking": ("prompt", "completions", "ranks"),
    "label": ("prompt", "completion", "label"),
    "trajectory": ("messages", "rewards"),
    "steps": ("prompt", "steps", "labels"),
    "prompt": ("prompt",),
}
_ALIASES = {
    "messages": ("messages", "conversations"),
    "chosen": ("chosen", "chosen_messages"),
    "rejected": ("rejected", "rejected_messages"),
    "completions": ("completions", "responses"),
    "ranks": ("ranks", "ranking"),
    "label": ("label", "score"),
    "steps": ("steps", "completions"),
    "labels": ("labels", "ratings"),
}
_OTHER_PROMPTS = ("instruction", "question", "query", "input", "problem", "context")


def detect(record: dict, where: str = "record") -> str:
    """Name of the format (a key of SCHEMAS). Raises UserError when none fits, or more than one."""
    marks = {"text": "text", "completion": "completion", "messages": "chat", "chosen": "preference"}
    marks |= {"rejected": "preference", "completions": "ranking", "ranks": "ranking"}
    found = list(dict.fromkeys(f for key, f in marks.items() if _has(record, key)))
    if "steps" in record or found == ["ranking"] and "labels" in record and not _has(record, "ranks"):
        found = ["steps"] if found in ([], ["ranking"]) else [*found, "steps"]
    if found == ["chat", "preference"] and "conversations" in record and "prompt" not in record:
        found = ["preference"]  # ShareGPT preferences: the conversation is the prompt
    if found == ["text"] and "prompt" in record:
        found = ["text", "prompt"]
    if len(found) > 1:
        raise UserError(
            f"{where}: ambiguous: the keys {sorted(map(str, record))} fit the formats {' and '.join(found)}; "
            f"remove the others or say which (format={found[0]!r})"
        )
    if found in (["chat"], ["completion"]) and isinstance(record.get("label"), bool):
        return "label"
    if found in (["chat"], ["completion"]) and _earns(record):
        return "trajectory"
    if found or "prompt" in record:
        return found[0] if found else "prompt"
    keys = [k for k in record if isinstance(k, str)]
    close = {f: [k for m in need for k in difflib.get_close_matches(m, keys, 1, 0.7)] for f, need in SCHEMAS.items()}
    best = max(SCHEMAS, key=lambda f: len(close[f]) / len(SCHEMAS[f]))
    nearest = f"; nearest is {best}, which needs {list(SCHEMAS[best])}" if close[best] else ""
    raise UserError(
        f"{where}: no known format has the keys {sorted(map(str, record))}{nearest}. Rename the keys, or give "
        "format= a function from the record to an example"
    )


def canonical(record: dict, where: str = "record", format: str | Callable[[dict], Example] | None = None) -> Example:
    """The example in a record. ``format``: a name in SCHEMAS, a function, or None to `detect` it.

    Raises UserError naming ``where`` for a missing field, a wrong type, bad roles or empty text; `Unusable` for what
    is whole but teaches nothing (chosen equal to rejected, a ranking of one item or of ties only).
    """
    if isinstance(record, EXAMPLES):
        return check(record, where)
    if not isinstance(record, dict):
        raise UserError(f"{where}: a row must be an object (dict), this is a {type(record).__name__}")
    if callable(format):
        try:
            example = format(record)
        except Unusable:
            raise
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        except Exception as e:
            raise UserError(f"{where}: format= failed on this row: {type(e).__name__}: {e}") from e
        return check(example, where)
    if format is not None and format not in _READERS:
        raise UserError(f"format {format!r}: use one of {list(SCHEMAS)}, or a function")
    return _READERS[format or detect(record, where)](record, where)


# -- one reader per format ------------------------------------------------------------------------------------------


def _text(record, where):
    return Text(string(_get(record, "text", where, "text"), where, "text"))


def _completion(record, where):
    prompt = prompt_of(_get(record, "prompt", where, "completion"), where, record)
    answer = said_of(_get(record, "completion", where, "completion"), where, "completion")
    return Completion(*follow(prompt, [answer], where))


def _chat(record, where):
    messages = with_tools(record, messages_of(_get(record, "messages", where, "chat"), where, "messages"), where)
    turns(messages, where, "messages", last="assistant")
    return Chat(messages)


def _prompt_only(record, where):
    return Prompt(prompt_of(_get(record, "prompt", where, "prompt"), where, record), record)


def _ranking(record, where):
    prompt = prompt_of(_get(record, "prompt", where, "ranking"), where, record)
    items = _get(record, "completions", where, "ranking")
    ranks = _picked(record["best"], items, where) if "best" in record and not _has(record, "ranks") else _get(record, "ranks", where, "ranking")
    if not isinstance(items, list) or not isinstance(ranks, list) or len(items) != len(ranks):
        raise UserError(f"{where}: 'completions' and 'ranks' must be lists of the same length")
    if not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
        raise UserError(f"{where}: 'ranks' must be integers (0 is best), one per completion, not {ranks}")
    answers = [said_of(a, where, f"completions[{i}]") for i, a in enumerate(items)]
    if len(answers) < 2:
        raise Unusable("one_item", f"{where}: a ranking of {len(answers)} item says nothing; give two or more")
    if len(set(ranks)) == 1:
        raise Unusable("ties", f"{where}: all ranks are equal, so nothing is preferred; remove the row")
    prompt, *answers = follow(prompt, answers, where)
    return Ranking(prompt, tuple(answers), tuple(ranks))


def _picked(best, items, where):
    if not isinstance(items, list) or not isinstance(best, int) or isinstance(best, bool) or not 0 <= best < len(items):
        raise UserError(f"{where}: 'best' must be the index of one of 'completions', from 0 on, not {best!r}")
    return [int(i != best) for i in range(len(items))]


def _steps(record, where):
    said, labels = (_get(record, k, where, "steps") for k in ("steps", "labels"))
    if not isinstance(said, list) or not isinstance(labels, list) or len(said) != len(labels) or not said:
        raise UserError(f"{where}: 'steps' and their labels must be lists of the same length, with one step or more")
    if "ratings" in record:
        if not all(x in (None, -1, 0, 1) and not isinstance(x, bool) for x in labels):
            raise UserError(f"{where}: 'ratings' of steps are -1 (wrong), 0 (neither) and 1 (right), or null, not {labels}; other numbers are 'labels'")
        labels = [None if x is None else float(x >= 0) for x in labels]
    said = [string(s, where, f"steps[{i}]") for i, s in enumerate(said)]
    said = [s if s.endswith("\n") else s + "\n" for s in said[:-1]] + said[-1:]
    return check(Steps(prompt_of(_get(record, "prompt", where, "steps"), where, record), tuple(said), tuple(x if x is None else number(x, where, "labels") for x in labels)), where)


def _label(record, where):
    label = number(_get(record, "label", where, "label"), where, "label" if "label" in record else "score")
    if _has(record, "messages"):
        messages = _chat(record, where).messages
        return Label(*follow(messages[:-1], [messages[-1:]], where), label)
    said = _completion(record, where)
    return Label(said.prompt, said.completion, label)


def _trajectory(record, where):
    said = _completion(record, where) if _has(record, "completion") else _chat(record, where)
    terminal = record.get("terminal", True)
    if not isinstance(terminal, bool):
        raise UserError(f"{where}: 'terminal' must be true or false, not {terminal!r}")
    turns_ = Trajectory(said, ()).turns
    apart = [m.get("reward") for m in _assistants(record)]
    given = [k for k in ("reward", "rewards") if record.get(k) is not None] + ["a message's reward"] * any(r is not None for r in apart)
    if len(given) != 1:
        raise UserError(f"{where}: trajectory needs one of 'reward' (at its end), 'rewards' (one per turn of the assistant) and a 'reward' in the messages; found {' and '.join(given) or 'none'}")
    rewards = [0.0] * (len(turns_) - 1) + [record["reward"]] if given == ["reward"] else record["rewards"] if given == ["rewards"] else [0.0 if r is None else r for r in apart]
    if not isinstance(rewards, list) or not all(map(_number, rewards)):
        raise UserError(f"{where}: rewards must be finite numbers, not {rewards!r}")
    if len(rewards) != len(turns_):
        raise UserError(f"{where}: {len(rewards)} rewards for {len(turns_)} turns of the assistant; give one each (or, if they are none, say format={type(said).__name__.lower()!r})")
    if any(r and not m.trained for r, m in zip(rewards, turns_)):
        raise UserError(f"{where}: a turn that is not trained earns a reward; give it to the turn before it")
    return Trajectory(said, tuple(float(r) for r, m in zip(rewards, turns_) if m.trained), terminal)


def _preference(record, where):
    margin = record.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise UserError(f"{where}: 'margin' must be a finite number, not {margin!r}")
    rating, probability = record.get("rating", ""), record.get("probability", 1.0)
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
        raise UserError(f"{where}: 'probability' (that the chosen one is better) must be a number from 0 to 1, not {probability!r}")
    pair = [_get(record, k, where, "preference") for k in ("chosen", "rejected")]
    if pair[0] == pair[1]:
        raise Unusable("identical", f"{where}: chosen and rejected are the same; remove the row")
    prompt = record.get("prompt", record.get("conversations"))
    if all(isinstance(p, str) and _HH.match(p) for p in pair) and prompt is None:
        pair = [_dialogue(p, where, k) for p, k in zip(pair, ("chosen", "rejected"))]
    else:
        pair = [said_of(p, where, k) for p, k in zip(pair, ("chosen", "rejected"))]
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be strings or both be messages")
    whole = not isinstance(pair[0], str) and pair[0][0].role != "assistant"  # the prompt is in the messages
    if whole and isinstance(prompt, str):  # UltraFeedback repeats the first question as "prompt"
        shared = os.path.commonprefix(pair)
        if not any(m.role == "user" and m.content == prompt for m in shared):
            raise UserError(f"{where}: 'prompt' is no user turn of the common beginning of chosen and rejected")
        prompt = None
    elif whole and prompt is not None:
        raise UserError(f"{where}: the prompt is given twice, as its own messages and inside chosen; keep one")
    if prompt is not None:
        prompt = prompt_of(prompt, where, record)
    elif whole:
        shared = os.path.commonprefix(pair)
        while shared and shared[-1].role not in ("user", "tool"):
            shared = shared[:-1]
        prompt, pair = with_tools(record, tuple(shared), where), [p[len(shared) :] for p in pair]
        if not prompt or not all(pair):
            raise UserError(f"{where}: chosen and rejected must share a question and then both answer it")
        turns(prompt, where, "the common beginning", last="user")
    elif isinstance(pair[0], str):
        prompt, pair = _common(record, pair, where)
    else:
        raise UserError(f"{where}: missing 'prompt': chosen and rejected are answers without a question")
    prompt, chosen, rejected = follow(prompt, pair, where)
    if chosen == rejected:
        raise Unusable("identical", f"{where}: chosen and rejected are the same; remove the row")
    return Preference(prompt, chosen, rejected, float(margin), rating if isinstance(rating, str) else "", float(probability))


_READERS = {
    "text": _text,
    "completion": _completion,
    "chat": _chat,
    "preference": _preference,
    "ranking": _ranking,
    "label": _label,
    "trajectory": _trajectory,
    "steps": _steps,
    "prompt": _prompt_only,
}

_HH = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant): ?")


def _dialogue(text, where, key):
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    said = [Message(roles[r], string(c, where, f"{key}: {r}'s turn")) for r, c in zip(parts[::2], parts[1::2])]
    turns(said, where, key, last="assistant")
    return tuple(said)


def _common(record, pair, where):
    """Splits two strings after their common beginning: at the last turn of it ("...Assistant:"), else before the last
    blank, so that no word is cut and a completion keeps the space it starts with."""
    if other := [k for k in _OTHER_PROMPTS if k in record]:  # else the answers' first words would pass for the prompt
        raise UserError(f"{where}: preference needs 'prompt'; rename {other[0]!r}, or give format= a function")
    shared = os.path.commonprefix(pair)
    ends = [m.end(1) + 1 for m in _TURN.finditer(shared) if m[1] == "Assistant"]
    cuts = ends[-1:] or [m.start() for m in re.finditer(r"\s+(?=\S|$)", shared)][::-1]
    for cut in cuts:
        if pair[0][:cut].strip() and all(p[cut:].strip() for p in pair):
            return pair[0][:cut], [p[cut:] for p in pair]
    raise UserError(f"{where}: chosen and rejected have no common beginning to serve as prompt; add a 'prompt' field")


# -- fields ---------------------------------------------------------------------------------------------------------


def _has(record, key):
    return any(k in record for k in _ALIASES.get(key, (key,)))


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _assistants(record):
    """The raw messages of the assistant in a record, or in its completion."""
    said = record.get("completion", record.get("messages", record.get("conversations")))
    return [m for m in said if isinstance(m, dict) and m.get("role", m.get("from")) in ("assistant", "gpt", "function_call")] if isinstance(said, list) else []


def _earns(record):
    """Whether a completion or a chat says what it earned, in numbers."""
    rewards = record.get("rewards")
    return _number(record.get("reward")) or isinstance(rewards, list) and bool(rewards) and all(map(_number, rewards)) or any(_number(m.get("reward")) for m in _assistants(record))


def _get(record, key, where, schema):
    names = [k for k in _ALIASES.get(key, (key,)) if k in record]
    if len(names) > 1:
        raise UserError(f"{where}: both {names[0]!r} and {names[1]!r}; keep one")
    if not names:
        close = difflib.get_close_matches(key, [k for k in record if isinstance(k, str)], 1, 0.7)
        hint = f" (is {close[0]!r} meant for it?)" if close else ""
        raise UserError(f"{where}: {schema} needs {key!r}{hint}; found keys {sorted(map(str, record))}")
    return record[names[0]]
