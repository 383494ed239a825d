"""Files -> rows. A row that cannot be read is refused with file, line, reason and remedy, or skipped and counted.

What is read: ``.jsonl`` (one object a line), ``.json`` (a list of objects) and ``.txt``, each also as ``.gz``.
Rows are parsed one by one: no type is inferred from other rows. Files are UTF-8; a byte-order mark at the start is
dropped, blank lines and the last newline do not count, CRLF is read as LF. Refused: other encodings, NUL, lone
surrogates, duplicate keys, NaN and Infinity, rows above ``max_row_bytes``, absurd nesting, empty files, cut-short gzip.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import math
import os
import zlib
from typing import Any, Callable, Iterable, Iterator, Sequence

from jaxalign.types import UserError

MAX_FILE = 1 << 30  # a .json list, or text split at a separator, is read whole: about 1 GB at most
_SUFFIXES = (".jsonl", ".json", ".txt")


class Rows:
    """An iterable of (record, "file:line"), read anew by each pass.

    counts       {"rows": seen, "skipped": refused by policy} of the latest pass
    errors       the first 20 of those refusals, as text
    fingerprint  SHA-256 over the contents (not the names) of the files, and how text is split
    """

    def __init__(
        self,
        passes: Callable[[Rows], Iterator[tuple[Any, str]]],
        fingerprint: str,
        *,
        on_bad_row: str = "error",
        max_bad_fraction: float = 0.01,
        quarantine: str | None = None,
    ):
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row {on_bad_row!r}: use 'error' or 'skip'")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction {max_bad_fraction}: use a number between 0 and 1")
        self._passes, self.fingerprint = passes, fingerprint
        self._policy, self._max_bad, self._quarantine = on_bad_row, max_bad_fraction, quarantine
        self.counts, self.errors = {"rows": 0, "skipped": 0}, []

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        self.counts, self.errors = {"rows": 0, "skipped": 0}, []
        if self._quarantine:
            open(self._quarantine, "w").close()
        for record, where in self._passes(self):
            self.counts["rows"] += 1
            yield record, where
        self.settle()

    def refuse(self, error: UserError, row: Any = None, seen: bool = True) -> None:
        """Applies the policy to a bad row: raises the error, or counts it and puts the row in quarantine.

        ``seen``: the row was yielded before it proved bad (a reader of ours says False).
        """
        if self._policy == "error":
            raise error
        self.counts["rows"] += not seen
        self.counts["skipped"] += 1
        if len(self.errors) < 20:
            self.errors.append(str(error))
        if self._quarantine:
            text = row.decode("utf-8", "backslashreplace") if isinstance(row, bytes) else row
            with open(self._quarantine, "a", encoding="utf-8") as f:
                f.write(json.dumps({"error": str(error), "row": text}, default=repr) + "\n")

    def settle(self) -> None:
        """Raises UserError when nothing is left, or more than ``max_bad_fraction`` was skipped."""
        rows, skipped = self.counts["rows"], self.counts["skipped"]
        if rows == skipped:
            raise UserError("the data set holds no usable row" + "".join(f"\n  {e}" for e in self.errors[:5]))
        if skipped > self._max_bad * rows:
            raise UserError(
                f"{skipped} of {rows} rows are bad, more than max_bad_fraction={self._max_bad:g} allows; mend them or "
                "raise the limit. The first:" + "".join(f"\n  {e}" for e in self.errors[:5])
            )


def read(
    paths: str | Sequence[str],
    *,
    on_bad_row: str = "error",
    max_bad_fraction: float = 0.01,
    max_row_bytes: int = 16 << 20,
    text_split: str = "blank",
    quarantine: str | None = None,
) -> Rows:
    """Rows of one or several files (globs allowed; files of a glob in name order).

    ``on_bad_row``: "error" stops at the first bad row; "skip" leaves it out, counts it, writes it to the file
    ``quarantine`` if given, and stops after the pass if there were more than ``max_bad_fraction``. A damaged file (cut
    gzip, a .json that does not parse, an empty file) always stops.
    ``text_split`` makes documents of .txt files: at "blank" lines, one per "line", the whole "file", or at any other
    string, such as "<|endoftext|>" (documents lose the blank space around them, then).

    Raises UserError when a pattern matches no file; rows are only read by iterating.
    """
    files: list[str] = []
    for pattern in [paths] if isinstance(paths, (str, os.PathLike)) else list(paths):
        pattern = os.fspath(pattern)
        found = [pattern] if os.path.isfile(pattern) else sorted(f for f in glob.glob(pattern) if os.path.isfile(f))
        if not found:
            what = "is a directory" if os.path.isdir(pattern) else "no such file"
            raise UserError(f"{pattern}: {what}; give a file or a pattern such as 'data/*.jsonl'")
        files += found
    if not files:
        raise UserError("no data file given")
    digest = hashlib.sha256(text_split.encode())
    for path in files:
        if _suffix(path) not in _SUFFIXES:
            raise UserError(f"{path}: can not read this kind; use .jsonl, .json or .txt (or these with .gz)")
        with _opened(path, compressed=True) as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())

    def passes(rows: Rows):
        for path in files:
            before = rows.counts["rows"]
            yield from _file(rows, path, max_row_bytes, text_split)
            if rows.counts["rows"] == before:
                raise UserError(f"{path}: holds no row; remove it from the list or fill it")

    return Rows(
        passes,
        digest.hexdigest(),
        on_bad_row=on_bad_row,
        max_bad_fraction=max_bad_fraction,
        quarantine=quarantine,
    )


def given(rows: Rows | Iterable[Any]) -> Rows:
    """Rows as they are, or rows of dicts made in a notebook; a bad one is an error that names its index."""
    if isinstance(rows, Rows):
        return rows
    records = list(rows)
    digest = hashlib.sha256()
    for r in records:
        digest.update(json.dumps(r, sort_keys=True, default=repr).encode() + b"\n")
    return Rows(lambda _: ((r, f"rows[{i}]") for i, r in enumerate(records)), digest.hexdigest())


# -- one file -------------------------------------------------------------------------------------------------------


def _file(rows: Rows, path: str, limit: int, text_split: str) -> Iterator[tuple[Any, str]]:
    with _opened(path) as f:
        try:
            if _suffix(path) == ".json":
                yield from _json_list(path, f)
                return
            text = _suffix(path) == ".txt"
            for where, offset, raw in _texts(path, f, limit, text_split) if text else _lines(path, f, limit):
                try:
                    if raw is None:
                        raise UserError(f"{where}: row above {limit:,} bytes; split it or raise max_row_bytes")
                    content = _decode(raw, where, offset)
                    record = {"text": content} if text else _parse(content, where)
                except UserError as e:
                    rows.refuse(e, raw, seen=False)
                    continue
                yield record, where
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise UserError(f"{path}: the gzip file is damaged or cut short ({e}); fetch it again") from None


def _lines(path: str, f, limit: int, keep_blank: bool = False) -> Iterator[tuple[str, int, bytes | None]]:
    """("file:line", byte offset, line without its end); None for a line above the limit, which is never held whole."""
    offset = number = 0
    while raw := f.readline(limit + 2):
        number += 1
        start, line = offset, raw
        offset += len(raw)
        while not raw.endswith(b"\n") and (raw := f.readline(limit + 2)):
            offset += len(raw)
            line = None
        if line is not None:
            line = line.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = start + 3, line[3:]
            if len(line) > limit:
                line = None
        if keep_blank or line is None or line.strip():
            yield f"{path}:{number}", start, line


def _texts(path: str, f, limit: int, split: str) -> Iterator[tuple[str, int, bytes | None]]:
    """Documents of a text file, in the form of `_lines`."""
    if split == "line":
        yield from _lines(path, f, limit)
    elif split == "blank":
        document: list[bytes] = []
        first, size = None, 0
        for where, offset, line in _lines(path, f, limit, keep_blank=True):
            if line is not None and not line.strip():
                if first:
                    yield *first, b"\n".join(document) if size <= limit else None
                document, first, size = [], None, 0
                continue
            first = first or (where, offset)
            size += limit + 1 if line is None else len(line) + 1
            if size <= limit:
                document.append(line)
        if first:
            yield *first, b"\n".join(document) if size <= limit else None
    else:
        data = f.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise UserError(f"{path}: above {MAX_FILE:,} bytes; use text_split 'blank' or 'line', or several files")
        at = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        line = 1
        for part in [data[at:]] if split == "file" else data[at:].split(split.encode()):
            if part.strip():
                lead = 0 if split == "file" else len(part) - len(part.lstrip())
                body = part.replace(b"\r\n", b"\n")
                body = body if split == "file" else body.strip()
                yield f"{path}:{line + part[:lead].count(10)}", at + lead, body if len(body) <= limit else None
            line += part.count(10)
            at += len(part) + len(split.encode())


def _json_list(path: str, f) -> Iterator[tuple[Any, str]]:
    data = f.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UserError(f"{path}: above {MAX_FILE:,} bytes; write it as .jsonl, which is read line by line")
    bom = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    if not data.strip():
        return
    text = _decode(data[bom:], path, bom)
    del data
    at, line, counted = _blank(text, 0), 1, 0
    if text[at] != "[":
        raise UserError(f"{path}: a .json file must be a list of rows; if it has one row a line, name it .jsonl")
    at = _blank(text, at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        record, at = _parse(text, f"{path}:{line}", at)
        yield record, f"{path}:{line}"
        at = _blank(text, at)
        if text[at : at + 1] == ",":
            at = _blank(text, at + 1)
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise UserError(f"{path}:{line}: expected ',' or ']' after a row; the list is malformed or cut short")


def _blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


# -- one row --------------------------------------------------------------------------------------------------------


def _decode(raw: bytes, where: str, offset: int) -> str:
    if (nul := raw.find(0)) >= 0:
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\0"
        hint = "it looks like UTF-16; convert it" if utf16 else "remove it"
        raise UserError(f"{where}: NUL at byte {offset + nul} of the file; {hint}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: not UTF-8 at byte {offset + e.start} of the file (0x{raw[e.start]:02x}); "
            "convert the file, e.g. iconv -f latin1 -t utf-8"
        ) from None


class _Refused(ValueError):
    pass


def _object(pairs):
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [k for k, _ in pairs]
        raise _Refused(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}; keep one")
    return out


def _float(text):
    if not math.isfinite(value := float(text)):
        raise _Refused(f"{text} is no finite number; write null or leave the field out")
    return value


_json = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_float)


def _parse(text: str, where: str, at: int | None = None) -> Any:
    """The object in a line; with ``at``, the (object, end) at that place of a longer text."""
    try:
        value, end = _json.raw_decode(text, _blank(text, 0) if at is None else at)
        if at is None and (end := _blank(text, end)) != len(text):
            raise UserError(f"{where}:{end + 1}: more text after the row; write one object a line")
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise UserError(f'{where}: a row must be an object, this is a {kind}; write e.g. {{"prompt": ...}}')
        if "\\u" in text if at is None else text.find("\\u", at, end) >= 0:
            _clean(value, where)
    except json.JSONDecodeError as e:
        place = f"{where}:{e.colno}" if at is None else f"{where.rpartition(':')[0]}:{e.lineno}:{e.colno}"
        raise UserError(f"{place}: not JSON: {e.msg}; mend the row or set on_bad_row='skip'") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be a training example; flatten it") from None
    except ValueError as e:  # ours, or an integer of thousands of digits
        raise UserError(f"{where}: {e}") from None
    return value if at is None else (value, end)


def _clean(value: Any, where: str) -> None:
    """Escapes can smuggle in what the bytes may not hold."""
    if isinstance(value, dict):
        for k, v in value.items():
            _clean(k, where)
            _clean(v, where)
    elif isinstance(value, list):
        for v in value:
            _clean(v, where)
    elif isinstance(value, str):
        if bad := unclean(value):
            raise UserError(f"{where}: {bad}; remove it")


def unclean(text: str) -> str | None:
    """What makes a string unfit for training, or None."""
    if (at := text.find("\0")) >= 0:
        return f"NUL (\\u0000) at character {at} of a string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        return f"lone surrogate (\\u{ord(text[e.start]):04x}) at character {e.start} of a string"
    return None


def _suffix(path: str) -> str:
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def _opened(path: str, compressed: bool = False):
    try:
        return gzip.open(path, "rb") if path.endswith(".gz") and not compressed else open(path, "rb")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
