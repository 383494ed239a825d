"""How fast jaxalign is beside torch, transformers and TRL: the same shapes, the same weights, in turn, step by step.

    python benchmarks/speed.py sft --size small --peer raw
    python benchmarks/speed.py all --peer-python /path/to/peers/bin/python --trl110 /path/to/trl-1.10 --write docs/performance.md

The peers may live in an interpreter of their own (--peer-python):

    pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate datasets
    pip install google-tunix==0.1.7      # of another interpreter still, Python 3.12 (--tunix-python)
    pip download --no-deps trl==1.10.0 && unzip -d trl110 trl-1.10.0-*.whl      # the last with a PPO trainer; --trl110 trl110

A ratio is the peer's seconds over ours, step by step; above 1, jaxalign is faster. Wall is what you wait; cpu (seconds
of both cores together) is steadier on a machine that others use. "same" is a check that both sides compute one thing:
the largest relative difference of the losses of all steps (so gradients and updates agree too), or how many greedily
decoded tokens are equal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from pairing import Process, lockstep, ratios
from work import SIZES, TASKS, Work, flops, shapes, units

HERE = Path(__file__).parent
# As the command `jaxalign` starts itself (cli.main): not for what it computes, but for how its memory is paged.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
PEERS = {"sft": ("raw", "compile", "trl", "tunix"), "dpo": ("trl", "precompute"), "reward": ("trl",), "sample": ("generate", "static"), "ppo": ("trl",), "grpo": ("trl",)}
NAMES = {"raw": "transformers, plain loop", "compile": "transformers + torch.compile", "trl": "TRL", "tunix": "Tunix", "precompute": "TRL, reference precomputed", "generate": "transformers generate", "static": "generate, static cache"}
ALL = [
    *(("sft", p, "small") for p in ("raw", "compile", "trl", "tunix")),
    *(("sft", "raw", s) for s in ("tiny", "small4k", "medium")),
    *(("reward", "trl", s) for s in ("small", "tiny")),
    *(("dpo", p, "small") for p in ("trl", "precompute")),
    *(("sample", p, s) for s, p in (("small", "generate"), ("small", "static"), ("tiny", "generate"), ("medium", "generate"))),
    *((t, "trl", s) for t in ("grpo", "ppo") for s in ("small", "tiny")),
]  # fmt: skip
ALL_GPU = [(t, p, s) for s in ("0.5b", "1b") for t, p in (("sft", "raw"), ("sft", "compile"), ("sft", "trl"), ("dpo", "trl"), ("dpo", "precompute"), ("reward", "trl"), ("sample", "generate"), ("sample", "static"), ("ppo", "trl"), ("grpo", "trl"))]  # fmt: skip
COLUMNS = (
    "task", "size", "peer", "peer s", "ours s", "ours per s", "wall ratio", "cpu ratio", "share of matmul peak peer / ours", "peak MiB peer / ours",
    "first step s peer / ours", "compile s ours cold / cached", "same", "others",
)  # fmt: skip


def environment(a, which: str, w: Work | None = None) -> tuple[list[str], dict[str, str]]:
    """(interpreter and file, extra environment) of a side."""
    if which == "ours":
        env = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]), **HUGE_PAGES}
        # Both sides share the card.
        return [sys.executable, str(HERE / "ours.py")], env | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if a.gpu else {"JAX_PLATFORMS": "cpu"})
    if w is not None and w.peer == "tunix":
        return [a.tunix_python, str(HERE / "peer_tunix.py")], {"JAX_PLATFORMS": "cpu"}
    old = w is not None and w.task == "ppo" and a.trl110
    env = {"PYTHONPATH": str(a.trl110) if old else "", **({} if a.gpu else {"CUDA_VISIBLE_DEVICES": ""}), **(HUGE_PAGES if getattr(a, "huge_pages_for_both", False) else {})}
    return [a.peer_python, str(HERE / "peers.py")], env


def call(a, which: str, verb: str, w: Work) -> str:
    command, env = environment(a, which, w)
    return subprocess.run([*command, verb, w.dumps()], env={**os.environ, **env}, check=True, stdout=subprocess.PIPE, text=True).stdout


def same(peer: Process, ours: Process) -> str:
    """Do both sides compute the same thing?"""
    first = peer.steps[0]["values"], ours.steps[0]["values"]
    if all("greedy" in v for v in first):
        x, y = (np.array(v["greedy"]) for v in first)
        return f"{(x == y).sum()} of {x.size} greedy tokens"
    if all("loss" in v for v in first):
        x, y = (np.array([s["values"]["loss"] for s in p.steps]) for p in (peer, ours))
        return f"losses to {np.max(np.abs(x - y) / np.abs(x)):.0e}"
    return "not comparable: each side samples its own rollouts"


def measure(a, task: str, peer: str, size: str, log) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="jaxalign-bench-") as weights:
        w = Work(task, peer, size, a.steps, a.warmup, a.gpu, weights, **shapes(task, a.gpu))
        call(a, "ours", "export", w)
        cache = {"JAX_COMPILATION_CACHE_DIR": os.path.join(weights, "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        sides = []

        def start(which):
            command, env = environment(a, which, w)
            sides.append(Process([*command, "run", w.dumps()], env | cache, log))
            return sides[-1]

        try:
            p, o = start("peer"), start("ours")
            before = float(call(a, "ours", "peak", w))
            others = lockstep(p, o, a.steps, a.warmup)
            peak = max(before, float(call(a, "ours", "peak", w)))
            again = start("ours")
        finally:
            for s in sides:
                s.close()
    share = lambda side: f"{flops(w) / side.median('wall', a.warmup) / peak:.0%}" if flops(w) else "–"
    compiling = [x.steps[0]["compiling"] for x in (o, again)]
    ratio = lambda what: "{1:.2f} [{0:.2f} {2:.2f}]".format(*ratios(p, o, what, a.warmup))
    n, unit = units(w)
    seconds, memory = o.median("wall", a.warmup), "device_mib" if a.gpu else "mib"
    row = (
        task, size, NAMES[peer], f"{p.median('wall', a.warmup):.3g}", f"{seconds:.3g}", f"{n / seconds:,.4g} {unit}", ratio("wall"), ratio("cpu"), f"{share(p)} / {share(o)}",
        f"{p.peak(memory):.0f} / {o.peak(memory):.0f}", f"{p.first_step:.1f} / {o.first_step:.1f}", "{:.1f} / {:.1f}".format(*compiling), same(p, o), f"{others:.0%}",
    )  # fmt: skip
    return dict(zip(COLUMNS, row))


def table(rows: list[dict[str, str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([r[c] for c in COLUMNS] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(a) -> str:
    """Versions and hardware, for whoever reads the numbers later."""
    w = Work("sft")
    v = {**json.loads(call(a, "ours", "versions", w)), **json.loads(call(a, "peer", "versions", w))}
    if getattr(a, "tunix_python", None):
        v |= json.loads(call(a, "peer", "versions", Work("sft", "tunix")))
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    device = v.pop("device")
    hardware = device if a.gpu else f"{os.cpu_count()} x {cpu}, f32"
    return f"{datetime.date.today()}, {hardware}, Python {platform.python_version()}; jaxalign {commit}, " + ", ".join(f"{k} {x}" for k, x in v.items()) + ("; PPO against trl 1.10.0" if a.trl110 else "")


def write(path: Path, text: str, by: str = "speed.py"):
    """Replace what stands between the markers of a command, or append it with them."""
    begin, end = f"<!-- {by} begin -->", f"<!-- {by} end -->"
    old = path.read_text() if path.exists() else ""
    block = f"{begin}\n{text}\n{end}"
    if begin in old:
        head, rest = old.split(begin, 1)
        path.write_text(head + block + rest.split(end, 1)[1])
    else:
        path.write_text(f"{old.rstrip()}\n\n{block}\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=[*TASKS, "all"])
    p.add_argument("--size", choices=SIZES, help="default: small (0.5b with --gpu); with all: every size of the table")
    p.add_argument("--peer", help="raw, compile, trl or tunix for sft; trl or precompute for dpo; generate or static for sample; default: the first")
    p.add_argument("--steps", type=int, default=7, help="measured steps of each side")
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--peer-python", default=sys.executable)
    p.add_argument("--tunix-python", help="an interpreter with google-tunix; without it, no lines of Tunix")
    p.add_argument("--trl110", type=Path, help="directory that holds TRL 1.10, for ppo")
    p.add_argument("--gpu", action="store_true", help="bf16 on the first GPU, larger shapes")
    p.add_argument("--huge-pages-for-both", action="store_true", help="start the peer too as the command jaxalign starts itself, with huge pages from malloc")
    p.add_argument("--write", type=Path, help="put the table into this page, between its markers")
    p.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "jaxalign-bench.log", help="what the programs print")
    a = p.parse_args()
    if a.task != "all" and a.peer and a.peer not in PEERS[a.task]:
        p.error(f"--peer of {a.task} is one of {', '.join(PEERS[a.task])}")
    if a.steps < 1 or a.warmup < 1:
        p.error("--steps and --warmup must be at least 1: the first step compiles and is not measured")
    a.trl110 = a.trl110 and a.trl110.resolve()
    if a.task == "all":
        todo = [x for x in (ALL_GPU if a.gpu else ALL) if a.size in (None, x[2]) and a.peer in (None, x[1])]
        todo = [x for x in todo if (x[0] != "ppo" or a.trl110) and (x[1] != "tunix" or a.tunix_python)]
    else:
        todo = [(a.task, a.peer or PEERS[a.task][0], a.size or ("0.5b" if a.gpu else "small"))]
    rows = []
    with open(a.log, "w") as log:
        for x in todo:
            rows.append(measure(a, *x, log))
            print("  ".join(f"{k} {v};" for k, v in rows[-1].items()), file=sys.stderr, flush=True)
    text = f"{about(a)}. Medians of {a.steps} steps taken in turn; a ratio is peer / ours [min max].\n\n{table(rows)}"
    print(text)
    if a.write:
        write(a.write, text)


if __name__ == "__main__":
    main()
