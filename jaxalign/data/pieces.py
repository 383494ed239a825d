"""SentencePiece models: ours, Llama's and Mistral's, T5's."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from typing import Callable, Sequence

from jaxalign.data import hub
from jaxalign.types import UserError

_SPACE = "\u2581"  # SentencePiece's own spelling of a space

# A serialised protobuf is merged by concatenation. This says: normalizer_spec { add_dummy_prefix: false,
# remove_extra_whitespaces: false }. Without it "world" after "Hello " would get a second space, and " world" none.
_VERBATIM = b"\x1a\x04\x18\x00\x20\x00"


class SentencePiece:
    """A SentencePiece ``.model``: ours (`train_sentencepiece`) or a published one. ``beside``: what stood in its directory,
    such as tokens added after its own. T5's <extra_id_N> come after the pieces, the last first, as transformers has them.

    Raises UserError when the file is missing, no model, or has no EOS.
    """

    def __init__(self, path: str, beside: hub.About = hub.About()):
        try:
            with open(path, "rb") as f:
                self._init(f.read(), beside)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}; give the path of a SentencePiece .model file") from None
        except (RuntimeError, TypeError):
            raise UserError(f"{path}: not a SentencePiece model (or cut short); fetch or train it again") from None
        if self.eos_id < 0:
            raise UserError(f"{path}: the vocabulary has no EOS, so a model could never stop; use one that has")

    def _init(self, proto: bytes, beside: hub.About):
        import sentencepiece

        self.published = sentencepiece.SentencePieceProcessor(model_proto=proto)  # as its makers' programs read a text
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=proto + _VERBATIM)
        self._proto, self.beside = proto, beside
        self._dummy_prefix = self.published.encode("a") != sp.encode("a")
        size = sp.vocab_size()
        pieces = {sp.id_to_piece(i): i for i in range(size)}
        sentinels = {f"<extra_id_{beside.sentinels - 1 - k}>": size + k for k in range(beside.sentinels)}
        added = {**sentinels, **{t: a.id for t, a in beside.added.items()}}
        added = {t: i for t, i in added.items() if t not in pieces}
        if sorted(added.values()) != list(range(size, size + len(added))):
            raise UserError(
                f"added tokens {added} do not follow the {size} pieces of tokenizer.model; the files are of two vocabularies"
            )
        self.vocab_size = size + len(added)
        self.specials = {p: i for p, i in pieces.items() if sp.is_control(i) or hub.CONTROL.fullmatch(p)} | added
        named = {k: sp.id_to_piece(i) for k, i in (("bos_token", sp.bos_id()), ("eos_token", sp.eos_id()), ("pad_token", sp.pad_id())) if i >= 0}
        beside = dataclasses.replace(beside, names={**named, **beside.names})
        bos = sp.bos_id() if sp.bos_id() >= 0 else None
        if "eos_token" not in beside.names:
            self.names, self.bos_id, self.eos_id, self.pad_id = named, bos, -1, -1  # refused by __init__, which knows the path
        else:
            self.names, self.bos_id, self.eos_id, self.pad_id = hub.resolve(beside, {**pieces, **added}, "tokenizer.model", bos)
        self.chat_template = beside.chat_template
        content = hashlib.sha256(proto)
        if (self.specials, self.names) != ({p: i for p, i in self.specials.items() if i < size}, named):
            content.update(repr([sorted(self.specials.items()), self.bos_id, self.eos_id, self.pad_id]).encode())
        self.fingerprint = content.hexdigest()
        self._added = set(added.values())
        # Control pieces never match text, but "user defined" ones do: those we cut apart before SentencePiece looks.
        matched = [re.escape(p) for p, i in self.specials.items() if i < size and not sp.is_control(i)]
        self._guard = re.compile("|".join(sorted(matched, key=len, reverse=True))) if matched else None
        # A literal U+2581 would decode to a space; spelled in bytes it survives. None where there are no bytes.
        spelled = [pieces.get(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._underline = None if None in spelled else spelled

    def __getstate__(self):
        return self._proto, self.beside

    def __setstate__(self, state):
        self._init(*state)

    def encode(self, text: str, start: bool = False) -> list[int]:
        return self.encode_batch([text], [start])[0]

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        for t in texts:
            utf8(t)  # SentencePiece would replace what is not UTF-8 without a word
        if self._dummy_prefix and start is not None:
            texts = [" " + t if s and t else t for t, s in zip(texts, start, strict=True)]
        odd = {i for i, t in enumerate(texts) if _SPACE in t or (self._guard and self._guard.search(t))}
        out = self._sp.encode(list(texts), out_type=int)
        for i in odd:
            out[i] = spell(texts[i], self._guard, self._underline, lambda t: self._sp.encode(t, out_type=int))
        return out

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        known, out = [], []
        for i in ids:
            if 0 <= i < self.vocab_size:
                known += [i] * (i not in self._added)
            else:
                out += [self._sp.decode(known), "\ufffd"]
                known = []
        text = "".join(out) + self._sp.decode(known)
        opened = self._dummy_prefix and ids[:1] == [self.bos_id]  # BOS opens a document, hence the vocabulary's space
        return text[1:] if opened and text.startswith(" ") else text

    def special_id(self, text: str) -> int | None:
        return self.specials.get(text)

    def _copy(self, beside: hub.About) -> SentencePiece:
        new = object.__new__(SentencePiece)
        new._init(self._proto, beside)
        return new

    carrying = _copy

    def added(self, texts: Sequence[str]) -> SentencePiece:
        """A vocabulary with these special tokens after all others. The model's embedding must have rows for them."""
        more = [t for t in dict.fromkeys(texts) if t not in self.specials]
        tokens = {t: hub.Added(self.vocab_size + k, True) for k, t in enumerate(more)}
        ids = {t: a.id for t, a in {**self.beside.added, **tokens}.items()}
        files = {**self.beside.files, "added_tokens.json": hub.dumped(ids)}
        files.pop("tokenizer.json", None)
        return self._copy(dataclasses.replace(self.beside, added={**self.beside.added, **tokens}, files=files))

    def save(self, directory: str) -> None:
        hub.write(directory, self.beside, self.names, self.bos_id is not None, **self._for_transformers(directory))
        hub.put(os.path.join(directory, "spiece.model" if self.beside.sentinels else "tokenizer.model"), self._proto)

    def _for_transformers(self, directory: str) -> dict[str, str]:
        """Writes a tokenizer.json beside, where one that gives the same ids can be made; it serves any kind of model."""
        from jaxalign.data import fast

        if self.beside.files.get("tokenizer.json"):
            return {}
        if self.beside.sentinels:
            return {"tokenizer_class": "T5Tokenizer", "extra_ids": self.beside.sentinels}
        made = fast.of_sentencepiece(self._proto, self.specials, self._dummy_prefix)
        os.makedirs(directory, exist_ok=True)
        if made is None or hub.compare(self, fast.Fast(made, self.beside)):
            return {"tokenizer_class": "LlamaTokenizer"}
        hub.put(os.path.join(directory, "tokenizer.json"), made)
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def spell(text: str, guard: re.Pattern | None, underline: list[int] | None, encode: Callable[[str], list[int]]) -> list[int]:
    """Ids of a text with what ``guard`` matches cut apart, and a literal U+2581 in bytes."""
    if underline and _SPACE in text:
        first, *rest = text.split(_SPACE)
        again = lambda t: spell(t, guard, underline, encode)
        return again(first) + [i for t in rest for i in (*underline, *again(t))]
    cuts = [m.start() + 1 for m in guard.finditer(text)] if guard else []
    return [i for a, b in zip([0, *cuts], [*cuts, len(text)]) for i in encode(text[a:b])]


def utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"text holds a lone surrogate at character {e.start}, which is no Unicode; repair it") from None
