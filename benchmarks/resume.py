"""Killed at any moment, run again, the same bits: a small pipeline under SIGKILL.

    python benchmarks/resume.py                 # every stage, about 20 kills
    python benchmarks/resume.py --kills 5       # more random ones per stage

The pipeline of configs/quickstart.py:smoke, made smaller (and PPO richer: two epochs of two minibatches, adaptive KL,
pretraining mixed in), runs once undisturbed. Then again in another directory, where it is killed at moments drawn when
the benchmark runs, from a generator seeded by the clock:

    save      while STAGE/checkpoints holds a directory that is being written, some milliseconds into it
    line      when metrics.jsonl has grown past what the newest checkpoint knows
    epoch     between two minibatches of one PPO iteration
    random    some milliseconds after a drawn step of the stage
    anywhere  some milliseconds after the process was started: data, tokenizer, compilation, labelling, evaluation

What the kill really hit is read from the directory after death; one that missed is drawn again, in that stage done anew.
At the end metrics.jsonl, samples.jsonl and the weights of every stage, the data, the tokenizer and the evaluation must be
those of the undisturbed run, to the bit. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable

ROOT = Path(__file__).resolve().parent.parent
STEPS = 18
STAGES = ("pretrain", "sft", "reward", "ppo", "dpo")
SMALL = {
    **{f"model.{k}": v for k, v in dict(dim=32, layers=1, heads=2, hidden=64).items()},
    **{f"world.sizes.{k}": v for k, v in dict(pretrain=1000, pretrain_eval=20, sft=200, sft_eval=20, prompts=64, prompts_eval=16).items()},
    **dict(zip(("world.ranked", "world.ranked_eval", "world.samples"), (32, 8, 16))),
    **{f"stages.{s}.train.steps": STEPS for s in STAGES},
    **{f"stages.{s}.train.save_every": 3 for s in STAGES},
    **{f"stages.{s}.data.batch_size": 8 for s in ("pretrain", "sft", "reward", "dpo")},
    "stages.ppo.sampling.max_new": 32,
    **{f"stages.ppo.rl.{k}": v for k, v in dict(epochs=2, minibatches=2, target=0.05, horizon=200.0).items()},
    **{f"stages.ppo.rl.mix.{k}": v for k, v in dict(path="data/pretrain.jsonl", batch_size=4, seq_len=64).items()},
    "stages.ppo.objective.ptx_coef": 0.3,
}
ITERATION = 4  # PPO steps from one rollout to the next


def command(workdir: Path) -> list[str]:
    flags = [f"--config.{k}={v}" for k, v in SMALL.items()]
    return [sys.executable, "-m", "jaxalign", "pipeline", f"--config={ROOT}/configs/quickstart.py:smoke", f"--workdir={workdir}", *flags]


# -- what a run directory shows from outside ------------------------------------------------------------------------


def lines(stage: Path) -> int:
    try:
        return (stage / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def newest(stage: Path) -> tuple[int, dict]:
    """(step, meta) of the newest whole checkpoint; (0, {}) if there is none."""
    while True:
        steps = [int(p.parent.name) for p in stage.glob("checkpoints/*/manifest.json") if p.parent.name.isdigit()]
        try:
            return (max(steps), json.loads((stage / f"checkpoints/{max(steps)}/meta.json").read_text())) if steps else (0, {})
        except OSError:  # just renamed away
            continue


def writing(stage: Path) -> dict[str, int]:
    """{name: when it was last written to} of checkpoints being written, or left half-written."""
    out = {}
    for p in stage.glob("checkpoints/*.jaxalign-tmp"):
        with contextlib.suppress(OSError):  # just renamed away
            if ".old" not in p.name:
                out[p.name] = p.stat().st_mtime_ns
    return out


def alive(stage: Path) -> int:
    """Changes when a process has found its place in the stage and writes the config that it goes on with."""
    try:
        return (stage / "config.json").stat().st_mtime_ns
    except OSError:
        return 0


@dataclasses.dataclass
class Moment:
    """What the stage's directory held when the process to be killed had found its place in it."""

    step: int
    halves: dict[str, int]


def ahead(stage: Path) -> int:
    """Bytes of metrics.jsonl that no checkpoint knows."""
    try:
        size = (stage / "metrics.jsonl").stat().st_size
    except OSError:
        return 0
    return size - newest(stage)[1].get("offsets", {}).get("metrics.jsonl", 0)


def finished(stage: Path) -> bool:
    return (stage / "params/manifest.json").exists()


HIT: dict[str, Callable[[Path, Moment], bool]] = {
    "save": lambda s, m: any(m.halves.get(n) != t for n, t in writing(s).items()),
    "line": lambda s, m: lines(s) > m.step and ahead(s) > 0,
    "epoch": lambda s, m: lines(s) > m.step and lines(s) % ITERATION != 0,
    "random": lambda s, m: lines(s) > m.step,
}


# -- killing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Kill:
    stage: str
    kind: str
    after: int  # metric lines to wait for
    delay: float  # seconds beyond what it waits for
    seen: str = ""  # what the directory showed after death
    hit: bool = False


def draw(stage: str, kind: str, rng: random.Random, steps: int = STEPS) -> Kill:
    """A moment: after a drawn step, and some milliseconds into what it waits for. A save takes 50 ms or more."""
    longest = {"save": 0.06, "random": 0.4}.get(kind, 0.0)
    return Kill(stage, kind, rng.randrange(1, steps - 4), rng.uniform(0, longest))


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.0005)


def strike(argv: list[str], directory: Path, kill: Kill, env: dict | None = None, log: Path | None = None) -> None:
    """Starts the command, waits for the moment, SIGKILLs it, and looks at what it left. `directory`: that of the stage."""
    before = alive(directory)
    with open(log or os.devnull, "ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=env)
        until = lambda condition: _until(lambda: process.poll() is not None or condition())  # noqa: E731
        try:
            if kill.kind != "anywhere":
                until(lambda: alive(directory) != before)
                found = Moment(newest(directory)[0], writing(directory))
                until(lambda: lines(directory) >= kill.after or finished(directory))
                until(lambda: HIT[kill.kind](directory, found) or finished(directory))
            time.sleep(kill.delay)
        finally:
            process.kill()
            process.wait()
    step, meta = newest(directory)
    position = f", minibatch {meta['source']['used']} of {ITERATION}" if meta.get("source", {}).get("used") is not None else ""
    half = ", ".join(f"{n}: {sum(1 for p in (directory / 'checkpoints' / n).rglob('*') if p.is_file())} files" for n in writing(directory))
    kill.seen = f"{lines(directory)} lines, {max(ahead(directory), 0)} bytes ahead of checkpoint {step}{position}" + (f"; left {half}" if half else "")
    kill.hit = process.returncode == -9 and (kill.kind == "anywhere" or HIT[kill.kind](directory, found) and not finished(directory))


# -- what must be the same ------------------------------------------------------------------------------------------


def facts(workdir: Path) -> dict[str, object]:
    """{what: value} of a finished pipeline: everything that is not wall-clock."""
    from jaxalign import tree
    from jaxalign.train import checkpoint

    def digest(x: bytes) -> str:
        return hashlib.sha256(x).hexdigest()

    out: dict[str, object] = {}
    for stage in [p.parent for p in sorted(workdir.glob("*/params"))]:
        arrays, _ = checkpoint.load_tree(stage / "params", checkpoint.structure(stage / "params"))
        out[f"{stage.name}/weights"] = digest(b"".join(k.encode() + x.tobytes() for k, x in sorted(tree.flat(arrays).items())))
        for name in ("metrics.jsonl", "samples.jsonl"):
            out[f"{stage.name}/{name}"] = digest((stage / name).read_bytes())
    for path in sorted([*workdir.glob("data/*.jsonl"), *workdir.glob("tokenizer/*.model")]):
        out[str(path.relative_to(workdir))] = digest(path.read_bytes())
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    out["evaluation.json"] = {k: v for k, v in evaluation.items() if k not in ("seconds", "peak_rss_mib")}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1, help="random kills per stage, besides one of each kind")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the moments; default: the clock")
    parser.add_argument("--keep", type=Path, help="work in this directory and leave it")
    args = parser.parse_args()
    rng, begin = random.Random(args.seed), time.monotonic()
    work = args.keep or Path(tempfile.mkdtemp(prefix="jaxalign-resume-"))
    # The compiler is given less to do, and its results are kept for the next process of this benchmark alone.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick}",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    whole, torn = work / "whole", work / "torn"
    work.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}; directory {work}", flush=True)
    subprocess.run(command(whole), env=env, check=True, stdout=subprocess.DEVNULL, stderr=open(work / "whole.log", "wb"))
    print(f"undisturbed run: {time.monotonic() - begin:.0f} s\n\n{'stage':9} {'kind':9} {'after step':>10} {'+ ms':>6}  {'':4}  found after death", flush=True)

    kills: list[Kill] = []

    def report(kill: Kill) -> None:
        kills.append(kill)
        print(f"{kill.stage:9} {kill.kind:9} {kill.after:10} {1000 * kill.delay:6.1f}  {'hit' if kill.hit else 'miss'}  {kill.seen}", flush=True)

    for _ in range(2):
        strike(command(torn), torn / STAGES[0], kill := Kill("(start)", "anywhere", 0, rng.uniform(0.5, 8)), env, work / "torn.log")
        report(kill)
    for stage in STAGES:
        kinds = ["save", "line", *["random"] * args.kills, *(["epoch"] if stage == "ppo" else [])]
        rng.shuffle(kinds)
        for kind in kinds:
            for _ in range(6):
                kill = draw(stage, kind, rng)
                strike(command(torn), torn / stage, kill, env, work / "torn.log")
                report(kill)
                if kill.hit:
                    break
                if finished(torn / stage):  # too late for this stage: it, and what came after it, is done anew
                    for later in STAGES[STAGES.index(stage) :]:
                        shutil.rmtree(torn / later, ignore_errors=True)
    subprocess.run(command(torn), env=env, check=True, stdout=subprocess.DEVNULL, stderr=open(work / "torn.log", "ab"))

    a, b = facts(whole), facts(torn)
    differ = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    few = [s for s in STAGES if len([k for k in kills if k.stage == s and k.hit]) < 3]
    print(f"\n{'':28} undisturbed   {len([k for k in kills if k.hit])} times killed")
    for k in {**a, **b}:
        show = lambda v: v[:8] if isinstance(v, str) else "(numbers)" if v else "missing"  # noqa: E731
        print(f"{k:28} {show(a.get(k)):13} {show(b.get(k)):13} {'DIFFERS' if k in differ else 'same'}")
    print(f"\n{'bit-identical' if not differ else f'{len(differ)} of {len(a)} differ'}; {time.monotonic() - begin:.0f} s" + (f"; fewer than 3 kills in {', '.join(few)}" if few else ""))
    if not args.keep and not differ:
        shutil.rmtree(work)
    return 1 if differ or few else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
