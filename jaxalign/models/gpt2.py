"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, fused QKV, GELU (tanh form), biases everywhere, tied.

B batch, T time, D dim, N heads, H head width, V vocab, L layers. Weights are (in, out), as HF's Conv1D stores them.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.models import Architecture, FamilyModel
from jaxalign.ops import kvcache, nn
from jaxalign.ops.attention import attend
from jaxalign.ops.nn import Spec
from jaxalign.types import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int | None = None  # None: 4 dim
    max_len: int = 1024
    norm_eps: float = 1e-5
    dtype: str = "float32"
    scan: bool | None = None
    remat: str = "none"

    def __post_init__(self):
        if self.hidden is None:
            object.__setattr__(self, "hidden", 4 * self.dim)
        if self.scan is None:
            object.__setattr__(self, "scan", self.layers > 16)
        if self.dim % self.heads:
            raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}")
        nn.policy(self.remat)


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


def specs(cfg: Config):
    D, F, std = cfg.dim, cfg.hidden, 0.02
    out_std = std / (2 * cfg.layers) ** 0.5
    layer = {
        "ln_1": {"scale": Spec((D,), (None,), nn.ones), "bias": Spec((D,), (None,))},
        "qkv": {"w": Spec((D, 3 * D), ("embed", "heads"), nn.normal(std)), "b": Spec((3 * D,), ("heads",))},
        "o": {"w": Spec((D, D), ("heads", "embed"), nn.normal(out_std)), "b": Spec((D,), (None,))},
        "ln_2": {"scale": Spec((D,), (None,), nn.ones), "bias": Spec((D,), (None,))},
        "up": {"w": Spec((D, F), ("embed", "mlp"), nn.normal(std)), "b": Spec((F,), ("mlp",))},
        "down": {"w": Spec((F, D), ("mlp", "embed"), nn.normal(out_std)), "b": Spec((D,), (None,))},
    }
    return {
        "embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std)),
        "positions": Spec((cfg.max_len, D), (None, "embed"), nn.normal(std)),
        "layers": nn.stacked(layer, cfg.layers),
        "norm": {"scale": Spec((D,), (None,), nn.ones), "bias": Spec((D,), (None,))},
    }


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    B, T = tokens.shape
    heads = lambda a: a.reshape(B, T, cfg.heads, cfg.dim // cfg.heads)
    norm = lambda x, p: nn.layer_norm(x, p["scale"], p["bias"], cfg.norm_eps)
    x = nn.embed(params["embed"], tokens, cfg.dtype) + nn.embed(params["positions"], positions, cfg.dtype, ".")
    x = shard.constrain(x, "batch", "time", None)
    cache, kv_segments, start = kvcache.reserve(cache, segments) if cache else (None, segments, 0)

    def block(p, x, kv):
        q, k, v = map(heads, jnp.split(nn.name(nn.linear(norm(x, p["ln_1"]), p["qkv"]["w"], p["qkv"]["b"]), "qkv"), 3, axis=-1))
        if kv is not None:
            kv, k, v = kvcache.write(kv, k, v, start)
        a = attend(q, k, v, q_segments=segments, kv_segments=kv_segments, start=start)
        a = nn.name(nn.linear(a.reshape(B, T, -1), p["o"]["w"], p["o"]["b"]), "o")
        x = shard.constrain(x + a, "batch", "time", None)
        h = jax.nn.gelu(nn.name(nn.linear(norm(x, p["ln_2"]), p["up"]["w"], p["up"]["b"]), "mlp"), approximate=True)
        return shard.constrain(x + nn.linear(h, p["down"]["w"], p["down"]["b"]), "batch", "time", None), kv

    x, layers = nn.stack(block, params["layers"], x, cache and cache["layers"], cfg.layers, scan=cfg.scan, remat=cfg.remat)
    x = shard.constrain(norm(x, params["norm"]), "batch", "time", None)
    return nn.Hidden(x, cache and {**cache, "layers": layers})


def positions(cfg: Config) -> int:
    """A learned table: a position past its end has no row, and would silently take the last one."""
    return cfg.max_len


def branches(cfg: Config) -> bool:
    return True


def unembed(cfg: Config, params) -> nn.Unembed:
    return nn.Unembed(params["embed"])


def init_cache(cfg: Config, batch: int, size: int):
    return kvcache.init(cfg.layers, batch, size, cfg.heads, cfg.dim // cfg.heads, jnp.dtype(cfg.dtype), cfg.scan)


def flops_per_token(cfg: Config, length: int) -> float:
    """As `decoder.flops_per_token`."""
    D, F = cfg.dim, cfg.hidden
    return 6.0 * (cfg.layers * (4 * D * D + 2 * D * F) + cfg.vocab * D) + 6.0 * cfg.layers * D * length


# -- Hugging Face (see `models.hf`) ---------------------------------------------------------------------------------

FIELDS = {"vocab": "vocab_size", "dim": "n_embd", "layers": "n_layer", "heads": "n_head", "max_len": "n_positions", "norm_eps": "layer_norm_epsilon"}


def _read(c: dict) -> dict:
    return {**{ours: c.pop(theirs) for ours, theirs in FIELDS.items()}, "hidden": c.pop("n_inner", None)}


def _write(cfg: Config) -> dict:
    return {**{theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}, "n_inner": cfg.hidden if cfg.hidden != 4 * cfg.dim else None}


def _names(cfg: Config) -> dict[str, tuple[str, bool]]:
    norm = lambda ours, theirs: {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    dense = lambda ours, theirs: {f"{ours}/w": f"{theirs}.weight", f"{ours}/b": f"{theirs}.bias"}
    layer = {
        **norm("ln_1", "ln_1"), **dense("qkv", "attn.c_attn"), **dense("o", "attn.c_proj"),
        **norm("ln_2", "ln_2"), **dense("up", "mlp.c_fc"), **dense("down", "mlp.c_proj"),
    }  # fmt: skip
    names = {"embed": "wte.weight", "positions": "wpe.weight", **norm("norm", "ln_f")}
    names |= {f"layers/{k}": f"h.{{}}.{v}" for k, v in layer.items()}
    return {k: (f"transformer.{v}", False) for k, v in names.items()}


HF = {
    "gpt2": Architecture(
        "GPT2LMHeadModel", "GPT2ForSequenceClassification", _read, _write, _names, prefix="transformer.",
        buffers=r"\.attn\.(bias|masked_bias)$",  # the causal mask; c_attn.bias is another name
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    )
}  # fmt: skip
