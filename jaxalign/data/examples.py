"""Canonical examples: what every format becomes, and all that templates and sources know of data."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import NamedTuple, Sequence, Union

from jaxalign.data.rows import unclean
from jaxalign.types import UserError


class Message(NamedTuple):
    role: str  # system, user, assistant or tool
    content: str
    trained: bool = True  # only assistant turns ever are; False leaves this one out (a "loss_weight" of 0)
    # What else a chat template may ask of it, as JSON: {"tool_calls": [...]}. "tools", those of the whole conversation, are
    # kept with its first message, so that they stay with a prompt wherever it goes.
    more: str = ""

    @property
    def calls(self) -> bool:
        return bool(self.more) and bool(json.loads(self.more).get("tool_calls"))


Said = Union[str, tuple[Message, ...]]


@dataclasses.dataclass(frozen=True)
class Text:
    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    prompt: Said
    completion: Said


@dataclasses.dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True)
class Preference:
    prompt: Said
    chosen: Said
    rejected: Said
    margin: float = 0.0
    rating: str = ""  # how much better, in the labellers' words
    probability: float = 1.0  # that the chosen one is the better one


_UNSURE = dict.fromkeys(("negligibly better", "unsure", "negligibly better / unsure"), 0.0)
# What a rating is worth as a margin (Llama 2, 2307.09288, table 27): `data.margins` names the column.
MARGINS = {
    "small": {"significantly better": 1.0, "better": 2 / 3, "slightly better": 1 / 3, **_UNSURE},
    "large": {"significantly better": 3.0, "better": 2.0, "slightly better": 1.0, **_UNSURE},
}


def margin_of(example: Preference, margins: str) -> float:
    """What the row says, or with `margins`, a key of MARGINS, what its rating is worth there."""
    if not margins:
        return example.margin
    worth = MARGINS[margins].get(example.rating.strip().lower())
    if worth is None:
        raise UserError(f"data.margins {margins!r} reads the 'rating' of each row, and this one has {example.rating!r}; it must be one of {', '.join(MARGINS[margins])}")
    return worth


@dataclasses.dataclass(frozen=True)
class Ranking:
    prompt: Said
    completions: tuple[Said, ...]
    ranks: tuple[int, ...]  # smaller is better, equal is a tie


@dataclasses.dataclass(frozen=True)
class Label:
    prompt: Said
    completion: Said
    label: float  # a score, or of good and bad answers 1 and 0


@dataclasses.dataclass(frozen=True)
class Steps:
    prompt: Said
    steps: tuple[str, ...]  # joined as they are, they make the answer
    labels: tuple[float | None, ...]  # 1 = right, 0 = wrong, or between; None: nobody said


@dataclasses.dataclass(frozen=True)
class Prompt:
    prompt: Said
    record: dict


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """An episode: what was said, and what each of the assistant's trained turns earned."""

    said: Union[Completion, Chat]
    rewards: tuple[float, ...]  # one per trained turn
    terminal: bool = True  # False: it was cut off, and would have gone on

    @property
    def turns(self) -> tuple[Message, ...]:
        """The assistant's, trained or not."""
        said = self.said.messages if isinstance(self.said, Chat) else self.said.completion
        return (Message("assistant", said),) if isinstance(said, str) else tuple(m for m in said if m.role == "assistant")


Example = Union[Text, Completion, Chat, Preference, Ranking, Label, Steps, Prompt, Trajectory]
EXAMPLES = (Text, Completion, Chat, Preference, Ranking, Label, Steps, Prompt, Trajectory)


class Unusable(UserError):
    """A well-formed row that teaches nothing: sources drop and count it by ``reason``, whatever the policy."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def string(value: object, where: str, key: str) -> str:
    """The value, if it is text that says something."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{where}: {key!r} is empty; fill it or remove the row")
    if bad := unclean(value):
        raise UserError(f"{where}: {key!r} holds a {bad}; remove it")
    return value


def number(value: object, where: str, key: str) -> float:
    """The value, if it is a finite number, or true or false."""
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {key!r} must be true, false or a finite number, not {value!r}")
    return float(value)


def turns(said: Sequence[Message], where: str, key: str, last: str, first: str = "user") -> None:
    """[system] user assistant user ... : every chat model was trained on turns that alternate. A call of tools is answered
    by tool turns, and they by the assistant."""
    for i, m in enumerate(said):
        if m.role != "tool" and not m.calls:
            string(m.content, where, f"{key}[{i}] content")
        if m.role == "system" and (i > 0 or first == "assistant"):
            raise UserError(f"{where}: {key}[{i}] is a system turn; it may only open the conversation")
    roles = [m.role for m in said if m.role != "system"]
    called = [m.calls for m in said if m.role != "system"]
    for i, role in enumerate(roles):
        if i == 0:
            wanted = (first,)
        else:
            wanted = {"user": ("assistant",), "tool": ("assistant", "tool")}.get(roles[i - 1], ("tool",) if called[i - 1] else ("user",))
        if role in wanted:
            continue
        if role == "tool":
            raise UserError(f"{where}: {key}: a tool turn that answers no call; put it after an assistant's turn with tool_calls")
        if i and called[i - 1]:
            raise UserError(f"{where}: {key}: a call of tools is followed by a {role} turn; answer it with tool turns")
        why = f"two {role} turns in a row" if i else f"starts with the {role}"
        raise UserError(f"{where}: {key}: {why}; turns must alternate, the {first} first")
    if not roles or roles[-1] not in ((last, "tool") if last == "user" else (last,)):
        found = f", not of the {roles[-1]}" if roles else ""
        raise UserError(f"{where}: {key} must end with a turn of the {last}{found}")


def check(example: Example, where: str) -> Example:
    """The example, if it keeps the rules every reader of ours keeps; for those made by a user's function."""
    if not isinstance(example, EXAMPLES):
        raise UserError(f"{where}: format= returned a {type(example).__name__}; return an example: Completion(...)")
    match example:
        case Text(text):
            string(text, where, "text")
        case Chat(messages):
            turns(messages, where, "messages", last="assistant")
        case Prompt(prompt):
            _said(prompt, where, "prompt")
        case Completion(prompt, completion):
            _said(prompt, where, "prompt")
            _said(completion, where, "completion", answer=True)
        case Label(prompt, completion, label):
            _said(prompt, where, "prompt")
            _said(completion, where, "completion", answer=True)
            number(label, where, "label")
        case Steps(prompt, steps, labels):
            _said(prompt, where, "prompt")
            if not steps or len(steps) != len(labels):
                raise UserError(f"{where}: {len(steps)} steps but {len(labels)} labels")
            for s in steps:
                string(s, where, "steps")
            if not all(x is None or 0 <= number(x, where, "labels") <= 1 for x in labels):
                raise UserError(f"{where}: labels of steps lie between 0 (wrong) and 1 (right), or are null where nobody said; these are {list(labels)}")
            if all(x is None for x in labels):
                raise Unusable("unlabelled", f"{where}: no step has a label")
        case Preference(prompt, chosen, rejected):
            _said(prompt, where, "prompt")
            _said(chosen, where, "chosen", answer=True)
            _said(rejected, where, "rejected", answer=True)
        case Trajectory(said, rewards):
            check(said, where)
            if len(rewards) != sum(m.trained for m in example.turns):
                raise UserError(f"{where}: {len(rewards)} rewards for {sum(m.trained for m in example.turns)} trained turns of the assistant; give one each")
        case Ranking(prompt, completions, ranks):
            _said(prompt, where, "prompt")
            for c in completions:
                _said(c, where, "completions", answer=True)
            if len(completions) != len(ranks):
                raise UserError(f"{where}: {len(completions)} completions but {len(ranks)} ranks")
            if len(set(ranks)) < 2:
                raise Unusable("ties" if len(ranks) > 1 else "one_item", f"{where}: the ranking prefers nothing")
    return example


def _said(said: Said, where: str, key: str, answer: bool = False) -> None:
    if isinstance(said, str):
        string(said, where, key)
    elif answer:
        turns(said, where, key, last="assistant", first="assistant")
    else:
        turns(said, where, key, last="user")
