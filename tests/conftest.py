"""Eight simulated CPU devices and quick compiles, set before anything imports jax."""

import collections
import os
from pathlib import Path

import pytest
import recordings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Without this, collectives that do not depend on one another run in another order on each simulated device, and a
    # program that comes from the compilation cache (accumulation on a mesh: 6 times of 6) waits for itself until XLA aborts.
    + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/jaxalign-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _maps() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return 0


LEFT: collections.Counter = collections.Counter()  # tests of a file that have not passed


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Before any are deselected. Of those asked for by name, or because they failed last, nobody knows how many others their files have."""
    files = [i.nodeid.split("::")[0] for i in items]
    LEFT.update(files)
    if config.getoption("lf", False) or any("::" in a for a in config.args):
        LEFT.update(set(files))  # one that never passes


def pytest_runtest_logreport(report):
    LEFT[report.nodeid.split("::")[0]] -= report.when == "call" and report.passed


@pytest.fixture(scope="module", autouse=True)
def _recordings_are_read(request):
    """A recorded number that no test of its module looked at, though all of them passed, is a number that nothing is compared with."""
    yield
    if LEFT[request.node.nodeid] == 0:
        assert recordings.unread(request.module) == []


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """Every compiled CPU program holds several memory maps, and Linux ends a process at 65,530 of them."""
    yield
    if _maps() > 30_000:
        import jax

        jax.clear_caches()
