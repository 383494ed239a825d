"""BERT (Devlin et al. 2018, 1810.04805): an encoder that sees both ways, with a masked-LM head or, as a classifier or reward
model, with a pooler on the first token. Post-norm, learned positions, one token type.

B batch, T time, D dim, N heads, F hidden, V vocab, L layers. Weights are (in, out).
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp

from jaxalign import shard
from jaxalign.models import Architecture, FamilyModel, dense_names, norm_names
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
    head: str = "masked"  # masked: x is what the masked-LM head unembeds | pooled: x is the encoder's, and `pool` its summary
    types: int = 2  # token types; all our tokens are of type 0
    activation: str = "gelu"  # gelu | gelu_tanh | relu | silu
    norm_eps: float = 1e-12
    max_len: int = 512
    dtype: str = "float32"
    scan: bool | None = None
    remat: str = "none"

    def __post_init__(self):
        if self.scan is None:
            object.__setattr__(self, "scan", self.layers > 16)
        if self.dim % self.heads:
            raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}")
        for name, known in {"head": ("masked", "pooled"), "activation": tuple(nn.ACTIVATIONS)}.items():
            if getattr(self, name) not in known:
                raise UserError(f"model.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")


def model(**config) -> FamilyModel:
    """`model(vocab=512, dim=128, layers=4, heads=4, hidden=512)`"""
    return FamilyModel(sys.modules[__name__], Config(**config))


whole = {"pooler": "pooler"}  # ours -> HF's: trained and saved whole beside a classifier's adapters, since no masked-LM base has it
causal = False  # what `hidden` says at t has read the tokens after t: nothing that generates may use it


def positions(cfg: Config) -> int:
    return cfg.max_len


def scored(cfg: Config) -> Config:
    """The same encoder as the trunk of a reward model."""
    return dataclasses.replace(cfg, head="pooled")


def specs(cfg: Config):
    D, F, std = cfg.dim, cfg.hidden, 0.02
    norm = {"scale": Spec((D,), (None,), nn.ones), "bias": Spec((D,), (None,))}
    dense = lambda i, o, axes: {"w": Spec((i, o), axes, nn.normal(std)), "b": Spec((o,), (axes[1] if axes[1] != "embed" else None,))}
    square = lambda: dense(D, D, ("embed", "heads"))
    layer = {
        "q": square(), "k": square(), "v": square(), "o": dense(D, D, ("heads", "embed")), "attn_norm": norm,
        "up": dense(D, F, ("embed", "mlp")), "down": dense(F, D, ("mlp", "embed")), "mlp_norm": norm,
    }  # fmt: skip
    out = {
        "embed": Spec((cfg.vocab, D), ("vocab", "embed"), nn.normal(std)),
        "positions": Spec((cfg.max_len, D), (None, "embed"), nn.normal(std)),
        "types": Spec((cfg.types, D), (None, "embed"), nn.normal(std)),
        "embed_norm": norm,
        "layers": nn.stacked(layer, cfg.layers),
    }
    if cfg.head == "pooled":
        return {**out, "pooler": dense(D, D, ("embed", None))}
    return {**out, "masked": {**dense(D, D, ("embed", None)), "norm": norm, "bias": Spec((cfg.vocab,), ("vocab",))}}


def _norm(cfg: Config, x, p):
    return nn.layer_norm(x, p["scale"], p["bias"], cfg.norm_eps)


def hidden(cfg: Config, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> nn.Hidden:
    if cache is not None:
        raise UserError("BERT reads both ways and generates nothing; it has no cache")
    B, T = tokens.shape
    dense = lambda x, p: nn.linear(x, p["w"], p["b"])
    split = lambda x: x.reshape(B, T, cfg.heads, -1)
    spread = lambda x: shard.constrain(x, "batch", "time", None)
    x = nn.embed(params["embed"], tokens, cfg.dtype) + nn.embed(params["types"], jnp.zeros_like(tokens), cfg.dtype, ".") + nn.embed(params["positions"], positions, cfg.dtype, ".")
    x = spread(_norm(cfg, x, params["embed_norm"]))

    def block(p, x, _):
        q, k, v = (split(dense(x, p[name])) for name in "qkv")
        a = attend(q, k, v, q_segments=segments, kv_segments=segments, causal=False)
        x = spread(_norm(cfg, x + dense(a.reshape(B, T, -1), p["o"]), p["attn_norm"]))
        h = dense(nn.ACTIVATIONS[cfg.activation](dense(x, p["up"])), p["down"])
        return spread(_norm(cfg, x + h, p["mlp_norm"])), None

    x = nn.stack(block, params["layers"], x, None, cfg.layers, scan=cfg.scan, remat=cfg.remat)[0]
    if cfg.head == "masked":
        x = _norm(cfg, nn.ACTIVATIONS[cfg.activation](dense(x, params["masked"])), params["masked"]["norm"])
    return nn.Hidden(spread(x))


def pool(cfg: Config, params, x, segments) -> jax.Array:
    """f[B,T,D] -> f[B,D]: tanh of a linear map of each row's first token ([CLS]), what the classifier's head reads."""
    first = jnp.take_along_axis(x, jnp.argmax(segments != 0, 1)[:, None, None], 1)[:, 0]
    return jnp.tanh(nn.linear(first, params["pooler"]["w"], params["pooler"]["b"]))


def unembed(cfg: Config, params) -> nn.Unembed:
    if cfg.head != "masked":
        raise UserError("this BERT is the trunk of a classifier and has no masked-LM head")
    return nn.Unembed(params["embed"], params["masked"]["bias"])


def init_cache(cfg: Config, batch: int, size: int):
    raise UserError("BERT reads both ways and generates nothing; it has no cache")


def flops_per_token(cfg: Config, length: int) -> float:
    """6 per weight of a matmul and 12 L D T for attention: nothing is masked but padding."""
    D = cfg.dim
    return 6.0 * (cfg.layers * (4 * D * D + 2 * D * cfg.hidden) + D * D + cfg.vocab * D) + 12.0 * cfg.layers * D * length


# -- Hugging Face (see `models.hf`) ---------------------------------------------------------------------------------

FIELDS = {
    "vocab": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "intermediate_size",
    "types": "type_vocab_size", "norm_eps": "layer_norm_eps", "max_len": "max_position_embeddings",
}  # fmt: skip
SPELLED = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def _read(c: dict) -> dict:
    act = c.pop("hidden_act", "gelu")
    if act not in SPELLED:
        raise UserError(f"hidden_act {act!r} is not supported; it may be {', '.join(SPELLED)}")
    return {**{ours: c.pop(theirs) for ours, theirs in FIELDS.items()}, "activation": SPELLED[act]}


def _write(cfg: Config) -> dict:
    return {**{theirs: getattr(cfg, ours) for ours, theirs in FIELDS.items()}, "hidden_act": {v: k for k, v in SPELLED.items()}[cfg.activation]}


def _names(cfg: Config) -> dict[str, tuple[str, bool]]:
    layer = {
        **dense_names("q", "attention.self.query"), **dense_names("k", "attention.self.key"), **dense_names("v", "attention.self.value"),
        **dense_names("o", "attention.output.dense"), **norm_names("attn_norm", "attention.output.LayerNorm"),
        **dense_names("up", "intermediate.dense"), **dense_names("down", "output.dense"), **norm_names("mlp_norm", "output.LayerNorm"),
    }  # fmt: skip
    out = {f"layers/{k}": (f"bert.encoder.layer.{{}}.{v}", t) for k, (v, t) in layer.items()}
    out |= {k: (f"bert.embeddings.{v}_embeddings.weight", False) for k, v in (("embed", "word"), ("positions", "position"), ("types", "token_type"))}
    out |= norm_names("embed_norm", "bert.embeddings.LayerNorm") | dense_names("pooler", "bert.pooler.dense") | dense_names("masked", "cls.predictions.transform.dense")
    return out | norm_names("masked/norm", "cls.predictions.transform.LayerNorm") | {"masked/bias": ("cls.predictions.bias", False)}


HF = {
    "bert": Architecture(
        "BertForMaskedLM", "BertForSequenceClassification", _read, _write, _names, prefix="bert.",
        copies={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias"},
        buffers=r"position_ids$|^cls\.seq_relationship\.|^bert\.pooler\.",  # pre-trained files carry the parts of the other heads
        renamed={".gamma": ".weight", ".beta": ".bias"},
        score={"head/weight": "classifier.weight", "head/bias": "classifier.bias"},
        fixed={"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",), "tie_word_embeddings": (True,)},
    )
}  # fmt: skip
