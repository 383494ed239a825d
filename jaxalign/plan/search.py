"""Which mesh, remat and accumulation fit and are fastest: many by formulas, the best few compiled.

The formulas only decide what is worth compiling; what is printed as memory and seconds comes from the compiled programs.
They know the stage's weights exactly (by the shardings of every candidate mesh) and estimate the rest of one training step:
saved and working activations, gathered weights, a chunk of logits; FLOPs, weights streamed from memory, and the collectives
of fsdp (gather weights twice, scatter gradients), tensor (reduce activations) and data (reduce gradients). Letters as in
`types`; m tokens of one micro-batch on one chip, f, t, d the sizes of fsdp, tensor and data.
"""

from __future__ import annotations

import dataclasses
from typing import Callable

import jax
from ml_collections import ConfigDict

from jaxalign import build, tree
from jaxalign.chips import Chip
from jaxalign.plan import programs, roofline
from jaxalign.types import UserError

ACCUMULATE = (1, 2, 4, 8, 16, 32, 64)
MOST_TENSOR = 16  # a head or a slice of the feed-forward becomes too thin beyond


@dataclasses.dataclass(frozen=True)
class Candidate:
    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulate: int

    def __str__(self) -> str:
        mesh = " ".join(f"{k}={v}" for k, v in (("data", self.data), ("fsdp", self.fsdp), ("tensor", self.tensor)) if v > 1)
        return f"{mesh or 'one device'} remat={self.remat} accumulate={self.accumulate}"

    def put(self, config: ConfigDict, name: str) -> ConfigDict:
        """The config with these choices in it."""
        out = config.copy_and_resolve_references()
        with out.unlocked():
            out.mesh.data, out.mesh.fsdp, out.mesh.tensor = self.data, self.fsdp, self.tensor
            if "remat" in out.model:
                out.model.remat = self.remat
            build.stages(out)[name].data.accumulate = self.accumulate
        return out


@dataclasses.dataclass
class Found:
    candidate: Candidate
    memory: float  # bytes a chip, by the formulas
    seconds: float  # an iteration, by the formulas
    plan: roofline.Plan | None = None  # compiled
    why: str = ""  # it was not


@dataclasses.dataclass(frozen=True)
class Work:
    """What the formulas need to know of a stage, whatever the mesh."""

    dim: int
    layers: int
    attn: int  # width of queries, keys and values together
    hidden: int
    vocab: int
    rows: int  # of one update
    length: int
    flops: float  # of one update, forward and backward, of all chips
    held: tuple  # trees of Spec held all the time besides the params: reference, rewards
    trained: tuple  # trees of Spec that are trained
    moments: float  # optimizer bytes per byte of params
    decode: int  # tokens sampled one after another
    updates: int  # per iteration


def work(config: ConfigDict, name: str, devices: list) -> Work:
    """Of the stage on a mesh that is all fsdp, or all data where rows are few: only shapes are read off it."""
    probe = config.copy_and_resolve_references()
    with probe.unlocked():
        probe.mesh.data, probe.mesh.fsdp, probe.mesh.tensor, probe.mesh.context, probe.mesh.expert = 1, 1, 1, 1, 1
    s = programs.stage(probe, name, build.stages(probe)[name], devices[:1])
    it = programs.iteration(s)
    m = s.world.model.config
    heads = getattr(m, "heads", 1)
    head_dim = getattr(m, "head_dim", None) or m.dim // heads
    params = {k: v for k, v in it.resident.items() if k == "params"}
    size = lambda parts: sum(programs.shares(parts).values())
    step = it.programs[-1]
    shapes = [x.shape for k, x in tree.flat(step.args[2]).items() if k.split("/")[-1] == "tokens"]
    rows = sum(x[0] * (x[1] if len(x) == 3 else 1) for x in shapes)
    how = getattr(s.source, "sampling", None)
    return Work(
        m.dim, getattr(m, "layers", 1), (heads + 2 * (getattr(m, "kv_heads", None) or heads)) * head_dim, getattr(m, "hidden", None) or 4 * m.dim, m.vocab,
        rows, shapes[0][-1], it.model_flops / step.times, tuple((w, p) for w, p in s.world.imagined.held), (it.resident["params"],),
        size({"o": it.resident["optimizer"]}) / max(size(params), 1), how.max_new if how else 0, step.times,
    )  # fmt: skip


def candidates(config: ConfigDict, name: str, n: int, w: Work) -> list[Candidate]:
    """All that divide what must be divided."""
    c, m = build.stages(config)[name], config.model
    if n & (n - 1):
        raise UserError(f"--search tries powers of two, and there are {n} devices; give a mesh in the config instead")
    kv, fixed = m.get("kv_heads") or m.get("heads") or 1, int(config.mesh.context) * int(config.mesh.expert)
    parts = c.rl.minibatches if "rl" in c else 1
    out = []
    for t in (2**i for i in range(n.bit_length())):
        if t > MOST_TENSOR or n % (t * fixed) or kv % t or w.hidden % t:
            continue
        rest = n // (t * fixed)
        for f in (2**i for i in range(rest.bit_length())):
            for a in ACCUMULATE:
                if c.data.batch_size % (parts * a * rest) == 0:
                    out += [Candidate(rest // f, f, t, r, a) for r in (("none", "dots", "full") if "remat" in m else ("none",))]
    return out


def estimate(x: Candidate, w: Work, n: int, chip: Chip, size: float, other: float) -> tuple[float, float]:
    """(bytes a chip, seconds an iteration). size, other: bytes of trained and of other held weights, of all chips, in f32."""
    f, t, d, a = x.fsdp, x.tensor, x.data, x.accumulate
    m = w.rows * w.length / (d * f * a)
    weights = size / (f * t)
    width = {
        "full": w.dim,
        "dots": 3 * w.dim + (w.attn + 2 * w.hidden) / t,
        "none": 8 * w.dim + (3 * w.attn + 5 * w.hidden) / t,
    }[x.remat]
    saved = w.layers * m * width * 2
    working = m * (6 * w.dim + (2 * w.attn + 4 * w.hidden) / t) * 3
    gathered = 2 * (size / 2) / max(w.layers, 1) / t if f > 1 else 0.0
    head = min(m * w.vocab / t, 2**27) * 8 + 2 * w.vocab * w.dim * 4 / (f * t)
    memory = weights * (1 + w.moments + (2 if a > 1 else 1)) + other / (f * t) + saved + working + gathered + head
    passes = {"full": 4 / 3, "dots": 1.05, "none": 1.0}[x.remat]
    wire = 2 * chip.link * max(1, chip.links // 4)
    compute = w.flops * passes / n / chip.flops
    stream = (a * 3 * (size / 2) / t + 10 * weights + 8 * saved * a) / chip.bandwidth
    gathers = a * (size / t) * (f - 1) / f * (2 * 0.5 + 1) / wire if f > 1 else 0.0
    reduced = a * w.layers * (6 if x.remat == "full" else 4) * m * w.dim * 2 * 2 * (t - 1) / t / wire
    across = 2 * weights * (d - 1) / d / wire
    one = max(compute, stream, gathers + reduced + across) + 0.1 * (gathers + reduced + across)
    decode = w.decode * (max(size / 2 / t / chip.bandwidth, (size / 2 / t) * (f - 1) / f / wire))
    return memory, w.updates * one + decode


def search(config: ConfigDict, name: str, devices: list, chip: Chip | None, top: int = 3, progress: Callable = lambda text: None) -> list[Found]:
    """The best by the formulas, compiled until `top` of them fit; the fastest first, those that do not fit last.

    Raises UserError where nothing divides, or the chip is in no table.
    """
    if chip is None:
        raise UserError("--search needs a chip with a data sheet: --topology=v5e:4x4, v5p:4x4x4, v6e:16x16, or a GPU at hand")
    w = work(config, name, devices)
    nbytes = lambda trees: float(sum(programs.per_device(jax.tree.leaves(t)) for t in trees))
    size = nbytes(w.trained)
    mine = {id(x) for x in jax.tree.leaves(w.trained)}
    other = sum(programs.per_device(x for x in jax.tree.leaves(t) if id(x) not in mine) for _, t in w.held)
    every = [Found(x, *estimate(x, w, len(devices), chip, size, other)) for x in candidates(config, name, len(devices), w)]
    if not every:
        c = build.stages(config)[name]
        raise UserError(f"{name}: data.batch_size {c.data.batch_size} divides over no mesh of {len(devices)} devices; change it to a multiple of their number")
    # The formulas err by some; what they call a little too large is tried, after what they call small enough.
    order = sorted(every, key=lambda x: (x.memory > 1.3 * chip.memory, x.memory > chip.memory, x.seconds, x.memory))
    progress(f"{len(every)} candidates, {sum(x.memory <= chip.memory for x in every)} of them fit by the formulas")
    tried: list[Found] = []
    for x in order[: 3 * top]:
        if sum(bool(y.plan and y.plan.fits) for y in tried) >= top:
            break
        asked = x.candidate.put(config, name)
        progress(f"{x.candidate}: by the formulas {x.memory / 2**30:.1f} GiB, {x.seconds * 1e3:.0f} ms")
        s = programs.stage(asked, name, build.stages(asked)[name], devices)
        x.plan = roofline.plan(name, programs.iteration(s), s.world.mesh, chip, progress)
        tried.append(x)
    return sorted(tried, key=lambda x: (not x.plan.fits, x.plan.seconds if x.plan.fits else x.plan.peak(x.plan.worst)))


def lines(found: list[Found], section: str = "stage") -> list[str]:
    """The table that `--search` prints, and what to add to the command. section: where the stage stands in the config."""
    rows = []
    for x in found:
        p = x.plan
        mine = (f"{p.peak(p.worst) / 2**30:.2f}", "yes" if p.fits else "no")
        times = (f"{p.seconds * 1e3:.3g}", f"{p.tokens / p.seconds:,.0f}", f"{p.mfu:.0%}" if p.mfu else "-") if p.fits else ("-",) * 3
        rows.append((str(x.candidate), f"{x.memory / 2**30:.2f}", f"{x.seconds * 1e3:.3g}", *mine, *times))
    out = roofline.table(("candidate", "formula GiB", "formula ms", "compiled GiB", "fits", "at best ms", "tokens/s", "MFU"), rows)
    best = next((x for x in found if x.plan.fits), None)
    if best is None:
        return [*out, "", "none of these fits: more chips, a smaller data.batch_size, shorter rows, adapters, or an optimizer with fewer moments"]
    c = best.candidate
    return [*out, "", f"--config.mesh.data={c.data} --config.mesh.fsdp={c.fsdp} --config.mesh.tensor={c.tensor} --config.model.remat={c.remat} --config.{section}.data.accumulate={c.accumulate}"]
