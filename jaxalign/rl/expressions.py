"""Whether two expressions are the same, however they are written: read by a small parser of our own, never by `eval`.

Reads sums, products (implicit ones too), powers, roots, fractions and the common functions, as text or LaTeX. Two expressions
that differ at one of a few fixed points, negative ones too, are different; where they agree there, sympy is asked to prove it, if it is installed, and
else agreement to nine digits is taken for it. Both run in a process that is ended when it takes too long.
"""

from __future__ import annotations

import cmath
import functools
import math
import re
from typing import Any

from jaxalign.rl.functions import Cases, Limits, Pool

LONGEST, DEEPEST, LARGEST = 400, 60, 1000  # characters, brackets in brackets, exponents: what is beyond is not read
FUNCTIONS = ("sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sec", "csc", "cot", "exp", "ln", "log", "abs")
_ONE_OVER = {"sec": "cos", "csc": "sin", "cot": "tan"}
GREEK = ("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "phi", "omega")
# Read as one name with a backslash only: without it xi may be x times i. Other commands (\pm, \cup) are not read: they are no factors.
COMMANDS = "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|infty|ell|(?:var)?epsilon|zeta|eta|iota|kappa|nu|xi|rho|sigma|tau|chi|psi|varphi|vartheta"
_SUBSCRIPT = r"(?:_(?:\d+|[A-Za-z]|\[[^\[\]]*\]))?"
# e is Euler's in 2e-3, which may be 2e less 3; in 2e3 and 2E-3 it can only be a power of ten.
_TOKEN = re.compile(
    r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:(?:e|E[-+]?)\d{1,3}(?!\d))?)"
    rf"|\\?((?:{'|'.join(sorted(FUNCTIONS, key=len, reverse=True))})|(?:{'|'.join(('pi', *GREEK))}|(?<=\\)(?:{COMMANDS})|(?<!\\)[A-Za-z]){_SUBSCRIPT})"
    r"|(\*\*|[-+*/^()|,!]))"
)

DIGITS = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"  # an argument of \frac, and two groups of which one is empty
_ARGUMENT = r"\s*(?:\{([^{}]*)\}|([0-9A-Za-z]|\\pi))"
_TEXT = re.compile(r"\\(?:text\w*|mbox)\{([^{}]*)\}")
_FONT = re.compile(r"\\(?:math[a-z]+|boldsymbol|bm|operatorname)\{([^{}]*)\}")
# What stands behind a value, at the end or before a comma: cm, \mathrm{m/s}, cm^2. A single letter in \mathrm is a name.
_UNIT = re.compile(r"(?<=[^-+*/=(,^_\s])\s*\\(?:text\w*|mbox|mathrm(?=\{[^{}]{2}))\{[^{}\d]*\}(?:\^\{?-?\d\}?)?(?=\s*(?:,|\.?\s*$))")


def numerals(text: str) -> str:
    """One notation for numbers: U+2212 is -, \\% is %, 1{,}234 and 1,\\!234 are 1234, 2\\frac{1}{3} is 2 1/3."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3})", "", text.replace("−", "-").replace("\\%", "%"))
    return re.sub(r"(?<![\w.^])(\d+)\s*\\[dtc]?frac" + DIGITS * 2, r"\1 \2\3/\4\5", text)


def plain(text: str) -> str:
    """LaTeX as text: \\frac{a}{b} becomes ((a)/(b)), \\sqrt{a} sqrt(a), 2 1/3 (2+1/3), and what only looks nice is left out. Words among
    the mathematics are put into quotation marks, which `parse` does not read: "2 or 3" is no product."""
    text = re.sub(r"\\(left|right|displaystyle|big|Big|q?quad|,|;|!|:| |\$)|[$]|\\\(|\\\)|\\\[|\\\]|\^\s*\{?\s*\\circ\s*\}?|°", "", numerals(text).replace("~", " ")).strip()
    text = _UNIT.sub("", text)
    text = m[1] if (m := _TEXT.fullmatch(text.rstrip("."))) else _TEXT.sub(lambda m: f' "{m[1].strip()}" ' if m[1].strip() else " ", text)
    text = re.sub(r"(?<![A-Za-z\"])(or|and)(?![A-Za-z\"])", r'"\1"', _FONT.sub(r" \1", text))
    text = re.sub(r"(?<![\w.^/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0], text)
    for _ in range(DEEPEST):  # from the inside out
        new = re.sub(r"\\[dtc]?frac" + _ARGUMENT * 2, r"((\1\2)/(\3\4))", text)
        new = re.sub(r"\\sqrt\s*\[(\d+)\]\s*\{([^{}]*)\}", r"((\2)^(1/\1))", new)
        new = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"\\sqrt(\1)", new)
        new = re.sub(r"([\^_])\{([^{}]*)\}", lambda m: f"^({m[2]})" if m[1] == "^" else "_[" + re.sub(r'[\s"]', "", m[2]) + "]", new)
        if new == text:
            break
        text = new
    text = re.sub(r"\\(?:cdot|times)", "*", text).replace("\\div", "/").replace("%", "/100")
    text = text.replace("×", "*").replace("·", "*").replace("÷", "/").replace("π", "pi").replace("√", "sqrt")
    return re.sub(r"arc(?=sin|cos|tan)", "a", text).replace("{", "(").replace("}", ")").strip().rstrip(".")


def parse(text: str) -> Any:
    """A tree of tuples: ("num", "1.5"), ("var", "x"), ("+", a, b), ("sqrt", a), or (",", [...]) of several. Raises ValueError."""
    text = plain(text)
    if len(text) > LONGEST:
        raise ValueError("too long")
    if "=" in text:  # x = 5 is 5
        left, _, text = text.rpartition("=")
        if not re.fullmatch(rf"\s*[A-Za-z](\w{{0,2}}|{_SUBSCRIPT})(\([a-z]\))?\s*", left):
            raise ValueError("an equation, no expression")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if not text.startswith("(") else text
    tokens, at = [], 0
    while at < len(text.rstrip()):
        if not (m := _TOKEN.match(text, at)):
            raise ValueError(f"{text[at:][:10]!r} is not read")
        tokens.append(("num", m[1]) if m[1] else ("name", re.sub(r"[][]", "", m[2])) if m[2] else ("op", m[3]))
        at = m.end()
    return _Parser(tokens).all()


class _Parser:
    def __init__(self, tokens):
        self.tokens, self.at, self.depth = tokens, 0, 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, op=None):
        token = self.peek()
        if op is not None and token != ("op", op):
            raise ValueError(f"{op!r} was expected, not {token[1]!r}")
        self.at += 1
        return token

    def all(self):
        out = self.several()
        if self.peek()[0] != "end":
            raise ValueError(f"{self.peek()[1]!r} comes unexpectedly")
        return out

    def several(self):
        items = [self.sum()]
        while self.peek() == ("op", ","):
            self.take()
            items.append(self.sum())
        return items[0] if len(items) == 1 else (",", *items)

    def sum(self):
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("too deep")
        out = self.product()
        while self.peek() in (("op", "+"), ("op", "-")):
            out = (self.take()[1], out, self.product())
        self.depth -= 1
        return out

    def product(self):
        out = self.signed()
        while True:
            kind, what = self.peek()
            if (kind, what) in (("op", "*"), ("op", "/")):
                self.take()
                out = (what, out, self.signed())
            elif kind == "num" and self.tokens[self.at - 1][0] == "num":
                raise ValueError("two numbers side by side")  # 10 000 is not nothing
            elif kind in ("num", "name") or (kind, what) == ("op", "("):  # 2x, 3(x+1)
                out = ("*", out, self.power())
            else:
                return out

    def signed(self):
        if self.peek() in (("op", "-"), ("op", "+")):
            sign = self.take()[1]
            self.depth += 1
            if self.depth > DEEPEST:
                raise ValueError("too deep")
            out = self.signed()
            self.depth -= 1
            return ("*", ("num", "-1"), out) if sign == "-" else out
        return self.power()

    def power(self):
        base = self.atom()
        if self.peek() == ("op", "!"):
            self.take()
            base = ("!", base)
        if self.peek() in (("op", "^"), ("op", "**")):
            self.take()
            return ("^", base, self.signed())
        return base

    def atom(self):
        kind, what = self.take()
        if kind == "num":
            return ("num", what)
        if kind == "name" and what in FUNCTIONS:
            power = None
            if self.peek() in (("op", "^"), ("op", "**")):  # sin^2 x; sin^-1 x is the inverse
                self.take()
                power = self.atom()
            of = self.bracket() if self.peek() == ("op", "(") else self.power()
            if power == ("*", ("num", "-1"), ("num", "1")):
                if "a" + what not in FUNCTIONS:
                    raise ValueError(f"no inverse of {what}")
                return ("a" + what, of)
            return ("^", (what, of), power) if power else (what, of)
        if kind == "name":
            return ("var", what)
        if what == "(":
            out = self.several()
            self.take(")")
            return out
        if what == "|":
            out = self.sum()
            self.take("|")
            return ("abs", out)
        raise ValueError(f"{what!r} comes unexpectedly")

    def bracket(self):
        self.take("(")
        out = self.sum()
        self.take(")")
        return out


def names(t: Any) -> set[str]:
    return {t[1]} - {"pi", "e"} if t[0] == "var" else set() if t[0] == "num" else set().union(*(names(x) for x in t[1:]))


def value(t: Any, point: dict[str, complex]) -> complex:
    """At a point, in double precision. Raises ValueError, OverflowError or ZeroDivisionError where there is none. Where a name is
    negative only what is real all the way counts: sqrt(x^3) = x sqrt(x) is meant for x that have a root, |x| = x is wrong."""
    kind, *of = t
    if kind == "num":
        return complex(float(of[0]))
    if kind == "var":
        return {"pi": cmath.pi, "e": cmath.e}.get(of[0]) or point[of[0]]
    if kind == ",":
        raise ValueError("several values in one")
    a = [value(x, point) for x in of]
    if kind == "^" and abs(a[1]) > LARGEST:
        raise ValueError("too large an exponent")
    out = complex(_apply(kind, a, cmath, _factorial))
    if abs(out.imag) > 1e-12 * abs(out) and any(v.real < 0 for v in point.values()):
        raise ValueError("not real")
    return out


def _apply(kind: str, a: list, maths: Any, factorial: Any) -> Any:
    if kind in "+-*/^":
        return {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "/": lambda x, y: x / y, "^": lambda x, y: x**y}[kind](*a)
    if kind in _ONE_OVER:
        return 1 / getattr(maths, _ONE_OVER[kind])(a[0])
    return abs(a[0]) if kind == "abs" else factorial(a[0]) if kind == "!" else getattr(maths, "log" if kind == "ln" else kind)(a[0])


def _factorial(x: complex) -> float:
    if x.imag:
        raise ValueError("no factorial")
    return math.gamma(x.real + 1)


def _exact(t: Any, sympy) -> Any:
    kind, *of = t
    if kind == "num":
        return sympy.Rational(of[0])
    if kind == "var":
        return {"pi": sympy.pi, "e": sympy.E}.get(of[0]) or sympy.Symbol(of[0], positive=True)
    if kind == ",":
        raise ValueError("several values in one")
    a = [_exact(x, sympy) for x in of]
    if kind in "^!" and a[-1].is_number and not abs(a[-1]) <= LARGEST:
        raise ValueError("too large an exponent or factorial")
    return _apply(kind, a, sympy, sympy.factorial)


# No numbers that anything but an identity is likely to cross at.
_POINTS = (0.7390851332, 1.3247179572, 2.2360679775, 3.3598856662, 0.2614972128)


def _same(a: str, b: str, record: dict | None = None) -> float:
    letters = lambda text: re.sub(r'["\\]|(?<!\d)\s+|\s+(?!\d)', "", plain(text))  # 1 2 is not 12
    try:
        x, y = parse(a), parse(b)
    except (ValueError, RecursionError):
        return float(letters(a) == letters(b))
    several = lambda t: list(t[1:]) if t[0] == "," else [t]
    pairs = list(zip(several(x), several(y)))
    return float(len(several(x)) == len(several(y)) and all(_one(p, q) for p, q in pairs))


def _one(x: Any, y: Any) -> bool:
    known = sorted(names(x) | names(y))
    met = 0
    # Five times all positive, then all negative, then each by itself.
    for k, negative in [(k, ()) for k in range(len(_POINTS))] + [(0, n) for n in (known, *([n] for n in known)) if n]:
        point = {n: complex((_POINTS[(k + i) % len(_POINTS)] + 0.01 * i) * (-1 if n in negative else 1)) for i, n in enumerate(known)}
        try:
            p, q = value(x, point), value(y, point)
        except (ValueError, OverflowError, ZeroDivisionError):
            continue
        if not abs(p - q) <= 1e-9 * max(abs(p), abs(q), 1e-12):
            return False
        met += 1
    try:
        import sympy
    except ImportError:
        return met > 0
    try:
        difference = _exact(x, sympy) - _exact(y, sympy)
        return difference == 0 or difference.equals(0) is not False and (not difference.is_Rational and met > 0)
    except (ValueError, ZeroDivisionError, TypeError, RecursionError):
        return False


@functools.cache
def _pool(seconds: float) -> Pool:
    return Pool(f"{__name__}:_same", _same, Limits(seconds, on_error="0"))


def equal(a: str, b: str, seconds: float = 5.0) -> bool:
    """Whether two texts say the same expression (or the same several, with commas, in the same order). What can not be read is
    compared as text; what takes longer than `seconds` is not equal."""
    if a.strip() == b.strip():
        return True
    if max(len(a), len(b)) > 4 * LONGEST:
        return False
    return _pool(seconds).score(Cases([a], [b], [{}], [[]]))[0] == 1.0
