"""What is said in a record: a string, or messages with roles, tools and calls, in the ways in which people write them down."""

from __future__ import annotations

import json

from jaxalign.data.examples import Message, Said, string, turns
from jaxalign.data.rows import unclean
from jaxalign.types import UserError

_ROLES = {"human": "user", "gpt": "assistant", "prompter": "user", "observation": "tool", "function": "tool", "function_call": "assistant"}
_PASSED = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # fields of a message that chat templates know


def said_of(value, where: str, key: str) -> Said:
    """What a field says. All of this file raise UserError, naming `where` and the field."""
    return string(value, where, key) if isinstance(value, str) else messages_of(value, where, key)


def prompt_of(value, where: str, record: dict) -> Said:
    """A question, with the tools of its record."""
    prompt = said_of(value, where, "prompt")
    if not isinstance(prompt, str):
        turns(prompt, where, "prompt", last="user")
        prompt = with_tools(record, prompt, where)
    return prompt


def with_tools(record: dict, messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages with the record's tools, a list or the JSON text of one."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        tools = _json(tools, where, "'tools'")
    if not tools or not messages:
        return messages
    if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
        raise UserError(f"{where}: 'tools' must be a list of objects, or the JSON text of one")
    more = json.loads(messages[0].more or "{}") | {"tools": tools}
    return (messages[0]._replace(more=_dumps(more)), *messages[1:])


def _dumps(value):
    return json.dumps(value, ensure_ascii=False)  # in the record's own order: templates print it


def _json(text, where, key):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {key} is no JSON; write it as an object or list") from None


def messages_of(value, where: str, key: str) -> tuple[Message, ...]:
    """One message or a list of them, in their own order; an empty system prompt is none."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} must be a string or a list of messages, not {type(value).__name__}")
    said = [_message(m, where, f"{key}[{i}]") for i, m in enumerate(value)]
    return tuple(m for m in said if m is not None)


def _message(m, where, key):
    if not isinstance(m, dict):
        raise UserError(f"{where}: {key} must be an object with 'role' and 'content', not {type(m).__name__}")
    role = m.get("role", m.get("from"))
    called = role == "function_call"  # ShareGPT: the call is the message
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(f"{where}: {key} has role {role!r}; use system, user, assistant or tool")
    content = m.get("content", m.get("value"))
    more = {k: m[k] for k in _PASSED if m.get(k)}
    if called:
        more["tool_calls"] = [_call(content, where, key)]
        content = ""
    if isinstance(content, list):  # the parts of a message: text, and what an assistant thinks and calls
        parts = [(p.get("type"), p.get("text", p.get("value"))) if isinstance(p, dict) else (None, None) for p in content]
        kinds = ("text", "reasoning", "tool_call") if role == "assistant" else ("text",)
        if not all(k in kinds and isinstance(t, str) for k, t in parts):
            raise UserError(f"{where}: {key} has content other than text; only text can be trained on")
        if calls := [_call(t, where, key) for k, t in parts if k == "tool_call"]:
            more["tool_calls"] = calls
        if thoughts := "".join(t for k, t in parts if k == "reasoning"):
            more["reasoning_content"] = thoughts
        content = "".join(t for k, t in parts if k == "text")
    if calls := more.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list) or not all(isinstance(c, dict) and isinstance(c.get("function", c), dict) and isinstance(c.get("function", c).get("name"), str) for c in calls):
            raise UserError(f"{where}: {key}: tool_calls must be an assistant's list of {{'function': {{'name', 'arguments'}}}}")
        if content is None:
            more["content"] = content = None  # some templates tell null from empty
    if role == "system" and content == "":
        return None  # "no system prompt", as many exports write it
    weight = m.get("loss_weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where}: {key} has loss_weight {weight!r}; only 0 and 1 are understood")
    if bad := unclean(_dumps(more)):
        raise UserError(f"{where}: {key} holds a {bad}; remove it")
    if role != "tool" and not more.get("tool_calls"):
        string(content, where, f"{key} content")
    elif not isinstance(content, str | None):
        raise UserError(f"{where}: {key} content must be a string, not {type(content).__name__}")
    elif bad := unclean(content or ""):
        raise UserError(f"{where}: {key} content holds a {bad}; remove it")
    return Message(role, content or "", bool(weight) if role == "assistant" else True, _dumps(more) if more else "")


def _call(text, where, key):
    call = _json(text, where, f"{key}: the call") if isinstance(text, str) else text
    return {"type": "function", "function": call}


def follow(prompt: Said, answers: list[Said], where: str) -> tuple[Said, ...]:
    """Makes a prompt and its answers of one kind, and checks that the answers continue it."""
    for a in answers:
        if not isinstance(a, str):
            turns(a, where, "the answer", last="assistant", first="assistant")
    if isinstance(prompt, str) and any(not isinstance(a, str) for a in answers):
        prompt = (Message("user", prompt),)
    single = all(not isinstance(a, str) and len(a) == 1 and a[0].trained and not a[0].more for a in answers)
    return prompt, *(a[0].content if single else a for a in answers)
