"""Llama-shaped decoders: RoPE, RMSNorm, grouped-query attention, gated feed-forward (Touvron et al. 2023, 2302.13971).

What sets Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2, Mixtral and Qwen-MoE apart is said by `Config`, field by field;
`decoder_hf` says which of them each uses and how transformers spells it.

B batch, T time, D dim, N heads, K kv_heads, H head width, F hidden, V vocab, L layers, E experts. Weights are stored
(in, out) and stacked over layers.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.models import FamilyModel, decoder_hf
from jaxalign.ops import kvcache, moe, nn, rope
from jaxalign.ops.attention import attend
from jaxalign.ops.nn import Spec
from jaxalign.types import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    layers: int
    heads: int
    hidden: int  # of the feed-forward; of one expert where there are experts
    arch: str = "llama"  # the model_type that transformers gives it; says only how it is spelled there
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: dim / heads
    norm_eps: float = 1e-5
    norm: str = "pre"  # pre | post (OLMo 2: of a branch's output) | both (Gemma 2 and 3)
    norm_offset: float = 0.0  # 1: scales are stored less 1 (Gemma)
    qk_norm: str = ""  # head: of every head's query and key (Qwen 3, Gemma 3) | whole: before heads are split (OLMo 2)
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # q, k, v in one weight, gate and up in another (Phi-3)
    embed_scale: bool = False  # embeddings times sqrt(dim) (Gemma)
    query_scale: float | None = None  # what scores are multiplied by; None: 1 / sqrt(head_dim)
    attn_softcap: float | None = None  # bounds attention scores (Gemma 2)
    logit_softcap: float | None = None  # bounds logits (Gemma 2)
    window: int | None = None  # how many keys a query of a windowed layer sees
    windowed: tuple[bool, ...] = ()  # which layers are; (): all, if there is a window
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # (name, value) pairs, see `ops.rope`
    rotary: float = 1.0  # the part of a head that rotates
    window_theta: float | None = None  # rope_theta of windowed layers, unscaled; None: as all (Gemma 3 has its own)
    experts: int = 0  # 0: a dense feed-forward
    experts_per_token: int = 2
    renormalise: bool = True  # the chosen experts' weights sum to 1
    shared_hidden: int = 0  # width of the expert that every token takes (Qwen2-MoE)
    router_aux: float = 0.0  # coefficient of the load-balancing loss
    tied: bool = True  # the unembedding is the embedding
    max_len: int = 2048  # what it was made for: dynamic rope scaling starts there, nothing ends there
    dtype: str = "float32"  # of activations; weights are kept as they are and cast at use
    scan: bool | None = None  # compile one layer and scan; None: from 17 layers on
    remat: str = "none"  # what the backward pass recomputes, see `ops.nn.policy`

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        if self.kv_heads is None:
            put("kv_heads", self.heads)
        if self.head_dim is None:
            if self.dim % self.heads:
                raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}; change one or give head_dim")
            put("head_dim", self.dim // self.heads)
        if self.scan is None:
            put("scan", self.layers > 16)
        put("windowed", tuple(map(bool, self.windowed)))
        put("rope_scaling", tuple((k, tuple(v) if isinstance(v, (list, tuple)) else v) for k, v in self.rope_scaling))
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.rotary_width % 2 or not 2 <= self.rotary_width <= self.head_dim:
            raise UserError(f"rotary embeddings need an even width of 2 or more, got {self.rotary_width} of a head of {self.head_dim}")
        for name, known in {"norm": ("pre", "post", "both"), "qk_norm": ("", "head", "whole"), "activation": tuple(nn.ACTIVATIONS)}.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} {getattr(self, name)!r} is not one of {', '.join(map(repr, known))}")
        if len(self.windowed) not in (0, self.layers) or (any(self.windowed) and self.window is None):
            raise UserError(f"model.windowed names {len(self.windowed)} layers of {self.layers}" if self.window else "model.windowed needs model.window")
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window {self.window} must be 1 or more")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise UserError(f"model.experts_per_token {self.experts_per_token} must lie between 1 and model.experts {self.experts}")
        for field, needs in {"qkv_bias": not self.fused, "mlp_bias": not (self.fused or self.experts), "shared_hidden": self.experts and not self.fused, "router_aux": self.experts}.items():
            if getattr(self, field) and not needs:
                raise UserError(f"model.{field} {getattr(self, field)!r} has no place in this model: it takes {'no fused projections' if self.fused else 'a dense feed-forward' if self.experts else 'experts'}")
        rope.check(self.rope_scaling, self.rotary_width)
        nn.policy(self.remat)

    @property
    def rotary_width(self) -> int:
        return int(self.head_dim * self.rotary)

    @property
    def local(self) -> tuple[bool, ...]:
        """Which layers are windowed."""
        return self.windowed or (self.window is not None,) * self.layers


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4, hidden=344)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


def specs(cfg: Config):
    D, F, E, std = cfg.dim, cfg.hidden, cfg.experts, 0.02
    N, K = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    out_std = std / (2 * cfg.layers) ** 0.5  # residual branches start small (GPT-2, section 2.3)
    unit = nn.zeros if cfg.norm_offset else nn.ones
    scale = lambda n=D: Spec((n,), (None,), unit)
    into = lambda n, axis: Spec((D, n), ("embed", axis), nn.normal(std))
    back = lambda n, axis: Spec((n, D), (axis, "embed"), nn.normal(out_std))
    layer = {}
    if cfg.norm != "post":
        layer |= {"attn_norm": scale(), "mlp_norm": scale()}
    if cfg.norm != "pre":
        layer |= {"attn_post_norm": scale(), "mlp_post_norm": scale()}
    if cfg.fused:
        layer |= {"qkv": into(N + 2 * K, "heads")}
    else:
        layer |= {"q": into(N, "heads"), "k": into(K, "kv_heads"), "v": into(K, "kv_heads")}
    layer |= {"o": back(N, "heads")}
    if cfg.qkv_bias:
        layer |= {"q_bias": Spec((N,), ("heads",)), "k_bias": Spec((K,), ("kv_heads",)), "v_bias": Spec((K,), ("kv_heads",))}
    if cfg.o_bias:
        layer |= {"o_bias": Spec((D,), (None,))}
    if cfg.qk_norm:
        whole = cfg.qk_norm == "whole"
        layer |= {"q_norm": scale(N if whole else cfg.head_dim), "k_norm": scale(K if whole else cfg.head_dim)}
    if E:
        many = lambda s: Spec((E, *s.shape), ("expert", *s.axes), s.init)
        layer |= {"router": Spec((D, E), ("embed", None), nn.normal(std))}
        layer |= {"experts": {"gate": many(into(F, "mlp")), "up": many(into(F, "mlp")), "down": many(back(F, "mlp"))}}
        if S := cfg.shared_hidden:
            layer |= {"shared": {"gate": into(S, "mlp"), "up": into(S, "mlp"), "down": back(S, "mlp"), "mix": Spec((D, 1), ("embed", None), nn.normal(std))}}
    else:
        layer |= {"gate_up": into(2 * F, "mlp")} if cfg.fused else {"gate": into(F, "mlp"), "up": into(F, "mlp")}
        layer |= {"down": back(F, "mlp")}
        if cfg.mlp_bias:
            layer |= {"gate_bias": Spec((F,), ("mlp",)), "up_bias": Spec((F,), ("mlp",)), "down_bias": Spec((D,), (None,))}
    out = {"embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std)), "layers": nn.stacked(layer, cfg.layers), "norm": scale()}
    return out if cfg.tied else {**out, "unembed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std))}


# -- the two branches of a layer ------------------------------------------------------------------------------------


def _qkv(cfg: Config, p, h):
    """f[B,T,D] -> queries [B,T,N,H], keys and values [B,T,K,H], not yet rotated."""
    N, K = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    if cfg.fused:
        q, k, v = jnp.split(nn.name(nn.linear(h, p["qkv"]), "qkv"), (N, N + K), axis=-1)
    else:
        q, k, v = (nn.name(nn.linear(h, p[name], p.get(f"{name}_bias")), "qkv") for name in "qkv")
    split = lambda x: x.reshape(*x.shape[:-1], -1, cfg.head_dim)
    norm = lambda x, name: nn.rms_norm(x, p[name], cfg.norm_eps, cfg.norm_offset)
    if cfg.qk_norm == "whole":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    q, k, v = split(q), split(k), split(v)
    return (norm(q, "q_norm"), norm(k, "k_norm"), v) if cfg.qk_norm == "head" else (q, k, v)


def _gated(cfg: Config, p, h):
    act = nn.ACTIVATIONS[cfg.activation]
    if cfg.fused:
        gate, up = jnp.split(nn.name(nn.linear(h, p["gate_up"]), "mlp"), 2, axis=-1)
    else:
        gate, up = nn.name((nn.linear(h, p["gate"], p.get("gate_bias")), nn.linear(h, p["up"], p.get("up_bias"))), "mlp")
    return nn.linear(act(gate) * up, p["down"], p.get("down_bias"))


def _mixture(cfg: Config, p, h, segments):
    """(the experts' output, the load they got)."""
    weight, expert, probabilities = moe.route(h, p["router"], cfg.experts_per_token, cfg.renormalise)
    y = moe.experts(h, weight, expert, p["experts"], nn.ACTIVATIONS[cfg.activation])
    if cfg.shared_hidden:
        y = y + jax.nn.sigmoid(nn.linear(h, p["shared"]["mix"])) * _gated(cfg, p["shared"], h)
    return y, moe.load(probabilities, expert, (segments != 0).astype(probabilities.dtype))


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    B, T = tokens.shape
    norm = lambda x, scale: nn.rms_norm(x, scale, cfg.norm_eps, cfg.norm_offset)
    spread = lambda x: shard.constrain(x, "batch", "time", None)
    x = nn.embed(params["embed"], tokens, cfg.dtype)
    x = spread(x * jnp.asarray(cfg.dim**0.5, x.dtype) if cfg.embed_scale else x)
    table = rope.table(positions, cfg.rotary_width, cfg.rope_theta, cfg.rope_scaling, segments=segments, max_len=cfg.max_len)
    near = rope.table(positions, cfg.rotary_width, cfg.window_theta) if cfg.window_theta else table
    cache, kv_segments, start = kvcache.reserve(cache, segments, positions) if cache else (None, segments, 0)
    mixed = len(set(cfg.local)) > 1
    # Where all layers are alike nothing is handed from layer to layer, and XLA sees constants.
    each = {"local": np.array(cfg.local)} if mixed else {}

    def block(p, carry, kv, kind=None):
        x, load = carry
        local = kind["local"] if mixed else cfg.local[0]
        window = cfg.window if mixed or local else None
        h = norm(x, p["attn_norm"]) if cfg.norm != "post" else x
        q, k, v = _qkv(cfg, p, h)
        here = jax.tree.map(lambda a, b: jnp.where(local, a, b), near, table) if mixed and cfg.window_theta else near if local is True else table
        q, k = rope.rotate(q, here), rope.rotate(k, here)
        if kv is not None:
            kv, k, v = kvcache.write(kv, k, v, start)
        at = None if kv is None or window is None else (positions, cache["positions"])
        a = attend(
            q, k, v, q_segments=segments, kv_segments=kv_segments, start=start, window=window, windowed=local if mixed else None, positions=at, scale=cfg.query_scale, softcap=cfg.attn_softcap
        )  # fmt: skip
        a = nn.name(nn.linear(a.reshape(B, T, -1), p["o"], p.get("o_bias")), "o")
        x = spread(x + (a if cfg.norm == "pre" else norm(a, p["attn_post_norm"])))
        h = norm(x, p["mlp_norm"]) if cfg.norm != "post" else x
        if cfg.experts:
            h, own = _mixture(cfg, p, h, segments)
            load = jax.tree.map(jnp.add, load, own)
        else:
            h = _gated(cfg, p, h)
        return (spread(x + (h if cfg.norm == "pre" else norm(h, p["mlp_post_norm"]))), load), kv

    zeros = jnp.zeros((cfg.experts,), nn.wide(x))
    load = moe.Load(zeros, zeros, zeros.sum()) if cfg.experts else ()
    (x, load), layers = nn.stack(block, params["layers"], (x, load), cache and cache["layers"], cfg.layers, scan=cfg.scan, remat=cfg.remat, each=each)
    return nn.Hidden(spread(norm(x, params["norm"])), cache and {**cache, "layers": layers}, {"load": load} if cfg.experts else {})


def branches(cfg: Config) -> bool:
    """Not with windows, which are measured by slots, nor where angles depend on how long a segment is."""
    return cfg.window is None and dict(cfg.rope_scaling).get("rope_type") not in rope.BY_LENGTH


def unembed(cfg: Config, params) -> nn.Unembed:
    return nn.Unembed(params["embed"] if cfg.tied else params["unembed"], softcap=cfg.logit_softcap)


def init_cache(cfg: Config, batch: int, size: int):
    return kvcache.init(cfg.layers, batch, size, cfg.kv_heads, cfg.head_dim, jnp.dtype(cfg.dtype), cfg.scan, positions=cfg.window is not None)


def flops_per_token(cfg: Config, length: int) -> float:
    """Model FLOPs of training one token, forward and backward: 6 per weight that it meets (embedding look-up not counted,
    unembedding counted; of the experts only those it chose) and 6 L N H T for causal attention (half the square; PaLM
    appendix B counts the whole), T at most the window."""
    layer = nn.count(specs(dataclasses.replace(cfg, layers=1, windowed=()))["layers"])
    if cfg.experts:
        layer -= 3 * cfg.dim * cfg.hidden * (cfg.experts - cfg.experts_per_token)
    seen = sum(min(length, 2 * cfg.window) if local else length for local in cfg.local)
    return 6.0 * (cfg.layers * layer + cfg.vocab * cfg.dim) + 6.0 * seen * cfg.heads * cfg.head_dim


HF = decoder_hf.ARCHITECTURES
