"""Several processes: started here on one machine, or found through jax.distributed on a cluster."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

from jaxalign.types import UserError

ENV = "JAXALIGN_PROCESS"  # "index/count/host:port", set for the processes that `spawn` starts


def is_child() -> bool:
    return ENV in os.environ


def spawn(count: int, argv: list[str]) -> int:
    """Run this command in `count` processes that find one another; returns the exit code. If one dies all are ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jaxalign", *argv[1:]]
    children = [subprocess.Popen(command, env={**os.environ, ENV: f"{i}/{count}/127.0.0.1:{port}"}) for i in range(count)]

    def forward(number, frame):
        for c in children:
            c.send_signal(number)

    old = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            codes = [c.poll() for c in children]
            bad = [c for c in codes if c]
            if bad or all(c == 0 for c in codes):
                break
            time.sleep(0.1)
        deadline = time.monotonic() + 10
        for c in children:  # the others are told, and given time to say why
            if c.poll() is None and not bad:
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                c.wait(max(0.1, deadline - time.monotonic()))
        return bad[0] if bad else 0
    finally:
        for c in children:
            if c.poll() is None:
                c.kill()
        for s, h in old.items():
            signal.signal(s, h)


@contextlib.contextmanager
def joined(cluster: bool):
    """Inside: jax.distributed is up, if this is one of several processes."""
    if not is_child() and not cluster:
        yield
        return
    import jax

    if is_child():
        with contextlib.suppress(AttributeError, OSError):  # Linux: when `spawn` dies, however it dies, save and stop
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        index, count, address = os.environ[ENV].split("/")
        jax.distributed.initialize(
            address, int(count), int(index), cluster_detection_method="deactivate", initialization_timeout=120, heartbeat_timeout_seconds=30
        )
    else:
        # Under SLURM jax would take one GPU per process: JAX_LOCAL_DEVICE_IDS, which launch/slurm.sh sets, says otherwise.
        jax.distributed.initialize()
    try:
        yield
    except SystemExit:  # agreed on by all: SIGTERM
        jax.distributed.shutdown()
        raise
    except BaseException as e:
        # The others may wait for this process in a collective, so a barrier with them (shutdown is one) would never end.
        print(f"jaxalign: error: {e}", file=sys.stderr) if isinstance(e, UserError) else traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(e, UserError) else 1)
    jax.distributed.shutdown()
