"""What accelerators can do, from their makers' data sheets, and the devices of a topology that need not be there.

TPU: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e (bf16 peak, HBM, its bandwidth, interchip interconnect in Gbps a chip).
GPU: NVIDIA's A100, H100 and H200 data sheets, SXM, dense bf16; NVLink is given for both directions together.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Sequence

from jaxalign.types import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them. SI units: FLOP/s, bytes, bytes/s."""

    name: str
    kinds: tuple[str, ...]  # jax.Device.device_kind, or what it begins with
    flops: float  # dense bf16
    memory: float
    bandwidth: float  # of that memory
    link: float  # to one neighbour, one way
    links: int  # neighbours; of a GPU 1: a switch to all in its machine
    wraps: int = 0  # a torus closes along an axis whose size is a multiple of this; 0: never


GB, GIB, TERA = 1e9, 2**30, 1e12
CHIPS = (
    # Memory of a TPU is what its compiler lets a program have ("exceeds available HBM"), a little below the data sheet's.
    Chip("TPU v4", ("TPU v4",), 275 * TERA, 30.5 * GIB, 1228 * GB, 50 * GB, 6, 4),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197 * TERA, 15.75 * GIB, 819 * GB, 50 * GB, 4, 16),
    Chip("TPU v5p", ("TPU v5p", "TPU v5"), 459 * TERA, 95.74 * GIB, 2765 * GB, 100 * GB, 6, 4),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918 * TERA, 31.25 * GIB, 1640 * GB, 112 * GB, 4, 16),
    Chip("H200", ("NVIDIA H200",), 989 * TERA, 141 * GB, 4800 * GB, 450 * GB, 1),
    Chip("H100", ("NVIDIA H100",), 989 * TERA, 80 * GB, 3350 * GB, 450 * GB, 1),
    Chip("A100", ("NVIDIA A100",), 312 * TERA, 80 * GB, 2039 * GB, 300 * GB, 1),
)


def of(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for one that is in no table (a CPU)."""
    return next((c for c in CHIPS if any(kind == k or (kind.startswith(k) and not kind.startswith("TPU")) for k in c.kinds)), None)


def peak_flops(devices: Sequence) -> float | None:
    """bf16 FLOP/s of all devices together."""
    chip = of(devices[0].device_kind)
    return chip and chip.flops * len(devices)


def topology(name: str) -> tuple[list, Chip | None]:
    """(devices, the chip) of "v5p:4x4x4" (through libtpu, no TPU needed), "cpu:8" (simulated), or "local" (those at hand).

    Raises UserError for what is not there: libtpu, the accelerator, as many simulated devices.
    """
    import jax

    if name in ("", "local"):
        return jax.devices(), of(jax.devices()[0].device_kind)
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        if not shape.isdigit() or not int(shape):
            raise UserError(f"--topology={name}: write cpu:8 for eight simulated devices")
        return _simulated(int(shape)), None
    if not re.fullmatch(r"v\d\w*", kind) or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(f"--topology={name}: write a TPU slice as v5e:4x4, v5p:4x4x4 or v6e:16x16 (chips along each axis), cpu:8, or local")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(f'--topology={name} compiles for TPUs through libtpu, which is not installed: pip install "jaxalign[plan]"') from None
    from jax.experimental import topologies

    # No TPU is touched: no cloud's metadata server need be asked for it, and no other process be kept from it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as e:  # libtpu reports whatever it dislikes as a RuntimeError or an XlaRuntimeError
        raise UserError(f"--topology={name}: libtpu knows no such slice: {str(e).splitlines()[0]}") from None
    chip = of(devices[0].device_kind)
    cores = len(devices) // math.prod(int(x) for x in shape.split("x"))
    if chip and cores > 1:  # libtpu describes v4 core by core
        chip = dataclasses.replace(chip, name=f"{chip.name} core", flops=chip.flops / cores, memory=chip.memory / cores, bandwidth=chip.bandwidth / cores)
    return list(devices), chip


def _simulated(n: int) -> list:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:
        pass  # the backend is up already; perhaps with enough of them
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise UserError(f"--topology=cpu:{n}: this process has {len(devices)} CPU devices; start it with JAX_NUM_CPU_DEVICES={n}")
    return devices[:n]
