"""Text <-> token ids.

Every tokenizer here composes: ``encode(a) + encode(b)`` decodes to ``a + b``. That is what lets a prompt and its
completion be tokenised apart, so that the prompt the trainer sees is the prompt the sampler saw, token by token.

Text is only ever text: ``encode("<|im_end|>")`` spells the characters out, even where the vocabulary has such a token.
Special tokens come from templates, by `special_id`; `encode_with_specials` is for text that is known to be a template's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import re
from typing import Iterable, Mapping, Protocol, Sequence

from jaxalign.data import hub
from jaxalign.data.pieces import SentencePiece, utf8
from jaxalign.types import UserError


class Tokenizer(Protocol):
    vocab_size: int
    bos_id: int | None  # opens every document; None where the vocabulary has, or wants, none
    eos_id: int
    pad_id: int  # may equal eos_id: masks go by position, never by id
    fingerprint: str  # SHA-256 of the content, hex
    specials: Mapping[str, int]  # special tokens by their text: what templates may write and texts may not
    names: Mapping[str, str]  # {"bos_token": "<s>", "eos_token": "</s>", ...}, as templates know them
    chat_template: str | None  # the Jinja source that came with it

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
    specials = {"<s>": 256, "</s>": 257, "<pad>": 258}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    chat_template = None

    def encode(self, text: str, start: bool = False) -> list[int]:
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        return [list(utf8(t)) for t in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos_id, self.eos_id, self.pad_id)
        return b"".join(bytes([i]) if 0 <= i < 256 else b"" if i in special else b"\xff" for i in ids).decode(
            "utf-8", "replace"
        )

    def special_id(self, text: str) -> int | None:
        return self.specials.get(text)

    def save(self, directory: str) -> None:
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, "tokenizer.bytes"), "w", encoding="utf-8") as f:
            f.write("jaxalign.data.tokenizers.Bytes\n")


def encode_with_specials(tokenizer: Tokenizer, text: str, start: bool = False) -> list[int]:
    """Ids of a text in which special tokens mean themselves: only for text that a template wrote, never for a user's."""
    out: list[int] = []
    for k, part in enumerate(stripped(cut(text, tokenizer.specials), tokenizer.specials, strips(tokenizer))):
        special = tokenizer.special_id(part)
        out += tokenizer.encode(part, start and k == 0) if special is None else [special]
    return out


def strips(tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens that swallow the blanks before them ("l"), after them ("r") or both, as Phi-3's do."""
    return getattr(tokenizer, "strips", {})


def stripped(parts: Sequence[str], specials: Iterable[str], strips: Mapping[str, str]) -> list[str]:
    """The parts of a text (see `cut`), less the blanks that the special tokens among them swallow."""
    if not strips:
        return list(parts)
    out = list(parts)
    for step, side, strip in ((1, "r", str.lstrip), (-1, "l", str.rstrip)):
        swallows = False
        for i in range(len(out))[::step]:
            if out[i] in specials:
                swallows = side in strips.get(out[i], "")
            elif swallows:
                out[i] = strip(out[i])
                swallows = not out[i]
    return out


def decode_with_specials(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of the ids with special tokens written out, for people to read."""
    texts = {i: t for t, i in tokenizer.specials.items()}
    out, known = "", []
    for i in map(int, ids):
        if i in texts:
            out, known = out + tokenizer.decode(known) + texts[i], []
        else:
            known.append(i)
    return out + tokenizer.decode(known)


def cut(text: str, words: Iterable[str]) -> list[str]:
    """The text in parts, such that each of the words found in it (the longest first) is a part of its own."""
    words = tuple(words)
    return [p for p in (_any_of(words).split(text) if words else [text]) if p]


@functools.lru_cache(16)
def _any_of(words: tuple[str, ...]) -> re.Pattern:
    return re.compile("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")")


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


_LATER = ("spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.txt.gz")  # read where there is nothing better
_AS_IT_STANDS = ("", "T5Tokenizer", "MT5Tokenizer", "mt5", "umt5", "LlamaTokenizer", "PreTrainedTokenizer")


def load(spec: str) -> Tokenizer:
    """"bytes"; a SentencePiece .model, a tokenizer.json or a .tiktoken file (or its .gz); or a directory, as `save` or the
    Hub has it.

    Of several vocabularies in a directory the first is taken: tokenizer.model, tokenizer.json, vocab.json with merges.txt,
    *.tiktoken, spiece.model, vocab.txt. (A tokenizer.json beside a tokenizer.model was made from it; `differences` says whether they still agree. It
    is taken where tokens were added to the vocabulary, which a .model can not hold.) What tokenizer_config.json,
    special_tokens_map.json, added_tokens.json and chat_template.jinja say is read with it.

    Raises UserError when there is nothing of the kind, or it is damaged.
    """
    if spec == "bytes":
        return Bytes()
    if not os.path.isdir(spec):
        return _file(spec, hub.about(os.path.dirname(spec)) if spec.endswith((".json", ".gz", ".tiktoken", "tokenizer.model", *_LATER)) else hub.About())
    beside, names = hub.about(spec), sorted(os.listdir(spec))
    wanted = ["tokenizer.model", "tokenizer.json", "tokenizer.json.gz", "vocab.json", "vocab.json.gz"]
    wanted += [n for n in names if n.endswith(".tiktoken")] + [*_LATER]
    for name in wanted:
        if name in names and not (name.startswith("vocab.json") and hub.read_bytes(os.path.join(spec, "merges.txt")) is None):
            return _file(os.path.join(spec, name), beside)
    if "tokenizer.bytes" in names:
        return Bytes()
    raise UserError(
        f"{spec}: holds no tokenizer.model, tokenizer.json, vocab.json with merges.txt, .tiktoken file, spiece.model or vocab.txt; give 'bytes', one of "
        "these files, or a directory with one"
    )


def differences(directory: str) -> list[hub.Difference]:
    """Where a directory's tokenizer.model and tokenizer.json part; empty where they agree, or where there are not both."""
    paths = [os.path.join(directory, f) for f in ("tokenizer.model", "tokenizer.json")]
    if not os.path.exists(paths[0]) or hub.read_bytes(paths[1]) is None or _is_tiktoken(paths[0]):
        return []
    beside = hub.about(directory)
    return hub.compare(SentencePiece(paths[0], beside), _file(paths[1], beside))


def _file(path: str, beside: hub.About) -> Tokenizer:
    from jaxalign.data import fast

    stem = path.removesuffix(".gz")
    name = os.path.basename(stem)
    if name == "vocab.json":
        merges = hub.read_bytes(os.path.join(os.path.dirname(path), "merges.txt"))
        return fast.gpt2(hub.read_bytes(stem) or b"", merges or b"", beside, path)
    if name.endswith(".json"):
        data = hub.read_bytes(stem)
        if data is None:
            raise UserError(f"{path}: No such file; give the path of a tokenizer.json")
        return fast.Fast(data, beside, path)
    if name == "vocab.txt":
        data = hub.read_bytes(stem)
        if data is None:
            raise UserError(f"{path}: No such file; give the path of a vocab.txt")
        return fast.wordpiece(data, beside, path)
    if name == "sentencepiece.bpe.model" or name == "spiece.model" and beside.kind not in _AS_IT_STANDS:
        why = f"{beside.kind or 'XLM-R and its relatives'} give other ids than this file, or write the text otherwise first"
        raise UserError(f"{path}: {why}; save a tokenizer.json beside it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))")
    if name.endswith(".tiktoken") or _is_tiktoken(path):
        return fast.tiktoken(path, about=beside)
    if name != "tokenizer.model":
        return SentencePiece(path, beside)
    there = os.path.join(os.path.dirname(path), "tokenizer.json")
    data = hub.read_bytes(there)
    beside = dataclasses.replace(beside, files={**beside.files, **({"tokenizer.json": data} if data else {})})
    made = SentencePiece(path, beside)
    return fast.Fast(data, beside, there) if data and made.vocab_size > made.published.vocab_size() else made


def _is_tiktoken(path: str) -> bool:
    """Llama 3 publishes such a file under the name tokenizer.model."""
    try:
        with open(path, "rb") as f:
            return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", f.read(400)) is not None
    except OSError:
        return False


def _sentences(texts: Iterable[str]):
    """Lines of at most 1,000 characters: the trainer silently skips longer ones (4,192 bytes)."""
    for text in texts:
        utf8(text)
        for line in text.splitlines():
            for i in range(0, len(line), 1000):
                yield line[i : i + 1000]
