"""What checkpoints and runs ask of a file system: directories that are whole or do not count, and a lock. No JAX.

A sealed directory holds a manifest.json with the SHA-256 and size of every other file. `seal` writes it last, once
everything is on disk; `rename` then gives the directory its name in one instant. `damage` says what has changed since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

from jaxalign.types import UserError

FORMAT = 1
MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Sees that every file is on disk, then writes the manifest."""
    files = _files(directory)
    with ThreadPoolExecutor(8) as pool:  # hashlib releases the GIL
        prints = dict(zip(files, pool.map(lambda p: _fingerprint(p, sync=True), files.values())))
    with open(directory / MANIFEST, "w") as f:
        json.dump({"format": FORMAT, "files": prints}, f, indent=0)
        f.flush()
        os.fsync(f.fileno())
    for d in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        _sync(d)


def rename(path: Path, to: Path) -> None:
    """On disk when it returns. `to` must not exist."""
    os.rename(path, to)
    _sync(to.parent)


def damage(path: Path) -> str | None:
    """What is wrong with the sealed directory at `path`, naming the file; None if every file is what was written."""
    if not path.is_dir():
        return "no such checkpoint"
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        expected = {name: (entry["sha256"], entry["size"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        return f"{MANIFEST} is damaged ({type(e).__name__}: {e})"
    if version != FORMAT:
        return f"{MANIFEST} says format {version!r}, this version of jaxalign reads format {FORMAT}"
    found = _files(path)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]!r} is missing" + (f" ({len(missing)} files in all)" if len(missing) > 1 else "")
    if extra := sorted(found.keys() - expected.keys()):
        return f"{extra[0]!r} was not part of it"

    def wrong(name: str) -> str | None:
        sha256, size = expected[name]
        try:
            if found[name].stat().st_size != size:
                return f"{name!r} has {found[name].stat().st_size} bytes instead of {size}"
            return None if _fingerprint(found[name])["sha256"] == sha256 else f"{name!r} has changed (its SHA-256 differs)"
        except OSError as e:
            return f"{name!r} cannot be read ({e.strerror})"

    with ThreadPoolExecutor(8) as pool:
        return next((why for why in pool.map(wrong, sorted(found)) if why), None)


def read_json(path: Path, name: str) -> Any:
    """A JSON file of a sealed directory, verified by itself (quicker than the whole). Raises ValueError if it is not as written."""
    try:
        data = (path / name).read_bytes()
        expected = json.loads((path / MANIFEST).read_bytes())["files"][name]["sha256"]
        if hashlib.sha256(data).hexdigest() == expected:
            return json.loads(data)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{path}: {damage(path) or f'{name!r} cannot be read'}")


def set_aside(path: Path, suffix: str) -> Path:
    """Renames `path` to path + suffix (+ -2, -3, ... where that is taken)."""
    n, to = 1, path.with_name(path.name + suffix)
    while to.exists():
        n, to = n + 1, path.with_name(f"{path.name}{suffix}-{n + 1}")
    rename(path, to)
    return to


@contextlib.contextmanager
def pin(path: Path) -> Iterator[Path]:
    """While this is held, `pinned(path)` is true on this machine."""
    try:
        fd = os.open(path / MANIFEST, os.O_RDONLY)
    except OSError:
        yield path  # nothing to hold on to; the reader will say what is missing
        return
    try:
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(fd, fcntl.LOCK_SH)
        yield path
    finally:
        os.close(fd)


def pinned(path: Path) -> bool:
    try:
        fd = os.open(path / MANIFEST, os.O_RDWR)  # NFS gives exclusive locks to writers only
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no locks on this file system
    finally:
        os.close(fd)
    return False


@contextlib.contextmanager
def lock(directory: str | os.PathLike, process_index: int = 0) -> Iterator[None]:
    """Holds a run directory for this run (process 0 holds it for all). The kernel lets go when the process dies, however it dies.

    Raises UserError naming the holder if another run has it.
    """
    if process_index != 0:
        yield
        return
    path = Path(directory) / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read().strip() or "it has not said which"
            raise UserError(f"{directory} is in use by another run ({holder}); stop that one, or choose another --workdir") from None
        except OSError as e:
            warnings.warn(f"{path}: no file locks here ({e.strerror}); make sure that only one run uses this directory", stacklevel=3)
        f.truncate(0)
        f.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}))
        f.flush()
        try:
            yield
        finally:
            f.truncate(0)  # the file stays: deleting it would let two runs lock two files of one name


def is_full(e: BaseException) -> bool:
    """Whether an error says, in a number or in words, that the disk, quota or file size limit is exhausted."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return getattr(e, "errno", None) in full or any(os.strerror(n) in str(e) for n in full)


def _files(path: Path) -> dict[str, Path]:
    return {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p != path / MANIFEST and (p.is_symlink() or not p.is_dir())}


def _fingerprint(path: Path, sync: bool = False) -> dict:
    with open(path, "rb") as f:
        if sync:
            os.fsync(f.fileno())
        return {"sha256": hashlib.file_digest(f, "sha256").hexdigest(), "size": os.fstat(f.fileno()).st_size}


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
