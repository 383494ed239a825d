"""Vocabularies that the `tokenizers` package runs: tokenizer.json, GPT-2's two files, tiktoken's one, BERT's vocab.txt.

Byte-level vocabularies compose as they are: every piece is its own bytes. Those made from Llama-like ones put a space
before a text (a Prepend normaliser, a Metaspace that prepends); that is taken out, and put back only where a document starts,
as `pieces.SentencePiece` does. A normaliser (NFC, lower case) stays: then it is the normalised text that comes back.

Special tokens in a text are spelled out. Other added tokens are words of the vocabulary, as its makers declared: runs of
spaces in GPT-NeoX's, <think> in Qwen's. Only those shaped like control tokens (<｜User｜>) count as special whatever is declared.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import re
from typing import Any, Mapping, Sequence

from jaxalign.data.hub import CONTROL, About, parse_json, put, resolve, write
from jaxalign.data.pieces import spell, utf8
from jaxalign.types import UserError

# How GPT-4's vocabulary, Llama 3's and Qwen's cut text into words before merging; the file does not say. (Qwen's has no
# tokens of several digits, so that it may be cut in threes makes no difference to it.)
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"


class Fast:
    """A tokenizer.json (its bytes). Raises UserError for bad files, or when nothing says which token is EOS."""

    def __init__(self, data: bytes, about: About = About(), where: str = "tokenizer.json"):
        self._state = data, about, where
        try:
            self._init(_spec(data, where), data, about, where)
        except (AttributeError, IndexError, KeyError, TypeError) as e:  # JSON, but of another shape
            raise UserError(f"{where}: not a tokenizer.json ({type(e).__name__}: {e}); fetch it again") from None

    def _init(self, spec: dict[str, Any], data: bytes, about: About, where: str):
        self._dummy_prefix = _verbatim(spec)
        for key in ("truncation", "padding"):
            spec[key] = None
        spec["model"]["dropout"] = None  # the same text has the same ids
        added = spec.setdefault("added_tokens", [])
        have = {t.get("content") for t in added}
        for text, (i, special) in sorted(about.added.items(), key=lambda a: a[1].id):
            if text not in have:
                added.append(dict(_token(text, i), special=special))
        named = set(about.names.values())
        for t in added:
            t["special"] = bool(t.get("special") or t["content"] in named or CONTROL.fullmatch(t["content"]))
        self._tok = tok = _made(spec, where)
        tok.encode_special_tokens = True
        vocab = tok.get_vocab(with_added_tokens=True)
        for t in added:
            if vocab.get(t["content"]) != t["id"]:
                raise UserError(
                    f"{where}: the added token {t['content']!r} should have id {t['id']} but gets {vocab.get(t['content'])}; "
                    "the files beside it belong to another vocabulary"
                )
        self.vocab_size = max(vocab.values()) + 1
        self.specials = {t["content"]: t["id"] for t in added if t["special"]}
        sides = {t["content"]: "l" * bool(t.get("lstrip")) + "r" * bool(t.get("rstrip")) for t in added if t["special"]}
        self.strips = {t: s for t, s in sides.items() if s}
        first = next((t for t in _first_of(spec.get("post_processor")) if t in self.specials), None)
        self.names, self.bos_id, self.eos_id, self.pad_id = resolve(about, vocab, where, vocab.get(first))
        if first and self.bos_id == vocab[first]:
            self.names.setdefault("bos_token", first)
        for name in ("bos_token", "eos_token", "pad_token"):
            if name in self.names:
                self.specials.setdefault(self.names[name], vocab[self.names[name]])
        self.chat_template = about.chat_template
        content = hashlib.sha256(data)
        content.update(json.dumps([self.specials, self.bos_id, self.eos_id, self.pad_id], sort_keys=True).encode())
        self.fingerprint = content.hexdigest()
        # No text may reach these by their names: a Unigram would take "</s>", "<unk>" and "<0x41>" for pieces like others.
        bytewise = {b: vocab.get(f"<0x{b:02X}>") for b in range(256)}
        names = {*self.specials, *(t for t in ("<unk>", about.names.get("unk_token")) if t in vocab)}
        self._guarded = {vocab[t] for t in names} | {i for i in bytewise.values() if i is not None}
        # Decoded by the run: one bad byte makes all of its neighbours unknown.
        by_run = '"ByteFallback"' in json.dumps(spec["decoder"])
        self.byte_ids = frozenset(i for i in bytewise.values() if i is not None) if by_run else frozenset()
        words = [re.escape(t) for t in sorted(names, key=len, reverse=True)] + ["<0x[0-9A-F]{2}>"]
        self._guard = re.compile("|".join(words))
        bytewise = [bytewise[b] for b in _SPACE.encode()]
        self._underline = bytewise if None not in bytewise and _SPACE in json.dumps(spec["decoder"], ensure_ascii=False) else None
        self._silent, self._known = set(self.specials.values()), set(vocab.values())

    def __getstate__(self):
        return self._state

    def __setstate__(self, state):
        self.__init__(*state)

    def encode(self, text: str, start: bool = False) -> list[int]:
        return self.encode_batch([text], [start])[0]

    def encode_batch(self, texts: Sequence[str], start: Sequence[bool] | None = None) -> list[list[int]]:
        for t in texts:
            utf8(t)
        if self._dummy_prefix and start is not None:
            texts = [" " + t if s and t else t for t, s in zip(texts, start, strict=True)]
        texts = list(texts)
        try:
            out = [e.ids for e in self._tok.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as e:  # the package raises bare Exception, as for a text that the vocabulary can not spell
            raise UserError(f"{self._state[2]}: can not encode this text ({e}); use another tokenizer") from None
        for i, t in enumerate(texts):
            forged = self._guard.search(t) and not self._guarded.isdisjoint(out[i])
            if not forged and not (self._underline and _SPACE in t):
                continue
            out[i] = spell(texts[i], self._guard, self._underline, lambda t: self._tok.encode(t, add_special_tokens=False).ids)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        known, out = [], []
        for i in ids:
            if i in self._known:
                known += [i] * (i not in self._silent)
            else:
                out += [self._tok.decode(known, skip_special_tokens=False), "\ufffd"]
                known = []
        text = "".join(out) + self._tok.decode(known, skip_special_tokens=False)
        opened = self._dummy_prefix and ids[:1] == [self.bos_id]
        return text[1:] if opened and text.startswith(" ") else text

    def special_id(self, text: str) -> int | None:
        return self.specials.get(text)

    def carrying(self, about: About) -> Fast:
        """The same vocabulary with other files beside it (another chat template)."""
        return Fast(self._state[0], about, self._state[2])

    def added(self, texts: Sequence[str]) -> Fast:
        """A vocabulary with these special tokens after all others. The model's embedding must have rows for them."""
        data, about, where = self._state
        more = {t: (self.vocab_size + k, True) for k, t in enumerate(x for x in dict.fromkeys(texts) if x not in self.specials)}
        spec = _spec(data, where)
        spec.setdefault("added_tokens", []).extend(_token(t, i) for t, (i, _) in more.items())
        files = {k: v for k, v in about.files.items() if k not in ("added_tokens.json",)}
        return Fast(json.dumps(spec, ensure_ascii=False).encode(), dataclasses.replace(about, files=files), where)

    @property
    def beside(self) -> About:
        """What stood beside the vocabulary where it was read."""
        return self._state[1]

    def save(self, directory: str) -> None:
        data, about, _ = self._state
        write(directory, about, self.names, self.bos_id is not None, tokenizer_class="PreTrainedTokenizerFast")
        put(os.path.join(directory, "tokenizer.json"), data)


def _spec(data: bytes, where: str) -> dict[str, Any]:
    try:
        spec = json.loads(data)
    except (ValueError, RecursionError):
        spec = None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{where}: not a tokenizer.json (or cut short); fetch it again")
    return spec


def _made(spec: dict[str, Any], where: str):
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{where} needs the tokenizers package; pip install tokenizers") from None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as e:  # the package raises bare Exception
        raise UserError(f"{where}: not a tokenizer.json that this version of tokenizers reads ({e})") from None


def _token(text: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, **flags, "special": True}


def _verbatim(spec: dict[str, Any]) -> bool:
    """Takes out whatever puts a space before a text, and what takes it away again. Was there something?"""
    found = split = False

    def walk(part: dict[str, Any] | None) -> dict[str, Any] | None:
        nonlocal found
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Prepend":
            found = True
            return None
        if kind == "Strip" and "strip_left" in part:  # the normaliser (decoders have one of that name): "a " + "b" is not "ab"
            return None
        if kind == "Metaspace":
            found = found or part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") != "never"
            part = {k: v for k, v in part.items() if k != "add_prefix_space"}
            return {**part, "prepend_scheme": "never"}
        if kind == "ByteLevel":
            found = found or bool(part.get("add_prefix_space"))
            return {**part, "add_prefix_space": False}
        if kind == "Sequence" and [p.get("type") for p in part.get("pretokenizers", ())] == ["WhitespaceSplit", "Metaspace"]:
            nonlocal split
            split = True  # T5's: the spaces that this throws away are told by the prefixes that are taken out here
            return walk(part["pretokenizers"][1])
        for key in ("normalizers", "pretokenizers", "decoders"):
            if key in part:
                return {**part, key: [p for p in map(walk, part[key]) if p is not None]}
        return part

    spec["normalizer"], spec["pre_tokenizer"] = walk(spec.get("normalizer")), walk(spec.get("pre_tokenizer"))
    if split:
        blank = {"type": "Replace", "pattern": {"Regex": r"\s"}, "content": " "}
        spec["normalizer"] = {"type": "Sequence", "normalizers": [*([spec["normalizer"]] if spec["normalizer"] else []), blank]}
    prefixed = found
    spec["decoder"] = walk(spec.get("decoder"))
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if prefixed and isinstance(spec["decoder"], dict) and strip in spec["decoder"].get("decoders", ()):
        spec["decoder"]["decoders"].remove(strip)
    return prefixed


def _first_of(post: Any) -> list[str]:
    """Special tokens that a post-processor puts before a text: the vocabulary's own idea of BOS."""
    if not isinstance(post, dict):
        return []
    if post.get("type") == "TemplateProcessing":
        parts = post.get("single") or [{}]
        return [t for t in (parts[0].get("SpecialToken", {}).get("id"),) if t]
    return [t for p in post.get("processors", ()) for t in _first_of(p)]


# -- other files of the same vocabularies -----------------------------------------------------------------------------


def gpt2(vocab: bytes, merges: bytes, about: About = About(), where: str = "vocab.json") -> Fast:
    """GPT-2's vocab.json and merges.txt, as byte-level BPE."""
    try:
        ids = json.loads(vocab)
        lines = merges.decode("utf-8").split("\n")
    except ValueError as e:
        raise UserError(f"{where} and merges.txt: damaged ({e}); fetch them again") from None
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise UserError(f"{where}: must be an object of token to id; fetch it again")
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    for n, p in enumerate(pairs):
        if len(p) != 2 or p[0] not in ids or p[1] not in ids or "".join(p) not in ids:
            raise UserError(f"merges.txt: merge {n + 1}, {' '.join(p)!r}, is not of this vocabulary; fetch both files again")
    special = {t: i for t, i in ids.items() if CONTROL.fullmatch(t) or t in about.names.values()}
    return Fast(_bpe(ids, pairs, special, None), about, where)


_BERTS = re.compile(r"|bert|distilbert|electra|mobilebert|PreTrainedTokenizer|((Distil|Mobile|Conv|Squeeze|Retri)?Bert|Electra|Lxmert|LayoutLM|DPR\w*)Tokenizer")
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def wordpiece(vocab: bytes, about: About = About(), where: str = "vocab.txt") -> Fast:
    """BERT's vocab.txt, a token a line: [CLS] is its BOS, [SEP] its EOS; `names` knows "mask_token".

    Words are what stands between spaces and punctuation, so a text does not come back as it was: lower-cased and without
    accents (where tokenizer_config.json says so, and by default), unknown words gone, single spaces where there were any or
    none. ``encode(a) + encode(b)`` is ``encode(a + b)`` where a ends, or b begins, with a space or punctuation; elsewhere b
    begins a new word. So prompt and completion stay the tokens that they are, but train causal models on other vocabularies.
    """
    config = parse_json(about.files.get("tokenizer_config.json", b"{}"), where)
    try:
        lines = vocab.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; fetch it again") from None
    ids = {t: i for i, t in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    names = {**_BERT, **about.names}
    if not _BERTS.fullmatch(about.kind) or names["unk_token"] not in ids:
        why = f"has no {names['unk_token']!r}" if _BERTS.fullmatch(about.kind) else f"is {about.kind}'s, which cuts words otherwise than BERT"
        raise UserError(f"{where}: {why}; save a tokenizer.json beside it with transformers")
    names = {k: t for k, t in names.items() if t in ids or k not in _BERT}
    special = {t: ids[t] for t in names.values() if t in ids}
    flag = lambda key, default: default if not isinstance(config.get(key), bool) else config[key]
    opens, closes = names.get("cls_token"), names.get("sep_token")
    part = lambda t: {"SpecialToken": {"id": t, "type_id": 0}}
    text = lambda k: {"Sequence": {"id": k, "type_id": 0}}
    post = {
        "type": "TemplateProcessing", "single": [part(opens), text("A"), part(closes)], "pair": [part(opens), text("A"), part(closes), text("B"), part(closes)],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (opens, closes) if t},
    }  # fmt: skip
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [_token(t, i) for t, i in sorted(special.items(), key=lambda s: s[1])],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": flag("tokenize_chinese_chars", True),
            "strip_accents": flag("strip_accents", None), "lowercase": flag("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": post if opens and closes else None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", "unk_token": names["unk_token"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": ids},
    }  # fmt: skip
    return Fast(json.dumps(spec, ensure_ascii=False).encode(), dataclasses.replace(about, names=names), where)


def tiktoken(
    path: str, specials: Mapping[str, int] = {}, about: About = About(), pattern: str = TIKTOKEN_PATTERN
) -> Fast:
    """A tiktoken file: base64 token and rank a line. Neither the special tokens nor the pattern stand in it: ``specials``
    {"<|endoftext|>": 100257}, besides those that ``about`` adds; ``pattern`` is that of GPT-4, Llama 3 and Qwen unless given.
    """
    ranks: dict[bytes, int] = {}
    try:
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}; give the path of a .tiktoken file") from None
    except (ValueError, binascii.Error):
        raise UserError(f"{path}:{n}: not 'base64 rank'; this is no tiktoken file, or a damaged one") from None
    letters = _letters()
    word = lambda token: "".join(letters[b] for b in token)
    pairs = [(r, p) for t, r in ranks.items() if len(t) > 1 and (p := _pair(t, ranks))]
    merges = [[word(a), word(b)] for _, (a, b) in sorted(pairs)]
    special = {**{t: a.id for t, a in about.added.items() if a.special}, **specials}
    return Fast(_bpe({word(t): r for t, r in ranks.items()}, merges, special, pattern), about, path)


def _pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts a token is merged from: what is left of its bytes when every merge of a lower rank is done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, 1 << 62), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= ranks[token]:
            return None  # reached by no merge: only a whole word can be this token
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _bpe(vocab: Mapping[str, int], merges: list, special: Mapping[str, int], pattern: str | None) -> bytes:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    words = level if pattern is None else {"type": "Sequence", "pretokenizers": [split, level]}
    # tiktoken takes a word that is in the vocabulary whole, merges or not.
    model = {"type": "BPE", "vocab": dict(vocab), "merges": merges, "ignore_merges": pattern is not None}
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [_token(t, i) for t, i in sorted(special.items(), key=lambda s: s[1])],
        "normalizer": None, "pre_tokenizer": words, "post_processor": None, "decoder": level, "model": model,
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False).encode()


def _letters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: its own where it has one, else the next free."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    free = iter(range(256, 512))
    return [chr(b) if b in own else chr(next(free)) for b in range(256)]


def of_sentencepiece(proto: bytes, specials: Mapping[str, int], dummy_prefix: bool) -> bytes | None:
    """A SentencePiece model as a tokenizer.json, for programs that read only those; None where it has no equal there."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
    n = sp.vocab_size()
    pieces = [sp.id_to_piece(i) for i in range(n)]
    if sp.unk_id() < 0 or "<0x00>" not in pieces:
        return None
    vocab, score = {p: i for i, p in enumerate(pieces)}, sp.get_score
    unigram = any(score(i) != round(score(i)) for i in range(n))  # BPE's scores are minus the rank of the merge
    if unigram:
        plain = lambda i: not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
        least = min((score(i) for i in range(n) if plain(i)), default=0.0) - 10.0
        model = {"type": "Unigram", "unk_id": sp.unk_id(), "vocab": [[p, score(i) if plain(i) else least] for i, p in enumerate(pieces)], "byte_fallback": True}
    else:
        merges = []
        for i, p in enumerate(pieces):
            halves = ((p[:k], p[k:]) for k in range(1, len(p))) if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i)) else ()
            merges += [(-score(i), vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        merges = [[a, b] for *_, a, b in sorted(merges)]
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": pieces[sp.unk_id()], "fuse_unk": True, "byte_fallback": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] * dummy_prefix
    decoders = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * dummy_prefix
    bos = sp.id_to_piece(sp.bos_id()) if sp.bos_id() >= 0 else None
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}},
    }  # fmt: skip
    spec = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [_token(t, i) for t, i in sorted(specials.items(), key=lambda s: s[1])],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, space]}, "pre_tokenizer": None,
        "post_processor": post if bos else None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
    }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False).encode()
