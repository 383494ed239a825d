"""Two programs take turns, step by step, so that a machine whose speed drifts slows both alike.

The child side (`Child`) reads one line on stdin to go and answers each step with one JSON line on stdout; the parent
side (`Process`, `lockstep`) starts each child alone, waits for its first step, and then lets them alternate.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Callable


def _rss() -> float:
    """The most memory that this program has held, in MiB. ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Child:
    """In a measured program: `done()` ends a step, reports it and waits for the next turn."""

    def __init__(self, memory: Callable[[], int] | None = None, compiling: Callable[[], float] | None = None):
        """memory: bytes of the device at their peak; compiling: seconds spent on compilation so far."""
        # Libraries print; what the parent reads goes through a descriptor of its own.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._memory, self._compiling = memory or (lambda: 0), compiling or (lambda: 0.0)
        self._idle = _rss()
        self._clock()

    def _clock(self):
        self._start = time.perf_counter(), time.process_time()

    def done(self, **values):
        """End a step. `values` are reported with it: numbers that the other side must find too."""
        wall, cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        print(json.dumps({"wall": wall, "cpu": cpu, "mib": _rss(), "idle_mib": self._idle, "device_mib": self._memory() / 2**20, "compiling": self._compiling(), "values": values}), file=self._out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the parent has seen enough; trainers would go on to save and log
        self._clock()


class Process:
    """In the parent: a measured program."""

    def __init__(self, command: list[str], env: dict[str, str], log):
        self.command, self._log, self.steps = command, log, []
        self._began = time.perf_counter()
        self._p = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._read()
        self.first_step = time.perf_counter() - self._began  # imports, model, data, compilation and the first step

    def _read(self):
        line = self._p.stdout.readline()
        if not line:
            code = self._p.wait()
            raise RuntimeError(f"{' '.join(self.command[:3])} ended with code {code}; its log is {self._log.name}")
        self.steps.append(json.loads(line))

    def step(self):
        self._p.stdin.write("go\n")
        self._p.stdin.flush()
        self._read()

    def close(self):
        self._p.stdin.close()
        try:
            self._p.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._p.kill()

    def median(self, what: str, warmup: int) -> float:
        return statistics.median(s[what] for s in self.steps[warmup:])

    def peak(self, what: str) -> float:
        return max(s[what] for s in self.steps)


def busy() -> float:
    """CPU seconds that this machine has spent, all programs together."""
    with open("/proc/stat") as f:
        v = [int(x) for x in f.readline().split()[1:9]]
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def lockstep(a: Process, b: Process, steps: int, warmup: int) -> float:
    """Let both take `steps` after `warmup` (the first of which they have taken), in turn. Returns the share of the
    machine that other programs used meanwhile."""
    start = None
    for i in range(1, warmup + steps):
        if i == warmup:
            start = time.perf_counter(), busy()
        a.step()
        b.step()
    wall, used = time.perf_counter() - start[0], busy() - start[1]
    own = sum(s["cpu"] for p in (a, b) for s in p.steps[warmup:])
    return max(0.0, used - own) / wall / os.cpu_count()


def ratios(a: Process, b: Process, what: str, warmup: int) -> tuple[float, float, float]:
    """(min, median, max) of a's seconds over b's, step by step: above 1, b is faster."""
    q = [x[what] / y[what] for x, y in zip(a.steps[warmup:], b.steps[warmup:])]
    return min(q), statistics.median(q), max(q)
