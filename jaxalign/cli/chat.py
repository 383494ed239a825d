"""A conversation with a trained stage, or a Hugging Face directory, in the terminal or through a pipe (one message a line)."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from absl import flags

from jaxalign.cli import speak
from jaxalign.cli.main import common
from jaxalign.types import UserError

COMMANDS = {
    "/reset": "forget the conversation; the system prompt stays",
    "/system": "TEXT: another system prompt from here on; without TEXT, none",
    "/save": "FILE: add the conversation to a JSONL file that SFT reads",
    "/help": "this list",
    "/quit": "leave (so does Ctrl-D; Ctrl-C stops an answer)",
}


def define(fv):
    common(fv, config=False)
    speak.define(fv, max_new=512)
    flags.DEFINE_integer("max_len", None, "tokens that a conversation may have; default: as many as the model has positions", lower_bound=2, flag_values=fv)


class Chat:
    """The conversation so far. Every answer is the one that a fresh run over the whole conversation gives: turn k draws as row
    k, and the cache only spares reading again the tokens that are the same."""

    def __init__(self, speaker: speak.Speaker, system: str | None = None, seed: int = 0, max_len: int | None = None):
        import jax

        from jaxalign.rl.stream import Stream

        self.speaker, self.system, self.turns = speaker, system, []  # turns: (role, content)
        w = speaker.w
        self._stream, self._key = Stream(w.model, speaker.params, w.mesh), jax.random.key(seed)
        limits = [n for n in (getattr(w.model, "positions", None), max_len) if n is not None]
        self.limit = min(limits) if limits else None
        self.chats = w.template.chat
        if system is not None:
            self.ids([("user", "?")])  # a template that takes no system prompt says so now

    def ids(self, turns) -> list[int]:
        """Tokens of the conversation, up to where the model speaks."""
        from jaxalign.data import templates
        from jaxalign.data.examples import Message

        w = self.speaker.w
        before = [("system", self.system)] if self.system is not None else []
        said = tuple(Message(r, t) for r, t in [*before, *turns]) if self.chats else self._running(before + turns)
        return templates.encode_prompt(said, w.tokenizer, w.template)

    @staticmethod
    def _running(turns) -> str:
        """Without roles the conversation is one text, a line for each turn."""
        return "".join(f"{t}\n" if r != "assistant" else t if t.endswith("\n") else f"{t}\n" for r, t in turns)

    def say(self, text: str, show=lambda piece: None) -> speak.Answer:
        """The answer to a message. Raises UserError, and leaves the conversation as it was, where there is no room for one
        or the template can not write it."""
        turns = [*self.turns, ("user", text)]
        ids = self.ids(turns)
        room = self.speaker.how.max_new if self.limit is None else min(self.speaker.how.max_new, self.limit - len(ids))
        if room < 1:
            raise UserError(f"the context is full: the conversation has {len(ids)} tokens with this message, of {self.limit}; nothing was dropped. /reset begins anew, /save FILE keeps it")
        lead = getattr(self.speaker.w.template, "lead", "")
        how = dataclasses.replace(self.speaker.how, max_new=room)
        begun = False

        def put(piece: str) -> None:  # the template writes its lead again, so it is not part of what was said
            nonlocal begun
            piece, begun = piece if begun else piece.removeprefix(lead), True
            if piece:
                show(piece)

        got = speak.answer(self.speaker, self._stream, ids, how, self._key, len(self.turns) // 2, put)
        got = got._replace(text=got.text.removeprefix(lead))
        if got.reason == "length" and room < self.speaker.how.max_new:
            got = got._replace(reason="context")
        if got.text or got.reason != "interrupted":
            self.turns = [*turns, ("assistant", got.text)]
        return got

    def save(self, path: str) -> None:
        """One row {"messages": [...]} more in a JSONL file."""
        if not self.turns:
            raise UserError("/save: there is nothing to save yet")
        if not path:
            raise UserError("/save wants a file: /save chats.jsonl")
        before = [("system", self.system)] if self.system is not None else []
        row = {"messages": [{"role": r, "content": t} for r, t in [*before, *self.turns]]}
        try:
            with open(os.path.expanduser(path), "a", encoding="utf-8") as f:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UserError(f"/save {path}: {e.strerror}") from None


WHY = {"length": "cut at --max_new tokens", "context": "cut: the context is full", "interrupted": "stopped"}


def main(fv, rest):
    import jax

    if rest:
        raise UserError(f"chat reads its messages from the terminal or a pipe, not from the command line: {rest[0]!r}; jaxalign sample takes prompts")
    if jax.process_count() > 1:
        raise UserError("chat is one process: leave out --processes and --distributed")
    speaker = speak.opened(fv, "chat")
    chat = Chat(speaker, fv.system, fv.seed, fv.max_len)
    for text in speaker.notes:
        speak.note(text)
    if not chat.chats:
        speak.note(f"template {speaker.w.template.name!r} has no roles: the model continues the text of the conversation. --template=chatml (or human_assistant, hf, a .jinja file) gives it some, if it was trained on them")
    if sys.stdin.isatty():
        speak.note("/help lists the commands, Ctrl-D leaves")
        try:
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        except ImportError:
            pass
    try:
        for line in _lines():
            if not _turn(chat, line):
                break
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lines():
    """Messages: typed, or the lines of a pipe."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            raise UserError("a message is not UTF-8; convert it") from None
        except KeyboardInterrupt:
            if not typed:
                return
            speak.note("\n(Ctrl-D or /quit leaves)")
            continue
        if not typed and not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _turn(chat: Chat, line: str) -> bool:
    """One line: a command or a message. False: leave."""
    word, _, more = line.partition(" ")
    try:
        if word == "/quit":
            return False
        if word == "/reset":
            chat.turns = []
            speak.note("the conversation is forgotten" + ("; the system prompt stays" if chat.system is not None else ""))
        elif word == "/system":
            _system(chat, more.strip())
        elif word == "/save":
            chat.save(more.strip())
            speak.note(f"added to {more.strip()}" + ("" if all(t.strip() for _, t in chat.turns) else "; it has an empty turn, which SFT refuses"))
        elif word == "/help":
            speak.note("\n".join(f"{k:8} {v}" for k, v in COMMANDS.items()) + "\n//TEXT   a message that begins with /")
        elif line.startswith("/") and not line.startswith("//"):
            from jaxalign.build import nearest

            raise UserError(f"there is no command {word!r};{nearest(word, list(COMMANDS))}; //... sends a message that begins with /")
        else:
            got = chat.say(line[1:] if line.startswith("//") else line, speak.shown)
            if not got.text.endswith("\n"):
                speak.shown("\n")
            if not got.text and got.reason == "stop":
                speak.note("(an empty answer)")
            if got.reason in WHY:
                speak.note(f"({WHY[got.reason]})")
    except UserError as e:
        speak.note(f"jaxalign: {e}")
    except KeyboardInterrupt:  # before there was an answer to stop
        speak.note("\n(stopped)")
    return True


def _system(chat: Chat, text: str) -> None:
    old, chat.system = chat.system, text or None
    try:
        chat.ids([("user", "?")])
    except UserError:
        chat.system = old
        raise
    speak.note(("the system prompt is now: " + text if text else "no system prompt now") + ("; the conversation goes on" if chat.turns else ""))
