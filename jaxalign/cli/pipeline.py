"""Raw text to aligned models and a report: every stage of one config, each picking up what the one before it left.

Every part is done once: its result is written under a temporary name and renamed, or is a checkpoint, so the command
can be killed anywhere and run again.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_string("profile", "", "write a trace of a few steps of a stage under this directory, for xprof or TensorBoard; DIR:FIRST-LAST chooses them (3-5)", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    if "stages" not in fv.config:
        raise UserError("this config has one stage: run it with jaxalign train")
    import jax

    from jaxalign.train import checkpoint

    with checkpoint.lock(fv.workdir, jax.process_index()):
        run(fv.config, Path(fv.workdir), fv.profile)


def run(config, workdir: Path, profile: str = "") -> dict:
    """The whole pipeline; returns the evaluation."""
    import jax

    from jaxalign import build, report
    from jaxalign.cli import eval as evaluation_verb

    w, world, clock = trained(config, workdir, profile)
    with clock("evaluate"):
        evaluation = evaluation_verb.evaluate(w, world, config)
    evaluation["stages"], evaluation["seconds"] = list(build.stages(config)), clock.seconds
    evaluation["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if jax.process_index() == 0:
        _replace(workdir / "evaluation.json", json.dumps(evaluation, indent=1))
        print(report.console(evaluation))
        print(f"report: {report.write(workdir)}")
    return evaluation


def trained(config, workdir: Path, profile: str = "") -> tuple:
    """(what the stages share, the world or None, the clock) once data, tokenizer and every stage of the config are there."""
    import jax

    from jaxalign import build
    from jaxalign.cli import lineage, rounds

    build.check(config)
    clock = Clock(workdir)
    world = build.embedded(config)
    if world is not None:
        with clock("data"):
            _write_data(world, config, workdir)
    with clock("tokenizer"):
        w = build.world(config, workdir)
        if jax.process_index() == 0:
            w.tokenizer.save(str(workdir / "tokenizer"))
    for name, c in build.stages(config).items():
        if world is not None and Path(c.data.path).name in LABELLED and not (workdir / c.data.path).exists():
            with clock("label"):
                _label(w, world, config)
        if rounds.missing(w, config, c):
            with clock("label"):
                rounds.write(w, world, config, c)
        rounds.note(w, config, c)
        if (workdir / name / "params" / "manifest.json").exists():
            if jax.process_index() == 0:
                print(f"{name}: already done")
            lineage.check(w, name, c)
            continue
        with clock(name):
            s = build.make_stage(w, name, c, workdir / name)
            params = s.finish(s.go(profile))
            s.save(params)
            lineage.stage(w, name, c, params)
            del s, params
    return w, world, clock


class Clock:
    """Seconds per part, kept in the run directory so that a resumed run adds up."""

    def __init__(self, workdir: Path):
        self.path = workdir / "seconds.json"
        self.seconds = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __call__(self, part: str):
        import contextlib

        @contextlib.contextmanager
        def timed():
            begin = time.monotonic()
            try:
                yield
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - begin
                self.seconds["total"] = sum(v for k, v in self.seconds.items() if k != "total")
                _replace(self.path, json.dumps(self.seconds))

        return timed()


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temp.write_text(text)
    os.replace(temp, path)


def _write_data(world, config, workdir: Path) -> None:
    import jax

    from jaxalign import build

    sizes = dict(config.world.sizes)
    if jax.process_index() == 0 and not all((workdir / "data" / f"{n}.jsonl").exists() for n in sizes):
        world.write_all(workdir / "data.tmp", sizes, config.seed)
        (workdir / "data").mkdir(parents=True, exist_ok=True)
        for f in (workdir / "data.tmp").iterdir():
            os.replace(f, workdir / "data" / f.name)
        (workdir / "data.tmp").rmdir()
    build.barrier("data")


LABELLED = ("rankings.jsonl", "pairs.jsonl", "rankings_eval.jsonl", "pairs_eval.jsonl", "all_pairs.jsonl", "all_pairs_eval.jsonl")


def _label(w, world, config) -> None:
    """Samples of the SFT model, ranked by the world's labellers: rankings and, from them, disjoint pairs for DPO."""
    import jax
    import numpy as np

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy
    from jaxalign.ops import nn
    from jaxalign.tasks.reviews import pairs_of, write_jsonl

    params = build.load_params(w, "sft", w.model.specs(), "label")
    how = build.sampling(w, config.world.sampling)
    for split, file, count in (("eval", "prompts_eval.jsonl", config.world.ranked_eval), ("train", "prompts.jsonl", config.world.ranked)):
        prompts = [r for r, _ in rows.read(str(w.workdir / "data" / file))][:count]
        ks = [7] * len(prompts) if split == "eval" else world.candidates(len(prompts), config.seed, *config.world.get("candidates", ()))  # least and most
        repeated = [p for p, k in zip(prompts, ks) for _ in range(k)]
        key = nn.fold(jax.random.key(config.seed), "label", split)
        got = policy.sample(w.model, params, how, build.prompt_rows(w, repeated, 256), w.decode, key, w.mesh, score=False)
        texts = iter(got.completions)
        # An empty completion, or one with control characters (byte tokens of a young model), is no answer that a person
        # could rank; it is left out, and so is a prompt left with one.
        groups = [[t for t in (next(texts) for _ in range(k)) if t.strip() and not rows.unclean(t)] for k in ks]
        kept = [(p, g) for p, g in zip(prompts, groups) if len(set(g)) > 1]
        rankings = world.rankings([p for p, _ in kept], [g for _, g in kept], config.seed + (split == "eval"))
        pairs = disjoint_pairs(rankings, np.random.default_rng([config.seed, split == "eval"]))
        suffix = "_eval" if split == "eval" else ""
        if jax.process_index() == 0:
            files = {f"rankings{suffix}": rankings, f"pairs{suffix}": pairs}
            if any(Path(c.data.path).name == "all_pairs.jsonl" for c in build.stages(config).values()):
                files[f"all_pairs{suffix}"] = pairs_of(rankings)
            for name, records in files.items():
                temp = write_jsonl(w.workdir / "data" / f"{name}.tmp", records)
                os.replace(temp, w.workdir / "data" / f"{name}.jsonl")
    build.barrier("label")


def disjoint_pairs(rankings: list[dict], rng) -> list[dict]:
    """Preference pairs of the answers of each ranking, each answer in one pair at most; ties are left out."""
    pairs = []
    for r in rankings:
        order = rng.permutation(len(r["ranks"]))
        for i, j in zip(order[::2], order[1::2]):
            a, b = (i, j) if r["ranks"][i] < r["ranks"][j] else (j, i)
            if r["ranks"][a] != r["ranks"][b]:
                pairs.append({"prompt": r["prompt"], "chosen": r["completions"][a], "rejected": r["completions"][b]})
    return pairs
