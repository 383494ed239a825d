"""Text <-> token ids.

Every tokenizer here composes: ``encode(a) + encode(b)`` decodes to ``a + b``. That is what lets a prompt and its
completion be tokenised apart, so that the prompt the trainer sees is the prompt the sampler saw, token by token.

Text is only ever text: ``encode("<|im_end|>")`` spells the characters out, even where the vocabulary has such a token.
Special tokens come from templates, by `special_id`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from typing import Iterable, Protocol, Sequence

from jaxalign.types import UserError


class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int  # may equal eos_id: masks go by position, never by id
    fingerprint: str  # SHA-256 of the content, hex

    def encode(self, text: str, start: bool = False) -> list[int]:
        """Ids of the text, no special tokens. ``start``: the text opens a document (only matters to vocabularies
        that were trained with a space before every document, as Llama's and Mistral's were)."""

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        """`encode` of many texts, faster."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens say nothing, ids that no token has (a padded embedding) read U+FFFD."""

    def special_id(self, text: str) -> int | None:
        """Id of a special token such as "<|im_end|>", None where the vocabulary has none of that name."""

    def save(self, directory: str) -> None:
        """Writes what `load(directory)` needs."""


class Bytes:
    """UTF-8 bytes, then BOS, EOS and PAD. Nothing to train, nothing it cannot spell."""

    bos_id, eos_id, pad_id, vocab_size = 256, 257, 258, 259
    fingerprint = hashlib.sha256(b"jaxalign bytes 259").hexdigest()

    def encode(self, text: str, start: bool = False) -> list[int]:
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        return [list(_utf8(t)) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos_id, self.eos_id, self.pad_id)
        return b"".join(bytes([i]) if 0 <= i < 256 else b"" if i in special else b"\xff" for i in ids).decode(
            "utf-8", "replace"
        )

    def special_id(self, text: str) -> int | None:
        return None

    def save(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, "tokenizer.bytes"), "w", encoding="utf-8") as f:
            f.write("jaxalign.data.tokenizers.Bytes\n")


_SPECIAL = re.compile(r"<\|.*\|>|\[/?[A-Z_]+\]|<(start|end)_of_\w+>")  # what chat formats look like in the wild
_SPACE = "\u2581"  # SentencePiece's own spelling of a space

# A serialised protobuf is merged by concatenation. This says: normalizer_spec { add_dummy_prefix: false,
# remove_extra_whitespaces: false }. Without it "world" after "Hello " would get a second space, and " world" none.
_VERBATIM = b"\x1a\x04\x18\x00\x20\x00"


class SentencePiece:
    """A SentencePiece ``.model``: ours (`train_sentencepiece`) or a published one.

    Raises UserError when the file is missing, no model, or has no EOS.
    """

    def __init__(self, path: str):
        try:
            with open(path, "rb") as f:
                self._init(f.read())
        except OSError as e:
            raise UserError(f"{path}: {e.strerror or e}; give the path of a SentencePiece .model file") from None
        except (RuntimeError, TypeError):
            raise UserError(f"{path}: not a SentencePiece model (or cut short); fetch or train it again") from None
        if self.eos_id < 0:
            raise UserError(f"{path}: the vocabulary has no EOS, so a model could never stop; use one that has")

    def _init(self, proto: bytes):
        import sentencepiece

        published = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=proto + _VERBATIM)
        self._proto = proto
        self._dummy_prefix = published.encode("a") != sp.encode("a")
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        self.vocab_size = sp.vocab_size()
        self.eos_id = sp.eos_id()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        pieces = {sp.id_to_piece(i): i for i in range(self.vocab_size)}
        self._special = {p: i for p, i in pieces.items() if sp.is_control(i) or _SPECIAL.fullmatch(p)}
        # Control pieces never match text, but "user defined" ones do: those we cut apart before SentencePiece looks.
        matched = [re.escape(p) for p, i in self._special.items() if not sp.is_control(i)]
        self._guard = re.compile("|".join(sorted(matched, key=len, reverse=True))) if matched else None
        # A literal U+2581 would decode to a space; spelled in bytes it survives. None where there are no bytes.
        spelled = [pieces.get(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._underline = None if None in spelled else spelled

    def __getstate__(self):
        return self._proto

    def __setstate__(self, proto):
        self._init(proto)

    def encode(self, text: str, start: bool = False) -> list[int]:
        return self.encode_batch([text], [start])[0]

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        for t in texts:
            _utf8(t)  # SentencePiece would replace what is not UTF-8 without a word
        if self._dummy_prefix and start is not None:
            texts = [" " + t if s else t for t, s in zip(texts, start, strict=True)]
        odd = {i for i, t in enumerate(texts) if _SPACE in t or (self._guard and self._guard.search(t))}
        out = self._sp.encode([t for t in texts if t is not None], out_type=int)
        for i in odd:
            out[i] = self._spell(texts[i])
        return out

    def _spell(self, text: str) -> list[int]:
        if self._underline and _SPACE in text:
            first, *rest = text.split(_SPACE)
            return self._spell(first) + [i for t in rest for i in (*self._underline, *self._spell(t))]
        cuts = [m.start() + 1 for m in self._guard.finditer(text)] if self._guard else []
        return [i for a, b in zip([0, *cuts], [*cuts, len(text)]) for i in self._sp.encode(text[a:b], out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        known, out = [], []
        for i in ids:
            if 0 <= i < self.vocab_size:
                known.append(i)
            else:
                out += [self._sp.decode(known), "\ufffd"]
                known = []
        text = "".join(out) + self._sp.decode(known)
        opened = self._dummy_prefix and ids[:1] == [self.bos_id]  # BOS opens a document, hence the vocabulary's space
        return text[1:] if opened and text.startswith(" ") else text

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def save(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, "tokenizer.model")
        with open(f"{path}.{os.getpid()}.tmp", "wb") as f:  # a kill here must not leave half a vocabulary under its name
            f.write(self._proto)
        os.replace(f.name, path)


def train_sentencepiece(
    texts: Iterable[str],
    path: str,
    vocab_size: int,
    model_type: str = "unigram",
    *,
    split_digits: bool = True,
    character_coverage: float = 0.9995,
    specials: Sequence[str] = (),
) -> SentencePiece:
    """Trains a vocabulary and writes it to ``path``. The same texts in the same order give the same bytes.

    Ids 0..3 are PAD, UNK, BOS, EOS, then ``specials`` (e.g. "<|im_start|>"), then 256 bytes: nothing is unknown, and no
    text is normalised, so decode(encode(text)) == text for every text, whitespace included. ``split_digits`` gives each
    digit its own token, which arithmetic is learned more easily with.

    Raises UserError when the texts are empty or cannot fill (or fit) ``vocab_size``.
    """
    import sentencepiece

    if model_type not in ("unigram", "bpe"):
        raise UserError(f"model_type {model_type!r}: use 'unigram' or 'bpe'")
    least = 4 + len(specials) + 256
    if vocab_size <= least:
        raise UserError(f"vocab_size {vocab_size}: {least} ids go to specials and bytes; use at least {least + 64}")
    model = io.BytesIO()  # a file name would end up in the model, and in its fingerprint
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=split_digits,
            character_coverage=character_coverage,
            control_symbols=list(specials),
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,  # threads add floats in their own order, and then two runs differ
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e)
        if "too high" in reason:
            most = re.search(r"<= (\d+)", reason)
            remedy = f"use at most {most[1]}, or more text" if most else "use a smaller one, or more text"
            raise UserError(f"vocab_size {vocab_size} is more than the texts can fill; {remedy}") from None
        if "smaller than required_chars" in reason:
            need = re.search(r"\d+ vs (\d+)", reason)
            raise UserError(
                f"vocab_size {vocab_size} does not hold the characters of the texts ({need[1] if need else 'more'} "
                "ids needed); use a larger one, or a lower character_coverage (the rest is spelled in bytes)"
            ) from None
        if "sentences_.empty()" in reason:
            raise UserError("no text to train a vocabulary on; check the files given") from None
        raise UserError(f"SentencePiece could not train: {reason}") from None
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "wb") as f:
        f.write(model.getvalue())
    return SentencePiece(path)


def load(spec: str) -> Tokenizer:
    """"bytes", a SentencePiece .model file, or a directory that `Tokenizer.save` wrote.

    Raises UserError when there is nothing of the kind.
    """
    if spec == "bytes":
        return Bytes()
    if os.path.isdir(spec):
        if os.path.exists(os.path.join(spec, "tokenizer.model")):
            return SentencePiece(os.path.join(spec, "tokenizer.model"))
        if os.path.exists(os.path.join(spec, "tokenizer.bytes")):
            return Bytes()
        raise UserError(f"{spec}: holds no tokenizer.model; give 'bytes', a .model file, or a directory with one")
    return SentencePiece(spec)


def _sentences(texts: Iterable[str]):
    """Lines of at most 1,000 characters: the trainer silently skips longer ones (4,192 bytes)."""
    for text in texts:
        _utf8(text)
        for line in text.splitlines():
            for i in range(0, len(line), 1000):
                yield line[i : i + 1000]


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"text holds a lone surrogate at character {e.start}, which is no Unicode; repair it") from None
