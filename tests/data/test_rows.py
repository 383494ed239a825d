"""Faults 35 to 39 and 42: what a file can do wrong, and what the reader says."""

import gzip
import json
import pathlib
import tracemalloc

import pytest

from jaxalign.data.rows import given, read
from jaxalign.types import UserError

GOOD = [{"text": f"row {i}"} for i in range(5)]


def lines(rows=GOOD, end="\n"):
    return "".join(json.dumps(r) + end for r in rows).encode()


def put(tmp_path, data, name="x.jsonl"):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def texts(path, **kw):
    return [r["text"] for r, _ in read(path, **kw)]


@pytest.mark.parametrize(
    "data",
    [
        lines(),
        lines(end="\r\n"),
        lines().rstrip(b"\n"),
        b"\xef\xbb\xbf" + lines(),
        b"\n\n" + lines(end="\n \t\n") + b"\n",
    ],
    ids=["plain", "crlf", "no final newline", "bom", "blank lines"],
)
def test_harmless_variations(tmp_path, data):
    assert texts(put(tmp_path, data)) == [r["text"] for r in GOOD]


def test_line_numbers_count_blank_lines(tmp_path):
    rows = list(read(put(tmp_path, b'\n{"text": "a"}\n\n{"text": "b"}')))
    assert [w.rpartition(":")[2] for _, w in rows] == ["2", "4"]


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    assert texts(put(tmp_path, '{"text": "a\u2028b\u0085c"}\n'.encode())) == ["a\u2028b\u0085c"]


BAD = {
    "malformed": (b'{"text": oops}', r"x.jsonl:3:10: not JSON"),
    "cut": (b'{"text": "abc', r"x.jsonl:3:10: not JSON"),
    "two in a line": (b'{"text": "a"} {"text": "b"}', r"x.jsonl:3:15: more text"),
    "not an object": (b'["a"]', r"x.jsonl:3: a row must be an object, this is a list"),
    "latin1": (b'{"text": "caf\xe9"}', r"x.jsonl:3: not UTF-8 at byte 53 of the file \(0xe9\)"),  # 2 * 20 + 13
    "bom inside": (b'\xef\xbb\xbf{"text": "a"}', r"x.jsonl:3:1: not JSON"),
    "nul byte": (b'{"text": "a\0"}', r"x.jsonl:3: NUL at byte 51"),  # 2 * 20 + 11
    "nul escape": (b'{"text": "a\\u0000"}', r"x.jsonl:3: NUL .* at character 1"),
    "surrogate": (b'{"text": {"deep": ["\\ud83d"]}}', r"x.jsonl:3: lone surrogate \(\\ud83d\) at character 0"),
    "duplicate key": (b'{"text": "a", "text": "b"}', r"x.jsonl:3: duplicate key 'text'"),
    "nan": (b'{"text": "a", "margin": NaN}', r"x.jsonl:3: .*[nN]a[nN] is no finite"),
    "infinity": (b'{"text": "a", "margin": -Infinity}', r"x.jsonl:3: -Infinity is no finite"),
    "overflow": (b'{"text": "a", "margin": 1e999}', r"x.jsonl:3: 1e999 is no finite"),
    "huge integer": (b'{"text": ' + b"9" * 5000 + b"}", r"x.jsonl:3: "),
    "deep": (b'{"text": ' + b"[" * 100000 + b"]" * 100000 + b"}", r"x.jsonl:3: nested too deeply"),
    "giant": (b'{"text": "' + b"a" * 300000 + b'"}', r"x.jsonl:3: row above 250,000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row(tmp_path, name):
    row, match = BAD[name]
    good = [b'{"text": "row 000"}'] * 99  # 20 bytes a line with its newline
    path = put(tmp_path, b"\n".join([*good[:2], row, *good[2:]]))
    with pytest.raises(UserError, match=match):
        list(read(path, max_row_bytes=250_000))
    jail = str(tmp_path / "bad.jsonl")
    rows = read(path, max_row_bytes=250_000, on_bad_row="skip", quarantine=jail)
    for _ in range(2):  # counts are of the latest pass
        assert len(list(rows)) == 99 and rows.counts == {"rows": 100, "skipped": 1} and len(rows.errors) == 1
        assert "x.jsonl:3" in json.loads(pathlib.Path(jail).read_text())["error"]
    with pytest.raises(UserError, match=r"1 of 100 rows are bad(.|\n)*x.jsonl:3"):
        list(read(path, max_row_bytes=250_000, on_bad_row="skip", max_bad_fraction=0.009))


def test_escaped_backslash_and_real_pairs_are_no_surrogates(tmp_path):
    assert texts(put(tmp_path, b'{"text": "\\\\ud800 \\ud83d\\ude00"}')) == ["\\ud800 😀"]


def test_types_may_change_from_row_to_row(tmp_path):
    data = lines([{"text": "a", "id": 1}] * 50 + [{"text": "a", "id": "one"}, {"text": "a", "id": None}])
    assert len(texts(put(tmp_path, data))) == 52


@pytest.mark.parametrize("name, data", [("a.jsonl", b""), ("b.jsonl", b"\n \r\n"), ("c.json", b"[]"), ("d.txt", b"\n\n")])
def test_empty_files(tmp_path, name, data):
    path = put(tmp_path, data, name)
    for policy in ("error", "skip"):
        with pytest.raises(UserError, match=f"{name}: holds no row"):
            list(read(path, on_bad_row=policy))
    full = put(tmp_path, lines())
    with pytest.raises(UserError, match=f"{name}: holds no row"):
        list(read([full, path]))


def test_all_rows_bad_is_an_empty_set(tmp_path):
    with pytest.raises(UserError, match="no usable row"):
        list(read(put(tmp_path, b"{\n{\n"), on_bad_row="skip", max_bad_fraction=1.0))


def test_gzip_whole_and_cut_short(tmp_path):
    packed = gzip.compress(lines(GOOD * 500))
    assert len(texts(put(tmp_path, packed, "x.jsonl.gz"))) == 2500
    for broken in (packed[:-20], packed[:40], b"plain text", packed[:50] + b"\xff\xff\xff" + packed[53:]):
        for policy in ("error", "skip"):
            with pytest.raises(UserError, match="damaged or cut short"):
                list(read(put(tmp_path, broken, "x.jsonl.gz"), on_bad_row=policy, max_bad_fraction=1.0))


def test_giant_line_is_never_held_whole(tmp_path):
    path = put(tmp_path, b'{"text": "' + b"a" * 30_000_000 + b'"}\n' + lines())
    tracemalloc.start()
    rows = read(path, max_row_bytes=1_000_000, on_bad_row="skip", max_bad_fraction=0.5)
    assert len(list(rows)) == 5 and rows.counts["skipped"] == 1
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


def test_json_list(tmp_path):
    path = put(tmp_path, b'\xef\xbb\xbf [\n {"text": "a"},\n\n {"text": "b"} ]\n', "x.json")
    assert [(r["text"], w.rpartition(":")[2]) for r, w in read(path)] == [("a", "2"), ("b", "4")]
    for data, match in [
        (b'[\n{"text": "a"},\n{"text": b}]', r"x.json:3:10: not JSON"),
        (b'[{"text": "a"}\n{"text": "b"}]', r"x.json:2: expected ','"),
        (b'[{"text": "a"}', r"x.json:1: expected ','"),
        (b'{"text": "a"}\n{"text": "b"}', "must be a list of rows; if it has one row a line, name it .jsonl"),
        (b'[{"text": "a"}, "b"]', r"x.json:1: a row must be an object"),
        (b'[{"text": "a", "text": "b"}]', r"x.json:1: duplicate key"),
        (b'[{"text": "\\ud800"}]', r"x.json:1: lone surrogate"),
        (b'[{"text": "caf\xe9"}]', r"x.json: not UTF-8 at byte 14"),
    ]:
        with pytest.raises(UserError, match=match):
            list(read(put(tmp_path, data, "x.json")))


def test_text_files(tmp_path):
    path = put(tmp_path, b"\xef\xbb\xbfone\r\ntwo\r\n\r\n\r\nthree<E>\nfour\n", "x.txt")
    for split, want in {
        "blank": [("one\ntwo", 1), ("three<E>\nfour", 5)],
        "line": [("one", 1), ("two", 2), ("three<E>", 5), ("four", 6)],
        "file": [("one\ntwo\n\n\nthree<E>\nfour\n", 1)],
        "<E>": [("one\ntwo\n\n\nthree", 1), ("four", 6)],
    }.items():
        assert [(r["text"], int(w.rpartition(":")[2])) for r, w in read(path, text_split=split)] == want
    with pytest.raises(UserError, match="x.txt:3: not UTF-8 at byte 5"):
        list(read(put(tmp_path, b"ok\n\nx\xff", "x.txt")))


def test_paths(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        put(tmp_path, lines([{"text": name}]), name)
    assert texts(str(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]) == ["b.jsonl", "a.jsonl"]
    for bad, match in [(tmp_path / "no*.jsonl", "no such file"), (tmp_path, "is a directory"), ([], "no data file")]:
        with pytest.raises(UserError, match=match):
            read(bad)
    with pytest.raises(UserError, match="can not read this kind"):
        read(put(tmp_path, b"", "x.parquet"))


def test_fingerprint_is_of_contents_and_split(tmp_path):
    a, b, c = put(tmp_path, lines(), "a.jsonl"), put(tmp_path, lines(), "b.jsonl"), put(tmp_path, lines(GOOD[:4]), "c.jsonl")
    assert read(a).fingerprint == read(b).fingerprint != read(c).fingerprint
    assert read([a, c]).fingerprint != read([c, a]).fingerprint
    assert read(a, text_split="line").fingerprint != read(a).fingerprint


def test_dicts_given_in_a_notebook():
    rows = given(r for r in GOOD)
    assert [w for _, w in rows] == [f"rows[{i}]" for i in range(5)] and len(list(rows)) == 5
    assert given(GOOD).fingerprint == rows.fingerprint != given(GOOD[:4]).fingerprint
    with pytest.raises(UserError, match="no usable row"):
        list(given([]))
