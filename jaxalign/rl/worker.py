"""The process that a reward function runs in. `functions.Pool` starts this file as a script and talks JSON lines with it.

Nothing of jaxalign is imported here, so that the file may run as it is; how a function is called stands here, because the same
calls are made without a process of their own too (`functions.Here`).
"""

import importlib
import inspect
import json
import math
import os
import signal
import sys
import traceback

OWN = ("prompts", "completions", "records", "completion_ids")  # what a function of a group may ask for; other names are fields of its records
PLURALS = {"prompts", "completions", "completion_ids"}


def whole_group(fn) -> bool:
    """Whether a function takes lists (prompts, completions, ...) and answers with a list, and not a row at a time: by the names of
    its arguments, of which TRL's functions have `completions` at least, or because it says so with an attribute, fn.group = True."""
    said = getattr(fn, "group", None)
    if isinstance(said, bool):
        return said
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
    return not PLURALS.isdisjoint(names) and {"prompt", "completion"}.isdisjoint(names)


def call_group(fn, prompts, completions, records, ids):
    """fn(prompts=..., completions=..., ...): any of `OWN`, any other name the list of that field of the records, and ** all fields (TRL's
    convention). A function marked as a group's that has names of its own gets prompts, completions and records in that order."""
    known = dict(zip(OWN, (prompts, completions, records, ids)))
    parameters = inspect.signature(fn).parameters.values()
    if PLURALS.isdisjoint(p.name for p in parameters):
        return fn(*[prompts, completions, records][: sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)])
    fields = dict.fromkeys(k for r in records for k in r)
    columns = lambda name: known[name] if name in known else [r.get(name) for r in records]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and (p.name in known or p.name in fields or p.default is p.empty)}
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        named |= {*known, *fields}
    return fn(**{name: columns(name) for name in named})


def plain(value):
    """A number, None, or a list of numbers as JSON has them; {"bad": its repr} for anything else. An infinity is no score."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or isinstance(value, (bool, int, float)):
        return {"bad": repr(value)} if value is not None and math.isinf(value) else value if value is None else float(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, (int, float)) and math.isfinite(x) for x in value):
        return [float(x) for x in value]
    return {"bad": repr(value)[:200]}


def outcomes(fn, group: bool, prompts, completions, records, ids) -> list:
    """One entry for each row: a number, None (no score), a list of numbers (of each of its tokens), or {"bad": ...} or {"error": ...}."""
    try:
        said = call_group(fn, prompts, completions, records, ids) if group else [fn(p, c, r) for p, c, r in zip(prompts, completions, records)]
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return [{"error": f"raised {type(e).__name__}: {e}", "at": f"{at.filename}:{at.lineno}"}] * len(prompts)
    said = said.tolist() if hasattr(said, "tolist") else said
    if group and (not isinstance(said, (list, tuple)) or len(said) != len(prompts)):
        what = f"a list of {len(said)}" if isinstance(said, (list, tuple)) else f"a {type(said).__name__}"
        return [{"error": f"returned {what} for {len(prompts)} rows", "at": ""}] * len(prompts)
    return [plain(x) for x in said]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the run, which saves first
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]
    try:
        module, _, name = first["function"].partition(":")
        fn = getattr(importlib.import_module(module), name)
        group = whole_group(fn)
        said = {"group": group}
    except Exception as e:
        said = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(said), file=answers, flush=True)
    if "error" in said:
        return
    for line in sys.stdin:
        job = json.loads(line)
        if hasattr(signal, "setitimer"):  # the kernel ends this process even inside a C loop, also when the other side was killed and no one is left to do it
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 1)
        out = outcomes(fn, group, job["prompts"], job["completions"], job["records"], job["ids"])
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(out), file=answers, flush=True)


if __name__ == "__main__":
    main()
