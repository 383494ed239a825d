"""Reward functions, called so that none of them can hold up a run: in processes of their own, killed when they overrun.

Why processes and not threads: a thread that hangs can only be abandoned, and one that hangs inside C (a regular expression that
backtracks, a large power) keeps the interpreter's lock, so that nobody is left to notice. A process can always be killed. It
costs a start (once), the import of the function's module, and JSON there and back: texts and numbers, microseconds a row.

What has no import path (a closure, a notebook's function) can not be sent to a process, since nothing here pickles: it is called
in this one, under a time limit in a thread that is abandoned when it overruns (`Here`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any, Callable, NamedTuple

from jaxalign.rl import worker
from jaxalign.types import UserError

START = 120.0  # seconds for a process to import the function's module: some of them import torch
HANGS = 8  # so many rows that hang, and more than those that answered: the function is broken, whatever the policy


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float = 0.0  # for one call: of a row, or of the whole group where it takes that; 0: none
    workers: int = 1  # processes that score rows side by side
    on_error: str = "error"  # "error" stops the run; "nan": the row has no score; a number: that score

    def __post_init__(self):
        if self.seconds < 0 or self.workers < 1:
            raise UserError(f"rl.reward_timeout {self.seconds:g} must be 0 (none) or more seconds, rl.reward_workers {self.workers} 1 or more")
        self.instead()

    def instead(self) -> float | None:
        """What a row is worth whose score failed; None: it stops the run."""
        try:
            return None if self.on_error == "error" else float(self.on_error)
        except ValueError:
            raise UserError(f"rl.on_reward_error {self.on_error!r} is unknown; it is error, nan or a number") from None


class Failure(NamedTuple):
    """What a row has in place of a score."""

    why: str  # continues "reward function NAME ..."
    at: str = ""  # file and line
    hung: bool = False


class Cases(NamedTuple):
    """The rows of a batch, as a reward function reads them."""

    prompts: list[str]
    completions: list[str]
    records: list[dict]
    ids: list[list[int]]  # of the completion, its stop token included

    def part(self, i: int) -> Cases:
        return Cases(*([x[i]] for x in self))


def _read(answer: Any) -> Any:
    if not isinstance(answer, dict):
        return math.nan if answer is None else answer
    return Failure(f"returned {answer['bad']}") if "bad" in answer else Failure(answer["error"], answer["at"])


def within(seconds: float, what: str, f: Callable, *args) -> Any:
    """f(*args), or TimeoutError after so many seconds: it then goes on in a daemon thread, and is forgotten. 0: no limit."""
    if not seconds:
        return f(*args)
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(f(*args))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True, name=what).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"did not end within {seconds:g} seconds") from None


class Here:
    """Calls a function in this process."""

    def __init__(self, fn: Callable, limits: Limits):
        self.fn, self.limits, self.group = fn, limits, worker.whole_group(fn)
        self.name = getattr(fn, "__qualname__", None) or type(fn).__name__

    def score(self, cases: Cases) -> list[Any]:
        """A number (NaN: none), a list of numbers, one for each token, or a `Failure` of every row. Once the run is to stop, the rows
        that are left count as failed."""
        out, tally = [UNASKED] * len(cases.prompts), Tally(self.limits)
        if self.group:
            return self._call(cases)
        for i in range(len(out)):
            if tally.hopeless:
                break
            out[i] = tally.saw(self._call(cases.part(i))[0])
        return out

    def _call(self, cases: Cases) -> list[Any]:
        try:
            return [_read(a) for a in within(self.limits.seconds, self.name, worker.outcomes, self.fn, self.group, *cases)]
        except TimeoutError as e:
            return [Failure(str(e), hung=True)] * len(cases.prompts)


class Tally:
    """Whether it is worth going on."""

    def __init__(self, limits: Limits):
        self.fatal, self.failed, self.hung, self.seen = limits.on_error == "error", 0, 0, 0

    def saw(self, answer: Any) -> Any:
        failed = isinstance(answer, Failure)
        if answer is UNASKED:
            return answer
        self.seen, self.failed, self.hung = self.seen + 1, self.failed + failed, self.hung + (failed and answer.hung)
        return answer

    @staticmethod
    def of(limits: Limits, answers: list[Any]) -> Tally:
        tally = Tally(limits)
        for a in answers:
            tally.saw(a)
        return tally

    @property
    def broken(self) -> bool:
        return self.hung >= HANGS and 2 * self.hung > self.seen

    @property
    def hopeless(self) -> bool:
        return self.broken or self.fatal and self.failed > 0


UNASKED = Failure("was not asked, since it failed before")


class Pool(Here):
    """Calls the function of an import path in `limits.workers` processes, which start at first use."""

    def __init__(self, path: str, fn: Callable, limits: Limits):
        super().__init__(fn, limits)
        self.path, self._free = path, [_Process(path, limits.seconds) for _ in range(limits.workers)]

    def score(self, cases: Cases) -> list[Any]:
        if self.group:
            return self._free[0].ask(cases)
        out, tally, turn = [UNASKED] * len(cases.prompts), Tally(self.limits), itertools.count()

        def serve(process):
            # Rows are handed out in order and put down by number: which process had which does not show.
            while (i := next(turn)) < len(out) and not tally.hopeless:
                out[i] = tally.saw(process.ask(cases.part(i))[0])

        with concurrent.futures.ThreadPoolExecutor(len(self._free)) as threads:
            for future in [threads.submit(serve, p) for p in self._free]:
                future.result()
        return out


class _Process:
    """One child, replaced when it was killed."""

    def __init__(self, path: str, seconds: float):
        self.path, self.seconds = path, seconds
        self._child: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, cases: Cases) -> list[Any]:
        try:
            line = json.dumps({**dict(zip(("prompts", "completions", "records", "ids"), cases)), "seconds": self.seconds}).encode() + b"\n"
        except (TypeError, ValueError) as e:
            raise UserError(f"reward function {self.path}: the row's record is no JSON ({e}), so it can not be sent to a process; set rl.reward_timeout to 0") from None
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            self._start()
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
            return [_read(a) for a in self._line(self.seconds)]
        except TimeoutError:
            self._stop()
            why = Failure(f"did not end within {self.seconds:g} seconds", hung=True)
        except (EOFError, BrokenPipeError, ValueError):
            why = Failure(f"broke the process that it ran in (exit {self._stop()})")
        except BaseException:
            self._stop()  # interrupted in the middle of an answer
            raise
        return [why] * len(cases.prompts)

    def _line(self, seconds: float) -> Any:
        deadline, got = time.monotonic() + seconds, []
        while not (got and got[-1].endswith(b"\n")):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if select.select([self._child.stdout], [], [], left)[0]:
                if not (part := os.read(self._child.stdout.fileno(), 1 << 20)):
                    raise EOFError
                got.append(part)
        return json.loads(b"".join(got))

    def _start(self):
        # -P: this directory holds names that must not be taken for packages. A function that imports jax must not take the accelerator.
        command = [sys.executable, "-P", os.path.abspath(worker.__file__)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"})
        self._owner = os.getpid()
        weakref.finalize(self, _end, self._child, self._owner)
        try:
            self._child.stdin.write(json.dumps({"function": self.path, "path": [p or os.getcwd() for p in sys.path]}).encode() + b"\n")
            self._child.stdin.flush()
            said = self._line(max(START, self.seconds))
        except TimeoutError:
            self._stop()
            raise UserError(f"reward function {self.path}: its module did not import within {max(START, self.seconds):g} seconds") from None
        except (EOFError, BrokenPipeError, ValueError):
            raise UserError(f"reward function {self.path}: importing its module broke the process (exit {self._stop()})") from None
        if "error" in said:
            self._stop()
            raise UserError(f"reward function {self.path} can not be imported in a process of its own: {said['error']}; set rl.reward_timeout to 0 to call it in this one")

    def _stop(self) -> int | None:
        child, self._child = self._child, None
        child.kill()
        child.stdin = child.stdout = None
        return child.wait()


def _end(child: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner and child.poll() is None:
        child.kill()
        child.wait()
