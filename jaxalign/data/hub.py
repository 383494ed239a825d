"""What a Hub directory says about its vocabulary: names of special tokens, added tokens, the chat template.

Read once, carried by the tokenizer, and written again by `save`, so that an export holds what was imported.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import zlib
from typing import Any, Mapping, NamedTuple, Sequence

from jaxalign.types import UserError

# What control tokens look like in the wild: <|im_end|>, <｜User｜>, [INST], <start_of_turn>. Some vocabularies declare them
# as ordinary added tokens; whoever could write them in a message could still forge a turn.
CONTROL = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]|<(start|end)_of_\w+>", re.DOTALL)
_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>")
_CARRIED = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_T5 = ("t5", "longt5", "switch_transformers")  # mT5 and UMT5 have their sentinels in the .model
UNPACKED = 256 << 20  # the largest published tokenizer.json has 35 MB; a gzip file of a few kB may hold any amount


class Added(NamedTuple):
    id: int
    special: bool


@dataclasses.dataclass(frozen=True)
class About:
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {"bos_token": "<s>", ...}, for templates too
    added: Mapping[str, Added] = dataclasses.field(default_factory=dict)
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)  # {"eos_token": 2}: config.json, where no name is given
    add_bos: bool | None = None  # None: not said
    chat_template: str | None = None
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # as they were, to be saved again
    kind: str = ""  # the class of transformers that reads it, or the kind of model
    sentinels: int = 0  # T5's <extra_id_N>, which its .model does not hold


def read_bytes(path: str) -> bytes | None:
    """Contents of a file or of its .gz, None where there is neither."""
    for p in (path, path + ".gz"):
        try:
            with gzip.open(p) if p.endswith(".gz") else open(p, "rb") as f:
                data = f.read(UNPACKED + 1 if p.endswith(".gz") else -1)
        except FileNotFoundError:
            continue
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{p}: {getattr(e, 'strerror', None) or e}; fetch the file again") from None
        if len(data) > UNPACKED:
            raise UserError(f"{p}: more than {UNPACKED >> 20} MiB once unpacked, which no vocabulary needs; fetch the file again, from where you trust it")
        return data
    return None


def parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: no JSON, or cut short ({e}); fetch the file again") from None


def about(directory: str) -> About:
    """Everything beside the vocabulary itself. Raises UserError for a damaged file."""
    found = {f: read_bytes(os.path.join(directory, f)) for f in (*_CARRIED, "chat_template.json", "config.json")}
    docs = {f: parse_json(d, os.path.join(directory, f)) for f, d in found.items() if d and f.endswith(".json")}
    for f, d in docs.items():
        if not isinstance(d, dict):
            raise UserError(f"{os.path.join(directory, f)}: must be an object; fetch the file again")
    config = docs.get("tokenizer_config.json", {})
    names = _names(docs.get("special_tokens_map.json", {})) | _names(config)
    added = {t: Added(i, True) for t, i in docs.get("added_tokens.json", {}).items() if isinstance(i, int)}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and str(i).isdigit():
            added[token["content"]] = Added(int(i), bool(token.get("special")))
    template = found["chat_template.jinja"]
    if template is not None:
        template = _text(template, os.path.join(directory, "chat_template.jinja"))
    else:
        template = _chosen(config.get("chat_template")) or _chosen(docs.get("chat_template.json", {}).get("chat_template"))
    ids = {}
    for k in ("bos", "eos", "pad"):
        value = docs.get("config.json", {}).get(f"{k}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            ids[f"{k}_token"] = value
    bos = config.get("add_bos_token")
    if bos is None and "Llama" in str(config.get("tokenizer_class")):
        bos = True  # those classes put one where their config says nothing
    carried = {f: found[f] for f in _CARRIED if found[f] is not None}
    model = str(docs.get("config.json", {}).get("model_type") or "")
    kind = str(config.get("tokenizer_class") or ("T5Tokenizer" if model in _T5 else model)).removesuffix("Fast")
    sentinels = config.get("extra_ids", 100) if kind in ("T5Tokenizer", "MT5Tokenizer") else 0
    if not isinstance(sentinels, int):
        raise UserError(f"{os.path.join(directory, 'tokenizer_config.json')}: extra_ids {sentinels!r} is no number; fetch the file again")
    return About(names, added, ids, bos if isinstance(bos, bool) else None, template, carried, kind, sentinels)


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for k, v in config.items():
        v = v.get("content") if isinstance(v, dict) else v
        if k.endswith("_token") and isinstance(v, str) and v:
            out[k] = v
    return out


def _chosen(template: Any) -> str | None:
    """One of several named templates is the one called default."""
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template if isinstance(template, str) else None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8; convert it") from None


def resolve(a: About, ids: Mapping[str, int], where: str, bos: int | None = None) -> tuple[dict[str, str], int | None, int, int]:
    """(names, bos_id, eos_id, pad_id) of a vocabulary. ids: its tokens; bos: what it says itself.

    Raises UserError where nothing says which token is EOS.
    """
    tokens = {i: t for t, i in ids.items()}
    if a.names.get("eos_token", "") not in ids and "eos_token" in a.names:
        raise UserError(f"{where}: the vocabulary has no {a.names['eos_token']!r}, which the files beside it name as EOS; they belong to another")
    names = {k: tokens[i] for k, i in a.ids.items() if i in tokens} | {k: t for k, t in a.names.items() if t in ids}
    if "eos_token" not in names:
        eos = next((t for t in _EOS if t in ids), None) or names.get("sep_token")
        if eos is None:
            raise UserError(
                f"{where}: nothing says which token is EOS, so a model could never stop; name it in a tokenizer_config.json "
                'beside it: {"eos_token": "..."}'
            )
        names["eos_token"] = eos
        if eos == names.get("sep_token") and "cls_token" in names:  # BERT's: what closes and what opens a text
            names.setdefault("bos_token", names["cls_token"])
    if a.add_bos and "bos_token" in names:
        bos = ids[names["bos_token"]]
    eos = ids[names["eos_token"]]
    return names, None if a.add_bos is False else bos, eos, ids.get(names.get("pad_token", ""), eos)


def write(directory: str, a: About, names: Mapping[str, str], bos: bool, **more: Any) -> None:
    """The files beside a vocabulary, such that transformers reads the same tokens, BOS and template from them."""
    os.makedirs(directory, exist_ok=True)
    files = dict(a.files)
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    for k, v in more.items():
        config.setdefault(k, v)
    config.setdefault("clean_up_tokenization_spaces", False)
    config.setdefault("add_bos_token", bos)
    config.update({k: v for k, v in names.items() if not config.get(k)})
    if a.chat_template and "chat_template.jinja" not in files and _chosen(config.get("chat_template")) != a.chat_template:
        config.pop("chat_template", None)
        files["chat_template.jinja"] = a.chat_template.encode()
    files["tokenizer_config.json"] = dumped(config)
    files.setdefault("special_tokens_map.json", dumped(names))
    for name, data in files.items():
        put(os.path.join(directory, name), data)


def put(path: str, data: bytes) -> None:
    """A kill here must not leave half a file under its name."""
    with open(f"{path}.{os.getpid()}.tmp", "wb") as f:
        f.write(data)
    os.replace(f.name, path)


def dumped(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def with_template(a: About, template: str) -> About:
    """The same with another chat template, as `save` will write it."""
    files = {k: v for k, v in a.files.items() if k != "chat_template.jinja"}
    return dataclasses.replace(a, chat_template=template, files=files)


# What tells two implementations of a vocabulary apart: scripts, spaces, digits, code, emoji, normalisation, odd characters.
CORPUS = (
    "Hello world!", " leading", "trailing ", "two  spaces   three    four", "a\nb\n\nc\ttab\r\n", "\n", " ", "  \n  x",
    "1234567890 3.14159 -42 1,000,000", "don't can't it's I'll WE'VE", "naïve café déjà vu", "e\u0301 combining",
    "日本語のテキスト", "你好,世界。", "한국어 문장입니다", "Привет, мир", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก",
    "Γειά σου Κόσμε", "Tiếng Việt có dấu", "😀👍🏽 family: 👨\u200d👩\u200d👧", "def f(x):\n    return x**2  # square",
    '{"key": [1, 2.5, null], "b": "\\n"}', "<div class='x'>&amp;</div>", "https://example.org/a?b=c&d=%20e", "snake_case CamelCase ALLCAPS",
    "$\\frac{a}{b} = \\boxed{42}$", "\xa0nbsp\u200bzwsp\u3000wide", "ﬁ ligature ½ ① Ⅷ", "x" * 40, "…—–“quoted”‘s’", "\u2581 underline", "<s> </s> <unk> <0x41>",
)  # fmt: skip


class Difference(NamedTuple):
    text: str
    first: list[int]
    second: list[int]


def compare(first, second, texts: Sequence[str] = CORPUS) -> list[Difference]:
    """Where two tokenizers of one vocabulary (a directory's tokenizer.model and its tokenizer.json) give other ids, or a
    text that does not come back alike. Empty: none found."""
    out = []
    for text in texts:
        for start in (False, True):
            a, b = first.encode(text, start), second.encode(text, start)
            if a != b or first.decode(a) != second.decode(a):
                out.append(Difference(text, a, b))
                break
    return out
