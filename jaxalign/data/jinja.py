"""Chat templates as models publish them: Jinja, rendered in a process of its own, with exact masks.

What is trained is known from the template's own {% generation %} marks or, as most have none, from its prefixes: with

    prompt = render(messages[:i], add_generation_prompt)        whole = render(messages)

the assistant's turn i is what follows ``prompt`` in ``whole``, up to and with the token that ends a turn. Where ``prompt``
is no prefix of ``whole``, a sampler would continue other text than was trained on, and the template is refused.

Messages stay text. Before rendering, what looks like a special token in one is broken by a character that occurs nowhere
else; the rendering is cut at the special tokens that are left, which only the template can have written; then the character
is taken out. Added tokens that are no special ones (<think>) are words, in messages as anywhere (see `data.fast`).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, Mapping, Sequence

from jaxalign.data.examples import Message, Said
from jaxalign.data.templates import Segment
from jaxalign.data.tokenizers import Tokenizer, cut, stripped, strips
from jaxalign.types import UserError

SECONDS = 5.0  # a real template takes a thousandth of one
_INNER = [chr(c) for c in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF8FF))]  # not for interchange, or for private use


class Sandbox:
    """Renders in a child process that is killed, and replaced, when it overruns. Starts at first use; one for each process
    that uses it. Pickles as a new one."""

    def __init__(self, seconds: float = SECONDS):
        self.seconds, self._lock = seconds, threading.Lock()
        self._child: subprocess.Popen | None = None
        self._owner = 0

    def __reduce__(self):
        return Sandbox, (self.seconds,)

    def render(self, source: str, jobs: Sequence[Mapping[str, Any]], common: Mapping[str, Any] = {}, marks: str = "\0\0", today: str = "") -> list[str]:
        """The text of each job: the template with the job's variables. Raises UserError."""
        size = len(json.dumps([common, *jobs], default=_no_json))
        request = {
            "source": source, "jobs": list(jobs), "common": dict(common), "marks": marks, "today": today, "seconds": self.seconds,
            "max_chars": (1 << 20) + 4 * size,
        }  # fmt: skip
        with self._lock:
            answer = self._ask(json.dumps(request, default=_no_json).encode() + b"\n", len(jobs) * (request["max_chars"] * 6 + 100))
        if isinstance(answer, dict):
            raise UserError(f"the chat template fails: {answer['error']}")
        return answer

    def _ask(self, line: bytes, most: int) -> Any:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._start()
        child, deadline, got = self._child, time.monotonic() + self.seconds, []
        try:
            child.stdin.write(line)
            child.stdin.flush()
            while not (got and got[-1].endswith(b"\n")):
                left = deadline - time.monotonic()
                if left <= 0 or sum(map(len, got)) > most:
                    raise TimeoutError
                if select.select([child.stdout], [], [], left)[0]:
                    if not (part := os.read(child.stdout.fileno(), 1 << 20)):
                        raise EOFError
                    got.append(part)
            return json.loads(b"".join(got))
        except TimeoutError:
            self._stop()
            raise UserError(f"the chat template does not end within {self.seconds:g} seconds; mend it, or use another") from None
        except (EOFError, BrokenPipeError, ValueError):
            code = self._stop()
            raise UserError(f"the chat template broke the process that renders it (exit {code}); mend it, or use another") from None
        except BaseException:
            self._stop()  # interrupted in the middle of an answer
            raise

    def _start(self):
        try:
            import jinja2  # noqa: F401  (to say so here, not in the child)
        except ImportError:
            raise UserError("chat templates need the jinja2 package, 3.1.6 or later; pip install 'jinja2>=3.1.6'") from None
        # -P: this directory holds a tokenizers.py and more that must not be taken for packages.
        command = [sys.executable, "-P", os.path.join(os.path.dirname(os.path.abspath(__file__)), "render.py")]
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG")}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**env, "PYTHONIOENCODING": "utf-8"}
        )  # fmt: skip
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child, self._owner)

    def _stop(self) -> int | None:
        child, self._child = self._child, None
        child.kill()
        child.stdin = child.stdout = None
        return child.wait()


def _end(child: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner and child.poll() is None:
        child.kill()
        child.wait()


def _no_json(value: Any):
    raise UserError(f"a chat template takes text, numbers, lists and objects, no {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class Jinja:
    """A chat template with the tokens it may write. Made by `template`, which also checks it."""

    name: str = dataclasses.field(compare=False, repr=False)  # where it came from does not change the data
    source: str
    names: tuple[tuple[str, str], ...]  # bos_token, eos_token ... as variables
    specials: tuple[str, ...]  # special tokens of the vocabulary
    variables: str = "{}"  # more variables, as JSON: {"enable_thinking": false, "tools": [...]}
    stop: str | None = None  # the special token that ends an assistant's turn; None: the template writes none, EOS is put there
    tail: str = ""  # what it writes after an answer where there is no stop token
    strips: tuple[tuple[str, str], ...] = ()  # special tokens that swallow blanks, and on which sides
    chat: bool = True
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox, compare=False, repr=False)

    @property
    def marked(self) -> bool:
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    @property
    def date(self) -> str | None:
        """The day that it takes for today; None where it asks for none."""
        return json.loads(self.variables).get("strftime_now") if "strftime_now" in self.source else None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text that transformers' apply_chat_template gives; marks of generation are left out."""
        return self._texts([(messages, add_generation_prompt)], **variables)[0][0]

    def _texts(self, jobs, inner: str = "\0\0", **variables) -> list[tuple[str, list[tuple[int, int]]]]:
        """(text, spans that {% generation %} marks) of each (messages, add_generation_prompt)."""
        common = {**json.loads(self.variables), **variables}
        today = str(common.pop("strftime_now", ""))
        if inner == "\0\0":
            inner = _unused(json.dumps([[m for m, _ in jobs], common], ensure_ascii=False) + self.source)[1:]
            inner = "".join(inner)
        requests = [{"messages": list(m), "add_generation_prompt": g} for m, g in jobs]
        out = self.sandbox.render(self.source, requests, {"tools": None, "documents": None, **dict(self.names), **common}, inner, today)
        return [_unmarked(t, inner) for t in out]

    def prompt(self, prompt: Said) -> list[Segment]:
        """Segments of a prompt, up to where the assistant speaks. Nothing in it is trained."""
        return self._segments(_untrained(_said(prompt, "user")), open_=True)

    def completion(self, prompt: Said, answer: Said) -> list[Segment]:
        """Segments of a prompt and what follows it; the prompt's own assistant turns are not trained."""
        return self._segments(_untrained(_said(prompt, "user")) + _said(answer, "assistant"))

    def conversation(self, messages: Sequence[Message]) -> list[Segment]:
        """Segments of a whole conversation, every assistant turn trained unless its message says otherwise."""
        return self._segments(tuple(messages))

    def _segments(self, messages: tuple[Message, ...], open_: bool = False) -> list[Segment]:
        inner, *marks = _unused("".join([t for m in messages for t in (m.content, m.more)] + [self.source, self.variables]))
        plain = [{"role": m.role, "content": broken(m.content, self.specials, inner), **_more(m, self.specials, inner)} for m in messages]
        tools = {"tools": plain[0].pop("tools")} if plain and "tools" in plain[0] else {}
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        jobs = [(plain, open_), *((plain[:i], True) for i in turns)]
        if not self.stop:
            jobs += [(plain[: i + 1], False) for i in turns]
        texts = self._texts(jobs, "".join(marks), **tools)
        (whole, spans), starts, ends = texts[0], texts[1 : 1 + len(turns)], texts[1 + len(turns) :]
        pieces, at = [], 0
        for k, i in enumerate(turns):
            begin = len(starts[k][0])
            if not messages[i].trained and not whole.startswith(starts[k][0]):
                continue  # Qwen3 writes a turn's thoughts only while it is the last: then this turn is part of a prompt, as it stands
            _prefix(starts[k][0], whole, i, "the prompt before it", inner)
            end = self._end(whole, begin, ends[k][0] if ends else None, i, inner)
            if begin < at:
                raise UserError(f"messages[{i}]: the chat template writes this turn into the one before it")
            trained = messages[i].trained
            inside = [(max(a, begin), min(b, end)) for a, b in spans if a < end and b > begin] if self.marked else [(begin, end)]
            if trained and not inside:
                raise UserError(f"messages[{i}]: the template's generation marks leave out this assistant turn, so it would train nothing")
            pieces.append((at, begin, False, "text"))
            for a, b in inside:
                pieces += [(begin, a, False, "answer"), (a, b, trained, "answer")]
                begin = b
            pieces.append((begin, end, False, "answer"))
            if not self.stop:
                pieces.append((end, end, trained, "stop"))
            at = end
        pieces.append((at, len(whole), False, "text"))
        parts = [(p, *rest) for a, b, *rest in pieces for p in (cut(whole[a:b], self.specials) if b > a else [""])]
        texts = stripped([p for p, *_ in parts], self.specials, dict(self.strips))
        out = [Segment("", kind="opened")]  # BOS or none is the template's to decide
        for text, (_, trained, kind) in zip(texts, parts):
            special = text in self.specials
            if kind == "stop" or special and text == self.stop and kind == "answer":
                out.append(Segment(text, trained, "stop"))
            elif text:
                out.append(Segment(text.replace(inner, ""), trained, "special" if special else "answer"))
        return out

    def _end(self, whole: str, begin: int, alone: str | None, i: int, inner: str) -> int:
        """Where the assistant's turn i ends, its stop token included."""
        if self.stop:
            at = whole.find(self.stop, begin)
            if at < 0:
                raise UserError(f"messages[{i}]: the chat template writes no {self.stop} after this turn, so its stop would go untrained")
            return at + len(self.stop)
        _prefix(alone, whole, i, "the conversation up to it", inner)
        if not alone.endswith(self.tail):
            raise UserError(f"messages[{i}]: the chat template ends this turn with {alone[-20:]!r} and others with {self.tail!r}; its end can not be told")
        return len(alone) - len(self.tail)


def template(source: str, tokenizer: Tokenizer, name: str = "hf", variables: Mapping[str, Any] | None = None) -> Jinja:
    """A chat template that can be trained with. Raises UserError for one that can not (see `check`).

    The date that it writes, unless ``variables`` fix it, is today's for as long as it lives: rows do not change at midnight.
    """
    variables = {**({"strftime_now": _today()} if "strftime_now" in source else {}), **(variables or {})}
    names, swallow = tuple(sorted(tokenizer.names.items())), tuple(sorted(strips(tokenizer).items()))
    t = Jinja(name, source, names, tuple(tokenizer.specials), json.dumps(variables, sort_keys=True), strips=swallow)
    said = _said("Cobalt 7?", "user") + _said("Vermilion 9.", "assistant")
    messages = [{"role": m.role, "content": m.content} for m in said]
    whole = t.render(messages)
    head, found, tail = whole.rpartition(said[1].content)
    if not found:
        raise UserError(f"chat template {name!r} does not write what the assistant says; its whole text is {whole!r}")
    ends = [p for p in cut(tail, t.specials) if p in t.specials]
    if ends:
        t = dataclasses.replace(t, stop=ends[0])
    else:
        t = dataclasses.replace(t, tail=tail)
    try:
        check(t, said)
    except UserError as e:
        raise UserError(f"chat template {name!r}: {e}") from None
    return t


def _today() -> str:
    return datetime.date.today().isoformat()


PROBE = (
    Message("user", "Cobalt 7?"), Message("assistant", "Vermilion 9."), Message("user", "Ochre 11?"), Message("assistant", "Indigo 13."),
)  # fmt: skip


def check(t: Jinja, messages: Sequence[Message] = PROBE) -> None:
    """Refuses a template whose prompts are no prefixes, whose mask is empty, or whose stop token is not trained."""
    out = t.conversation(messages)
    if not any(s.trained and s.text for s in out):
        raise UserError("no token of an assistant's turn is trained; a template with generation marks must put them around what the assistant writes")
    stops = [s for s in out if s.kind == "stop"]
    wanted = sum(m.role == "assistant" for m in messages)
    if len(stops) < wanted or not all(s.trained for s in stops):
        raise UserError(
            f"the token that ends the assistant's turn ({t.stop or 'EOS'}) is not trained, so the model would never stop; move "
            "{% endgeneration %} behind it"
        )
    if len(messages) > 2:  # tokens, not only text: pieces of the prompt must be the same ones
        first = [s._replace(kind="") for s in t.prompt(messages[:3])]
        if [s._replace(trained=False, kind="") for s in out[: len(first)]] != first:
            raise UserError("a prompt of several turns is written otherwise than the same turns in a conversation")


def notes(t: Jinja) -> list[str]:
    """What is no fault but should be known of a template."""
    out = []
    whole, prompt = t.render(_dicts(PROBE[:2])), t.render(_dicts(PROBE[:1]), True)
    lead = whole[len(prompt) :].partition(PROBE[1].content)[0]
    if lead.strip() and not t.marked:
        out.append(f"the template writes {lead!r} before an answer, which is trained with it (a variable such as enable_thinking may change that)")
    if not t.stop:
        out.append("the template ends an answer with no special token of this vocabulary: EOS is put there and trained")
    if unknown := [x for x in literals(t.source) if x not in t.specials]:
        out.append(f"this vocabulary has no token for {', '.join(unknown)}: the template's own are spelled out")
    if not t.marked:
        out.append("the template has no generation marks: the mask is found from its prefixes")
    return out


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _said(said: Said, role: str) -> tuple[Message, ...]:
    return (Message(role, said),) if isinstance(said, str) else tuple(said)


def _untrained(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(m._replace(trained=False) for m in messages)


def _unused(text: str) -> list[str]:
    """Three characters that are not in the text."""
    return list(itertools.islice((c for c in _INNER if c not in text), 3))


def _unmarked(text: str, marks: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its marks of generation, and where it was marked. A mark within another says nothing new."""
    spans, out, at, depth, begin = [], [], 0, 0, 0
    for part in re.split(f"([{re.escape(marks)}])", text):
        if part == marks[0]:
            begin, depth = at if depth == 0 else begin, depth + 1
        elif part == marks[1]:
            depth -= 1
            if depth == 0 and at > begin:
                spans.append((begin, at))
        else:
            out.append(part)
            at += len(part)
    return "".join(out), spans


def broken(text: str, specials: tuple[str, ...], inner: str) -> str:
    """The text with ``inner`` inside all that is, or might become with what a template writes around it, a special token.

    Stripping goes on as before, for blanks at the ends stay there; and so does comparing, for ordinary text stays as it is.
    """
    inside, begins, ends = _edges(specials)
    text = inside.sub(inner, text)
    bare = text.strip()
    if not bare:
        return text
    longest = max(map(len, specials), default=0)
    at, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if any(bare[-n:] in begins for n in range(1, min(longest, len(bare)) + 1)):
        text = text[:end] + inner + text[end:]
    if any(bare[:n] in ends for n in range(1, min(longest, len(bare)) + 1)) or len(bare) < longest and any(bare in s for s in specials):
        text = text[:at] + inner + text[at:]
    return text


@functools.lru_cache(4)
def _edges(specials: tuple[str, ...]) -> tuple[re.Pattern, frozenset[str], frozenset[str]]:
    """(where a special token goes on after its first character, all beginnings, all ends)"""
    after = {s[0]: [t[1:] for t in specials if t[0] == s[0] and len(t) > 1] for s in specials}
    inside = "|".join(f"(?<={re.escape(c)})(?={'|'.join(map(re.escape, rest))})" for c, rest in after.items() if rest)
    parts = [(s[:n], s[n:]) for s in specials for n in range(1, len(s))]
    return re.compile(inside or "(?!)"), frozenset(a for a, _ in parts), frozenset(b for _, b in parts)


def _prefix(part: str, whole: str, i: int, what: str, inner: str) -> None:
    if whole.startswith(part):
        return
    n = len(os.path.commonprefix([part, whole]))
    show = lambda t: t[max(0, n - 30) : n].replace(inner, "") + "⟨here⟩" + t[n : n + 30].replace(inner, "")
    raise UserError(
        f"messages[{i}] (assistant): {what} is rendered otherwise alone than in the conversation, so a sampler would continue what "
        f"was never trained on. Alone: {show(part)!r}; within: {show(whole)!r}. Mend the template, set its variables, or train this row's last turn alone (loss_weight 0 on the others)"
    )


def read(path: str) -> str:
    """The source in a .jinja file."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; name a file with a chat template") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert it") from None


def _more(m: Message, specials: tuple[str, ...], inner: str) -> dict[str, Any]:
    """What else a message says, its text broken as well where it names a special token. Names too are text: of arguments,
    of a schema's properties."""
    inside = _edges(specials)[0]

    def walk(x):
        if isinstance(x, dict):
            return {walk(k): walk(v) for k, v in x.items()}
        return [walk(v) for v in x] if isinstance(x, list) else inside.sub(inner, x) if isinstance(x, str) else x

    return walk(json.loads(m.more)) if m.more else {}


def literals(source: str) -> tuple[str, ...]:
    """What looks like a special token in a template, for a vocabulary that is still to be trained."""
    return tuple(dict.fromkeys(re.findall(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]", source)))
