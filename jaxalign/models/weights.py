"""The safetensors format as a stream: tensors go from disk to the device's own slice and back, block by block.

A file is a length (8 bytes, little-endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). The only file that imports safetensors, which judges every header;
the data is read with `preadv` and not through its memory map, whose pages would count as resident beside the params.

What is held beside the params themselves: two blocks per thread, and, where devices have memory of their own, the local
part of one leaf. A tensor is read at most once per process, and only the rows that its devices hold: where rows of the file
are columns of ours, the slice of a column-sharded device is cut out of whole rows.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxalign import shard
from jaxalign.types import UserError

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 4 << 20  # bytes; smaller ones write the transpose in pieces too short, larger ones leave the cache
THREADS = min(os.cpu_count() or 1, 8)
ALIGNED = 64  # bytes: from such an address XLA on CPU takes an array over without copying it

Span = tuple[tuple[int, int], ...]  # (start, stop) of every dimension


class Tensor(NamedTuple):
    """One tensor of an open file."""

    name: str
    path: Path
    fd: int
    kind: str  # the format's name of the dtype: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # of its bytes, from the beginning of the file


class Part(NamedTuple):
    """A tensor and where it belongs: `leaf[index]`, or `leaf[index].T` of a leaf stored the other way round."""

    tensor: Any  # Tensor when reading, its name when writing
    index: tuple[int, ...]
    transposed: bool


# -- directories: everything is checked before a byte of data is read -------------------------------------------------


def inside(directory: Path, name: str) -> Path:
    """The regular file `name` of `directory`: a plain name, not a link that leads out of it.

    The Hub's cache is the one exception: snapshots/REVISION/name may link to ../../blobs/HASH.
    """
    root, path = directory.resolve(), directory / name
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
        raise UserError(f"{directory}: {name!r} is not a plain file name; a checkpoint may only name files of its own directory")
    try:
        real = path.resolve()
        regular = real.is_file()
    except (OSError, RuntimeError) as e:  # a link to itself, a name too long
        raise UserError(f"{path} cannot be opened: {e}") from e
    if real.parent != root and not (root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"):
        raise UserError(f"{path} leads out of its directory, to {real}; copy the file in place of the link")
    if not regular:
        raise UserError(f"{path} does not exist or is not a regular file")
    return real


def read_json(directory: Path, name: str) -> dict:
    path = inside(directory, name)
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(out, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(out).__name__}")
    return out


def tensors(directory: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    """{name: tensor} of model.safetensors, or of the files that model.safetensors.index.json names; `stack` closes them.

    Raises UserError for what is no such directory, for names that leave it, for an index that does not match its files,
    for a tensor that two files hold, and for a malformed file.
    """
    single, index = "model.safetensors", "model.safetensors.index.json"
    if os.path.lexists(directory / single):
        wanted = {single: None}
    elif os.path.lexists(directory / index):
        wanted = {}
        weight_map = read_json(directory, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError(f"{directory / index}: weight_map must map tensor names to file names")
        for name, file in weight_map.items():
            wanted.setdefault(file, set()).add(name)
    else:
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        hint = f"; {pickled[0]} is a pickle, which can run code and is never opened: convert it to safetensors where you trust it" if pickled else ""
        raise UserError(f"{directory} holds neither {single} nor {index}{hint}")
    out, wrong = {}, []
    for file, names in {f: wanted[f] for f in sorted(wanted)}.items():
        found = _open(inside(directory, file), stack)
        if names is not None and found.keys() != names:
            wrong += [f"{file} lacks {n}" for n in sorted(names - found.keys())]
            wrong += [f"{file} holds {n}, which the index does not list there" for n in sorted(found.keys() - names)]
        out |= found
    if wrong:
        raise UserError(f"{directory / index} does not match its files: {listing(wrong)}")
    return out


def _open(path: Path, stack: contextlib.ExitStack) -> dict[str, Tensor]:
    try:
        # Sizes, offsets, gaps, overlaps and dtypes are safetensors' to judge.
        with safe_open(path, framework="np") as f:
            judged = {n: (s.get_dtype(), tuple(s.get_shape())) for n in f.keys() for s in [f.get_slice(n)]}
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        (n,) = struct.unpack("<Q", os.pread(fd, 8, 0))
        header = json.loads(os.pread(fd, n, 8), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        out = {k: Tensor(k, path, fd, v["dtype"], tuple(v["shape"]), 8 + n + v["data_offsets"][0]) for k, v in header.items()}
    except Exception as e:  # SafetensorError has no stable base class
        raise UserError(f"{path} is not a valid safetensors file: {e}; fetch or export it again") from e
    if {k: (t.kind, t.shape) for k, t in out.items()} != judged:
        raise UserError(f"{path} is not a valid safetensors file: its header can be read in two ways; export it again")
    return out


def _once(pairs: list[tuple[str, Any]]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return out


def listing(lines: list[str], limit: int = 50) -> str:
    return "; ".join(lines[:limit]) + (f"; and {len(lines) - limit} more" if len(lines) > limit else "")


# -- reading ----------------------------------------------------------------------------------------------------------


def _pread(t: Tensor, into, offset: int) -> None:
    """Fills the buffer from `offset` bytes into the tensor. The GIL is free meanwhile."""
    view, at = memoryview(into).cast("B"), t.start + offset
    while view:
        try:
            n = os.preadv(t.fd, [view], at)
        except OSError as e:
            raise UserError(f"cannot read tensor {t.name} of {t.path}: {e}") from e
        if n == 0:
            raise UserError(f"cannot read tensor {t.name}: {t.path} ends before it does; it was cut short while being read")
        view, at = view[n:], at + n


def same(a: Tensor, b: Tensor) -> bool:
    """Are two tensors equal, byte by byte?"""
    if (a.kind, a.shape) != (b.kind, b.shape):
        return False
    size = math.prod(a.shape) * np.dtype(DTYPES[a.kind]).itemsize if a.kind in DTYPES else -1
    x, y = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint8)
    for at in range(0, size, BLOCK):
        n = min(BLOCK, size - at)
        _pread(a, x[:n], at), _pread(b, y[:n], at)
        if not np.array_equal(x[:n], y[:n]):
            return False
    return size >= 0


def empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Uninitialised memory that XLA on CPU can take over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNED, np.uint8)
    at = -raw.ctypes.data % ALIGNED
    return raw[at : at + size].view(dtype).reshape(shape)


def read(shape: tuple[int, ...], dtype, parts: list[Part], sharding: Sharding | None, pool: ThreadPoolExecutor) -> jax.Array:
    """One leaf, of which every addressable device gets its slice and nothing else is read. sharding None: the default device.

    On CPU the array takes the memory it was read into; nobody else knows of it, and XLA, to which it is immutable, copies
    it where it is donated. Equal slices (replicas) are read once.
    """
    index = sharding.addressable_devices_indices_map(shape) if sharding else {None: (slice(None),) * len(shape)}
    spans = {d: tuple(s.indices(n)[:2] for s, n in zip(i, shape)) for d, i in index.items()}
    hosts = {s: empty(tuple(b - a for a, b in s), dtype) for s in set(spans.values())}
    jobs = []
    for tensor, at, transposed in parts:
        targets = []
        for span, host in hosts.items():
            if all(a <= i < b for i, (a, b) in zip(at, span)):
                out, rest = host[(*(i - a for i, (a, _) in zip(at, span)), ...)], span[len(at) :]
                targets.append((rest[::-1], out.T) if transposed else (rest, out))  # as the file has it
        if targets:
            jobs.append((tensor, targets))
    for _ in pool.map(lambda job: _fill(*job), jobs):
        pass
    arrays = [jax.device_put(hosts[s], d, may_alias=True) for d, s in spans.items()]
    if arrays[0].device.platform != "cpu":
        jax.block_until_ready(arrays)  # else host memory would fill faster than it is taken away
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays) if sharding else arrays[0]


def _fill(t: Tensor, targets: list[tuple[Span, np.ndarray]]) -> None:
    """Reads the rows that the targets want, once, and gives each its part."""
    shape = t.shape or (1,)
    targets = [(s or ((0, 1),), out.reshape(1) if out.ndim == 0 else out) for s, out in targets]
    dtype = np.dtype(DTYPES[t.kind])
    row = math.prod(shape[1:]) * dtype.itemsize
    step = _step(row)
    rest = []
    for s, out in targets:
        if out.flags.c_contiguous and out.dtype == dtype and all(c == (0, n) for c, n in zip(s[1:], shape[1:])):
            _pread(t, out.reshape(-1).view(np.uint8), s[0][0] * row)  # whole rows of the same dtype need no block
        else:
            rest.append((s, out))
    if not rest:
        return
    block = np.empty((min(step, shape[0]), *shape[1:]), dtype)
    for low, high in _union(s[0] for s, _ in rest):
        for a in range(low, high, step):
            b = min(a + step, high)
            _pread(t, block[: b - a].reshape(-1).view(np.uint8), a * row)
            for (rows, *columns), out in rest:
                c, d = max(a, rows[0]), min(b, rows[1])
                if c < d:
                    cut = block[(slice(c - a, d - a), *(slice(*s) for s in columns))]
                    copy(out[c - rows[0] : d - rows[0]], cut, t.name)


def _step(row: int) -> int:
    """Rows per block: whole cache lines of the transpose, where they fit."""
    n = max(1, BLOCK // max(row, 1))
    return n // 64 * 64 or n


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals that cover the same rows."""
    out: list[tuple[int, int]] = []
    for a, b in sorted(set(spans)):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return out


# -- one block ----------------------------------------------------------------------------------------------------------


@functools.cache
def _cpu():
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        return None


def packed(x: np.ndarray) -> np.ndarray:
    """x in C order. XLA's transpose goes through vector registers; NumPy's, element by element, takes some eight times as long."""
    if x.flags.c_contiguous:
        return x
    return np.asarray(jax.device_put(x, _cpu())) if _cpu() is not None else np.ascontiguousarray(x)


def copy(out: np.ndarray, x: np.ndarray, name: str) -> None:
    """out[...] = x in out's dtype, rounding to nearest even. Raises UserError where a finite number would become infinite."""
    if out.ndim == 2 and out.strides[0] < out.strides[1] and x.shape[0] > 1:
        out, x = out.T, packed(x.T)
    if x.dtype == ml_dtypes.bfloat16 and out.dtype == np.float16:
        x = x.astype(np.float32)  # NumPy's own cast notices what does not fit
    try:
        with np.errstate(over="raise", invalid="ignore", under="ignore"):
            np.copyto(out, x, casting="unsafe")
    except FloatingPointError:
        raise UserError(f"{name} holds numbers beyond {out.dtype.name}'s range (65504); use bfloat16 or float32") from None


# -- writing ------------------------------------------------------------------------------------------------------------


_pick = jax.jit(lambda x, index: x[index])


def host(leaf, index: tuple[int, ...]) -> np.ndarray:
    """leaf[index] on the host, on every process; a view where the leaf already lies there."""
    if isinstance(leaf, jax.Array) and not (len(leaf.sharding.device_set) == 1 and leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu"):
        # Through a temporary: NumPy's copy of an array is kept for as long as the array lives.
        return shard.to_host(_pick(leaf, tuple(map(np.int32, index))))
    return np.asarray(leaf)[index]


def write(path: Path, dtypes: list, leaves: list, parts: list[Part], pool: ThreadPoolExecutor) -> int:
    """Writes parts (of leaves, in dtypes) as one safetensors file, whole or not at all. Returns its bytes.

    The header comes first, since all shapes are known; then one tensor after the other, in blocks. In a multi-process
    run every process must call it (they gather tensor by tensor); process 0 writes.
    """
    order = sorted(range(len(parts)), key=lambda i: -np.dtype(dtypes[i]).itemsize)  # keeps every tensor aligned
    kinds, header, at, starts = {v: k for k, v in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0, {}
    for i in order:
        name, index, transposed = parts[i]
        shape = leaves[i].shape[len(index) :]
        size = math.prod(shape) * np.dtype(dtypes[i]).itemsize
        header[name] = {"dtype": kinds[np.dtype(dtypes[i]).name], "shape": shape[::-1] if transposed else shape, "data_offsets": (at, at + size)}
        starts[i], at = at, at + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first, temp, fd = jax.process_index() == 0, path.with_name(f"{path.name}.{os.getpid()}.tmp"), -1
    try:
        if first:
            if (free := shutil.disk_usage(path.parent).free) < at + len(text):
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            _pwrite(fd, struct.pack("<Q", len(text)) + text, 0)
        for i in order:
            name, index, transposed = parts[i]
            x = host(leaves[i], index)
            if first:
                _put(fd, 8 + len(text) + starts[i], x.T if transposed else x, np.dtype(dtypes[i]), name, pool)
        if first:
            os.fsync(fd)
            os.replace(temp, path)
    except OSError as e:
        raise UserError(f"cannot write {path} ({at:,} bytes): {e}; free space, or choose another directory") from e
    finally:
        if fd >= 0:
            os.close(fd)
            temp.unlink(missing_ok=True)
    return 8 + len(text) + at


def _put(fd: int, start: int, x: np.ndarray, dtype: np.dtype, name: str, pool: ThreadPoolExecutor) -> None:
    """x, whatever its strides, in C order and `dtype` from `start` on."""
    x = x.reshape(1) if x.ndim == 0 else x
    row = math.prod(x.shape[1:]) * dtype.itemsize
    step = _step(row)

    def block(a: int) -> None:
        y = packed(x[a : a + step])
        if y.dtype != dtype:
            out = np.empty(y.shape, dtype)
            copy(out, y, name)
            y = out
        _pwrite(fd, y.reshape(-1).view(np.uint8), start + a * row)

    for _ in pool.map(block, range(0, x.shape[0], step)):
        pass


def _pwrite(fd: int, data, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


# -- small files, which fit in memory twice ---------------------------------------------------------------------------


def small(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(all tensors of a file, its metadata). Raises UserError for a malformed file."""
    try:
        with safe_open(path, framework="np") as f:
            return {n: f.get_tensor(n) for n in f.keys()}, f.metadata() or {}
    except Exception as e:  # SafetensorError has no stable base class
        raise UserError(f"{path} is not a valid safetensors file: {e}; fetch or export it again") from e


def write_small(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata)


def write_text(path: Path, text: str) -> None:
    """The whole text, or the file that was there before."""
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "jaxalign-weights")
