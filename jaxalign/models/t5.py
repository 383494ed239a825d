"""T5 and Flan-T5 (Raffel et al. 2019, 1910.10683): encoder and decoder, relative position biases, RMSNorm, unscaled scores.

The decoder's rows begin with the start token (PAD in T5), which is never a target, so that index t speaks of token t here as
everywhere. What the encoder reads is either given as `inputs`, or lies in the same row: everything before the first start
token of a document is the encoder's, the rest the decoder's. That is how prompts and completions reach it from every
source, objective and sampler, none of which knows that it is an encoder-decoder; each side passes over the other's slots,
which costs at most twice the work. Documents are told apart by segments: a decoder token sees the inputs of its own.

B batch, T decoder time, S input time, D dim, N heads, H head width, F hidden, V vocab, L layers. Weights are (in, out).
"""

from __future__ import annotations

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.models import Architecture, FamilyModel
from jaxalign.ops import kvcache, nn
from jaxalign.ops.attention import attend
from jaxalign.ops.nn import Spec
from jaxalign.types import Inputs, UserError


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    layers: int  # of the decoder
    heads: int
    hidden: int
    encoder_layers: int | None = None  # None: as many as the decoder's
    head_dim: int = 64
    buckets: int = 32  # of distances
    max_distance: int = 128  # further away is one bucket
    gated: bool = False  # T5 1.1 and Flan-T5
    activation: str = "relu"  # relu | gelu_tanh | gelu | silu
    norm_eps: float = 1e-6
    tied: bool = True  # the unembedding is the embedding (T5 1.0)
    scaled: bool = True  # logits times 1 / sqrt(dim) (T5 1.0)
    start: int = 0  # id that opens every decoder row
    dtype: str = "float32"
    scan: bool | None = None
    remat: str = "none"

    def __post_init__(self):
        if self.encoder_layers is None:
            object.__setattr__(self, "encoder_layers", self.layers)
        if self.scan is None:
            object.__setattr__(self, "scan", self.layers > 16)
        if self.activation not in nn.ACTIVATIONS:
            raise UserError(f"model.activation {self.activation!r} is not one of {', '.join(nn.ACTIVATIONS)}")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise UserError(f"model.buckets {self.buckets} must be a multiple of 4 and half of it less than model.max_distance {self.max_distance}")
        nn.policy(self.remat)


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4, hidden=256, head_dim=32)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


def start(cfg: Config) -> int:
    """The token that opens the decoder's part of a row; that a family has one says that its prompts must end with it."""
    return cfg.start


def specs(cfg: Config):
    D, F, A, std = cfg.dim, cfg.hidden, cfg.heads * cfg.head_dim, 0.02
    # Scores are not scaled, so queries are drawn smaller by sqrt(H) (Mesh TensorFlow; transformers does the same).
    into = lambda n, axis, by=1.0: Spec((D, n), ("embed", axis), nn.normal(by * D**-0.5))
    back = lambda n, axis: Spec((n, D), (axis, "embed"), nn.normal(n**-0.5))
    norm = Spec((D,), (None,), nn.ones)
    attention = lambda p="": {f"{p}q": into(A, "heads", cfg.head_dim**-0.5), f"{p}k": into(A, "heads"), f"{p}v": into(A, "heads"), f"{p}o": back(A, "heads")}
    mlp = {"mlp_norm": norm, **({"gate": into(F, "mlp")} if cfg.gated else {}), "up": into(F, "mlp"), "down": back(F, "mlp")}
    side = lambda layer, n: {"layers": nn.stacked(layer, n), "bias": Spec((cfg.buckets, cfg.heads), (None, "heads"), nn.normal(std)), "norm": norm}
    out = {
        "embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(1.0)),
        "encoder": side({"attn_norm": norm, **attention(), **mlp}, cfg.encoder_layers),
        "decoder": side({"attn_norm": norm, **attention(), "cross_norm": norm, **attention("cross_"), **mlp}, cfg.layers),
    }
    return out if cfg.tied else {**out, "unembed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(D**-0.5))}


def parted(cfg: Config, tokens, segments, positions) -> tuple[jax.Array, Inputs]:
    """Rows of prompt, start token, completion -> (the decoder's segments, the encoder's inputs), both [B,T]: 0 where a slot
    is the other's. A start token that comes again is the decoder's, like any token."""
    same = segments[:, :, None] == segments[:, None, :]
    begun = (same & (tokens == cfg.start)[:, None, :] & (jnp.arange(tokens.shape[1])[:, None] >= jnp.arange(tokens.shape[1]))[None]).any(-1)
    return jnp.where(begun, segments, 0), Inputs(tokens, jnp.where(begun, 0, segments), positions)


def bucket(gap: jax.Array, buckets: int, max_distance: int, both_ways: bool) -> jax.Array:
    """Distance (position of the key less that of the query) -> bucket: near ones each their own, far ones by the logarithm
    (section 2.1; `_relative_position_bucket` of Mesh TensorFlow)."""
    table = jnp.asarray(_buckets(buckets // 2 if both_ways else buckets, max_distance))
    near = jnp.take(table, jnp.minimum(jnp.abs(gap) if both_ways else jnp.maximum(-gap, 0), max_distance))
    return jnp.where(gap > 0, buckets // 2, 0) + near if both_ways else near


def _buckets(buckets: int, max_distance: int) -> np.ndarray:
    """i32[max_distance + 1]: the bucket of every distance. On the host and in f32, as torch rounds: where a distance lies on a
    border, another logarithm (a device's, or f64's) may put it on the other side, and the weights were trained with this one."""
    exact, gap = buckets // 2, np.arange(max_distance + 1)
    far = np.log(np.maximum(gap, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    return np.where(gap < exact, gap, np.minimum(exact + far.astype(np.int32), buckets - 1)).astype(np.int32)


def _bias(cfg: Config, table, q_positions, kv_positions, both_ways: bool):
    """[buckets,N] -> f32[B,N,T,S]."""
    where = bucket(kv_positions[:, None, :] - q_positions[:, :, None], cfg.buckets, cfg.max_distance, both_ways)
    return jnp.moveaxis(jnp.take(nn.weight(table, jnp.float32), where, axis=0, mode="clip"), -1, 1)


def _mlp(cfg: Config, p, h):
    act, up = nn.ACTIVATIONS[cfg.activation], nn.name(nn.linear(h, p["up"]), "mlp")
    return nn.linear(act(nn.name(nn.linear(h, p["gate"]), "mlp")) * up if cfg.gated else act(up), p["down"])


def _split(cfg: Config, x):
    return x.reshape(*x.shape[:-1], cfg.heads, cfg.head_dim)


def encode(cfg: Config, params, inputs: Inputs) -> jax.Array:
    """i32[B,S] -> f[B,S,D], after the encoder's last norm."""
    side, norm = params["encoder"], lambda x, scale: nn.rms_norm(x, scale, cfg.norm_eps)
    x = shard.constrain(nn.embed(params["embed"], inputs.tokens, cfg.dtype), "batch", "time", None)
    bias = _bias(cfg, side["bias"], inputs.positions, inputs.positions, True)

    def block(p, x, _):
        h = norm(x, p["attn_norm"])
        q, k, v = (_split(cfg, nn.name(nn.linear(h, p[name]), "qkv")) for name in "qkv")
        a = attend(q, k, v, q_segments=inputs.segments, kv_segments=inputs.segments, causal=False, scale=1.0, bias=bias)
        x = shard.constrain(x + nn.name(nn.linear(a.reshape(*x.shape[:2], -1), p["o"]), "o"), "batch", "time", None)
        return shard.constrain(x + _mlp(cfg, p, norm(x, p["mlp_norm"])), "batch", "time", None), None

    return norm(nn.stack(block, side["layers"], x, None, cfg.encoder_layers, scan=cfg.scan, remat=cfg.remat)[0], side["norm"])


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    """With a cache, the first call reads the inputs and keeps what the decoder needs of them; later rows are the decoder's."""
    B, T = tokens.shape
    side, norm = params["decoder"], lambda x, scale: nn.rms_norm(x, scale, cfg.norm_eps)
    spread = lambda x: shard.constrain(x, "batch", "time", None)
    if inputs is None and not (cache and "cross" in cache):
        segments, inputs = parted(cfg, tokens, segments, positions)
    if inputs is not None:
        read = encode(cfg, params, inputs)
        project = lambda w: _split(cfg, jax.vmap(lambda w: nn.linear(read, w))(w))
        cross = {"k": project(side["layers"]["cross_k"]), "v": project(side["layers"]["cross_v"])}  # [L,B,S,N,H]
        seen = inputs.segments
    else:
        cross, seen = cache["cross"], cache["cross_segments"]
    x = spread(nn.embed(params["embed"], tokens, cfg.dtype))
    cache, kv_segments, begin = kvcache.reserve(cache, segments, positions) if cache else (None, segments, 0)
    bias = _bias(cfg, side["bias"], positions, cache["positions"] if cache else positions, False)

    def block(p, x, kv, other):
        h = norm(x, p["attn_norm"])
        q, k, v = (_split(cfg, nn.name(nn.linear(h, p[name]), "qkv")) for name in "qkv")
        if kv is not None:
            kv, k, v = kvcache.write(kv, k, v, begin)
        a = attend(q, k, v, q_segments=segments, kv_segments=kv_segments, start=begin, scale=1.0, bias=bias)
        x = spread(x + nn.name(nn.linear(a.reshape(B, T, -1), p["o"]), "o"))
        q = _split(cfg, nn.linear(norm(x, p["cross_norm"]), p["cross_q"]))
        a = attend(q, other["k"], other["v"], q_segments=segments, kv_segments=seen, causal=False, scale=1.0)
        x = spread(x + nn.linear(a.reshape(B, T, -1), p["cross_o"]))
        return spread(x + _mlp(cfg, p, norm(x, p["mlp_norm"]))), kv

    x, layers = nn.stack(block, side["layers"], x, cache and cache["layers"], cfg.layers, scan=cfg.scan, remat=cfg.remat, each=cross)
    return nn.Hidden(spread(norm(x, side["norm"])), cache and {**cache, "layers": layers, "cross": cross, "cross_segments": seen})


def unembed(cfg: Config, params) -> nn.Unembed:
    return nn.Unembed(params["embed"] if cfg.tied else params["unembed"], scale=cfg.dim**-0.5 if cfg.scaled else 1.0)


def init_cache(cfg: Config, batch: int, size: int):
    return kvcache.init(cfg.layers, batch, size, cfg.heads, cfg.head_dim, jnp.dtype(cfg.dtype), cfg.scan, positions=True)


def flops_per_token(cfg: Config, length: int) -> float:
    """As `decoder.flops_per_token`, of a decoder token that comes with as many input tokens."""
    layers = nn.count(specs(cfg)["encoder"]["layers"]) + nn.count(specs(cfg)["decoder"]["layers"])
    return 6.0 * (layers + cfg.vocab * cfg.dim) + 6.0 * (2 * cfg.encoder_layers + 3 * cfg.layers) * cfg.heads * cfg.head_dim * length


# -- Hugging Face (see `models.hf`) ---------------------------------------------------------------------------------

FIELDS = {
    "vocab": "vocab_size", "dim": "d_model", "encoder_layers": "num_layers", "heads": "num_heads", "hidden": "d_ff", "head_dim": "d_kv",
    "buckets": "relative_attention_num_buckets", "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
SPELLED = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def _read(c: dict) -> dict:
    out = {ours: c.pop(theirs) for ours, theirs in FIELDS.items()}
    out |= {"layers": c.pop("num_decoder_layers", None) or out["encoder_layers"], "max_distance": c.pop("relative_attention_max_distance", 128)}
    gated, _, name = (c.pop("feed_forward_proj", "relu") or "relu").rpartition("-")
    name = "gelu_new" if gated and name == "gelu" else name  # "gated-gelu" has always meant the tanh form
    if gated not in ("", "gated") or name not in SPELLED:
        raise UserError(f"feed_forward_proj {gated}-{name} is not supported; it may be {', '.join(SPELLED)}, or gated- with one of these")
    c.pop("dense_act_fn", None), c.pop("is_gated_act", None), c.pop("n_positions", None), c.pop("output_past", None)
    # transformers 4 tied embeddings and scaled logits together; 5 says them apart, and always says tied.
    tied = c.pop("tie_word_embeddings", True) is not False
    scaled = c.pop("scale_decoder_outputs", tied)
    start = c.pop("decoder_start_token_id", None)
    return {**out, "gated": bool(gated), "activation": SPELLED[name], "tied": tied, "scaled": scaled, "start": 0 if start is None else start}


def _write(cfg: Config) -> dict:
    out = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}
    name = {v: k for k, v in SPELLED.items()}[cfg.activation]
    proj = ("gated-" if cfg.gated else "") + ("gelu" if cfg.gated and name == "gelu_new" else name)
    if cfg.gated and cfg.activation == "gelu":
        raise UserError("transformers reads gated-gelu as the tanh form; T5 cannot say activation = 'gelu' with gated = True")
    return {
        **out, "num_decoder_layers": cfg.layers, "relative_attention_max_distance": cfg.max_distance, "feed_forward_proj": proj,
        "tie_word_embeddings": cfg.tied, "scale_decoder_outputs": cfg.scaled, "decoder_start_token_id": cfg.start,
    }  # fmt: skip


def _names(cfg: Config) -> dict[str, tuple[str, bool]]:
    out = {"embed": ("shared.weight", False), "unembed": ("lm_head.weight", False)}

    def layer(side, ours, at, theirs, transposed=True):
        out[f"{side}/layers/{ours}"] = (f"{side}.block.{{}}.layer.{at}.{theirs}.weight", transposed)

    for side in ("encoder", "decoder"):
        last = 1 if side == "encoder" else 2
        for k in "qkvo":
            layer(side, k, 0, f"SelfAttention.{k}")
            if side == "decoder":
                layer(side, f"cross_{k}", 1, f"EncDecAttention.{k}")
        layer(side, "attn_norm", 0, "layer_norm", False)
        if side == "decoder":
            layer(side, "cross_norm", 1, "layer_norm", False)
        layer(side, "mlp_norm", last, "layer_norm", False)
        for k, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")) if cfg.gated else (("up", "wi"), ("down", "wo")):
            layer(side, k, last, f"DenseReluDense.{theirs}")
        out[f"{side}/bias"] = (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", False)
        out[f"{side}/norm"] = (f"{side}.final_layer_norm.weight", False)
    return out


HF = {
    "t5": Architecture(
        "T5ForConditionalGeneration", None, _read, _write, _names, prefix="", tied_by_file=True,
        copies={"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight"},
        buffers=r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # of a layer that has none
        why_not_scored="its classifier puts two layers on the decoder's EOS, which is another model than a scalar head",
        fixed={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    )
}  # fmt: skip
