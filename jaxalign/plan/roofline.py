"""From compiled programs to memory per chip, seconds at best, and why something does not fit.

A roofline is a bound: every instruction takes the longer of its arithmetic at peak and its traffic at full bandwidth, and
the interconnect works beside both. A real step is slower; what the bound is good for is to compare meshes and to see which
of the three limits.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import jax
import numpy as np

from jaxalign.chips import Chip
from jaxalign.plan import hlo
from jaxalign.plan.programs import Iteration, Program, shares
from jaxalign.types import UserError


@dataclasses.dataclass
class Compiled:
    """One program on one chip, once. Bytes, FLOPs and seconds."""

    name: str
    times: int
    compile_seconds: float
    refused: str = ""  # the compiler's word, where it found no room
    arguments: float = 0.0
    outputs: float = 0.0  # beyond those that take the place of arguments
    temporaries: float = 0.0
    host: float = 0.0
    code: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)  # kind -> (how often, bytes, seconds)
    kernels: dict = dataclasses.field(default_factory=dict)  # custom calls by target
    arithmetic_seconds: float = 0.0
    memory_seconds: float = 0.0
    roofline_seconds: float = 0.0  # of both, instruction by instruction
    link_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """At best: the interconnect hidden behind the rest, or the rest behind it."""
        return max(self.roofline_seconds, self.link_seconds)


def compiled(p: Program, mesh, chip: Chip | None, keep: Path | None = None) -> Compiled:
    """Compile and account. A program that its compiler finds too large comes back with `refused`. keep: where its text goes."""
    start = time.perf_counter()
    lowered = p.lower(mesh)
    cached = jax.config.jax_enable_compilation_cache
    try:
        # What is compiled for devices that are not there can be written to the cache, and not read again.
        jax.config.update("jax_enable_compilation_cache", cached and mesh.devices.flat[0] in jax.devices())
        exe = lowered.compile()
    except Exception as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        out = Compiled(p.name, p.times, time.perf_counter() - start, refused=str(e).split("RESOURCE_EXHAUSTED: ")[-1].splitlines()[0])
        if m := re.search(r"([\d.]+)([KMGT])\)? exceeds", out.refused):
            out.temporaries = float(m[1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[m[2]]
        return out
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    out = Compiled(p.name, p.times, time.perf_counter() - start)
    m = exe.memory_analysis()
    if m is not None:
        out.arguments, out.outputs, out.temporaries = m.argument_size_in_bytes, max(m.output_size_in_bytes - m.alias_size_in_bytes, 0), m.temp_size_in_bytes
        out.host = m.host_argument_size_in_bytes + m.host_temp_size_in_bytes + max(m.host_output_size_in_bytes - m.host_alias_size_in_bytes, 0)
        out.code = m.generated_code_size_in_bytes
    text = exe.as_text()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{p.name.replace(' ', '_')}.hlo").write_text(text, encoding="utf-8")
    count(out, text, p.unknown, list(mesh.devices.ravel()), chip)
    return out


def count(out: Compiled, text: str, unknown: int, devices: list, chip: Chip | None) -> None:
    """Fills in what the text of a program says: FLOPs, traffic, collectives, and their seconds on the chip."""
    cost = hlo.cost(text, unknown)
    out.flops, out.traffic, out.kernels, out.collectives = cost.flops, cost.bytes, dict(cost.kernels), {}
    for (kind, group), (n, size) in cost.collectives.items():
        t = 0.0 if chip is None else n * wire_seconds(kind, group, size / n, devices, chip)
        had = out.collectives.get(kind, (0, 0.0, 0.0))
        out.collectives[kind] = (had[0] + n, had[1] + size, had[2] + t)
    out.link_seconds = sum(t for _, _, t in out.collectives.values())
    if chip is not None:
        out.arithmetic_seconds, out.memory_seconds = cost.flops / chip.flops, cost.bytes / chip.bandwidth
        out.roofline_seconds = cost.seconds(chip.flops, chip.bandwidth)


# -- the interconnect -----------------------------------------------------------------------------------------------


def members(group: str, n: int) -> list[int]:
    """Who takes part beside device 0, of `n`: from {{0,1},{2,3}}, [groups,size]<=[dims]T(order), or mesh['a'=4,'b'=2] {'b'} (of an
    axis also a part, 'a':(2)2: the second factor of 2 x 2)."""
    if group.startswith("mesh["):
        sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", group)}
        dims, varies = [], []
        used = {k: (int(a or 1), int(b or sizes[k])) for k, a, b in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", group.split("]", 1)[1])}
        for k, size in sizes.items():
            before, mine = used.get(k, (1, 1))
            dims += [before, mine, size // (before * mine)]
            varies += [False, k in used, False]
        ids = np.arange(int(np.prod(dims))).reshape(dims)
        return [int(x) for x in ids[tuple(slice(None) if v else 0 for v in varies)].ravel()]
    if m := re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", group):
        ints = lambda t: [int(x) for x in t.split(",")]
        shape = ints(m[1])
        ids = np.arange(int(np.prod(shape)))
        if m[2]:
            ids = ids.reshape(ints(m[2]))
            ids = ids.transpose(ints(m[3])) if m[3] else ids
        return [int(x) for x in ids.reshape(shape[0], -1)[0]]
    first = re.search(r"\{([\d,]+)\}", group)
    return [int(x) for x in first[1].split(",")] if first else list(range(n))


def _torus(devices: list, chip: Chip) -> tuple[np.ndarray, list[int], list[bool]]:
    """(coordinates [n, axes], sizes, whether each axis closes)."""
    at = np.array([d.coords for d in devices])
    sizes = [int(x) for x in at.max(0) - at.min(0) + 1]
    return at, sizes, [bool(chip.wraps) and s % chip.wraps == 0 for s in sizes]


def wire_seconds(kind: str, group: str, size: float, devices: list, chip: Chip) -> float:
    """Of one collective of `size` bytes (the gathered, reduced or sent array on a device), rings along every axis of the
    torus that its group spans, both ways where the axis closes (Chan et al. 2007, Collective communication; the link is
    never shared with another collective)."""
    if kind == "collective-permute":
        pairs = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", group)]
        if not pairs or not hasattr(devices[0], "coords"):
            return size / chip.link
        at, sizes, closed = _torus(devices, chip)
        hops = lambda a, b: sum(min(d, s - d) if c else d for d, s, c in zip(np.abs(at[a] - at[b]), sizes, closed))
        return size * max(hops(a, b) for a, b in pairs) / chip.link
    who = members(group, len(devices))
    n = len(who)
    if n < 2:
        return 0.0
    if hasattr(devices[0], "coords"):
        at, _, closed = _torus(devices, chip)
        spans = np.ptp(at[who], axis=0) > 0
        wire = sum(chip.link * (2 if c else 1) for s, c in zip(spans, closed) if s) or chip.link
    else:
        wire = chip.link
    share = size * (n - 1) / n / wire
    return share * {"all-reduce": 2, "all-to-all": n / 4 if hasattr(devices[0], "coords") else 1}.get(kind, 1)


# -- the whole ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """Of one iteration on one topology."""

    stage: str
    mesh: dict[str, int]
    chips: int
    chip: Chip | None
    programs: list[Compiled]
    resident: dict[str, float]  # part -> bytes a chip
    tokens: int
    what: str
    model_flops: float  # of all chips
    cache: float

    @property
    def held(self) -> float:
        return sum(self.resident.values())

    def peak(self, p: Compiled) -> float:
        """Bytes a chip while it runs: what stays, what it makes, and the inputs that it alone reads."""
        return max(self.held, p.arguments) + p.temporaries + p.outputs + p.code

    @property
    def worst(self) -> Compiled:
        return max(self.programs, key=self.peak)

    @property
    def fits(self) -> bool | None:
        """None: nobody knows how much memory the device has."""
        if any(p.refused for p in self.programs):
            return False
        return None if self.chip is None else self.peak(self.worst) <= self.chip.memory

    @property
    def seconds(self) -> float:
        return sum(p.times * p.seconds for p in self.programs)

    @property
    def mfu(self) -> float | None:
        return self.model_flops / (self.chips * self.chip.flops * self.seconds) if self.chip and self.seconds and self.model_flops else None

    def json(self) -> dict:
        out = dataclasses.asdict(self)
        for p, mine in zip(out["programs"], self.programs):
            p |= {"seconds": mine.seconds, "peak": self.peak(mine)}
        return out | {"fits": self.fits, "peak": self.peak(self.worst), "seconds": self.seconds, "mfu": self.mfu, "tokens_per_second": self.tokens / self.seconds if self.seconds else None}


def plan(name: str, it: Iteration, mesh, chip: Chip | None, progress=lambda text: None, keep: Path | None = None) -> Plan:
    done = []
    for p in it.programs:
        progress(f"compiling {p.name} for {mesh.size} devices")
        done.append(compiled(p, mesh, chip, keep))
    return Plan(name, {k: v for k, v in mesh.shape.items() if v > 1}, mesh.size, chip, done, shares(it.resident), it.tokens, it.what, it.model_flops, it.cache)


def reasons(p: Plan, c) -> list[str]:
    """What takes the memory of the worst program, and which fields of the stage's config `c` would lessen it."""
    w = p.worst
    parts = {**p.resident, f"temporaries of {w.name}": w.temporaries, f"outputs of {w.name}": w.outputs}
    if p.cache and w.name == "generate":
        parts[f"(of which key/value cache, cut into {_cut(p)})"] = p.cache / _cut(p)
    total = p.peak(w)
    have = f"{p.chip.memory / 2**30:.2f} GiB" if p.chip else "what there is"
    out = [f"{w.name} needs {total / 2**30:.2f} GiB a chip of {have}" + (f" ({w.refused})" if w.refused else "")]
    out += [f"  {v / 2**30:8.2f} GiB  {k}" for k, v in sorted(parts.items(), key=lambda kv: -kv[1]) if v > 0.01 * total]
    state = p.resident.get("params", 0) + p.resident.get("optimizer", 0)
    advice = []
    room = min(total, p.chip.memory) if p.chip else total
    if state > 0.3 * room:
        advice += ["a larger mesh.fsdp (or mesh.tensor) cuts params and optimizer", "optim.name=adafactor or lion holds fewer moments", "adapter.rank trains a small part"]
    if sum(v for k, v in p.resident.items() if k.startswith(("reference", "reward", "frozen"))) > 0.2 * room:
        advice += ["adapter.rank makes the reference the frozen base, at no cost", "adapter.quantise holds the frozen base in fewer bits"]
    if w.temporaries > 0.3 * room:
        if w.name == "step":
            advice += ["model.remat=full keeps one activation a layer", f"data.accumulate above {max(c.data.accumulate, 1)} makes micro-batches smaller"]
        else:
            advice += ["a smaller data.batch_size"] + (["a smaller sampling.max_new, or fewer model.kv_heads, shrink the cache"] if p.cache else [])
        advice += ["shorter rows (data.seq_len, data.max_len)"]
    return out + (["it would help: " + "; ".join(advice)] if advice else [])


def _cut(p: Plan) -> int:
    return p.mesh.get("data", 1) * p.mesh.get("fsdp", 1) * p.mesh.get("tensor", 1)


# -- on paper -------------------------------------------------------------------------------------------------------


def _size(x: float) -> str:
    return f"{x / 2**30:.2f}"


def _time(s: float) -> str:
    return f"{s * 1e3:.1f} ms" if s < 1 else f"{s:.2f} s"


def lines(p: Plan, c) -> list[str]:
    """What `jaxalign plan` prints."""
    chip = p.chip
    about = f"{p.chips} x {chip.name} ({chip.memory / 2**30:.2f} GiB, {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s, {chip.links} links of {chip.link / 1e9:.0f} GB/s)" if chip else f"{p.chips} devices without a data sheet: no times"
    out = [f"{p.stage}: {about}", f"mesh: {', '.join(f'{k} {v}' for k, v in p.mesh.items()) or 'one device'}", ""]
    out += ["held from step to step, GiB a chip: " + ", ".join(f"{k} {_size(v)}" for k, v in p.resident.items()) + f"; together {_size(p.held)}", ""]
    head = ("program", "times", "arguments", "temporaries", "outputs", "host", "peak GiB", "TFLOP", "HBM GB", "wire GB", "arithmetic", "HBM", "wire", "at best", "compile s")
    rows = []
    for q in p.programs:
        memory = (_size(q.arguments), _size(q.temporaries), _size(q.outputs), _size(q.host), _size(p.peak(q)))
        work = (f"{q.flops / 1e12:.3g}", f"{q.traffic / 1e9:.3g}", f"{sum(b for _, b, _ in q.collectives.values()) / 1e9:.3g}")
        times = tuple(_time(t) if chip and not q.refused else "-" for t in (q.arithmetic_seconds, q.memory_seconds, q.link_seconds, q.seconds))
        rows.append((q.name, str(q.times), *memory, *work, *times, f"{q.compile_seconds:.0f}"))
    out += table(head, rows) + [""]
    for q in p.programs:
        for kind, (n, size, t) in sorted(q.collectives.items(), key=lambda kv: -kv[1][1]):
            out.append(f"{q.name}: {kind} x {n:.0f}, {size / 1e9:.3g} GB a chip" + (f", {_time(t)}" if chip else ""))
        if q.kernels:
            out.append(f"{q.name}: kernels " + ", ".join(f"{k} x {n}" for k, n in q.kernels.items()))
    out.append("")
    if p.fits and p.seconds:
        mfu = f", MFU at most {p.mfu:.0%}" if p.mfu else ""
        out.append(f"fits: {_size(p.peak(p.worst))} of {chip.memory / 2**30:.2f} GiB. An iteration takes at best {_time(p.seconds)}: {p.tokens / p.seconds:,.0f} {p.what}/s{mfu}")
    elif p.fits is False:
        out += ["does not fit: " + reasons(p, c)[0], *reasons(p, c)[1:]]
    else:
        out.append(f"peak {_size(p.peak(p.worst))} GiB a device ({p.worst.name})")
    return out


def table(head, rows) -> list[str]:
    width = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]
    return ["  ".join(str(x).rjust(w) if i else str(x).ljust(w) for i, (x, w) in enumerate(zip(r, width))).rstrip() for r in (head, *rows)]


def chosen(config, stage: str | None) -> str:
    """The stage that is meant; UserError where a config has several and none was said."""
    from jaxalign import build

    stages = build.stages(config)
    if stage is None and len(stages) > 1:
        raise UserError(f"this config has the stages {', '.join(stages)}: say which with --stage")
    name = stage or next(iter(stages))
    if name not in stages:
        raise UserError(f"no stage {name!r};{build.nearest(name, list(stages))}")
    return name
