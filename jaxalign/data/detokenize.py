"""Ids as they come -> text as it becomes certain: no half characters, no beginnings of a stop string."""

from __future__ import annotations

from typing import Iterable, Sequence

from jaxalign.data.tokenizers import Tokenizer

_UNKNOWN = "\ufffd"


class Detokenizer:
    """The pieces that `push` and `finish` return add up to `tokenizer.decode` of all ids less those in ``skip``.

    What may still change with the next id is held back: a character of which bytes are missing, and where a decoder reads
    bytes by the run (see `data.fast`), the whole run.
    """

    def __init__(self, tokenizer: Tokenizer, skip: Iterable[int] = ()):
        self._decode, self._skip = tokenizer.decode, frozenset(skip)
        self._specials = frozenset(tokenizer.specials.values())
        self._bytes = getattr(tokenizer, "byte_ids", frozenset())
        self._window: list[int] = []  # decoded again at each push; it begins with a token that stands for itself
        self._said = 0  # characters of its text that have been returned

    def push(self, i: int) -> str:
        """The text that is certain now and was not before."""
        i = int(i)
        if i in self._skip:
            return ""
        self._window.append(i)
        text = self._decode(self._window)
        sure = self._decode(self._window[: self._run()]) if self._bytes else text
        sure = sure.rstrip(_UNKNOWN)  # perhaps the beginning of a character
        out = sure[self._said :]
        self._said = max(self._said, len(sure))
        if sure == text and i not in self._specials:
            own = self._decode([i])
            if own and _UNKNOWN not in own and text.endswith(own):
                self._window, self._said = [i], len(own)
        return out

    def finish(self) -> str:
        """What was held back."""
        out = self._decode(self._window)[self._said :]
        self._window, self._said = [], 0
        return out

    def _run(self) -> int:
        """Where the run of byte tokens at the end begins; special tokens, which say nothing, do not end it."""
        n = len(self._window)
        while n and (self._window[n - 1] in self._bytes or self._window[n - 1] in self._specials):
            n -= 1
        return n


class Stops:
    """Cuts a text that comes in pieces before the first of the stop strings, and holds back what could begin one.

    Of several the one that is complete first counts (and of those that end together the longest), so the cut does not
    depend on where the pieces end.
    """

    def __init__(self, strings: Sequence[str] = ()):
        self._strings = tuple(s for s in strings if s)
        self._held = ""
        self.found: str | None = None  # the string that ended the text

    def push(self, piece: str) -> str:
        """Text that belongs to the answer for certain; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(at + len(s), at, s) for s in self._strings if (at := text.find(s)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = max((n for s in self._strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and began no stop string after all."""
        out, self._held = self._held, ""
        return out


def cut_at(text: str, strings: Sequence[str]) -> tuple[str, str | None]:
    """(text before the first stop string, that string or None): what `Stops` makes of the whole text."""
    stops = Stops(strings)
    out = stops.push(text)
    return out + stops.finish(), stops.found
