"""Verifiers: right answers in many forms, wrong ones that look right, and programs that misbehave."""

import os
import sys
from fractions import Fraction

import pytest
from jaxalign.rl import expressions, sandbox, verify

SAYS = lambda f, completion, **record: f("", completion, record)  # noqa: E731


@pytest.mark.parametrize(
    "text, want",
    [
        ("so 12 + 30 = 42.", 42),
        ("1,234.50 dollars", Fraction("1234.5")),
        ("between 3 and -7", -7),
        ("that is 3/4", Fraction(3, 4)),
        ("12% of it", Fraction(12, 100)),
        ("1.5e3", 1500),
        (".5", Fraction(1, 2)),
        ("1,2,3", 3),
        ("x = 5)", 5),
        ("none", None),
        ("1/0", None),
    ],
)
def test_last_number(text, want):
    assert verify.last_number(text) == want


def test_final_answers():
    assert verify.boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}"
    assert verify.boxed(r"\boxed{1") is None and verify.boxed("none") is None
    assert verify.marked("3 + 4 = 7\n#### 7\nbye") == "7" and verify.marked("7") is None
    assert verify.tagged("<answer>a</answer><answer> b </answer>") == "b"


def test_numbers():
    assert SAYS(verify.number, "It is 1,000.", answer="1000") == 1
    assert SAYS(verify.number, "... #### 8, I had 9 before", answer="3 + 5 = 8\n#### 8") == 0  # the last number of the marked line is 9
    assert SAYS(verify.number, "#### 8\nnot 9", answer=8) == 1
    assert SAYS(verify.number, "0.333", answer="1/3") == 0 and SAYS(verify.number, "0.333", answer="1/3", tolerance=0.01) == 1
    assert SAYS(verify.number, "", answer="1") == 0
    assert SAYS(verify.number_in_form, "8", answer="8") == 0 and SAYS(verify.number_in_form, r"\boxed{8}", answer="8") == 1
    with pytest.raises(ValueError, match="answer"):
        SAYS(verify.number, "8", question="4+4")


@pytest.mark.parametrize(
    "a, b, want",
    [
        ("2(x+1)", "2x + 2", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"$\dfrac{\sqrt{8}}{2}$", r"\sqrt{2}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+1", False),
        ("sin(x)^2+cos(x)^2", "1", True),
        ("x = 5", "5", True),
        (r"\frac12", "1/2", True),
        ("2^{10}", "1024", True),
        ("-x^2", "(-x)^2", False),
        ("-2^2", "-4", True),
        ("1,000", "1000", True),
        ("(1, 2)", "(1,2)", True),
        ("(1, 2)", "(2, 1)", False),
        (r"\pi r^2", "pi*r*r", True),
        ("|-3|", "3", True),
        ("xy", "y x", True),
        ("a/b/c", "a/(b c)", True),
        ("50%", "1/2", True),
        ("not math at all?", "not math at all!", False),
        (r"\sqrt[3]{27}", "3", True),
        ("9^9^9^9", "1", False),  # not read: too large
        ("__import__('os').system('true')", "0", False),
        ("(" * 500 + "1" + ")" * 500, "1", False),
    ],
)
def test_expressions(a, b, want):
    assert bool(expressions._same(a, b)) is want
    assert bool(expressions._same(b, a)) is want


def test_nearly_is_not_equal_where_sympy_can_tell():
    pytest.importorskip("sympy")
    assert not expressions._same("0.33333333333", "1/3") and expressions._same("1/3", "2/6")


def test_without_sympy_numbers_decide(monkeypatch):
    monkeypatch.setitem(sys.modules, "sympy", None)
    assert expressions._same("2(x+1)", "2x+2") and not expressions._same("2x+1", "2x+2")


def test_expressions_in_their_process(monkeypatch):
    assert SAYS(verify.expression, r"I get \boxed{2x+2}.", answer="2(x+1)") == 1
    assert SAYS(verify.expression, "3x", answer="2(x+1)") == 0


def test_patterns_forms_and_lengths():
    assert SAYS(verify.regex, "on 2024-02-29", pattern=r"\d{4}-\d{2}-\d{2}") == 1 and SAYS(verify.regex, "no", pattern=r"\d") == 0
    good = "<think>\na </think>\n<answer>4</answer>"
    assert SAYS(verify.think_answer, good) == 1 and SAYS(verify.think_tags, good) == 1
    for bad in ("<think>a</think>4", "x" + good, good + "x", good + good, "<think><think>a</think></think><answer>4</answer>"):
        assert SAYS(verify.think_answer, bad) == 0, bad
    assert SAYS(verify.think_tags, "<think>a</think>") == 0.5
    assert [SAYS(verify.words, "a " * n, min_words=2, max_words=4) for n in (0, 1, 2, 4, 6, 9)] == [0, 0.5, 1, 1, 0.5, 0]
    assert [verify.soft_overlong(n, 20, 4) for n in (16, 17, 18, 20, 21)] == [0, -0.25, -0.5, -1, -1]
    assert verify.overlong([""], [""], [{"max_tokens": 20, "cache": 4}], [[1] * 18]) == [-0.5]


def test_json():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert SAYS(verify.json_schema, 'So:\n```json\n{"n": 1}\n```', schema=schema) == 1
    for bad in ('{"n": "1"}', "{}", "{", '{"n": NaN}', "[" * 5000):
        assert SAYS(verify.json_schema, bad, schema=schema) == 0, bad
    assert SAYS(verify.json_schema, "[1]") == 1 and SAYS(verify.json_schema, "[NaN]") == 0
    import referencing.exceptions

    with pytest.raises((referencing.exceptions.Unresolvable, Exception), match="http://127.0.0.1:9/"):
        SAYS(verify.json_schema, "{}", schema={"$ref": "http://127.0.0.1:9/nowhere.json"})


# -- programs ---------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits are those of POSIX")
ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\n"


def test_code():
    assert SAYS(verify.code, ADD, tests="assert add(2, 3) == 5") == 1 and SAYS(verify.code, ADD, tests="assert add(2, 3) == 6") == 0
    assert SAYS(verify.code, "import sys; sys.exit(0)", tests="assert False") == 0  # left before the tests
    cases = [{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "3"}]
    assert SAYS(verify.code, "print(sum(map(int, input().split())))", cases=cases) == 0.5


@pytest.mark.parametrize(
    "program, says",
    [
        ("while True: pass", "overran"),
        ("import time; time.sleep(60)", "overran"),
        ("import signal, time; signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)", "overran"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("open('f', 'wb').write(b'0' * (64 << 20))", "File too large|FILE|25|"),
        ("import numpy", "ModuleNotFoundError"),
        ("import os; print(sorted(os.environ)); raise SystemExit(3 if 'SECRET' in os.environ else 4)", ""),
    ],
)
def test_programs_are_bounded(program, says, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    got = sandbox.run(program, seconds=1.0)
    assert got.code not in (0, 3)
    assert got.overran == (says == "overran")
    if says and says != "overran" and "|" not in says:
        assert says in got.stderr


def test_no_network_where_namespaces_are():
    if not sandbox.holds()["network"]:
        pytest.skip("this kernel lets no ordinary process make namespaces")
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        got = sandbox.run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert got.code != 0 and "OSError" in got.stderr or "ConnectionRefused" in got.stderr or "unreachable" in got.stderr, got


def test_processes_end_with_their_program(tmp_path):
    """A child that leaves the session would outlive it; with namespaces it does not. Forks are counted where the user is nobody."""
    if not sandbox.holds()["network"]:
        pytest.skip("this kernel lets no ordinary process make namespaces")
    import time

    note = f"jaxalign-escape-{os.getpid()}"
    sandbox.run(f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sh', ['/bin/sh', '-c', 'sleep 30; : {note}'])\ntime.sleep(0.3)", seconds=3.0)
    time.sleep(0.2)
    alive = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                alive.append(open(f"/proc/{pid}/cmdline", "rb").read())
            except OSError:
                pass
    assert not any(note.encode() in line and b"sleep 30" in line for line in alive)
    if sandbox.holds()["user"]:
        got = sandbox.run("import os\nfor _ in range(100):\n    if os.fork() == 0:\n        import time; time.sleep(5)", seconds=4.0)
        assert "BlockingIOError" in got.stderr


def test_nothing_else_is_written(tmp_path):
    if not (sandbox.holds()["files"] or sandbox.holds()["user"]):
        pytest.skip("this kernel has no read-only mounts for ordinary processes")
    note = tmp_path / "note"
    note.write_text("mine")
    for program in (f"open({str(note)!r}, 'w').write('yours')", f"import os; os.remove({str(note)!r})", f"open({str(tmp_path / 'new')!r}, 'w')"):
        assert sandbox.run(program).code == 1
    assert note.read_text() == "mine" and os.listdir(tmp_path) == ["note"]
    assert sandbox.run("open('own', 'w').write('a'); print(open('own').read())").stdout == "a\n"
