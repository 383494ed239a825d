"""`jaxalign eval --frontier=RUN/STAGE,...`: what policies earned against how far they went, where that turned over, and how it is drawn.

Read from what a stage wrote while it trained: eval/kl with eval/gold, where the config had a world.watch, and objective/kl with
objective/scores (`reward`, where there is no critic), the reward that an online stage was trained on. A stage with neither is asked anew, at each checkpoint that it kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from jaxalign.report import frontier as drawing
from jaxalign.report.frontier import KINDS, measured
from jaxalign.train.log import read_jsonl
from jaxalign.types import UserError


def define(fv):
    flags.DEFINE_list("frontier", [], "directories of stages, or of a run with several: reward against KL, where it turns over, and the fitted form; needs no --config", flag_values=fv)
    flags.DEFINE_string("out", "", "with --frontier: where frontier.json and frontier.svg go (default: beside the first stage)", flag_values=fv)


def main(fv) -> None:
    import jax

    directories = stages(fv.frontier, fv.workdir)
    got = {name: {"directory": str(d), **measured(read_jsonl(d / "metrics.jsonl"))} for name, d in directories.items()}
    for name, d in directories.items():
        if fv.reward or not any(k in got[name] for k in KINDS):
            try:
                got[name]["gold"] = drawing.summary(asked(d, fv))
                got[name]["missing"] = [m for m in got[name]["missing"] if "eval/gold" not in m]
            except UserError as e:
                got[name]["missing"].append(str(e))
    if jax.process_index():
        return
    missing = [f"{n}: {m}" for n, g in got.items() for m in g["missing"]]
    if not any(k in g for g in got.values() for k in KINDS):
        raise UserError("no stage has points of KL and reward\n  " + "\n  ".join(missing))
    out = Path(fv.out) if fv.out else next(iter(directories.values())).parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.json").write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
    (out / "frontier.svg").write_text(drawing.document(got), encoding="utf-8")
    print("\n".join([*table(got), *missing, f"written: {out / 'frontier.json'} and {out / 'frontier.svg'}"]))


def stages(named: list[str], workdir: str | None) -> dict[str, Path]:
    """{name for people: directory} of the stages that are meant. Names are looked for in the run's directory first."""
    found: list[Path] = []
    for n in named:
        path = Path(workdir, n) if workdir and Path(workdir, n).is_dir() else Path(n)
        inside = [p.parent for p in sorted(path.glob("*/metrics.jsonl"))]
        if not path.is_dir() or not (path / "metrics.jsonl").exists() and not inside:
            raise UserError(f"--frontier: {path} holds no metrics.jsonl; name a stage's directory, such as runs/quickstart/ppo, or that of a run")
        found += [path] if (path / "metrics.jsonl").exists() else [p for p in inside if measured(read_jsonl(p / "metrics.jsonl")).keys() & KINDS.keys()] or inside
    found = list(dict.fromkeys(p.absolute() for p in found))
    short = lambda p, n: "/".join(p.parts[-n:])
    alone = lambda p: next(n for n in range(1, len(p.parts) + 1) if [short(q, n) for q in found].count(short(p, n)) == 1)
    return {short(p, alone(p)): p for p in found}


def asked(directory: Path, fv) -> np.ndarray:
    """f64[N,3], step, KL and reward: answers of the policy as it began, and at each checkpoint that the stage kept, to the same prompts: those
    of --prompts, or the world's held-out ones. Their reward is --reward's, or the world's own; the KL is to the stage's reference, which it
    need not have begun as."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals.watch import watch
    from jaxalign.train import checkpoint, state

    kept = checkpoint.Checkpoints(directory / "checkpoints")
    if len(kept.steps()) < 2:
        raise UserError(f"{len(kept.steps())} checkpoints are kept, too few to ask the policy anew along its way; set train.save_every and train.keep")
    w, name, _ = build.opened(str(directory))
    c, world = build.ConfigDict(w.config.section), build.embedded(w.config)
    origin = (c.get("rl") or {}).get("reference") or c.get("reference") or c.init or w.config.model.path
    if c.objective.name in build.REWARDS or not origin:
        raise UserError("this stage trained no policy that started from another")
    if not fv.reward and world is None:
        raise UserError("the run has no world that knows a gold reward; name one with --reward=package.module:function, and --prompts=FILE")
    prompts = fv.prompts or w.find("data/prompts_eval.jsonl")
    records = [r for r, _ in rows.read(prompts) for _ in range(max(fv.samples, 1))]
    reward = build.imported(fv.reward) if fv.reward else None
    gold = world.gold_rewards if reward is None else lambda asked, said, records: np.array([reward(build.shown(r), t, r) for r, t in zip(records, said)], float)
    reference = build.load_params(w, origin, w.model.specs(), f"{name}, reference")
    how = build.sampling(w, w.config.world.sampling if world is not None and not fv.reward else build.ConfigDict({"max_new": fv.max_new}))
    look = watch(w.model, how, build.prompt_rows(w, records, min(len(records), 256)), records, gold, w.decode, w.mesh, reference=reference)
    s = build.make_stage(w, name, c, directory)
    if s.model is not w.model and "rl" not in c:
        raise UserError(f"a policy of {c.objective.name} decodes with heads of its own; its checkpoints are not asked")
    begin, key = s.begin()[0], jax.random.key(w.config.seed)
    states = ((step, kept.restore(step, state.abstract(begin), only="state")[0]) for step in kept.steps())
    points = [(step, look(build.result(s.objective, c, at, s.base), key, step)) for step, at in ((0, begin), *states)]
    return np.array([(step, max(v["kl"], 0.0), v["gold"]) for step, v in points])


def table(got: dict) -> list[str]:
    """Lines for the terminal."""
    from jaxalign.report.read import show

    rows = [["stage", "reward", "points", "highest: step", "KL", "reward", "end: KL", "reward", "turned", "fit: R2", "turns at KL"]]
    for name, g in got.items():
        for kind in KINDS:
            if kind in g:
                s, f = g[kind], g[kind].get("fit", {})
                at = "–" if not f else show(f["turnover"], 3) if f.get("turnover", math.inf) <= 4 * max(p[1] for p in s["points"]) else "not seen"
                highest = [s["turn"]["step"], *(show(s["turn"][k], 3) for k in ("kl", "reward"))]
                rows.append([name, kind, len(s["points"]), *highest, *(show(s["end"][k], 3) for k in ("kl", "reward")), "yes" if s["turned"] else "no", show(f.get("r2"), 3), at])
    width = [max(len(str(r[i])) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{x!s:{'<' if i < 2 else '>'}{n}}" for i, (x, n) in enumerate(zip(r, width))).rstrip() for r in rows]
