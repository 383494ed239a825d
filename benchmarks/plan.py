"""What `jaxalign plan` predicts: the large configs compiled for pods, and a training step at hand predicted and then measured.

    python benchmarks/plan.py large --write docs/plan.md
    python benchmarks/plan.py measured --size small --write docs/plan.md

`large` runs `jaxalign plan` on every preset of configs/large.py, one after another, and tabulates; it needs libtpu (pip
install "jaxalign[plan]"), no TPU, a few GiB and some minutes of one core. `measured` first measures what this machine can
do, a large matrix product and a copy, calls that the chip, predicts a step of the size and measures it. The prediction is a
bound, so the ratio says how near the step comes to it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import write
from work import SIZES

ROOT = Path(__file__).parent.parent
LARGE = {"1b_sft": "v5e:4x4", "8b_dpo": "v5p:4x4x4", "8b_ppo": "v5p:4x4x4", "70b_sft": "v5p:4x8x8"}
COLUMNS = ("preset", "topology", "mesh", "program", "times", "held", "temporaries", "peak GiB", "of", "TFLOP", "HBM GB", "wire GB", "arithmetic", "HBM", "wire", "at best", "tokens/s", "MFU", "splash")


def table(columns, rows) -> str:
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (columns, ["---"] * len(columns), *rows))


def seconds(s: float) -> str:
    return f"{s * 1e3:.0f} ms" if s < 1 else f"{s:.2f} s"


def large(a) -> str:
    import jax
    import libtpu

    rows = []
    for preset, topology in LARGE.items():
        if a.only and preset not in a.only.split(","):
            continue
        a.keep.mkdir(parents=True, exist_ok=True)
        out = a.keep / f"{preset}.json"
        if not out.exists():
            command = [sys.executable, "-m", "jaxalign", "plan", f"--config={ROOT / 'configs' / 'large.py'}:{preset}", f"--topology={topology}", f"--json={out}", f"--text={a.keep / preset}"]
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{preset}: {done.stderr[-2000:]}")
            print(f"{preset} on {topology}\n\n{done.stdout}", file=sys.stderr, flush=True)
        p = json.loads(out.read_text())
        rows += lines(preset, topology, p)
    return f"{datetime.date.today()}, jax {jax.__version__}, libtpu {libtpu.__version__}.\n\n{table(COLUMNS, rows)}"


def lines(preset: str, topology: str, p: dict) -> list[tuple]:
    mesh = " ".join(f"{k} {v}" for k, v in p["mesh"].items())
    held = sum(p["resident"].values()) / 2**30
    whole = (seconds(p["seconds"]), f"{p['tokens_per_second']:,.0f} {p['what']}" if p["tokens_per_second"] else "-", f"{p['mfu']:.0%}" if p["mfu"] else "-")
    out = []
    for q in p["programs"]:
        splash = sum(n for k, n in q["kernels"].items() if k.startswith("splash"))
        wire = sum(v[1] for v in q["collectives"].values())
        times = tuple(seconds(q[k]) for k in ("arithmetic_seconds", "memory_seconds", "link_seconds", "seconds"))
        out.append((
            preset, topology, mesh, q["name"], q["times"], f"{held:.1f}", f"{q['temporaries'] / 2**30:.1f}", f"{q['peak'] / 2**30:.1f}", f"{p['chip']['memory'] / 2**30:.1f}", f"{q['flops'] / 1e12:.3g}",
            f"{q['traffic'] / 1e9:.3g}", f"{wire / 1e9:.3g}", *times, "", "", splash or "-",
        ))  # fmt: skip
    worst = max(q["peak"] for q in p["programs"]) / 2**30
    fits = "fits" if p["fits"] else "does not fit"
    return [*out, (preset, topology, mesh, f"an iteration, {fits}", "", f"{held:.1f}", "", f"{worst:.1f}", f"{p['chip']['memory'] / 2**30:.1f}", "", "", "", "", "", "", *whole, "")]


# -- where there is a machine ---------------------------------------------------------------------------------------


def rates(n: int = 2048) -> tuple[float, float]:
    """(FLOP/s of an f32 product [n,n] x [n,n], bytes/s read and written by a copy with an addition) of this machine."""
    import jax
    import jax.numpy as jnp

    def best(f, *args):
        jax.block_until_ready(f(*args))
        took = []
        for _ in range(7):
            t = time.perf_counter()
            jax.block_until_ready(f(*args))
            took.append(time.perf_counter() - t)
        return min(took)

    x = jnp.ones((n, n))
    flops = 2 * n**3 / best(jax.jit(lambda a, b: a @ b), x, x)
    big = jnp.ones((2**26,))  # 256 MiB: no cache holds it
    return flops, 2 * big.nbytes / best(jax.jit(lambda a: a + 1), big)


def measured(a) -> str:
    import jax
    import numpy as np

    from jaxalign import build, shard
    from jaxalign.chips import Chip
    from jaxalign.plan import programs, roofline
    from jaxalign.types import Tokens

    best = rates()
    device = jax.devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit", 0) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = []
    for size in a.size.split(","):
        dim, layers, heads, kv, hidden, vocab = SIZES[size]
        c = build.base(size, dim=dim, layers=layers, heads=heads, kv_heads=kv, hidden=hidden, vocab=vocab, dtype="bfloat16" if a.bf16 else "float32")
        c.stage = build.stage("lm", data=dict(path="none", batch_size=a.batch, seq_len=a.seq), train=dict(steps=10))
        s = programs.stage(c, size, c.stage, jax.devices()[:1])
        it = programs.iteration(s)
        # The same stage with arrays in the place of shapes, and random ids.
        mesh = s.world.mesh
        roofline.plan(size, it, mesh, None)  # what compiling leaves in the process is there before
        forget()
        before = memory(device)
        s.params = shard.init(s.world.model.specs(), jax.random.key(0), mesh)
        ids = np.random.default_rng(0).integers(4, vocab, (a.batch, a.seq)).astype(np.int32)
        rest = np.ones(ids.shape, np.float32), np.ones_like(ids), np.broadcast_to(np.arange(a.seq, dtype=np.int32), ids.shape)
        batch = shard.place(Tokens(ids, *rest), mesh)
        took = []
        with jax.set_mesh(mesh):
            st, fn = s.begin()
            for _ in range(a.steps + 2):
                t = time.perf_counter()
                st, metrics = fn(st, {}, batch)
                float(metrics["loss"])
                took.append(time.perf_counter() - t)
                if len(took) == 1:  # it has compiled
                    forget()
        real, most = float(np.median(took[2:])), memory(device)
        best = flops, bandwidth = tuple(map(max, best, rates()))  # before and after: others may use this machine
        p = roofline.plan(size, it, mesh, Chip(device.device_kind, (), flops, room, bandwidth, 1e12, 1))
        q = p.programs[0]
        rows.append((size, f"{a.batch} x {a.seq}", seconds(q.arithmetic_seconds), seconds(q.memory_seconds), seconds(p.seconds), seconds(real), f"{p.seconds / real:.2f}", f"{p.mfu:.0%}", f"{it.model_flops / flops / real:.0%}",
                     f"{p.peak(q) / 2**20:.0f}", f"{(most - before) / 2**20:.0f}"))  # fmt: skip
    text = f"{datetime.date.today()}, {device.device_kind} x 1 ({os.cpu_count()} cores), jax {jax.__version__}: a product runs at {flops / 1e9:,.0f} GFLOP/s, a copy at {bandwidth / 1e9:.1f} GB/s. Medians of {a.steps} steps; the process's memory is its growth while it trains."
    return text + "\n\n" + table(("size", "rows", "arithmetic", "memory", "predicted step", "measured step", "predicted / measured", "MFU at most", "MFU measured", "predicted peak MiB", "measured peak MiB"), rows)


def memory(device) -> float:
    """Bytes in use at most since `forget`: the device's own count, or this process's resident set (Linux)."""
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"]
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def forget():
    """Lets the high-water mark of this process fall to what it holds now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("large", "measured"))
    p.add_argument("--size", default="tiny,small", help=f"of measured: {', '.join(SIZES)}; several with commas, small ones first")
    p.add_argument("--only", help="of large: these presets, with commas")
    p.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "jaxalign-plan", help="of large: numbers and programs go here; plans that are there already are not made again")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--write", type=Path, help="put the table into this page, between its markers")
    a = p.parse_args()
    text = {"large": large, "measured": measured}[a.what](a)
    print(text)
    if a.write:
        write(a.write, text, f"plan.py {a.what}")


if __name__ == "__main__":
    main()
