"""GPT-NeoX and Pythia (Black et al. 2022, 2204.06745; Biderman et al. 2023, 2304.01373): LayerNorm, partial rotary
embeddings, attention and feed-forward side by side on one residual (unless `parallel` is False), biases, GELU.

B batch, T time, D dim, N heads, H head width, F hidden, V vocab, L layers. Weights are (in, out); the fused QKV's columns
are ordered head by head, q, k and v of each, as HF stores them.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.models import Architecture, FamilyModel, dense_names, norm_names
from jaxalign.ops import kvcache, nn, rope
from jaxalign.ops.attention import attend
from jaxalign.ops.nn import Spec
from jaxalign.types import UserError


SPELLED = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int | None = None  # None: 4 dim
    parallel: bool = True  # both branches read the same x
    attn_bias: bool = True
    activation: str = "gelu"  # gelu | gelu_tanh (the 20 B model's)
    rotary: float = 0.25  # the part of a head that rotates
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # (name, value) pairs, see `ops.rope`
    norm_eps: float = 1e-5
    tied: bool = False
    max_len: int = 2048
    dtype: str = "float32"
    scan: bool | None = None
    remat: str = "none"

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        if self.hidden is None:
            put("hidden", 4 * self.dim)
        if self.scan is None:
            put("scan", self.layers > 16)
        put("rope_scaling", tuple((k, tuple(v) if isinstance(v, (list, tuple)) else v) for k, v in self.rope_scaling))
        if self.dim % self.heads:
            raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}")
        if self.rotary_width % 2 or not 2 <= self.rotary_width <= self.dim // self.heads:
            raise UserError(f"rotary embeddings need an even width of 2 or more, got {self.rotary_width} of a head of {self.dim // self.heads}")
        if self.activation not in SPELLED.values():
            raise UserError(f"model.activation {self.activation!r} is not one of gelu, gelu_tanh")
        rope.check(self.rope_scaling, self.rotary_width)
        nn.policy(self.remat)

    @property
    def rotary_width(self) -> int:
        return int(self.dim // self.heads * self.rotary)


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


def specs(cfg: Config):
    D, F, std = cfg.dim, cfg.hidden, 0.02
    out_std = std / (2 * cfg.layers) ** 0.5
    norm = {"scale": Spec((D,), (None,), nn.ones), "bias": Spec((D,), (None,))}
    bias = lambda n, axis: {"b": Spec((n,), (axis,))} if cfg.attn_bias else {}
    layer = {
        "ln_1": norm,
        "qkv": {"w": Spec((D, 3 * D), ("embed", "heads"), nn.normal(std)), **bias(3 * D, "heads")},
        "o": {"w": Spec((D, D), ("heads", "embed"), nn.normal(out_std)), **bias(D, None)},
        "ln_2": norm,
        "up": {"w": Spec((D, F), ("embed", "mlp"), nn.normal(std)), "b": Spec((F,), ("mlp",))},
        "down": {"w": Spec((F, D), ("mlp", "embed"), nn.normal(out_std)), "b": Spec((D,), (None,))},
    }
    out = {"embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std)), "layers": nn.stacked(layer, cfg.layers), "norm": norm}
    return out if cfg.tied else {**out, "unembed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std))}


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    B, T = tokens.shape
    norm = lambda x, p: nn.layer_norm(x, p["scale"], p["bias"], cfg.norm_eps)
    dense = lambda x, p: nn.linear(x, p["w"], p.get("b"))
    spread = lambda x: shard.constrain(x, "batch", "time", None)
    x = spread(nn.embed(params["embed"], tokens, cfg.dtype))
    table = rope.table(positions, cfg.rotary_width, cfg.rope_theta, cfg.rope_scaling, segments=segments, max_len=cfg.max_len)
    cache, kv_segments, start = kvcache.reserve(cache, segments) if cache else (None, segments, 0)

    def block(p, x, kv):
        q, k, v = jnp.moveaxis(nn.name(dense(norm(x, p["ln_1"]), p["qkv"]), "qkv").reshape(B, T, cfg.heads, 3, -1), 3, 0)
        q, k = rope.rotate(q, table), rope.rotate(k, table)
        if kv is not None:
            kv, k, v = kvcache.write(kv, k, v, start)
        a = attend(q, k, v, q_segments=segments, kv_segments=kv_segments, start=start)
        a = nn.name(dense(a.reshape(B, T, -1), p["o"]), "o")
        h = norm(x if cfg.parallel else x + a, p["ln_2"])
        h = dense(jax.nn.gelu(nn.name(dense(h, p["up"]), "mlp"), approximate=cfg.activation == "gelu_tanh"), p["down"])
        return spread(x + a + h), kv

    x, layers = nn.stack(block, params["layers"], x, cache and cache["layers"], cfg.layers, scan=cfg.scan, remat=cfg.remat)
    return nn.Hidden(spread(norm(x, params["norm"])), cache and {**cache, "layers": layers})


def branches(cfg: Config) -> bool:
    """As `decoder.branches`."""
    return dict(cfg.rope_scaling).get("rope_type") not in rope.BY_LENGTH


def unembed(cfg: Config, params) -> nn.Unembed:
    return nn.Unembed(params["embed"] if cfg.tied else params["unembed"])


def init_cache(cfg: Config, batch: int, size: int):
    return kvcache.init(cfg.layers, batch, size, cfg.heads, cfg.dim // cfg.heads, jnp.dtype(cfg.dtype), cfg.scan)


def flops_per_token(cfg: Config, length: int) -> float:
    """As `decoder.flops_per_token`."""
    D, F = cfg.dim, cfg.hidden
    return 6.0 * (cfg.layers * (4 * D * D + 2 * D * F) + cfg.vocab * D) + 6.0 * cfg.layers * D * length


# -- Hugging Face (see `models.hf`) ---------------------------------------------------------------------------------

FIELDS = {
    "vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "hidden": "intermediate_size", "norm_eps": "layer_norm_eps", "max_len": "max_position_embeddings",
}  # fmt: skip


def _read(c: dict) -> dict:
    out = {ours: c.pop(theirs) for ours, theirs in FIELDS.items()}
    out |= {"parallel": c.pop("use_parallel_residual", True), "attn_bias": c.pop("attention_bias", True), "tied": c.pop("tie_word_embeddings", False)}
    act = c.pop("hidden_act", "gelu")
    if act not in SPELLED:
        raise UserError(f"hidden_act {act!r} is not supported; it may be {', '.join(SPELLED)}")
    out["activation"] = SPELLED[act]
    scaling, rotary = rope.read(c, theta=c.pop("rotary_emb_base", 10000.0), rotary=c.pop("rotary_pct", 0.25), max_len=out["max_len"])
    return {**out, **rotary, "rope_scaling": scaling}


def _write(cfg: Config) -> dict:
    out = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}
    out |= {"use_parallel_residual": cfg.parallel, "hidden_act": "gelu" if cfg.activation == "gelu" else "gelu_fast", "attention_bias": cfg.attn_bias, "tie_word_embeddings": cfg.tied}
    return out | {"rope_parameters": {**rope.write(cfg.rope_scaling), "rope_theta": cfg.rope_theta, "partial_rotary_factor": cfg.rotary}}


def _names(cfg: Config) -> dict[str, tuple[str, bool]]:
    layer = {
        **norm_names("ln_1", "input_layernorm"), **dense_names("qkv", "attention.query_key_value"), **dense_names("o", "attention.dense"),
        **norm_names("ln_2", "post_attention_layernorm"), **dense_names("up", "mlp.dense_h_to_4h"), **dense_names("down", "mlp.dense_4h_to_h"),
    }  # fmt: skip
    out = {f"layers/{k}": (f"gpt_neox.layers.{{}}.{v}", t) for k, (v, t) in layer.items()}
    out |= {"embed": ("gpt_neox.embed_in.weight", False), "unembed": ("embed_out.weight", False)}
    return out | norm_names("norm", "gpt_neox.final_layer_norm")


HF = {
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification", _read, _write, _names, prefix="gpt_neox.",
        buffers=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$", fixed={"is_decoder": (False, True)},
    )
}  # fmt: skip
