"""Rows of tokens with their loss mask, for a terminal and as a page that needs no network."""

from __future__ import annotations

from typing import Any, Iterable, NamedTuple

from jaxalign.data.tokenizers import Tokenizer, decode_with_specials
from jaxalign.report.markup import Html, join, tag
from jaxalign.report.page import HEAD
from jaxalign.report.style import CSS


class Piece(NamedTuple):
    text: str
    ids: tuple[int, ...]  # several where only together they make characters
    trained: bool
    special: bool
    document: int  # 1, 2, ... within a packed row


def rows(batch: Any) -> list[tuple]:
    """(tokens, mask, segments) of each row of any batch: both sides of pairs, all candidates of rankings."""
    if hasattr(batch, "chosen"):
        sides = [rows(batch.chosen), rows(batch.rejected)]
        return [r for pair in zip(*sides) for r in pair]
    if hasattr(batch, "candidates"):
        c = batch.candidates
        return [r for i in range(c.tokens.shape[0]) for r in zip(c.tokens[i], c.mask[i], c.segments[i])]
    if hasattr(batch, "rows"):
        return rows(batch.rows)
    mask = getattr(batch, "mask", batch.segments * 0)
    return list(zip(batch.tokens, mask, batch.segments))


def pieces(tokenizer: Tokenizer, tokens: Iterable[int], mask: Iterable[float], segments: Iterable[int]) -> list[Piece]:
    """A row, token by token; the bytes of one character stay together."""
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"} | {i: t for t, i in tokenizer.specials.items()}
    out: list[Piece] = []
    held: list[int] = []
    row = [(int(t), bool(m), int(s)) for t, m, s in zip(tokens, mask, segments) if s]
    for k, (t, m, s) in enumerate(row):
        if t in names:
            out.append(Piece(names[t], (t,), m, True, s))
            continue
        held.append(t)
        text = decode_with_specials(tokenizer, held)
        more = k + 1 < len(row) and row[k + 1][1:] == (m, s) and row[k + 1][0] not in names
        if text.endswith("\ufffd") and more and len(held) < 4:
            continue
        out.append(Piece(text, tuple(held), m, False, s))
        held = []
    return out


def terminal(row: Iterable[Piece], colour: bool) -> str:
    """One line: trained tokens in green (or in [brackets] without colour), special ones bold, documents apart."""
    out, document = [], 0
    for p in row:
        if p.document != document and document:
            out.append(" || ")
        document = p.document
        text = "".join(c if c.isprintable() else {"\n": "\\n", "\t": "\\t"}.get(c, f"\\x{ord(c):02x}") for c in p.text)
        if colour:
            out.append(f"\033[{'1;' * p.special}{32 if p.trained else 2}m{text}\033[0m·")
        else:
            out.append(f"[{text}]" if p.trained else text)
    return "".join(out)


_STYLE = """
.tokens { font: 13px/1.9 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: .7rem .9rem; margin: .6rem 0; }
.tokens span { color: var(--soft); border-bottom: 2px solid var(--faint); padding: 2px 0; margin-right: 1px; border-radius: 2px; }
.tokens .t { color: var(--ink); background: var(--goodwash); border-bottom-color: var(--good); }
.tokens .x { font-weight: 600; color: var(--c0); } .tokens .t.x { color: var(--good); }
.tokens hr { border: 0; border-top: 1px dashed var(--rule); margin: .5rem 0; }
"""


def page(title: str, sections: Iterable[tuple[str, str, list[list[Piece]]]]) -> str:
    """HTML of (heading, a line about it, rows) each."""
    key = tag("p", "Trained tokens are ", tag("span", tag("span", "green", class_="t"), class_="tokens", style="padding: 0; border: 0"), ", special ones bold; point at one for its id.", class_="soft")
    body = [tag("h1", title), key]
    for heading, line, shown in sections:
        body += [tag("h2", heading), tag("p", line, class_="soft"), *(tag("div", _row(r), class_="tokens") for r in shown)]
    return join([HEAD, tag("title", f"{title} · tokens"), tag("style", Html(CSS + _STYLE)), tag("main", *body)])


def _row(row: list[Piece]) -> Html:
    out, document = [], 0
    for p in row:
        if p.document != document and document:
            out.append(Html("<hr>"))
        document = p.document
        text = p.text.replace("\n", "↵\n").replace("\t", "→\t")
        kind = " ".join(k for k, on in (("t", p.trained), ("x", p.special)) if on)
        out.append(tag("span", text, class_=kind or None, title=" ".join(map(str, p.ids))))
    return join(out)
