"""How much memory a training step takes, stage by stage, beside TRL's: each program alone, in a fresh process.

    python benchmarks/memory.py --peer-python /path/to/peers/bin/python --trl110 /path/to/trl-1.10 --write docs/performance.md
    python benchmarks/memory.py --tasks sft dpo --sizes tiny --steps 2

The peers are those of speed.py, whose first lines say how to install them; the shapes too: 8 rows or pairs of 256 tokens,
16 samples of 96. "peak" is the most that the process has held (on a GPU, with --gpu, what it has held on the card), "over
imports" the same less what it held once its libraries were imported; "of TRL" compares the latter, which is what grows
with the model. Ours comes in variants: what the backward pass makes again (model.remat) and how wide the optimizer's
moments are (optim.name). On a CPU XLA orders a program for concurrency, not for memory, and so undoes most of what remat
saves; "in order" is with --xla_cpu_enable_concurrency_optimized_scheduler=false.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from pairing import Process
from speed import about, call, environment, write
from work import SIZES, TASKS, Work, shapes

STAGES = tuple(t for t in TASKS if t != "sample")
VARIANTS = {
    "jaxalign": {},
    "remat qkv+attn": {"remat": "qkv+attn"},
    "remat full": {"remat": "full"},
    "remat full, in order": {"remat": "full"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "remat full, adamw_8bit": {"remat": "full", "optimizer": "adamw_8bit"},
}
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
COLUMNS = ("task", "size", "program", "peak MiB", "over imports MiB", "of TRL", "step s")


def measure(a, which: str, w: Work, log, in_order: bool = False) -> tuple[float, float, float]:
    """(peak, peak less what it held after its imports, median seconds of a step) of one program."""
    command, env = environment(a, which, w)
    env |= {"XLA_FLAGS": IN_ORDER} if in_order else {}
    p = Process([*command, "run", w.dumps()], env, log)
    try:
        for _ in range(w.total - 1):
            p.step()
    finally:
        p.close()
    peak = p.peak("device_mib" if a.gpu else "mib")
    return peak, peak - (0 if a.gpu else p.steps[0]["idle_mib"]), p.median("wall", w.warmup)


def rows(a, task: str, size: str, log):
    """One line per program, as cells."""
    sides = [("TRL", "peer", {})] if a.peer and (task != "ppo" or a.trl110) else []
    sides += [(name, "ours", more) for name, more in VARIANTS.items() if name in a.variants]
    theirs = None
    with tempfile.TemporaryDirectory(prefix="jaxalign-bench-") as weights:
        for name, which, more in sides:
            w = Work(task, "trl", size, a.steps, 1, a.gpu, weights, **shapes(task, a.gpu), **more)
            if not any(Path(weights).iterdir()):
                call(a, "ours", "export", w)
            peak, held, seconds = measure(a, which, w, log, name.endswith("in order"))
            theirs = held if which == "peer" else theirs
            of = "" if theirs is None or which == "peer" else f"{held / theirs:.2f}"
            row = (task, size, name, f"{peak:,.0f}", f"{held:,.0f}", of, f"{seconds:.3g}")
            print("  ".join(f"{k} {v};" for k, v in zip(COLUMNS, row)), file=sys.stderr, flush=True)
            yield row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", choices=STAGES, default=STAGES)
    p.add_argument("--sizes", nargs="+", choices=SIZES, help="default: tiny small (0.5b with --gpu)")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    p.add_argument("--steps", type=int, default=3, help="measured steps, after one that compiles")
    p.add_argument("--no-peer", dest="peer", action="store_false", help="ours alone")
    p.add_argument("--peer-python", default=sys.executable)
    p.add_argument("--trl110", type=Path, help="directory that holds TRL 1.10, for ppo")
    p.add_argument("--gpu", action="store_true", help="bf16 on the first GPU, larger shapes")
    p.add_argument("--write", type=Path, help="put the table into this page, between its markers")
    p.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "jaxalign-memory.log", help="what the programs print")
    a = p.parse_args()
    if a.steps < 1:
        p.error("--steps must be at least 1")
    a.trl110 = a.trl110 and a.trl110.resolve()
    with open(a.log, "w") as log:
        table = [COLUMNS, ("---",) * len(COLUMNS), *(r for size in a.sizes or (["0.5b"] if a.gpu else ["tiny", "small"]) for task in a.tasks for r in rows(a, task, size, log))]
    text = f"{about(a)}.\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in table)
    print(text)
    if a.write:
        write(a.write, text, "memory.py")


if __name__ == "__main__":
    main()
