"""Numbers that other implementations gave (tests/vectors, see its README), and a proof that each is read: a test module says which
keys of a file are its own and can read no others; when all its tests have passed, conftest.py asks `unread` for those nobody
looked at. That together they claim every key is in test_recordings.py."""

import fnmatch
import json
from pathlib import Path
from types import ModuleType

import numpy as np

VECTORS = Path(__file__).parent / "vectors"


def keys(file: str) -> dict:
    """{key: number} of an .npz, or of a .json, whose nested keys are joined by "/"."""
    if file.endswith(".npz"):
        return dict(np.load(VECTORS / file))
    flat = lambda d, at: {k: v for name, x in d.items() for k, v in (flat(x, f"{at}{name}/") if isinstance(x, dict) else {at + name: x}).items()}
    return flat(json.loads((VECTORS / file).read_text()), "")


class Recorded:
    """Of a file, the keys that match one of the patterns."""

    def __init__(self, file: str, patterns: tuple[str, ...]):
        self.file, everything = file, keys(file)
        for p in patterns:
            assert fnmatch.filter(everything, p), f"{file} has nothing like {p!r}"
        self.numbers = {k: v for k, v in everything.items() if any(fnmatch.fnmatchcase(k, p) for p in patterns)}
        self.files, self.unread = list(self.numbers), set(self.numbers)

    def __getitem__(self, key: str):
        if key not in self.numbers:
            raise KeyError(f"{key!r} is not among the keys of {self.file} that this module says it reads")
        self.unread.discard(key)
        return self.numbers[key]


def load(file: str, *patterns: str) -> Recorded:
    """To be called at the top of a test module; no patterns: every key."""
    return Recorded(file, patterns or ("*",))


def unread(module: ModuleType) -> list[str]:
    """What a test module claims and has not read."""
    values = [x for v in vars(module).values() for x in (v.values() if isinstance(v, dict) else (v,)) if isinstance(x, Recorded)]
    return sorted(f"{x.file}: {k}" for x in values for k in x.unread)
