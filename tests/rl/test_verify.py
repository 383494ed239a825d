"""Verifiers: right answers in many forms, wrong ones that look right, and programs that misbehave."""

import os
import sys
from fractions import Fraction

import pytest
from jaxalign.rl import expressions, sandbox, verify
from jaxalign.types import UserError

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
        ("I need 2 1/2 cups", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("1. 5 10/3", Fraction(10, 3)),  # no mixed number: its fraction is above one
        ("at 2\n1/2", Fraction(1, 2)),
        ("\u22125", -5),
        ("1{,}234", 1234),
        (r"1,\!234", 1234),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"x = -\dfrac34", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"2\frac{1}{3}", Fraction(7, 3)),
        (r"12\%", Fraction(12, 100)),
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
    assert SAYS(verify.number, r"\boxed{\frac{3}{4}}", answer=r"\boxed{\frac{1}{4}}") == 0 and SAYS(verify.number, r"\boxed{\frac{3}{4}}", answer="3/4") == 1
    with pytest.raises(ValueError, match="answer"):
        SAYS(verify.number, "8", question="4+4")


@pytest.mark.parametrize("said, want, right", [("50%", "50", 1), ("50%", "0.5", 1), ("50%", "20% of 250\n#### 50", 1), (r"50\%", "50", 1), ("50%", "5", 0), ("50", "50%", 1), ("5", "50%", 0), ("0.5", "50%", 1), ("50%", "50%", 1)])
def test_a_percentage_is_either_where_one_has_no_sign(said, want, right):
    assert SAYS(verify.number, said, answer=want) == right
    assert SAYS(verify.expression, said, answer=want) == right


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
        (r"x_{10}", r"x_{11}", False),
        ("x_10", "x_11", False),
        (r"x_{1}+2x_1", "3x_1", True),
        (r"a_{n+1}", r"a_{n-1}", False),
        (r"a_{n+1}+a_{n + 1}", r"2a_{n+1}", True),
        (r"x_{10} = 5", "5", True),
        (r"3\mathbf{i}+4\mathbf{j}", r"4\mathbf{i}+3\mathbf{j}", False),
        (r"3\mathbf{i}+4\mathbf{j}", "3+4", False),
        (r"3\mathbf{i}+4\mathbf{j}", r"4\mathbf{j}+3\mathbf{i}", True),
        (r"\mathbf{5}", "5", True),
        (r"\mathrm{e}", "e", True),
        (r"\mathbb{Z}", r"\mathbb{R}", False),
        (r"2\text{ or }3", "23", False),
        (r"2\text{ or }3", "2 or 3", True),
        ("2 or 3", "6 or 1", False),
        (r"(x+1)\text{ or }(x-1)", "x^2-1", False),
        (r"5\text{ cm}^2", "5", True),
        (r"5\,\mathrm{m/s}", "5", True),
        (r"3\text{ cm}, 4\text{ cm}", "3, 4", True),
        (r"\text{(A)}", "A", True),
        (r"\text{(A)}", "B", False),
        (r"\text{5}", "5", True),
        (r"1\frac12", "0.5", False),
        (r"1\frac12", "1.5", True),
        (r"2\frac{1}{3}", "7/3", True),
        ("-2 1/3", "-7/3", True),
        (r"x^2\frac{1}{3}", "x^2/3", True),
        ("10 000", "0", False),
        ("1 2", "12", False),
        (r"\sec x", r"\frac{1}{\cos(x)}", True),
        (r"\sinh^{-1} x", r"1/\sinh(x)", False),
        (r"\binom{5}{2}", r"\binom{2}{5}", False),
        (r"(1,2)\cup(3,4)", r"(1, 2) \cup (3, 4)", True),
        ("(1,2)x", "(1,2)y", False),
        ("|x|", "x", False),
        ("|x-y|", "|y-x|", True),
        ("|x+y|", "x+y", False),
        (r"\sqrt{x^3}", r"x\sqrt{x}", True),  # where there is a root
        (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}", True),
        (r"\sqrt{x^2}", "x", False),
        (r"90^{\circ}", "90", True),
        (r"90^\circ", "90", True),
        (r"\frac1{12}", "1/12", True),
        (r"\frac{1}2", "1/2", True),
        (r"\frac\pi2", r"\pi/2", True),
        (r"1{,}234", "1234", True),
        (r"(1{,}234, 5)", "(1234, 5)", True),
        (r"\sin^2 x+\cos^2 x", "1", True),
        (r"\sin^{-1} x", r"\arcsin x", True),
        (r"\sin^{-1} x", r"1/\sin x", False),
        (r"a\sin x", r"\sin(x) a", True),
        (r"\sinh x", "(e^x-e^{-x})/2", True),
        (r"2\pm 3", r"3\pm 2", False),
        (r"(-\infty, 0.5)", r"(-\infty, \frac12)", True),
        (r"2\sigma+\sigma", r"3\sigma", True),
        ("3!", "6", True),
        ("n!", "n (n-1)!", True),
        ("3!!", "720", False),  # 3!! is 3
        ("1000000000!", "1", False),
        ("999!!", "1", False),
        ("((1000!)^1000)!", "1", False),
        ("1e5", "100000", True),
        ("1E-2", "0.01", True),
        ("2e-1", "2*e - 1", True),  # Euler's
        ("1e999999999", "1", False),
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
    assert [SAYS(verify.words, t, min_words=None, max_words=0) for t in ("", "a")] == [1, 0]
    assert [verify.soft_overlong(n, 20, 4) for n in (16, 17, 18, 20, 21)] == [0, -0.25, -0.5, -1, -1]
    assert verify.overlong([""], [""], [{"max_tokens": 20, "cache": 4}], [[1] * 18]) == [-0.5]


def test_json():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert SAYS(verify.json_schema, 'So:\n```json\n{"n": 1}\n```', schema=schema) == 1
    for bad in ('{"n": "1"}', "{}", "{", '{"n": NaN}', "[" * 5000):
        assert SAYS(verify.json_schema, bad, schema=schema) == 0, bad
    assert SAYS(verify.json_schema, '```json\n{"n": 1}\n```\nwith\n```\nn = 1\n```', schema=schema) == 1
    assert SAYS(verify.json_schema, "[1]") == 1 and SAYS(verify.json_schema, "[NaN]") == 0
    import referencing.exceptions

    with pytest.raises((referencing.exceptions.Unresolvable, Exception), match="http://127.0.0.1:9/"):
        SAYS(verify.json_schema, "{}", schema={"$ref": "http://127.0.0.1:9/nowhere.json"})


@pytest.mark.parametrize(
    "text, want",
    [
        ("```python\nA\n```\nOutput:\n```\n5\n```", "A"),
        ("```c++\nint\n```\nso\n```python\nA\n```", "A"),
        ("```python3\nA\n```", "A"),
        ('```python title="a.py"\nA\n```', "A"),
        ("```Python\r\nA\r\nB\r\n```\r\n", "A\nB"),
        ("1. so:\n   ```python\n   if A:\n       B\n   ```\n", "if A:\n    B"),
        ("```python\nA\n```\nbetter:\n```python\nB", "B"),
        ("```python\nprint('```')\nB\n```\n", "print('```')\nB"),
        ("````python\n```\nA\n````\n", "```\nA"),
        ("```\nA\n```\n```\nB\n```", "B"),
        ("Here it is: ```python\nA\n```", "A"),
        ("```python\nA```\nthat is it", "A"),
        ("use ``` to fence\n```python\nA\n```", "A"),
        ("```text\nA\n```", "```text\nA\n```"),
        ("print('```')", "print('```')"),
        ("```sh ls```\n```python\nA\n```", "A"),
        ("with `x`: ```python\nA `b` ```", "A `b` "),
        ("```python", ""),
    ],
)
def test_fenced(text, want):
    assert verify.fenced(text, "python", "py", "python3").rstrip("\n") == want


# -- programs ---------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits are those of POSIX")
ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\n"


def test_code():
    assert SAYS(verify.code, ADD, tests="assert add(2, 3) == 5") == 1 and SAYS(verify.code, ADD, tests="assert add(2, 3) == 6") == 0
    assert SAYS(verify.code, "import sys; sys.exit(0)", tests="assert False") == 0  # left before the tests
    cases = [{"input": "2 3", "output": "5"}, {"input": "1 1", "output": "3"}]
    assert SAYS(verify.code, "print(sum(map(int, input().split())))", cases=cases) == 0.5
    assert SAYS(verify.code, "```python3\nprint(5)\n```\nOutput:\n```\n5\n```", cases=[{"input": "", "output": "5"}]) == 1
    with pytest.raises(UserError, match="cases"):
        SAYS(verify.code, "print(5)", cases=[])


@pytest.mark.parametrize("end", ["raise SystemExit(3)", "1/0", "while True: pass"])
def test_a_program_must_end_well(end):
    assert SAYS(verify.code, f"print(5, flush=True)\n{end}", cases=[{"input": "", "output": "5"}], seconds=1.0) == 0


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
