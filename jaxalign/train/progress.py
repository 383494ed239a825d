"""What a run says of its speed: the line in the terminal, where the time went, how much of it counted, a profiler's trace."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import jax

from jaxalign.types import UserError

# Phases in which nothing is learned. What is left (rollouts, scoring, steps) is productive.
OVERHEAD = ("data", "eval", "save", "compile")


class Phases:
    """Wall-clock seconds by phase: `with phases("step"): ...`. A phase within another counts for itself alone, and so does
    compiling, wherever it happens; so the seconds add up to the time spent in phases. Enter it to count compilation."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.compilations = 0  # programs compiled, or read from the compilation cache
        self._clock, self._inner = clock, 0.0  # seconds of the phases inside of the innermost open one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin, outer, self._inner = self._clock(), self._inner, 0.0
        try:
            yield
        finally:
            spent = self._clock() - begin
            self.seconds[name] += max(0.0, spent - self._inner)
            self._inner = outer + spent

    def compiled(self, event: str, seconds: float, **_: Any) -> None:
        """JAX tells this of every duration that it measures."""
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations += 1
            self.seconds["compile"] += seconds
            self._inner += seconds

    def productive(self) -> float:
        return sum(v for k, v in self.seconds.items() if k not in OVERHEAD)

    def __enter__(self) -> Phases:
        jax.monitoring.register_event_duration_secs_listener(self.compiled)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self.compiled)


def peak_memory() -> int:
    """Bytes: the most that the first device of this process has held, or where devices do not say (CPU), the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Trace:
    """A profiler's trace of a few steps, for xprof or TensorBoard: `with trace: ... trace.at(n)` before the n-th step of this process.

    `where`: DIR, or DIR:FIRST-LAST (default 3-5: compiling is over by then); "" records nothing. Raises UserError for a
    range that is none.
    """

    def __init__(self, where: str = "", name: str = ""):
        m = re.fullmatch(r"(.*?)(?::(\d+)-(\d+))?", where)
        self.first, self.last = int(m[2] or 3), int(m[3] or 5)
        if not 1 <= self.first <= self.last:
            raise UserError(f"--profile={where}: steps {self.first} to {self.last} are none; write DIR or DIR:3-5")
        self.directory = Path(m[1]) / name if m[1] else None
        self._on = False

    def at(self, n: int) -> None:
        if self.directory and n == self.first:
            jax.profiler.start_trace(os.fspath(self.directory))
            self._on = True
        elif n > self.last:
            self.stop()

    def stop(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


class Progress:
    """The line in the terminal, and the rates of timings.jsonl.

    On a terminal it is refreshed in place; elsewhere a line is printed every 10 s or every tenth of the way. The first
    step of the process compiles, so it is not part of any rate; wrap evaluation and saving in `paused()` to leave them
    out too. Rates are over the last 50 steps.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        process_index: int = 0,
        stream: Any = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`start`: steps already done (after a resume). `peak_flops`: FLOP/s of all devices together; without it MFU is not
        shown, only FLOP/s. Only process 0 prints (to stderr unless `stream` is given)."""
        self.stage, self.total, self.step = stage, total, start
        self._flops_per_token, self._peak = flops_per_token, peak_flops
        self._stream, self._every, self._clock = stream or sys.stderr, every, clock
        self._quiet = process_index != 0
        self._tty = bool(getattr(self._stream, "isatty", lambda: False)())
        self._marks: collections.deque = collections.deque(maxlen=51)  # (time, step, tokens so far)
        self._tokens, self._idle = 0, 0.0
        self._printed_at, self._printed_step, self._width = -math.inf, start, 0

    def update(self, step: int, loss: float | None = None, tokens: int = 0) -> dict[str, float]:
        """After step `step` (counted from 1) of `tokens` tokens. Returns `rates()`."""
        self.step, self._tokens = step, self._tokens + tokens
        now = self._clock()
        self._marks.append((now - self._idle, step, self._tokens))
        rates = self.rates()
        due = now - self._printed_at >= (0.1 if self._tty else self._every) or (not self._tty and step - self._printed_step >= self.total / 10)
        if not self._quiet and (due or step >= self.total):
            self._print(self._text(loss, rates), now)
        return rates

    def rates(self) -> dict[str, float]:
        """steps_per_second, tokens_per_second, flops_per_second, mfu: those that are known. {} before the second step."""
        if len(self._marks) < 2 or (dt := self._marks[-1][0] - self._marks[0][0]) <= 0:
            return {}
        out = {"steps_per_second": (self._marks[-1][1] - self._marks[0][1]) / dt}
        tokens = self._marks[-1][2] - self._marks[0][2]
        if tokens:
            out["tokens_per_second"] = tokens / dt
            if self._flops_per_token:
                out["flops_per_second"] = tokens / dt * self._flops_per_token
                if self._peak:
                    out["mfu"] = out["flops_per_second"] / self._peak
        return out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here is in no rate."""
        begin = self._clock()
        try:
            yield
        finally:
            self._idle += self._clock() - begin

    def close(self, summary: str = "") -> None:
        """Leaves the last line standing, and one of `summary` below."""
        with contextlib.suppress(OSError, ValueError):
            if self._tty and self._width:
                self._stream.write("\n")
            if summary and not self._quiet:
                self._stream.write(f"{self.stage}: {summary}\n")
            self._stream.flush()
        self._width = 0

    def _text(self, loss: float | None, rates: dict[str, float]) -> str:
        parts = [f"{self.stage} {self.step}/{self.total}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if rates:
            parts.append(f"{rates['steps_per_second']:.3g} steps/s")
        if "tokens_per_second" in rates:
            parts.append(f"{_si(rates['tokens_per_second'])} tokens/s")
        if "mfu" in rates:
            parts.append(f"MFU {100 * rates['mfu']:.1f}%")
        elif "flops_per_second" in rates:
            parts.append(f"{_si(rates['flops_per_second'])}FLOP/s")
        if rates.get("steps_per_second"):
            parts.append(f"ETA {_duration((self.total - self.step) / rates['steps_per_second'])}")
        elif not rates:
            parts.append("first step done, timing from here")
        return " | ".join(parts)

    def _print(self, text: str, now: float) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not end a run
            self._stream.write("\r" + text.ljust(self._width) if self._tty else text + "\n")
            self._stream.flush()
        self._printed_at, self._printed_step, self._width = now, self.step, len(text)


def summary(timings: dict[str, float]) -> str:
    """A line of timings.jsonl for people."""
    seconds = {k.removeprefix("seconds/"): v for k, v in timings.items() if k.startswith("seconds/")}
    total = sum(seconds.values()) or 1.0
    parts = [f"{_duration(total)} in {', '.join(f'{k} {v / total:.0%}' for k, v in sorted(seconds.items(), key=lambda kv: -kv[1]))}"]
    parts += [f"{_si(timings['tokens_per_second'])} tokens/s"] if "tokens_per_second" in timings else []
    parts += [f"MFU {timings['mfu']:.1%}"] if "mfu" in timings else []
    return " | ".join([*parts, f"goodput {timings['goodput']:.0%}", f"{timings['compilations']} programs compiled", f"peak {timings['peak_memory_bytes'] / 2**20:.0f} MiB"])


def _si(x: float) -> str:
    power = min(5, max(0, math.floor(math.log(max(x, 1) * 1.0005, 1000))))  # 999.6 is 1k, not 1e+03
    return f"{x / 1000**power:.3g}{' kMGTP'[power].strip()}"


def _duration(seconds: float) -> str:
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}"
