"""Rotary position embeddings (Su et al. 2021, 2104.09864) and the ways in which they are stretched to longer texts.

A scaling is a tuple of (name, value) pairs, in the names of Hugging Face's `rope_parameters` without rope_theta: it is
part of a config, so it hashes, and () is the plain embedding. H is the width that rotates, which may be less than a head's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.types import UserError

# What each type needs, and what it may have besides.
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("factor", "attention_factor")),
}
BY_LENGTH = ("dynamic", "longrope")  # their angles depend on the length of the text

Scaling = tuple[tuple[str, object], ...]


def check(scaling: Scaling, width: int) -> None:
    """Refuses, by name, a scaling that is not one of TYPES or whose numbers cannot be meant."""
    if not scaling:
        return
    s = dict(scaling)
    kind = s.pop("rope_type", None)
    if kind not in TYPES:
        raise UserError(f"rope scaling of type {kind!r} is not supported; the types are {', '.join(TYPES)}")
    needs, may = TYPES[kind]
    if missing := [k for k in needs if s.get(k) is None]:
        raise UserError(f"rope scaling {kind!r} lacks {', '.join(missing)}")
    if extra := sorted(set(s) - set(needs) - set(may)):
        raise UserError(f"rope scaling {kind!r} does not know {', '.join(f'{k} = {s[k]!r}' for k in extra)}")
    for k, v in s.items():
        numbers = v if k in ("short_factor", "long_factor") else (v,)
        if k == "truncate":
            good = type(v) is bool
        else:
            good = isinstance(numbers, tuple) and all(type(x) in (int, float) and math.isfinite(x) and x > 0 for x in numbers)
        if not good:
            raise UserError(f"rope scaling {kind!r}: {k} = {v!r} must be {'true or false' if k == 'truncate' else 'positive and finite'}")
        if isinstance(v, tuple) and len(v) != width // 2:
            raise UserError(f"rope scaling {kind!r}: {k} has {len(v)} numbers, half the rotary width is {width // 2}")
    if kind == "dynamic" and width < 4:
        raise UserError("rope scaling 'dynamic' needs a rotary width of 4 or more")
    if kind == "llama3" and s["high_freq_factor"] <= s["low_freq_factor"]:
        raise UserError("rope scaling 'llama3': high_freq_factor must exceed low_freq_factor")


def read(c: dict, *, theta: float, rotary: float = 1.0, max_len: int = 0) -> tuple[Scaling, dict]:
    """Takes the rotary fields out of a config.json: (scaling, {"rope_theta", "rotary"}).

    Both spellings: rope_parameters (transformers 5); rope_theta, rope_scaling and partial_rotary_factor at top level (4).
    `theta` and `rotary` are what the architecture takes where nothing is said.
    """
    said = {k: c.pop(k, None) for k in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")}
    rope: dict = {}
    for source in (said, c.pop("rope_scaling", None), c.pop("rope_parameters", None)):
        if source is not None and not isinstance(source, dict):
            raise UserError(f"rope scaling {source!r} must be an object")
        for k, v in (source or {}).items():
            k = "rope_type" if k == "type" else k
            if v is not None and rope.setdefault(k, v) != v:
                raise UserError(f"{k} is given twice, as {rope[k]!r} and as {v!r}")
    fields = {"rope_theta": rope.pop("rope_theta", theta), "rotary": rope.pop("partial_rotary_factor", rotary)}
    for k, v in fields.items():
        if type(v) not in (int, float) or not 0 < abs(v) < 2**63:
            raise UserError(f"{k} {v!r} is not a number that could be meant")
        fields[k] = float(v)
    kind, original = rope.pop("rope_type", "default"), rope.pop("original_max_position_embeddings", None)
    kind = "longrope" if kind == "su" else kind  # what Phi-3 called it at first
    if kind == "default":
        if rope:
            raise UserError(f"rope scaling is of the default type and yet has {', '.join(f'{k} = {v!r}' for k, v in sorted(rope.items()))}")
        return (), fields
    if kind in TYPES and "original_max_position_embeddings" in TYPES[kind][0]:
        rope["original_max_position_embeddings"] = max_len if original is None else original
    elif original not in (None, max_len):
        rope["original_max_position_embeddings"] = original  # which `check` refuses: nobody would read it
    return (("rope_type", kind), *sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in rope.items())), fields


def write(scaling: Scaling) -> dict:
    """The inverse of `read`, less theta and the rotating part."""
    return {"rope_type": "default", **{k: list(v) if isinstance(v, tuple) else v for k, v in scaling}}


def _plain(width: int, theta) -> np.ndarray:
    """theta^(-2i/H), f64[H/2]."""
    return theta ** (-np.arange(0, width, 2) / width)


def _llama3(width, theta, s):
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended (Llama 3.1, 2407.21783, section 3.4.3)."""
    freq = _plain(width, theta)
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return freq * (keep + (1 - keep) / s["factor"])


def _yarn(width, theta, s):
    """NTK by parts (Peng et al. 2023, 2309.00071, sections 3.2 and 3.3)."""
    freq, factor = _plain(width, theta), s["factor"]

    def dim(turns):  # the dimension that turns so often over the original length
        return width * math.log(s["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim(s.get("beta_fast") or 32), dim(s.get("beta_slow") or 1)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    slow = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return freq * (1 - slow) + freq / factor * slow


def _amplitude(s, max_len) -> float:
    """What cos and sin are multiplied with: attention becomes sharper as the text grows (2309.00071 eq. 22; 2402.13753)."""
    if s.get("attention_factor") is not None:
        return float(s["attention_factor"])
    factor = s.get("factor") or max_len / s["original_max_position_embeddings"]
    if factor <= 1:
        return 1.0
    if s["rope_type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(s["original_max_position_embeddings"]))
    m = lambda by: 0.1 * by * math.log(factor) + 1.0
    a, b = s.get("mscale"), s.get("mscale_all_dim")
    return m(a) / m(b) if a and b else m(1)


def _reach(positions, segments):
    """i32[B,T]: the length of the document that each token is in, as far as it is here. So a row's neighbours, in the
    batch and in the row, do not matter, as they would if the batch's longest decided."""
    T = positions.shape[1]
    last = jnp.concatenate([segments[:, 1:] != segments[:, :-1], jnp.ones_like(segments[:, :1], bool)], 1)
    end = jax.lax.cummin(jnp.where(last, jnp.arange(T), T - 1), axis=1, reverse=True)  # slot of the document's last token
    return jnp.take_along_axis(positions, end, 1) + 1


def table(positions, width: int, theta: float, scaling: Scaling = (), *, segments=None, max_len: int = 0) -> tuple[jax.Array, jax.Array]:
    """i32[B,T] -> cos, sin f32[B,T,1,H/2], half-split as in Llama's HF weights.

    "dynamic" and "longrope" look at the length of the document, and so are not causal once it passes the original
    length: a token that is sampled reads keys that were rotated for a shorter text, as it does in transformers.
    """
    s = dict(scaling)
    kind, amplitude = s.get("rope_type"), 1.0
    if kind == "linear":
        freq = _plain(width, theta) / s["factor"]
    elif kind == "llama3":
        freq = _llama3(width, theta, s)
    elif kind == "yarn":
        freq, amplitude = _yarn(width, theta, s), _amplitude(s, max_len)
    elif kind == "longrope":
        long = (_reach(positions, segments) > s["original_max_position_embeddings"])[..., None, None]
        freq, amplitude = (jnp.asarray(_plain(width, theta) / np.array(s[k]), jnp.float32) for k in ("long_factor", "short_factor")), _amplitude(s, max_len)
        freq = jnp.where(long, *freq)
    elif kind == "dynamic":
        length = jnp.maximum(_reach(positions, segments), max_len)[..., None, None].astype(jnp.float32)
        base = theta * (s["factor"] * length / max_len - (s["factor"] - 1)) ** (width / (width - 2))
        freq = base ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    else:
        freq = _plain(width, theta)
    angle = positions[..., None, None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)
    return amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate [B,T,N,H] by its positions; where the table is narrower than a head, the rest of the head stays."""
    cos, sin = (t.astype(x.dtype) for t in cos_sin)
    half = cos.shape[-1]
    if shard.platform() == "cpu" and x.shape[1] > 1 and 2 * half == x.shape[-1]:
        # (-b, a) as a product with a matrix of 0 and +-1, which is exact: a concatenation is written number by number there.
        turn = np.kron([[0, 1], [-1, 0]], np.eye(half))
        return x * jnp.concatenate([cos, cos], -1) + (x @ jnp.asarray(turn, x.dtype)) * jnp.concatenate([sin, sin], -1)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
