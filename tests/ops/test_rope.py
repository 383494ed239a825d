"""Rotary embeddings against their definitions, written as loops; parity with transformers is in models/test_parity.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign.ops import rope
from jaxalign.types import UserError

H, THETA = 12, 500.0
LLAMA3 = (("rope_type", "llama3"), ("factor", 4.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0), ("original_max_position_embeddings", 64))
YARN = (("rope_type", "yarn"), ("factor", 8.0), ("original_max_position_embeddings", 64))


def freqs(scaling, position=1, **more):
    """The angle per position that a table was made with, f64[H/2], and what it is multiplied by."""
    cos, sin = rope.table(jnp.array([[position]]), H, THETA, scaling, segments=jnp.ones((1, 1), jnp.int32), max_len=64, **more)
    return np.arctan2(sin, cos)[0, 0, 0] / position, float(np.hypot(cos, sin)[0, 0, 0, 0])


def plain(i):
    return THETA ** (-2 * i / H)


def llama3(i):
    """Meta's own way of saying it: by wavelength."""
    wavelength = 2 * math.pi / plain(i)
    if wavelength < 64 / 4:
        return plain(i)
    if wavelength > 64 / 1:
        return plain(i) / 4
    smooth = (64 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * plain(i) / 4 + smooth * plain(i)


def yarn(i):
    """2309.00071: dimensions that turn 32 times or more over 64 positions keep their speed, those that turn once or less are slowed."""
    dim = lambda turns: H * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(THETA))
    low, high = max(math.floor(dim(32)), 0), min(math.ceil(dim(1)), H - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain(i) * (1 - ramp) + plain(i) / 8 * ramp


@pytest.mark.parametrize("scaling, want, amplitude", [((), plain, 1.0), ((("rope_type", "linear"), ("factor", 3.0)), lambda i: plain(i) / 3, 1.0), (LLAMA3, llama3, 1.0), (YARN, yarn, 0.1 * math.log(8) + 1)])
def test_against_the_definition(scaling, want, amplitude):
    got, size = freqs(scaling)
    np.testing.assert_allclose(got, [want(i) for i in range(H // 2)], rtol=1e-5)
    assert abs(size - amplitude) < 1e-5


def test_llama3_keeps_slows_and_blends():
    """The parameters above reach all three branches; else the test of them would say nothing."""
    kinds = {plain(i) == llama3(i) for i in range(H // 2)} | {round(plain(i) / llama3(i), 6) == 4 for i in range(H // 2)}
    assert kinds == {True, False} and any(1 < plain(i) / llama3(i) < 3.999 for i in range(H // 2))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_is_the_documents_and_not_the_rows(kind):
    """A short document beside a long one is rotated as if alone; past the limit the long one is not as it was."""
    half = H // 2
    own = {"dynamic": (("rope_type", "dynamic"), ("factor", 2.0)), "longrope": (("rope_type", "longrope"), ("long_factor", (4.0,) * half), ("original_max_position_embeddings", 16), ("short_factor", (1.0,) * half))}[kind]
    segments = jnp.array([[1] * 20 + [2] * 6])
    positions = jnp.array([[*range(20), *range(6)]])
    table = lambda p, s: np.stack(rope.table(p, H, THETA, own, segments=s, max_len=16))
    both = table(positions, segments)
    np.testing.assert_allclose(both[:, :, 20:], table(positions[:, 20:], segments[:, 20:]), atol=1e-6)
    np.testing.assert_allclose(both[:, :, :20], table(positions[:, :20], segments[:, :20]), atol=1e-6)
    short = table(positions[:, :6], segments[:, :6])
    assert abs(both[:, :, :6] - short).max() > 1e-2  # the same six positions, in a document of 20


def test_dynamic_is_plain_up_to_the_limit_and_ntk_after():
    own = (("rope_type", "dynamic"), ("factor", 2.0))
    np.testing.assert_allclose(freqs(own, 63)[0][2:], freqs((), 63)[0][2:], rtol=1e-5)
    # one document of 128: theta grows by (2 * 128 / 64 - 1) ^ (H / (H - 2))
    cos, sin = rope.table(jnp.arange(128)[None], H, THETA, own, segments=jnp.ones((1, 128), jnp.int32), max_len=64)
    base = THETA * 3 ** (H / (H - 2))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 1, 0], [base ** (-2 * i / H) for i in range(H // 2)], rtol=1e-5)


def test_a_part_of_the_head_rotates_and_the_rest_stays():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 10)).astype(np.float32)
    positions = jnp.array([[0, 1, 2], [5, 6, 7]])
    out = jax.jit(lambda x: rope.rotate(x, rope.table(positions, 6, THETA)))(x)
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])
    np.testing.assert_allclose(out[0, 0], x[0, 0], atol=1e-6)  # position 0 turns nothing
    pair = x[1, 2, 3, 1] + 1j * x[1, 2, 3, 4]  # halves: 1 goes with 1 + 3
    want = pair * np.exp(1j * 7 * THETA ** (-2 / 6))
    np.testing.assert_allclose([out[1, 2, 3, 1], out[1, 2, 3, 4]], [want.real, want.imag], rtol=1e-4)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ((("rope_type", "abf"),), "'abf' is not supported"),
        ((("rope_type", "linear"),), "lacks factor"),
        ((("rope_type", "linear"), ("factor", 0.0)), "factor = 0.0 must be positive"),
        ((("rope_type", "linear"), ("factor", float("nan"))), "must be positive"),
        ((("rope_type", "linear"), ("factor", 2.0), ("beta_fast", 3)), "does not know beta_fast"),
        ((("rope_type", "longrope"), ("short_factor", (1.0,)), ("long_factor", (1.0,) * 6), ("original_max_position_embeddings", 8)), "half the rotary width is 6"),
        ((*LLAMA3[:2], ("high_freq_factor", 1.0), ("low_freq_factor", 1.0), LLAMA3[4]), "must exceed"),
    ],
)
def test_what_cannot_be_meant_is_refused(scaling, message):
    with pytest.raises(UserError, match=message):
        rope.check(scaling, H)


def test_both_spellings_read_alike():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert rope.read(dict(old), theta=1e4) == rope.read(dict(new), theta=1e4) == (((("rope_type", "linear"), ("factor", 2.0))), {"rope_theta": 5e5, "rotary": 1.0})
    with pytest.raises(UserError, match="given twice"):
        rope.read({**old, "rope_parameters": {"rope_theta": 1e4}}, theta=1e4)
    with pytest.raises(UserError, match="default type and yet has factor"):
        rope.read({"rope_scaling": {"factor": 2.0}}, theta=1e4)
