"""What a compiled program does on one device, read off its text: FLOPs, bytes moved, collectives, with loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once; a model that scans over its layers would seem a layer deep. Here
every loop's trip count is taken from its annotation, or from its counter: start, step and bound are constants in the text.

FLOPs are those of matrix products (2 per multiply-add; XLA writes them as `dot` or `convolution`) and of splash attention. Bytes are those of every
array that a top-level instruction reads or writes in the device's main memory; arrays that the compiler has put into
on-chip memory (memory space S(1) in a TPU's text) are free. Of an array that is sliced only the slice counts. Where a
conditional chooses, its dearest branch counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
# Names for the same bytes, or none at all.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "add-dependency", "copy-done", "slice-done", "async-done", "async-update"}
SLICING = ("dynamic-slice", "slice", "gather")
NO_WORK = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding", "annotate_device_placement")

_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\](?:\{([^{}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    kind: str
    shape: tuple[int, ...]
    space: int = 0  # 0: main memory; 1: on chip; 5: the host's

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * BITS.get(self.kind, 8 if self.kind.startswith("f8") else 0) / 8

    @property
    def stored(self) -> float:
        """Bytes in main memory."""
        return self.bytes if self.space == 0 and self.shape else 0.0  # scalars live in registers


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    kind: str
    out: tuple[Array, ...]
    args: tuple[str, ...]  # operand names; of parameters and constants, what stands in the brackets
    rest: str  # attributes

    def called(self, key: str) -> str | None:
        m = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return m and m[1]


@dataclasses.dataclass
class Cost:
    """Of one device. Collectives: {(kind, group): (how often, bytes)}, bytes of the whole array that is gathered, reduced or sent."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict = dataclasses.field(default_factory=dict)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    pieces: list = dataclasses.field(default_factory=list)  # (flops, bytes) of every instruction that has any: for a roofline of each

    def add(self, other: Cost, times: float = 1) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for k, (n, b) in other.collectives.items():
            had = self.collectives.get(k, (0, 0.0))
            self.collectives[k] = (had[0] + times * n, had[1] + times * b)
        for k, n in other.kernels.items():
            self.kernels[k] += int(times * n)
        self.pieces += [(n * times, f, b) for n, f, b in other.pieces]

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """{kind of collective: (how often, bytes)}"""
        out: dict[str, tuple[float, float]] = {}
        for (kind, _), (n, b) in self.collectives.items():
            had = out.get(kind, (0, 0.0))
            out[kind] = (had[0] + n, had[1] + b)
        return out

    def seconds(self, peak: float, bandwidth: float) -> float:
        """Each instruction takes the longer of its arithmetic and its memory traffic."""
        return sum(n * max(f / peak, b / bandwidth) for n, f, b in self.pieces)


# -- reading --------------------------------------------------------------------------------------------------------


def _arrays(text: str) -> tuple[Array, ...]:
    def one(m):
        space = re.search(r"S\((\d+)\)", m[3] or "")
        return Array(m[1], tuple(int(x) for x in m[2].split(",") if x), int(space[1]) if space else 0)

    return tuple(one(m) for m in _ARRAY.finditer(text))


def _closed(text: str, start: int) -> int:
    """Index after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    return len(text)


def _op(line: str) -> tuple[Op, bool] | None:
    m = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not m:
        return None
    at = m.end()
    end = _closed(line, at) if line[at] == "(" else line.index(" ", at)
    kind = re.match(r"\s*([a-z][\w\-]*)\(", line[end:])
    if not kind:
        return None
    opened = end + kind.end() - 1
    closed = _closed(line, opened)
    inside = line[opened + 1 : closed - 1]
    args = tuple(re.findall(r"%([\w.\-]+)", inside)) if "%" in inside else (inside.strip(),)
    return Op(m[2], kind[1], _arrays(line[at:end]), args, line[closed:]), bool(m[1])


@dataclasses.dataclass
class Computation:
    ops: dict[str, Op]
    root: Op


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """({name: computation}, name of the entry)."""
    out, entry, name, ops, root = {}, "", None, {}, None
    for line in text.splitlines():
        if name is None:
            m = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            if m:
                name, ops, root = m[2], {}, None
                entry = name if m[1] else entry
        elif line.rstrip() == "}":  # a kernel's attributes may hold line breaks and brackets of their own
            if root is not None:
                out[name] = Computation(ops, root)
            name = None
        elif got := _op(line):
            ops[got[0].name] = got[0]
            root = got[0] if got[1] else root
    return out, entry


# -- counting -------------------------------------------------------------------------------------------------------


def _kernel(name: str, given: list[Array], apart: bool) -> float:
    """FLOPs of splash attention, which a kernel does not tell: 2 products forward, 3 for dq, 4 for dk and dv, 5 in one kernel for
    all three (not `apart`), of which the causal mask leaves the blocks on and under the diagonal. Other kernels: 0."""
    m = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", name)
    wide = [a for a in given if a.kind in ("bf16", "f32") and len(a.shape) >= 3]
    if not m or len(wide) < 2:
        return 0.0
    q, k = wide[:2]
    blocks = max(k.shape[-2] // 512, 1)
    return 2.0 * math.prod(q.shape) * k.shape[-2] * (blocks + 1) / (2 * blocks) * {"fwd": 2, "dq": 3, "dkv": 4 if apart else 5}[m[1]]


def _dims(rest: str, key: str) -> list[int]:
    m = re.search(rf"{key}=\{{([0-9,]*)\}}", rest)
    return [int(x) for x in m[1].split(",") if x] if m else []


def _dot(op: Op, lhs: Array) -> float:
    return 2.0 * math.prod(op.out[0].shape) * math.prod(lhs.shape[i] for i in _dims(op.rest, "lhs_contracting_dims"))


def _convolution(op: Op, lhs: Array, rhs: Array) -> float:
    """2 * batch * features in * features out * the pairs (place, tap) of every window dimension that meet something: XLA writes
    batched products as convolutions with dilated windows, most of whose taps fall between the numbers."""
    m = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    left, right, out = m[1], m[2], m[3]
    window = re.search(r"window=\{([^}]*)\}", op.rest)
    given = dict(x.split("=") for x in window[1].split()) if window else {}
    spatial = sorted(c for c in left if c.isdigit())
    each = lambda key, default: [int(x) for x in given[key].split("x")] if key in given else [default] * len(spatial)
    pads = [tuple(map(int, p.split("_"))) for p in given["pad"].split("x")] if "pad" in given else [(0, 0)] * len(spatial)
    total = 2.0 * op.out[0].shape[out.index("b")] * op.out[0].shape[out.index("f")] * rhs.shape[right.index("i")]
    for i, (c, size, stride, ld, rd) in enumerate(zip(spatial, each("size", 1), each("stride", 1), each("lhs_dilate", 1), each("rhs_dilate", 1))):
        total *= _meet(op.out[0].shape[out.index(c)], size, lhs.shape[left.index(c)], stride, ld, rd, pads[i][0])
    return total


@functools.lru_cache(maxsize=4096)
def _meet(places: int, taps: int, length: int, stride: int, ld: int, rd: int, pad: int) -> int:
    end = (length - 1) * ld
    if taps == 1 and pad == 0:
        return sum(1 for o in range(places) if o * stride <= end and o * stride % ld == 0)
    return sum(1 for o in range(places) for k in range(taps) if 0 <= (at := o * stride + k * rd - pad) <= end and at % ld == 0)


def _constant(c: Computation, name: str) -> int | None:
    """The integer that a name stands for, through copies, conversions and bitcasts."""
    op = c.ops.get(name)
    while op is not None and op.kind in ("copy", "convert", "bitcast"):
        op = c.ops.get(op.args[0])
    try:
        return int(op.args[0]) if op is not None and op.kind == "constant" else None
    except ValueError:
        return None


def trips(comps: dict[str, Computation], c: Computation, op: Op) -> int | None:
    """How often a loop runs; None where it depends on what is computed (a sampler that stops early)."""
    if m := re.search(r'known_trip_count[":{ ]+n"?:? ?"?(\d+)', op.rest):
        return int(m[1])
    cond, body = comps.get(op.called("condition")), comps.get(op.called("body"))
    if cond is None or body is None:
        return None
    test = cond.root
    inner = cond
    args = test.args
    if test.kind == "fusion":  # the comparison, wrapped
        inner = comps[test.called("calls")]
        order = {p.args[0]: test.args[int(p.args[0])] for p in inner.ops.values() if p.kind == "parameter"}
        test = inner.root
        args = tuple(order[inner.ops[a].args[0]] if inner.ops[a].kind == "parameter" else a for a in test.args)
    if test.kind != "compare" or "direction=LT" not in test.rest or len(args) != 2:
        return None
    bound = _constant(cond, args[1])
    bound = bound if bound is not None else _constant(inner, args[1])
    counter = cond.ops.get(args[0])
    if bound is None or counter is None or counter.kind != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.rest)[1])
    start = c.ops.get(op.args[0])
    begin = _constant(c, start.args[index]) if start is not None and start.kind == "tuple" and index < len(start.args) else None
    return max(-(-(bound - (begin or 0)) // _stride(comps, body, index)), 0)


def _stride(comps, body: Computation, index: int) -> int:
    """By how much a loop's counter grows: it is x + constant, x the counter or again such a sum."""
    total, name = 0, body.root.args[index] if body.root.kind == "tuple" and index < len(body.root.args) else None
    while name in body.ops:
        op = body.ops[name]
        if op.kind == "add" and len(op.args) == 2:
            grown = [_constant(body, a) for a in op.args]
            if grown.count(None) != 1:
                break
            total += next(g for g in grown if g is not None)
            name = op.args[grown.index(None)]
        elif op.kind in ("copy", "bitcast"):
            name = op.args[0]
        elif op.kind == "fusion" and (inner := comps.get(op.called("calls"))) is not None and inner.root.kind == "add":
            grown = [_constant(inner, a) for a in inner.root.args]
            total += next((g for g in grown if g is not None), 0)
            break
        else:
            break
    return max(total, 1)


def _moved(comps, c: Computation, op: Op) -> float:
    """Bytes of main memory that a top-level instruction reads and writes."""
    shape_of = lambda a: c.ops[a].out if a in c.ops else ()
    whole = lambda arrays: sum(x.stored for x in arrays)
    if op.kind in SLICING:
        return 2 * whole(op.out) if whole(shape_of(op.args[0])) else whole(op.out)
    if op.kind == "dynamic-update-slice":
        return 2 * whole(shape_of(op.args[1]))
    if op.kind == "scatter":
        return 3 * whole(shape_of(op.args[-1]))
    if op.kind in ("copy-start", "slice-start"):
        out = op.out[0]
        read = shape_of(op.args[0])
        return out.stored + (out.bytes if read and read[0].space == 0 else 0.0)
    inner = comps.get(op.called("calls")) if op.kind == "fusion" else None
    if inner is None:
        return whole(op.out) + sum(whole(shape_of(a)) for a in op.args)
    carried = {a.shape for o in inner.ops.values() if o.kind in COLLECTIVES for n in (o.name, *o.args) if n in inner.ops for a in inner.ops[n].out}
    whole = lambda arrays: sum(x.stored for x in arrays if x.shape not in carried)  # their traffic is the interconnect's
    users = collections.defaultdict(list)
    for o in inner.ops.values():
        for i, a in enumerate(o.args):
            users[a].append((o, i))
    read = 0.0
    for p in inner.ops.values():
        if p.kind != "parameter":
            continue
        held = shape_of(op.args[int(p.args[0])]) if int(p.args[0]) < len(op.args) else ()
        stack, uses = [p.name], []
        while stack:  # a bitcast is another name
            for o, i in users[stack.pop()]:
                stack.append(o.name) if o.kind == "bitcast" else uses.append((o, i))
        if uses and all((o.kind in SLICING or o.kind == "dynamic-update-slice") and i == 0 for o, i in uses):
            if whole(held):
                read += sum(o.out[0].bytes for o, _ in uses if o.kind in SLICING)
        else:
            read += whole(held)
    roots = [inner.ops[a] for a in inner.root.args if a in inner.ops] if inner.root.kind == "tuple" else [inner.root]
    written = 0.0
    for r, out in zip(roots, op.out):
        while r.kind == "bitcast" and r.args[0] in inner.ops:
            r = inner.ops[r.args[0]]
        part = inner.ops[r.args[1]].out[0].bytes if r.kind == "dynamic-update-slice" else out.bytes
        written += part if out.space == 0 and out.shape not in carried else 0.0
    return read + written


def _group(rest: str) -> str:
    """What says who takes part: groups of replicas in one of XLA's three spellings, or the pairs of a permutation."""
    if m := re.search(r"replica_groups=(mesh\[[^\]]*\] ?\{[^}]*\})", rest):
        return m[1]
    m = re.search(r"(?:replica_groups|source_target_pairs)=(\[[^\]]*\](?:<=\[[\d,]*\])?(?:T\([\d,]*\))?|\{(?:\{[\d,]*\},?)*\})", rest)
    return m[1] if m else ""


def cost(text: str, unknown: int = 1) -> Cost:
    """Of a compiled program's text (`compiled.as_text()`). unknown: how often a loop runs whose end is computed."""
    comps, entry = parse(text)
    done: dict[tuple[str, bool], Cost] = {}
    # A TPU carries a collective on beside the products that follow it: the one instruction stands again in every fusion that
    # does a part of it, and is counted where it starts.
    goes_on = lambda name: name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in o.rest for o in comps[name].ops.values())

    def of(name: str, fused: bool) -> Cost:
        if (name, fused) in done:
            return done[name, fused]
        out, c = Cost(), comps.get(name)
        done[name, fused] = out
        for op in c.ops.values() if c else ():
            get = lambda i: c.ops[op.args[i]].out[0]
            if op.kind == "while":
                n = trips(comps, c, op)
                out.add(of(op.called("body"), fused), unknown if n is None else n)
                continue
            if op.kind == "conditional":
                names = re.findall(r"%?([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", op.rest) or [0, ""])[1]) or [op.called("true_computation"), op.called("false_computation")]
                branches = [of(n, fused) for n in names if n in comps]
                if branches:
                    out.add(max(branches, key=lambda b: (b.flops, b.bytes)))
                continue
            if op.kind in ("call", "async-start"):
                inside = op.called("to_apply") or op.called("calls")
                if inside in comps:
                    out.add(of(inside, fused))
                continue
            kind = op.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                size = lambda arrays: sum(a.bytes for a in arrays if a.kind != "u32" or a.shape)
                given, got = sum(size(c.ops[a].out) for a in op.args if a in c.ops), size(op.out)
                got = got - given if op.kind == "all-gather-start" else got / 2 if op.kind in ("collective-permute-start", "all-reduce-start") and len(op.out) > len(op.args) else got
                out.add(Cost(collectives={(kind, _group(op.rest)): (1, max(given, got))}))
                continue
            if op.kind in FREE or op.kind.endswith("-done"):
                continue
            flops = 0.0
            if op.kind == "dot":
                flops = _dot(op, get(0))
            elif op.kind == "convolution":
                flops = _convolution(op, get(0), get(1))
            elif op.kind == "fusion" and (inside := op.called("calls")) in comps:
                under = of(inside, True)
                flops = under.flops
                if not goes_on(inside):
                    scatters = inside.startswith("all-reduce-scatter")  # of which every device keeps its piece
                    out.add(Cost(collectives={("reduce-scatter" if scatters and k == "all-reduce" else k, g): v for (k, g), v in under.collectives.items()}))
            elif op.kind == "custom-call":
                target = (re.search(r'custom_call_target="([^"]*)"', op.rest) or [0, "?"])[1]
                if target in NO_WORK:
                    continue
                name = re.sub(r"\.\d+$", "", op.name) if target == "tpu_custom_call" else target
                out.kernels[name] += 1
                flops = _kernel(name, [a for n in op.args if n in c.ops for a in c.ops[n].out], "splash_mha_dq" in text)
            moved = 0.0 if fused else _moved(comps, c, op)
            if flops or moved:
                out.add(Cost(flops, moved, pieces=[] if fused else [(1, flops, moved)]))
        return out

    return of(entry, False)
