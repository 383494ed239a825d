"""How transformers spells the llama-shaped decoders: config.json and tensor names of each architecture.

An entry says what a model_type fixes (Gemma always scales its embeddings) and which fields of config.json say the rest.
Both spellings of the rotary fields are read: rope_parameters (transformers 5), rope_theta and rope_scaling (4).
"""

from __future__ import annotations

import functools

from jaxalign.models import Architecture
from jaxalign.ops import rope
from jaxalign.types import UserError

REQUIRED = object()

# ours -> (theirs, default where config.json may leave it out)
FIELDS = {
    "vocab": ("vocab_size", REQUIRED), "dim": ("hidden_size", REQUIRED), "layers": ("num_hidden_layers", REQUIRED), "heads": ("num_attention_heads", REQUIRED),
    "kv_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None), "hidden": ("intermediate_size", REQUIRED),
    "norm_eps": ("rms_norm_eps", REQUIRED), "max_len": ("max_position_embeddings", REQUIRED), "tied": ("tie_word_embeddings", False),
}  # fmt: skip

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
SPELLED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

# What an architecture always is, and in which fields of config.json it says the rest.
GEMMA = dict(norm_offset=1.0, embed_scale=True)
ARCHES: dict[str, dict] = {
    "llama": dict(biases={"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": ("mlp_bias",)}, fixed={"pretraining_tp": (1,)}),
    "mistral": dict(windows="all", defaults={"kv_heads": 8, "window": 4096}),
    "qwen2": dict(always=dict(qkv_bias=True), windows="qwen", defaults={"kv_heads": 32, "window": 4096}),
    "qwen3": dict(always=dict(qk_norm="head"), biases={"attention_bias": ("qkv_bias", "o_bias")}, windows="qwen", defaults={"kv_heads": 32, "head_dim": 128, "window": 4096}),
    "gemma": dict(always=GEMMA, biases={"attention_bias": ("qkv_bias", "o_bias")}, act=("hidden_act", "hidden_activation"), defaults={"tied": True, "kv_heads": 16, "head_dim": 256}, fixed={"use_bidirectional_attention": (None, False)}),
    "gemma2": dict(
        always=dict(GEMMA, norm="both"), biases={"attention_bias": ("qkv_bias", "o_bias")}, act=("hidden_activation", "hidden_act"), windows="types", period=2, defaults={"tied": True, "kv_heads": 4, "head_dim": 256, "window": 4096},
        caps={"attn_softcap": ("attn_logit_softcapping", 50.0), "logit_softcap": ("final_logit_softcapping", 30.0)}, fixed={"use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": dict(
        theta=1e6, always=dict(GEMMA, norm="both", qk_norm="head"), biases={"attention_bias": ("qkv_bias", "o_bias")}, act=("hidden_activation", "hidden_act"), windows="types", period=6, defaults={"tied": True, "kv_heads": 4, "head_dim": 256, "window": 4096},
        caps={"attn_softcap": ("attn_logit_softcapping", None), "logit_softcap": ("final_logit_softcapping", None)}, fixed={"use_bidirectional_attention": (False, None)},
    ),
    "phi3": dict(always=dict(fused=True), windows="all", fixed={"full_attn_mod": (1,), "interpolate_factor": (1,)}),
    "olmo2": dict(always=dict(norm="post", qk_norm="whole"), biases={"attention_bias": ("qkv_bias", "o_bias")}),
    "mixtral": dict(windows="all", defaults={"kv_heads": 8}, theta=1e6, experts="num_local_experts", fixed={"router_jitter_noise": (0.0, 0)}),
    "qwen2_moe": dict(
        windows="none", experts="num_experts", shared=True, biases={"qkv_bias": ("qkv_bias",)}, defaults={"qkv_bias": True, "kv_heads": 16},
        fixed={"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ((), [], None)},
    ),
    "qwen3_moe": dict(
        always=dict(qk_norm="head"), windows="none", experts="num_experts", biases={"attention_bias": ("qkv_bias", "o_bias")}, defaults={"kv_heads": 4},
        fixed={"use_sliding_window": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ((), [], None)},
    ),
}  # fmt: skip


# -- config.json ----------------------------------------------------------------------------------------------------


def read(arch: str, c: dict) -> dict:
    """Takes what it knows out of config.json and returns fields of `decoder.Config`."""
    a = ARCHES[arch]
    defaults = a.get("defaults", {})
    out = {"arch": arch, **a.get("always", {})}
    for ours, (theirs, default) in FIELDS.items():
        default = defaults.get(ours, default)
        out[ours] = c.pop(theirs) if default is REQUIRED else c.pop(theirs, default)
    for theirs, fields in a.get("biases", {}).items():
        value = c.pop(theirs, defaults.get(theirs, False))
        out |= dict.fromkeys(fields, value)
    for ours, (theirs, default) in a.get("caps", {}).items():
        out[ours] = c.pop(theirs, default)
    if "caps" in a:
        out["query_scale"] = c.pop("query_pre_attn_scalar", 256) ** -0.5
    out["activation"] = _activation(arch, {name: c.pop(name, None) for name in a.get("act", ("hidden_act",))})
    if "experts" in a:
        other = c.pop({"num_experts": "num_local_experts", "num_local_experts": "num_experts"}[a["experts"]], None)  # transformers takes either
        out["experts"], out["experts_per_token"] = c.pop(a["experts"]) if other is None else c.pop(a["experts"], other), c.pop("num_experts_per_tok")
        out["router_aux"] = float(c.pop("router_aux_loss_coef", 0.001))
        c.pop("output_router_logits", None)  # whether transformers adds the loss; router_aux says whether we do
        if a["experts"] == "num_experts":
            c.pop("max_window_layers", None), c.pop("sliding_window", None)
            if set(types := c.pop("layer_types", None) or ()) - {"full_attention"}:
                raise UserError(f"layer_types {types!r} is not supported; every layer must be full_attention")
            # intermediate_size was that of layers without experts, and there are none.
            out["hidden"], out["renormalise"] = c.pop("moe_intermediate_size"), c.pop("norm_topk_prob", False)
        if a.get("shared"):
            out["shared_hidden"] = c.pop("shared_expert_intermediate_size")
    _read_windows(a, c, out)
    _read_rope(arch, a, c, out)
    return out


def _activation(arch: str, said: dict) -> str:
    name = said.get("hidden_activation") or said.get("hidden_act")  # where both are, transformers reads the former
    if name is None or (arch == "gemma" and name == "gelu"):  # Gemma's first config.json said "gelu" and meant the tanh form
        name = "gelu_pytorch_tanh" if arch.startswith("gemma") else "silu"
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} is not supported; it may be {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _read_windows(a: dict, c: dict, out: dict) -> None:
    style, layers = a.get("windows"), out["layers"]
    if style in (None, "none"):
        return
    window, types = c.pop("sliding_window", a.get("defaults", {}).get("window")), c.pop("layer_types", None)
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"num_hidden_layers {layers!r} is not a positive whole number")
    if style == "all":
        out["window"] = window
        if types is not None:
            raise UserError(f"layer_types {types!r} is not supported here")
        return
    if style == "qwen":
        used, first = c.pop("use_sliding_window", False), c.pop("max_window_layers", 28)
        window = window if used else None
        local = [window is not None and i >= first for i in range(layers)]
    else:
        said = [c.pop(k, None) for k in ("sliding_window_pattern", "_sliding_window_pattern")]
        pattern = next(filter(None, said), a["period"])
        local = [bool((i + 1) % pattern) for i in range(layers)]
    if types is not None:
        if not isinstance(types, list) or len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
            raise UserError(f"layer_types {types!r} must name sliding_attention or full_attention for each of {layers} layers")
        local = [t == "sliding_attention" for t in types]
    if style == "types" or any(local):  # transformers wants Gemma's window even where no layer uses it
        out |= {"window": window, "windowed": tuple(local) if not all(local) else ()}


def _read_rope(arch: str, a: dict, c: dict, out: dict) -> None:
    if arch == "gemma3_text":
        # Two tables, by kind of layer; only that of full attention is ever scaled.
        by_kind, near = c.pop("rope_parameters", None) or {}, c.pop("rope_local_base_freq", None)
        if set(by_kind) - {"full_attention", "sliding_attention"}:
            raise UserError(f"rope_parameters has {sorted(by_kind)}; Gemma 3 has them for full_attention and sliding_attention")
        scaled, local = rope.read({"rope_parameters": by_kind.get("sliding_attention")}, theta=10000.0 if near is None else near)
        if scaled:
            raise UserError("rope_parameters of sliding_attention: windowed layers are not scaled")
        out["window_theta"] = local["rope_theta"]
        c["rope_parameters"] = by_kind.get("full_attention")
    out["rope_scaling"], fields = rope.read(c, theta=a.get("theta", 10000.0), max_len=out["max_len"])
    if fields["rotary"] != 1 and arch != "phi3":
        raise UserError(f"partial_rotary_factor {fields['rotary']} is not supported: in transformers only Phi-3 and GPT-NeoX rotate a part of a head")
    out |= fields


def write(cfg) -> dict:
    """The inverse of `read`, in the spelling of transformers 5."""
    a = ARCHES[cfg.arch]
    out = {theirs: getattr(cfg, ours) for ours, (theirs, _) in FIELDS.items()}
    for theirs, fields in a.get("biases", {}).items():
        out[theirs] = getattr(cfg, fields[0])
    for ours, (theirs, _) in a.get("caps", {}).items():
        out[theirs] = getattr(cfg, ours)
    if "caps" in a:
        scalar = (cfg.query_scale or cfg.head_dim**-0.5) ** -2
        out["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    out[a.get("act", ("hidden_act",))[0]] = SPELLED[cfg.activation]
    if "experts" in a:
        out |= {a["experts"]: cfg.experts, "num_experts_per_tok": cfg.experts_per_token, "router_aux_loss_coef": cfg.router_aux}
        if a["experts"] == "num_experts":
            out |= {"moe_intermediate_size": cfg.hidden, "norm_topk_prob": cfg.renormalise, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
        if a.get("shared"):
            out["shared_expert_intermediate_size"] = cfg.shared_hidden
    names = ["sliding_attention" if x else "full_attention" for x in cfg.local]
    match a.get("windows"):
        case "all":
            out["sliding_window"] = cfg.window
        case "qwen":
            out |= {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window, "layer_types": names, "max_window_layers": cfg.layers if cfg.window is None else names.count("full_attention")}
        case "types":
            out |= {"sliding_window": cfg.window, "layer_types": names}
    spelled = {**rope.write(cfg.rope_scaling), "rope_theta": cfg.rope_theta}
    if cfg.rotary != 1 or cfg.arch == "phi3":
        spelled["partial_rotary_factor"] = cfg.rotary
    if cfg.arch == "phi3":
        out["original_max_position_embeddings"] = spelled.get("original_max_position_embeddings", cfg.max_len)
    if cfg.arch == "gemma3_text":
        spelled = {"full_attention": spelled, "sliding_attention": {"rope_type": "default", "rope_theta": cfg.window_theta}}
    return out | {"rope_parameters": spelled}


# -- tensors --------------------------------------------------------------------------------------------------------


def names(cfg) -> dict[str, tuple[str, bool]]:
    layer: dict[str, tuple[str, bool]] = {}
    weight = lambda ours, theirs: layer.update({ours: (f"{theirs}.weight", True)})
    plain = lambda ours, theirs: layer.update({ours: (theirs, False)})
    # transformers calls the norm before the feed-forward after the attention that precedes it, unless both exist.
    before_mlp = {"pre": "post_attention_layernorm", "both": "pre_feedforward_layernorm"}
    if cfg.norm != "post":
        plain("attn_norm", "input_layernorm.weight"), plain("mlp_norm", f"{before_mlp[cfg.norm]}.weight")
    if cfg.norm != "pre":
        plain("attn_post_norm", "post_attention_layernorm.weight"), plain("mlp_post_norm", "post_feedforward_layernorm.weight")
    for k in ("qkv",) if cfg.fused else "qkv":
        weight(k, f"self_attn.{k}_proj")
    if cfg.qkv_bias:
        for k in "qkv":
            plain(f"{k}_bias", f"self_attn.{k}_proj.bias")
    if cfg.qk_norm:
        plain("q_norm", "self_attn.q_norm.weight"), plain("k_norm", "self_attn.k_norm.weight")
    weight("o", "self_attn.o_proj")
    if cfg.o_bias:
        plain("o_bias", "self_attn.o_proj.bias")
    parts = ("gate_up", "down") if cfg.fused else ("gate", "up", "down")
    if not cfg.experts:
        for k in parts:
            weight(k, f"mlp.{k}_proj")
            if cfg.mlp_bias:
                plain(f"{k}_bias", f"mlp.{k}_proj.bias")
    else:
        mixtral = cfg.arch == "mixtral"
        block = "block_sparse_moe" if mixtral else "mlp"
        weight("router", f"{block}.gate")
        for k, w in zip(parts, ("w1", "w3", "w2")):
            weight(f"experts/{k}", f"{block}.experts.{{}}.{w if mixtral else k + '_proj'}")
            if cfg.shared_hidden:
                weight(f"shared/{k}", f"mlp.shared_expert.{k}_proj")
        if cfg.shared_hidden:
            weight("shared/mix", "mlp.shared_expert_gate")
    out = {f"layers/{ours}": (f"model.layers.{{}}.{theirs}", t) for ours, (theirs, t) in layer.items()}
    return out | {"embed": ("model.embed_tokens.weight", False), "norm": ("model.norm.weight", False), "unembed": ("lm_head.weight", False)}


def _architecture(arch: str, stem: str, classifier: str | None = None) -> Architecture:
    return Architecture(
        f"{stem}ForCausalLM", classifier or f"{stem}ForSequenceClassification", functools.partial(read, arch), write, names,
        fixed=ARCHES[arch].get("fixed", {}), buffers=r"\.rotary_emb\.inv_freq$",
    )  # fmt: skip


STEMS = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "phi3": "Phi3",
    "olmo2": "Olmo2", "mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe",
}  # fmt: skip
ARCHITECTURES = {arch: _architecture(arch, stem, "Gemma3TextForSequenceClassification" if arch == "gemma3_text" else None) for arch, stem in STEMS.items()}
