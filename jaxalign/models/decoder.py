"""Llama-shaped decoders: pre-norm, RoPE, grouped-query attention, SwiGLU (Touvron et al. 2023, 2302.13971).

B batch, T time, D dim, N heads, K kv_heads, H head width, F hidden, V vocab, L layers. Weights are stored (in, out) and
stacked over layers.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.models import FamilyModel
from jaxalign.ops import nn
from jaxalign.ops.attention import attend
from jaxalign.ops.nn import Spec
from jaxalign.types import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim / heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = True  # the unembedding is the embedding
    max_len: int = 2048  # carried for export; rope itself has no limit
    dtype: str = "float32"  # of activations; weights are kept as they are and cast at use
    scan: bool | None = None  # compile one layer and scan; None: from 16 layers on
    remat: str = "none"  # none | dots | full

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim is None:
            if self.dim % self.heads:
                raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}; change one or give head_dim")
            object.__setattr__(self, "head_dim", self.dim // self.heads)
        if self.scan is None:
            object.__setattr__(self, "scan", self.layers > 16)
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"rotary embeddings need an even head width, got {self.head_dim}")


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4, hidden=344)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


def specs(cfg: Config):
    D, F, std = cfg.dim, cfg.hidden, 0.02
    N, K = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    out_std = std / (2 * cfg.layers) ** 0.5  # residual branches start small (GPT-2, section 2.3)
    layer = {
        "attn_norm": Spec((D,), (None,), nn.ones),
        "q": Spec((D, N), ("embed", "heads"), nn.normal(std)),
        "k": Spec((D, K), ("embed", "kv_heads"), nn.normal(std)),
        "v": Spec((D, K), ("embed", "kv_heads"), nn.normal(std)),
        "o": Spec((N, D), ("heads", "embed"), nn.normal(out_std)),
        "mlp_norm": Spec((D,), (None,), nn.ones),
        "gate": Spec((D, F), ("embed", "mlp"), nn.normal(std)),
        "up": Spec((D, F), ("embed", "mlp"), nn.normal(std)),
        "down": Spec((F, D), ("mlp", "embed"), nn.normal(out_std)),
    }
    out = {
        "embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std)),
        "layers": nn.stacked(layer, cfg.layers),
        "norm": Spec((D,), (None,), nn.ones),
    }
    return out if cfg.tied else {**out, "unembed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std))}


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    B, T = tokens.shape
    x = shard.constrain(nn.embed(params["embed"], tokens, cfg.dtype), "batch", "time", None)
    table = nn.rope_table(positions, cfg.head_dim, cfg.rope_theta)
    cache, kv_segments, start = nn.cache_open(cache, segments) if cache else (None, segments, 0)

    def block(p, x, kv):
        h = nn.rms_norm(x, p["attn_norm"], cfg.norm_eps)
        q = nn.rope(nn.linear(h, p["q"]).reshape(B, T, cfg.heads, cfg.head_dim), table)
        k = nn.rope(nn.linear(h, p["k"]).reshape(B, T, cfg.kv_heads, cfg.head_dim), table)
        v = nn.linear(h, p["v"]).reshape(B, T, cfg.kv_heads, cfg.head_dim)
        if kv is not None:
            kv, k, v = nn.cache_write(kv, k, v, start)
        a = attend(q, k, v, q_segments=segments, kv_segments=kv_segments, start=start)
        x = shard.constrain(x + nn.linear(a.reshape(B, T, -1), p["o"]), "batch", "time", None)
        h = nn.rms_norm(x, p["mlp_norm"], cfg.norm_eps)
        h = jax.nn.silu(nn.linear(h, p["gate"])) * nn.linear(h, p["up"])
        return shard.constrain(x + nn.linear(h, p["down"]), "batch", "time", None), kv

    x, layers = nn.stack(block, params["layers"], x, cache and cache["layers"], cfg.layers, scan=cfg.scan, remat=cfg.remat)
    x = nn.rms_norm(x, params["norm"], cfg.norm_eps)
    return nn.Hidden(shard.constrain(x, "batch", "time", None), cache and {**cache, "layers": layers})


def unembed(cfg: Config, params) -> nn.Unembed:
    return nn.Unembed(params["embed"] if cfg.tied else params["unembed"])


def init_cache(cfg: Config, batch: int, size: int):
    return nn.init_cache(cfg.layers, batch, size, cfg.kv_heads, cfg.head_dim, jnp.dtype(cfg.dtype), cfg.scan)


def flops_per_token(cfg: Config, length: int) -> float:
    """Model FLOPs of training one token, forward and backward: 6 per matmul weight (embedding look-up not counted,
    unembedding counted) and 6 L N H T for causal attention (half the square; PaLM appendix B counts the whole)."""
    weights = nn.count(nn.stacked({k: v for k, v in specs(cfg)["layers"].items()}, 1)) + cfg.vocab * cfg.dim
    return 6.0 * weights + 6.0 * cfg.layers * cfg.heads * cfg.head_dim * length


# -- Hugging Face (see `models.hf`) ---------------------------------------------------------------------------------

HF = {"model_type": "llama", "causal": "LlamaForCausalLM", "classifier": "LlamaForSequenceClassification", "prefix": "model."}
HF_FIXED = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,), "pretraining_tp": (1,)}
HF_BUFFERS = r"\.rotary_emb\.inv_freq$"
HF_FIELDS = {
    "vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "max_len": "max_position_embeddings",
}  # fmt: skip


def from_hf(c: dict) -> Config:
    """Transformers 5 nests the rotary fields in rope_parameters; 4 had rope_theta and rope_scaling at top level."""
    rope = {}
    for source in ({"rope_theta": c.pop("rope_theta", None)}, c.pop("rope_scaling", None), c.pop("rope_parameters", None)):
        for k, v in (source or {}).items():
            k = "rope_type" if k == "type" else k
            if v is not None and rope.setdefault(k, v) != v:
                raise UserError(f"{k} is given twice, as {rope[k]!r} and as {v!r}")
    theta = rope.pop("rope_theta", 10000.0)
    if rope.pop("rope_type", "default") != "default" or rope:
        raise UserError(f"rope scaling is not supported (rope_scaling or rope_parameters asks for something other than the default: {rope or 'rope_type'})")
    fields = {ours: c.pop(theirs) for ours, theirs in HF_FIELDS.items()}
    optional = {"kv_heads": c.pop("num_key_value_heads", None), "head_dim": c.pop("head_dim", None)}
    return Config(**fields, **optional, rope_theta=theta, tied=c.pop("tie_word_embeddings", False))


def to_hf(cfg: Config) -> dict:
    fields = {theirs: getattr(cfg, ours) for ours, theirs in HF_FIELDS.items()}
    rope = {"rope_theta": cfg.rope_theta, "rope_type": "default"}
    return {**fields, "num_key_value_heads": cfg.kv_heads, "head_dim": cfg.head_dim, "rope_parameters": rope, "tie_word_embeddings": cfg.tied}


def hf_names(cfg: Config) -> dict[str, tuple[str, bool]]:
    layer = {
        "attn_norm": ("input_layernorm", False),
        **{k: (f"self_attn.{k}_proj", True) for k in "qkvo"},
        "mlp_norm": ("post_attention_layernorm", False),
        **{k: (f"mlp.{k}_proj", True) for k in ("gate", "up", "down")},
    }
    out = {f"layers/{k}": (f"model.layers.{{}}.{name}.weight", t) for k, (name, t) in layer.items()}
    return out | {"embed": ("model.embed_tokens.weight", False), "norm": ("model.norm.weight", False), "unembed": ("lm_head.weight", False)}
