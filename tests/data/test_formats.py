"""Faults 40 to 42 and 45: which schema, and what is refused."""

import json

import pytest
from hypothesis import given, strategies as st

from jaxalign.data.formats import (
    Chat, Completion, Label, Message, Preference, Prompt, Ranking, Text, Unusable, canonical, detect,
)  # fmt: skip
from jaxalign.types import UserError


def m(role, content, **kw):
    return {"role": role, "content": content, **kw}


q, a, b = m("user", "q"), m("assistant", "a"), m("assistant", "b")
Q, A, B = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant: I think "


@pytest.mark.parametrize(
    "record, want",
    [
        ({"text": "t", "meta": {"id": 1}}, Text("t")),
        ({"prompt": "p", "completion": " c"}, Completion("p", " c")),
        ({"prompt": [q], "completion": "a"}, Completion((Q,), "a")),
        ({"prompt": [q], "completion": [a]}, Completion((Q,), "a")),
        ({"prompt": "q", "completion": [a]}, Completion((Q,), "a")),
        ({"messages": [m("system", "s"), q, a]}, Chat((Message("system", "s"), Q, A))),
        ({"messages": [m("system", ""), q, a]}, Chat((Q, A))),
        ({"messages": [q, m("assistant", "a", loss_weight=0), q, b]}, Chat((Q, Message("assistant", "a", False), Q, B))),
        ({"messages": [m("user", [{"type": "text", "text": "q"}]), a]}, Chat((Q, A))),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Chat((Q, A))),
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, Preference("p", "x", "y")),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": 2}, Preference("p", "x", "y", 2.0)),
        ({"prompt": "q", "chosen": [q, a], "rejected": [q, b]}, Preference((Q,), "a", "b")),
        ({"prompt": "q", "chosen": [a], "rejected": [b]}, Preference((Q,), "a", "b")),
        ({"chosen": [q, a], "rejected": [q, b]}, Preference((Q,), "a", "b")),
        ({"chosen_messages": [q, a], "rejected_messages": [q, b]}, Preference((Q,), "a", "b")),
        ({"chosen": [q, a, q, a], "rejected": [q, a, q, b]}, Preference((Q, A, Q), "a", "b")),
        # They part before the last turn: what follows the common beginning is a conversation of its own.
        ({"chosen": [q, a, q, a], "rejected": [q, b]}, Preference((Q,), (A, Q, A), (B,))),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
             "rejected": {"from": "gpt", "value": "b"}},
            Preference((Q,), "a", "b"),
        ),
        (
            {"chosen": HH + "so", "rejected": HH + "not"},
            Preference((Message("user", "hi"), Message("assistant", "hello"), Message("user", "and?")), "I think so", "I think not"),
        ),
        ({"chosen": "1 + 1 = 2", "rejected": "1 + 1 = 3"}, Preference("1 + 1 =", " 2", " 3")),
        ({"chosen": "Q: say it\nA: cat", "rejected": "Q: say it\nA: car"}, Preference("Q: say it\nA:", " cat", " car")),
        ({"chosen": "so be it", "rejected": "so be it then"}, Preference("so be", " it", " it then")),
        ({"prompt": "p", "completions": ["x", "y", "z"], "ranks": [1, 0, 1]}, Ranking("p", ("x", "y", "z"), (1, 0, 1))),
        ({"prompt": "p", "responses": ["x", "y"], "ranking": [2, 1]}, Ranking("p", ("x", "y"), (2, 1))),
        ({"prompt": "p", "completion": "c", "label": False}, Label("p", "c", 0.0)),
        ({"prompt": [q], "completion": [a], "label": True}, Label((Q,), "a", 1.0)),
        ({"messages": [q, a], "label": True}, Label((Q,), "a", 1.0)),
        ({"prompt": "p", "completion": "c", "score": 3}, Completion("p", "c")),
        ({"prompt": "p", "completion": "c", "label": "good"}, Completion("p", "c")),
        ({"prompt": "p", "answer": "4"}, Prompt("p", {"prompt": "p", "answer": "4"})),
        ({"prompt": [q]}, Prompt((Q,), {"prompt": [q]})),
    ],
)  # fmt: skip
def test_canonical(record, want):
    assert canonical(record, "f:1") == want


@pytest.mark.parametrize(
    "record, match",
    [
        ({"text": "t", "messages": [q, a]}, "ambiguous: .*text and chat"),
        ({"text": "t", "prompt": "p"}, "ambiguous"),
        ({"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y"}, "ambiguous"),
        ({"messages": [q, a], "chosen": [a], "rejected": [b]}, "ambiguous"),
        ({"prompt": "p", "completion": "c", "label": True, "score": 1}, "both 'label' and 'score'"),
        ({"messages": [q], "label": True}, "must end with a turn of the assistant"),
        ({"promt": "p", "completion": "c"}, r"completion needs 'prompt' \(is 'promt' meant.*found keys \['completion', 'promt'\]"),
        ({"massages": []}, r"no known format has the keys \['massages'\]; nearest is chat, which needs \['messages'\]"),
        ({}, r"no known format has the keys \[\]"),
        ({"foo": 1}, "no known format"),
        ({"chosen": "x"}, "preference needs 'rejected'"),
        ({"prompt": "p", "completions": ["x", "y"]}, "ranking needs 'ranks'"),
        ({"instruction": "i", "chosen": "The x", "rejected": "The y"}, "rename 'instruction'"),
        ({"prompt": "p", "chosen": "x", "chosen_messages": [a], "rejected": "y"}, "both 'chosen' and 'chosen_messages'"),
        ({"text": None}, "'text' must be a string, not NoneType"),
        ({"text": ["t"]}, "must be a string, not list"),
        ({"text": " \n\t"}, "'text' is empty"),
        ({"text": "a\0b"}, "NUL"),
        ({"text": "a\udc00b"}, "lone surrogate"),
        ({"prompt": "", "completion": "c"}, "'prompt' is empty"),
        ({"prompt": "p", "completion": "  "}, "'completion' is empty"),
        ({"prompt": "p", "chosen": "", "rejected": "y"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": "x", "rejected": [b]}, "both be strings or both be messages"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": float("nan")}, "finite"),
        ({"prompt": "p", "chosen": "x", "rejected": "y", "margin": True}, "finite"),
        ({"prompt": "other", "chosen": [q, a], "rejected": [q, b]}, "no user turn of the common"),
        ({"prompt": [q], "chosen": [q, a], "rejected": [q, b]}, "given twice"),
        ({"chosen": [a], "rejected": [b]}, "without a question"),
        ({"chosen": [q, a], "rejected": [m("user", "z"), b]}, "must share a question"),
        ({"chosen": "x", "rejected": "y"}, "no common beginning"),
        ({"chosen": [q, a], "rejected": [q, a, q]}, "must end with a turn of the assistant|must start|answer"),
        ({"prompt": "p", "completions": ["x", "y"], "ranks": [0]}, "same length"),
        ({"prompt": "p", "completions": ["x", "y"], "ranks": [0, True]}, "integers"),
        ({"prompt": "p", "completions": ["x", "y"], "ranks": [0, 1.5]}, "integers"),
        ({"prompt": "p", "completions": "xy", "ranks": [0, 1]}, "lists"),
        ("text", "must be an object"),
    ],
)  # fmt: skip
def test_refused(record, match):
    with pytest.raises(UserError, match=match) as e:
        canonical(record, "f:7")
    assert str(e.value).startswith("f:7: ") and not isinstance(e.value, Unusable)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}


@pytest.mark.parametrize(
    "messages, match",
    [
        ([], "list of messages"),
        ("hi", "must be|list"),
        ([q], "must end with a turn of the assistant, not of the user"),
        ([a], "starts with the assistant"),
        ([q, q, a], "two user turns in a row"),
        ([q, a, b], "two assistant turns in a row"),
        ([q, m("system", "s"), a], r"messages\[1\] is a system turn"),
        ([m("system", "s")], "must end with"),
        ([q, m("assistant", None)], r"messages\[1\] content' must be a string, not NoneType"),
        ([q, m("assistant", "")], r"messages\[1\] content' is empty"),
        ([m("user", "  "), a], "is empty"),
        ([q, m("assistant", [{"type": "image", "url": "x"}])], "content other than text"),
        ([q, m("assistant", ["text"])], "content other than text"),
        ([q, m("assistant", "a", tool_calls=[{"id": 1}])], "tool_calls must be"),
        ([m("user", "q", tool_calls=[CALL]), a], "tool_calls must be"),
        ([q, m("tool", "42"), a], "tool turn that answers no call"),
        ([q, m("assistant", None, tool_calls=[CALL]), q, a], "followed by a user turn"),
        ([q, m("assistant", None, tool_calls=[CALL]), m("tool", 42), a], "must be a string, not int"),
        ([q, {"from": "function_call", "value": "{"}, m("tool", "42"), a], "the call is no JSON"),
        ([q, m("narrator", "a")], "role 'narrator'"),
        ([q, {"content": "a"}], "role None"),
        ([q, {"role": ["user"], "content": "a"}], r"role \['user'\]"),
        ([q, "a"], r"messages\[1\] must be an object"),
        ([q, m("assistant", "a", loss_weight=0.5)], "loss_weight 0.5"),
    ],
)
def test_bad_messages(messages, match):
    with pytest.raises(UserError, match=match) as e:
        canonical({"messages": messages}, "f:7")
    assert str(e.value).startswith("f:7: ")


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "identical"),
        ({"chosen": [q, a], "rejected": [q, a]}, "identical"),
        ({"prompt": "p", "completions": ["x"], "ranks": [0]}, "one_item"),
        ({"prompt": "p", "completions": ["x", "y"], "ranks": [3, 3]}, "ties"),
    ],
)
def test_unusable(record, reason):
    with pytest.raises(Unusable, match="f:7") as e:
        canonical(record, "f:7")
    assert e.value.reason == reason


def test_format_by_name_and_by_function():
    record = {"text": "t", "messages": [q, a], "label": True}
    assert canonical(record, format="text") == Text("t")
    assert canonical(record, format="chat") == Chat((Q, A))
    scored = {"prompt": "p", "completion": "c", "score": 2.5}
    assert canonical(scored, format="label") == Label("p", "c", 2.5)
    with pytest.raises(UserError, match="f:7: 'score' must be true, false or a finite number"):
        canonical(scored | {"score": "high"}, "f:7", "label")
    assert canonical({"question": "q", "answer": "a"}, format=lambda r: Completion(r["question"], r["answer"])) == Completion("q", "a")
    for make, match in [
        (lambda r: r["nope"], "f:7: format= failed on this row: KeyError: 'nope'"),
        (lambda r: "text", "f:7: format= returned a str"),
        (lambda r: Completion("p", " "), "f:7: 'completion' is empty"),
        (lambda r: Chat((A, Q)), "f:7: messages"),
        (lambda r: Ranking("p", ("x", "y"), (0,)), "f:7: 2 completions but 1 ranks"),
        (lambda r: Completion((Q,), (Message("system", "s"), A)), "f:7: .*system"),
    ]:
        with pytest.raises(UserError, match=match):
            canonical(record, "f:7", make)
    with pytest.raises(UserError, match="format 'txt': use one of"):
        canonical(record, format="txt")
    with pytest.raises(UserError, match="ambiguous"):
        detect(record)


words = st.lists(st.sampled_from(["a", "bb", "ab", "\n\n", "c."]), min_size=1, max_size=6).map(" ".join)


@given(shared=words, x=words, y=words)
def test_implicit_prompt_loses_no_character(shared, x, y):
    chosen, rejected = f"{shared} {x}", f"{shared} {y}"
    try:
        p = canonical({"chosen": chosen, "rejected": rejected})
    except UserError:
        return
    assert p.prompt + p.chosen == chosen and p.prompt + p.rejected == rejected
    assert p.prompt.strip() and p.chosen.strip() and p.rejected.strip()
    assert p.chosen[0].isspace() and not p.prompt[-1].isspace()  # no word is cut


def test_tools_go_with_the_conversation():
    """In OpenAI's form, in ShareGPT's and as parts: the same example, and a prompt keeps its tools."""
    tools = [{"name": "add", "description": "é"}]
    said = [q, m("assistant", None, tool_calls=[CALL]), m("tool", "4"), a]
    got = canonical({"messages": said, "tools": tools})
    assert [x.role for x in got.messages] == ["user", "assistant", "tool", "assistant"] and got.messages[1].calls
    assert json.loads(got.messages[0].more) == {"tools": tools}
    assert json.loads(got.messages[1].more) == {"tool_calls": [CALL], "content": None}
    inner = json.dumps(CALL["function"])
    shared = [{"from": "human", "value": "q"}, {"from": "function_call", "value": inner}, {"from": "observation", "value": "4"}, {"from": "gpt", "value": "a"}]
    parts = [q, m("assistant", [{"type": "reasoning", "value": "hm"}, {"type": "tool_call", "value": inner}]), m("tool", "4"), a]
    for other in ({"conversations": shared, "tools": json.dumps(tools)}, {"messages": parts, "tools": tools}):
        x = canonical(other)
        assert x.messages[0] == got.messages[0] and json.loads(x.messages[1].more)["tool_calls"] == [CALL] and x.messages[2:] == got.messages[2:]
    assert canonical({"messages": [q, a], "tools": ""}) == canonical({"messages": [q, a]})
    assert canonical({"prompt": said[:3], "chosen": [a], "rejected": [b], "tools": tools}).prompt == got.messages[:3]
    assert canonical({"prompt": "p", "tools": tools}).prompt == "p"  # a key like any other
    with pytest.raises(UserError, match="'tools' must be a list"):
        canonical({"messages": [q, a], "tools": {"name": "x"}})
