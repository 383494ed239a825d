"""What came from what: WORKDIR/lineage.jsonl, a line for every stage that a pipeline finished and every file of labels it made.

A line has "name", "kind" (stage or data), "weights" (a hash of every bit of them), "parents" {field: {"from", "weights"}} and "data"
{path: SHA-256}; that of a reward model also "held_out", its last metrics on data.eval_path. Nothing reads it to decide what to run; it says what was run, and notices what has changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

FILE = "lineage.jsonl"


def read(workdir: Path) -> dict[str, dict]:
    """{name: line}, in the order in which they were written."""
    path = workdir / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {e["name"]: e for e in map(json.loads, filter(None, lines))}


def write(workdir: Path, entry: dict) -> None:
    """Puts the line in, in the place of an older one of that name; all or nothing."""
    import jax

    if jax.process_index():
        return
    known = read(workdir) | {entry["name"]: entry}
    temp = workdir / f"{FILE}.{os.getpid()}.tmp"
    temp.write_text("".join(json.dumps(e, sort_keys=True) + "\n" for e in known.values()), encoding="utf-8")
    os.replace(temp, workdir / FILE)


def stage(w, name: str, c, params) -> None:
    """Notes a finished stage; its files are hashed as they lie there now."""
    from jaxalign.train import state

    weights = state.fingerprint(params)
    write(w.workdir, {"name": name, "kind": "stage", "objective": c.objective.name, "weights": weights, **_held_out(w, name, c), **_origins(w, c)})


def _held_out(w, name: str, c) -> dict:
    """What a policy of the round was taught by: how good the reward model was, round by round, is the first thing to look at when a round gained nothing."""
    import jax

    from jaxalign import build
    from jaxalign.train.log import read_jsonl

    path = w.stage_dir(name) / "metrics.jsonl"
    if jax.process_index() or c.objective.name not in build.REWARDS or not path.exists():
        return {}
    said = [e for r in read_jsonl(path) if (e := {k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")})]
    return {"held_out": said[-1]} if said else {}


def check(w, name: str, c) -> None:
    """Of a stage that is done already: notes it where nobody has, and says what it was made of that is not the same any more."""
    import jax

    from jaxalign import build

    known = read(w.workdir).get(name)
    build.barrier("lineage read")  # nobody writes before all have looked
    if known is None:
        from jaxalign.train import checkpoint

        path = w.stage_dir(name) / "params"
        return stage(w, name, c, checkpoint.load_tree(path, checkpoint.structure(path))[0])
    now = _origins(w, c)
    changed = [f"setting {k}" for k in changed_settings(w.stage_dir(name), w.config, c)]
    changed += [f"{kind} {k}" for kind in ("parents", "data") for k, v in known.get(kind, {}).items() if now[kind].get(k, v) != v]
    if changed and jax.process_index() == 0:
        print(f"{name}: warning: changed since it was trained: {', '.join(changed)}; delete {w.stage_dir(name)} to train it anew")


def changed_settings(directory: Path, config, c, also: tuple[str, ...] = ()) -> list[str]:
    """The settings that shape a stage's training (`build.settings`; `also`: whole sections of the config) and were others when it was
    trained, by the config.json that it keeps; one that there was no name for yet is none."""
    from jaxalign import build
    from jaxalign.train.log import as_json, leaves, redact

    try:
        said = build.ConfigDict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        of = lambda x, s: leaves(redact(as_json(build.settings(x, s) | {k: build.plain(x[k]) for k in also if k in x})))
        then, now = of(said, said.section), of(config, c)
    except (OSError, ValueError, AttributeError, KeyError):  # kept by another version, or not at all
        return []
    return sorted(k for k in then.keys() & now.keys() if then[k] != now[k])


def _origins(w, c) -> dict:
    """{"parents", "data"} of a stage's config."""
    rl = c.get("rl") or {}
    named = {"init": c.init or w.config.model.path, "reference": c.get("reference"), "teacher": c.get("teacher"), "rl.reference": rl.get("reference"), "adapter.path": c.adapter.path, "normalisation.policy": (c.get("normalisation") or {}).get("policy")}
    judges = [r.strip().removeprefix("judge=") for r in (rl.get("reward") or "").split(",") if r.strip()]
    named |= {f"rl.reward{'' if len(judges) == 1 else f' {i}'}": r for i, r in enumerate(judges, 1)}
    named |= {k: rl.get(k) for k in ("judge", "environment") if rl.get(k)}
    more = ((c, "normalisation"), (rl, "mix"))  # sections with a file of their own
    paths = [*(c.data.path or "").split(","), c.data.get("eval_path") or "", *(at[k].get("path") or "" for at, k in more if at.get(k))]
    return {"parents": {k: origin(w, v) for k, v in named.items() if v}, "data": {p: file_hash(w.find(p)) for p in filter(None, paths)}}


def origin(w, named: str) -> dict:
    """{"from", "weights"}: of a stage what its line says, of a directory a hash of its files, of a function its name."""
    known = read(w.workdir).get(named)
    if known is not None:
        return {"from": named, "weights": known.get("weights")}
    path = Path(w.find(named))
    if not path.is_dir():
        return {"from": named}
    files = [path / "params/manifest.json"] if (path / "params").is_dir() else sorted(path.glob("*.safetensors")) or sorted(path.glob("adapter/*"))
    return {"from": named, "files": hashlib.sha256("".join(f"{f.name} {file_hash(f)}\n" for f in files if f.is_file()).encode()).hexdigest()}


def file_hash(path: str | os.PathLike) -> str | None:
    """SHA-256 of a file; of a pattern those of its files; None where there is none."""
    import glob

    found = [str(path)] if os.path.isfile(path) else sorted(f for f in glob.glob(str(path)) if os.path.isfile(f))
    digests = []
    for f in found:
        with open(f, "rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return None if not digests else digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
