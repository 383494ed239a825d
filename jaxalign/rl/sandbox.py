"""Runs a program that nobody has read: Python, in a process with limits of its own, in a directory of its own.

What holds, everywhere on POSIX: wall clock, CPU seconds, memory, size of files, a directory that is thrown away, no environment
variables, isolated mode without site packages (-I -S). On Linux where the kernel lets an ordinary process make namespaces: no
network, no process outlives its program, and (from 5.12 on) no file can be written but in that directory. Where we run as root, the
program runs as nobody if that user can read Python: then the number of its processes is bounded too, as it is for everybody but
root. `holds` says which of these hold here. What we may read the program may read.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

NOBODY = 65534
OUTPUT = 1 << 20  # bytes of stdout and of stderr that are looked at

# Between our process and the program: gives up what the program must not have, then becomes it.
_GATE = """
import ctypes, json, os, resource, signal, sys
how = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
die = lambda: hasattr(libc, "prctl") and libc.prctl(1, 9)
if how["nobody"]:
    os.setgroups([]); os.setgid(how["nobody"]); os.setuid(how["nobody"])
die()
if how["apart"]:
    if libc.unshare(0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000):  # user, mounts, network, processes, shared memory
        sys.exit(97)
    if how["files"]:
        here = os.getcwd().encode()
        def setattr(path, on, off, deep):
            return libc.syscall(442, -100, path, deep, (ctypes.c_uint64 * 4)(on, off, 0, 0), 32)  # mount_setattr
        private = libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)
        if private or libc.mount(here, here, None, 0x1000, None) or setattr(b"/", 1, 0, 0x8000) or setattr(here, 0, 1, 0):
            sys.exit(98)
        os.chdir(here)
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    die()
for name, most in how["limits"].items():
    if hasattr(resource, name):
        hard = resource.getrlimit(getattr(resource, name))[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(getattr(resource, name), (most, most))
signal.setitimer(signal.ITIMER_REAL, how["seconds"] + 1)
os.execv(sys.executable, [sys.executable, "-I", "-S", "-B", "main.py"])
"""


class Result(NamedTuple):
    code: int  # of its exit; 128 + the signal that ended it
    stdout: str
    stderr: str
    overran: bool  # the wall clock


def _run(program: str, stdin: str, seconds: float, memory_mib: int, apart: bool, files: bool, nobody: bool) -> Result:
    limits = {
        "RLIMIT_CPU": int(seconds) + 1, "RLIMIT_AS": memory_mib << 20, "RLIMIT_FSIZE": 16 << 20, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 16,
    }  # fmt: skip
    how = json.dumps({"apart": apart, "files": files, "nobody": NOBODY if nobody else 0, "limits": limits, "seconds": seconds})
    with tempfile.TemporaryDirectory(prefix="run-") as directory, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as given:
        (Path(directory) / "main.py").write_text(program, encoding="utf-8", errors="replace")
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        if nobody:
            os.chown(directory, NOBODY, NOBODY)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GATE, how], cwd=directory, stdin=given, stdout=out, stderr=err, start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": directory, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        overran = False
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            overran = True
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)  # all that it started and that stayed in its session
            except ProcessLookupError:
                pass
            code = child.wait()
        texts = []
        for f in (out, err):
            f.seek(0)
            texts.append(f.read(OUTPUT).decode("utf-8", "replace"))
        return Result(code if code >= 0 else 128 - code, *texts, overran)


@functools.cache
def holds() -> dict[str, bool]:
    """{"network": it has none, "files": it writes nowhere else, "user": it runs as nobody}: as many, in this order, as Python starts under here."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    for apart, files in ((True, True), (True, False), (False, False)) if sys.platform == "linux" else ((False, False),):
        for nobody in (True, False) if root else (False,):
            got = _run("import json, random, math\nopen('f', 'w').write('it')\nprint(open('f').read(), 'runs')", "", 20.0, 512, apart, files, nobody)
            if got.stdout.strip() == "it runs":
                return {"network": apart, "files": files, "user": nobody}
    raise RuntimeError(f"no program can be run here under limits: {got.stderr[-500:] or got}")


def run(program: str, stdin: str = "", *, seconds: float = 5.0, memory_mib: int = 512) -> Result:
    """Runs a program of Python's standard library."""
    here = holds()
    return _run(program, stdin, seconds, memory_mib, here["network"], here["files"], here["user"])


def passes(program: str, tests: str, *, seconds: float = 5.0, memory_mib: int = 512) -> bool:
    """Whether `tests` (statements, asserts) run to their end behind the program. A program that leaves early has not passed: the last
    line must be a word that was drawn for this run (which it could find by reading its own file: this is no judge for a liar)."""
    word = secrets.token_hex(8)
    got = run(f"{program}\n\n{tests}\n\nprint(); print({word!r})\n", seconds=seconds, memory_mib=memory_mib)
    return got.code == 0 and not got.overran and got.stdout.rstrip().endswith(word)
