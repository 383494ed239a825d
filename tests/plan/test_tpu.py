"""Compiled for TPUs that are not here. Needs libtpu (pip install "jaxalign[plan]"); the large ones also JAXALIGN_TEST_PODS=1, a few GiB
and some minutes each."""

import json
import os
import subprocess
import sys

import jax
import pytest
import runs
from jaxalign import build, chips
from jaxalign.plan import programs, roofline

pytest.importorskip("libtpu")
pods = pytest.mark.skipif(not os.environ.get("JAXALIGN_TEST_PODS"), reason="JAXALIGN_TEST_PODS is not set")


@pytest.fixture(scope="module")
def small():
    """Two layers, scanned, packed rows of 128: on four chips, weights over two and rows over two."""
    c = build.base("lm", vocab=512, dim=256, layers=2, heads=4, kv_heads=2, hidden=512, dtype="bfloat16", scan=True, remat="full")
    c.mesh.data, c.mesh.fsdp = 2, 2
    c.stage = build.stage("lm", data=dict(path="none", batch_size=8, seq_len=128))
    devices, chip = chips.topology("v5e:2x2")
    s = programs.stage(c, "lm", c.stage, devices)
    it = programs.iteration(s)
    return s, it, roofline.plan("lm", it, s.world.mesh, chip)


def test_a_step_for_four_chips(small):
    s, it, p = small
    (q,) = p.programs
    assert p.chip.name == "TPU v5e" and p.chips == 4 and p.fits and 0 < p.mfu <= 1
    assert q.arguments == pytest.approx(sum(p.resident.values()), rel=0.05)
    # Remat computes layers forward twice: 8 per weight and token where the model's own count says 6; attention 1.5 of its own.
    model = s.world.model
    layers = model.flops_per_token(128) - 6 * 512 * 256
    assert 4 * q.flops == pytest.approx(8 * 128 * (layers * 4 / 3 + 6 * 512 * 256), rel=0.1)
    assert {"all-gather", "reduce-scatter"} <= set(q.collectives) or "all-reduce" in q.collectives


def test_splash_attention_is_in_the_program(small):
    """One layer of the loop forward, forward again, backward: in two loops of two layers."""
    _, _, p = small
    forward = sum(n for k, n in p.programs[0].kernels.items() if k.startswith("splash_mha_fwd"))
    backward = sum(n for k, n in p.programs[0].kernels.items() if k.startswith("splash_mha_dkv"))
    assert (forward, backward) == (4, 2)


def test_what_does_not_fit_says_why():
    c = build.base("lm", vocab=512, dim=1024, layers=2, heads=8, hidden=2**17, dtype="bfloat16", scan=True)
    c.stage = build.stage("lm", data=dict(path="none", batch_size=512, seq_len=256))
    devices, chip = chips.topology("v5e:2x2")
    s = programs.stage(c, "lm", c.stage, devices)
    p = roofline.plan("lm", programs.iteration(s), s.world.mesh, chip)
    assert p.fits is False and p.programs[0].refused
    text = "\n".join(roofline.lines(p, c.stage))
    assert "does not fit: step needs" in text and "optimizer" in text and "mesh.fsdp" in text and "model.remat=full" in text


@pods
@pytest.mark.parametrize("preset, topology, chips", [("1b_sft", "v5e:4x4", 16), ("8b_dpo", "v5p:4x4x4", 64), ("8b_ppo", "v5p:4x4x4", 64), ("70b_sft", "v5p:4x8x8", 256)])
def test_the_large_configs_fit(preset, topology, chips, tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "jaxalign", "plan", f"--config={runs.ROOT / 'configs/large.py'}:{preset}", f"--topology={topology}", f"--json={out}"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": f"{runs.ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "JAX_PLATFORMS": "cpu"}, check=True, timeout=3600)
    p = json.loads(out.read_text())
    assert p["fits"] and p["chips"] == chips and 0 < p["mfu"] <= 1
    step = next(q for q in p["programs"] if q["name"] == "step")
    assert any(k.startswith("splash_mha_fwd") for k in step["kernels"]) and any(k.startswith("splash_mha_dkv") for k in step["kernels"])
    assert p["resident"]["optimizer"] == pytest.approx(2 * p["resident"]["params"], rel=0.01)


def test_the_process_keeps_its_own_devices(small):
    assert jax.devices()[0].platform == "cpu"
