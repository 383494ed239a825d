"""Every recorded number belongs to a test that reads it."""

import ast
import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import recordings

FILES = sorted(str(p.relative_to(recordings.VECTORS)) for pattern in ("*.npz", "*.json", "hf/*/io.npz") for p in recordings.VECTORS.glob(pattern))
NO_NUMBERS = ("packages/*",)  # versions of what recorded them


def claims():
    """(file, patterns) of every `recordings.load`; a file's name may have a part that is filled in."""
    name = lambda a: a.value if isinstance(a, ast.Constant) else "".join(x.value if isinstance(x, ast.Constant) else "*" for x in a.values)
    for path in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "recordings.load" and node.args and path != Path(__file__):
                yield name(node.args[0]), tuple(a.value for a in node.args[1:]) or ("*",)


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_claimed(file):
    patterns = [p for f, ps in claims() if fnmatch.fnmatchcase(file, f) for p in ps] + list(NO_NUMBERS)
    assert patterns != list(NO_NUMBERS), f"no test opens {file}"
    assert [k for k in recordings.keys(file) if not any(fnmatch.fnmatchcase(k, p) for p in patterns)] == []


def test_what_is_claimed_must_be_read():
    some = recordings.load("rloo_loss.npz", "logps", "loss__*")
    module = SimpleNamespace(SOME=some, others={"a": recordings.load("rloo_loss.npz", "mask")}, number=1)
    assert recordings.unread(module) == ["rloo_loss.npz: logps", "rloo_loss.npz: loss__eps0_2", "rloo_loss.npz: mask"]
    assert some["logps"].shape == module.others["a"]["mask"].shape
    assert recordings.unread(module) == ["rloo_loss.npz: loss__eps0_2"] and some.files == ["logps", "loss__eps0_2"]
    with pytest.raises(KeyError, match="'mask' is not among the keys of rloo_loss.npz"):
        some["mask"]
    with pytest.raises(AssertionError, match="nothing like 'los'"):
        recordings.load("rloo_loss.npz", "los")
