"""The run directory: what was configured, what was measured, what happened. Plain files that need no service to read.

    config.json        the resolved config
    environment.json   versions, devices, git commit, XLA flags
    metrics.jsonl      deterministic numbers only: the same seed gives the same bytes
    timings.jsonl      wall clock: seconds per phase, tokens/s, MFU, goodput
    events.jsonl       resumes, skips, alerts
    samples.jsonl      generated text

A line is one `write`, so a kill leaves whole lines. A checkpoint stores `offsets()`; resuming calls `truncate` with
them, and metrics and samples go on exactly where the checkpoint was taken. Timings and events are history: they stay.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Protocol

from jaxalign.types import UserError

REWOUND = ("metrics.jsonl", "samples.jsonl")  # cut back to the checkpoint on resume
KEPT = ("timings.jsonl", "events.jsonl")


class Mirror(Protocol):
    """A copy of the numbers for a dashboard. May raise: it is then dropped, and training goes on."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes the files of one run directory, in process 0 only; in the others every method does nothing."""

    def __init__(self, workdir: str | os.PathLike, *, process_index: int = 0, mirrors: Iterable[Mirror] = ()):
        """Opens `workdir` for appending; lines cut by a power failure are removed. On a fresh start or a resume, call `truncate` next."""
        self.workdir, self._files, self._mirrors = Path(workdir), {}, []
        if process_index == 0:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._mirrors = list(mirrors)
            # Unbuffered and O_APPEND: what `write` returned from survives SIGKILL.
            self._files = {name: open(self.workdir / name, "ab+", buffering=0) for name in REWOUND + KEPT}
            for f in self._files.values():
                f.truncate(_whole(f))

    def snapshot(self, config: dict, **environment: Any) -> None:
        """Writes config.json and environment.json (`environment()` and what is given). Changes since last time become events."""
        if not self._files:
            return
        for name, new in (("config", redact(as_json(config))), ("environment", redact(as_json(_environment() | environment)))):
            path = self.workdir / f"{name}.json"
            try:
                before = leaves(json.loads(path.read_text()))
            except (OSError, ValueError):
                before = None
            now = leaves(new)
            changed = sorted(k for k in (before or {}).keys() | now.keys() if before is not None and before.get(k) != now.get(k))
            if changed:
                self.event(f"{name}_changed", changes={k: [before.get(k), now.get(k)] for k in changed})
            temp = path.with_suffix(".json.tmp")
            temp.write_text(json.dumps(new, indent=2) + "\n")
            os.replace(temp, path)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Deterministic scalars of one step. Written with `repr`, so equal bytes mean equal bits; NaN is null, infinity 1e999."""
        self._numbers("metrics.jsonl", step, values)

    def timings(self, step: int, values: dict[str, Any]) -> None:
        """Scalars that depend on the clock."""
        self._numbers("timings.jsonl", step, values)

    def began(self) -> float:
        """When the run began, kills and restarts included (Unix time): the first line of timings.jsonl says. Now, if none does."""
        try:
            first, whole, _ = os.pread(self._files["timings.jsonl"].fileno(), 4096, 0).partition(b"\n")
            return float(json.loads(first)["time"]) if whole else time.time()
        except (KeyError, ValueError, TypeError):
            return time.time()

    def event(self, kind: str, **fields: Any) -> None:
        """Something a reader of the run should know: a resume, a skipped step, an alert."""
        self._line("events.jsonl", json.dumps(redact(as_json({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "kind": kind, **fields}))))

    def samples(self, step: int, samples: list[dict]) -> None:
        """Generated text, one line each."""
        for sample in samples:
            self._line("samples.jsonl", json.dumps(as_json({"step": int(step), **sample})))

    def offsets(self) -> dict[str, int]:
        """{file: bytes}, all of them on disk when this returns: what a checkpoint stores. {} outside process 0."""
        for f in self._files.values():
            os.fsync(f.fileno())
        return {name: os.fstat(f.fileno()).st_size for name, f in self._files.items()}

    def truncate(self, offsets: dict[str, int]) -> None:
        """Back to the moment when `offsets` was taken; {} is the very beginning. Events and timings keep their history.

        Raises UserError, before changing anything, if a file is shorter than it was then or has been edited.
        """
        cuts = {name: offsets.get(name, 0) for name in REWOUND if name in self._files}
        for name, at in cuts.items():
            f, size = self._files[name], os.fstat(self._files[name].fileno()).st_size
            if size < at:
                raise UserError(
                    f"{self.workdir / name} has {size} bytes, but the checkpoint was taken when it had {at}: it was deleted, cut or replaced since. "
                    "Put the file back, or resume in a new --workdir from a copy of the checkpoint"
                )
            if at and os.pread(f.fileno(), 1, at - 1) != b"\n":
                raise UserError(f"{self.workdir / name}: byte {at}, where the checkpoint was taken, is not the end of a line: the file was edited since")
        for name, at in cuts.items():
            self._files[name].truncate(at)

    def close(self) -> None:
        for mirror in list(self._mirrors):
            self._mirror(mirror, mirror.close)
        for f in self._files.values():
            f.close()
        self._files, self._mirrors = {}, []

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _numbers(self, name: str, step: int, values: dict[str, Any]) -> None:
        if not self._files:
            return
        numbers = {k: _scalar(k, values[k]) for k in sorted(values)}
        self._line(name, "{" + ", ".join(f"{json.dumps(k)}: {_number(v)}" for k, v in {"step": int(step), **numbers}.items()) + "}")
        for mirror in list(self._mirrors):
            self._mirror(mirror, lambda m=mirror: m.metrics(int(step), numbers))

    def _line(self, name: str, text: str) -> None:
        if self._files:
            data = text.encode() + b"\n"
            while data:  # a raw write may be short when the disk is nearly full; the next one then raises
                data = data[self._files[name].write(data) :]

    def _mirror(self, mirror: Mirror, f: Callable[[], None]) -> None:
        try:
            f()
        except Exception as e:
            self._mirrors.remove(mirror)
            name = type(mirror).__name__
            warnings.warn(f"{name} failed and is switched off for this run ({type(e).__name__}: {redact(str(e))}); the files in {self.workdir} are complete", stacklevel=4)
            self.event("mirror_failed", mirror=name, error=f"{type(e).__name__}: {e}")


class TensorBoard:
    """A mirror: event files for TensorBoard in `directory`. Needs tensorboardX."""

    def __init__(self, directory: str | os.PathLike):
        try:
            import tensorboardX
        except ImportError:
            raise UserError('TensorBoard needs tensorboardX: pip install "jaxalign[tensorboard]"') from None
        self._writer = tensorboardX.SummaryWriter(os.fspath(directory))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The lines of a file of the run directory. A last line cut by a kill is left out.

    Raises UserError for a line that is damaged elsewhere, or if the file is missing.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    *lines, _ = data.split(b"\n")  # what follows the last newline is not a line
    out = []
    for n, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path}, line {n}: not JSON ({e})") from None
    return out


# Tokens as their issuers shape them, credentials in URLs, and values under names that can mean nothing else.
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16}|xox[abp]-[\w-]{10,})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SECRET_NAME = re.compile(r"(^|_)(password|passwd|secret|api_?key|(access|auth|hf|api|bearer)_token|credentials?)$", re.IGNORECASE)


def redact(x: Any) -> Any:
    """`x` without what looks like a secret: the run directory gets shared."""
    if isinstance(x, dict):
        return {k: "[redacted]" if v and _SECRET_NAME.search(str(k)) else redact(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [redact(v) for v in x]
    return _SECRET.sub("[redacted]", x) if isinstance(x, str) else x


def _environment() -> dict:
    """Software, hardware and flags; names no user, no path and no environment variable but the flags."""
    import jax

    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: packages.get(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")},
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "x64": jax.config.jax_enable_x64,
        **_git(Path(__file__).parent),
        "packages": dict(sorted(packages.items(), key=lambda kv: kv[0].lower())),
    }


def _git(directory: Path) -> dict:
    def ask(*args: str) -> str:
        return subprocess.run(["git", "-C", directory, *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", __file__)  # an installed copy may lie inside somebody else's repository
        return {"git_commit": ask("rev-parse", "HEAD"), "git_dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _whole(f: Any) -> int:
    """How many bytes of an open file are whole lines."""
    end = os.fstat(f.fileno()).st_size
    while end > 0:
        begin = max(0, end - 65536)
        at = os.pread(f.fileno(), end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0


def _scalar(name: str, x: Any) -> float | int | bool:
    x = x.item() if hasattr(x, "item") and getattr(x, "size", 1) == 1 else x
    if not isinstance(x, (bool, int, float)):
        raise TypeError(f"metric {name!r} is {type(x).__name__}, not a number")
    return x


def _number(x: float | int | bool) -> str:
    """JSON has no NaN and no infinity; every JSON reader makes infinity of 1e999."""
    if isinstance(x, (bool, int)):
        return json.dumps(x)
    return "null" if math.isnan(x) else repr(x) if math.isfinite(x) else "1e999" if x > 0 else "-1e999"


def as_json(x: Any) -> Any:
    """Anything, as JSON has it: arrays as lists, NaN and what is unknown as text."""
    if isinstance(x, dict):
        return {str(k): as_json(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [as_json(v) for v in x]
    if hasattr(x, "tolist"):
        return as_json(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x if x is None or isinstance(x, (bool, int, float, str)) else str(x)


def leaves(x: Any, name: str = "") -> dict[str, Any]:
    if isinstance(x, dict) and x:
        return {k: v for key, value in x.items() for k, v in leaves(value, f"{name}.{key}" if name else str(key)).items()}
    return {name: x}
