"""Small random checkpoints of every architecture, made by transformers itself, with dimensions drawn from a seed."""

import numpy as np

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe"]
CAUSAL = [*DECODERS, "gpt2", "gpt_neox"]
ROPES = ["default", "linear", "dynamic", "llama3", "yarn"]


def rope_parameters(r, kind, width, max_len):
    """rope_parameters of transformers 5 with numbers drawn at random; max_len is short enough for texts to pass it."""
    u = lambda a, b: float(np.round(r.uniform(a, b), 3))
    out = {"rope_type": kind, "rope_theta": u(50, 20000)}
    if kind in ("linear", "dynamic", "yarn", "llama3"):
        out["factor"] = u(1.5, 8)
    if kind == "llama3":
        out |= {"low_freq_factor": u(0.8, 1.2), "high_freq_factor": u(2, 5), "original_max_position_embeddings": int(r.integers(8, 40))}
    if kind == "yarn":
        out |= {"original_max_position_embeddings": int(r.integers(8, 40))}
        out |= [{}, {"beta_fast": u(8, 40), "beta_slow": u(0.5, 2)}, {"attention_factor": u(0.5, 2)}, {"truncate": False}, {"mscale": 0.7, "mscale_all_dim": 1.3}][r.integers(5)]
    if kind == "longrope":
        out |= {k: [u(1, 4) for _ in range(width // 2)] for k in ("short_factor", "long_factor")}
    return out


def config(arch: str, seed: int) -> dict:
    """Fields of config.json. Everything that may vary does: widths, groups, tying, biases, windows, scalings."""
    r = np.random.default_rng((seed, sum(map(ord, arch))))
    pick = lambda *options: options[int(r.integers(len(options)))]
    coin = lambda: bool(r.integers(2))
    kv, group, width, layers = int(r.integers(1, 4)), int(r.integers(1, 4)), 2 * int(r.integers(2, 6)), int(r.integers(2, 5))
    heads, max_len = kv * group, int(r.integers(16, 64))
    vocab = int(r.integers(40, 130))
    if arch == "gpt2":
        return {"vocab_size": vocab, "n_embd": heads * width, "n_layer": layers, "n_head": heads, "n_positions": 64, "n_inner": pick(None, 24)}
    if arch == "t5":
        return {
            "vocab_size": vocab, "d_model": int(r.integers(5, 30)), "d_kv": width, "num_heads": heads, "d_ff": int(r.integers(5, 40)), "num_layers": layers, "num_decoder_layers": int(r.integers(1, 4)),
            "feed_forward_proj": pick("relu", "gated-gelu", "gated-silu"), "tie_word_embeddings": coin(), "relative_attention_num_buckets": pick(8, 12, 32), "relative_attention_max_distance": int(r.integers(17, 40)),
            "decoder_start_token_id": pick(0, 3),
        }  # fmt: skip
    if arch == "bert":
        return {
            "vocab_size": vocab, "hidden_size": heads * width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": int(r.integers(5, 40)), "max_position_embeddings": 64,
            "type_vocab_size": pick(1, 2), "hidden_act": pick("gelu", "relu", "gelu_new"), "layer_norm_eps": 1e-12,
        }  # fmt: skip
    # In some families transformers insists on heads x width = hidden_size, in all on a multiple of heads.
    own_width = arch not in ("qwen2", "phi3", "olmo2", "qwen2_moe", "gpt_neox")
    out = {
        "vocab_size": vocab, "hidden_size": heads * (int(r.integers(3, 9)) if own_width else width), "intermediate_size": int(r.integers(5, 40)),
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": max_len, "tie_word_embeddings": coin(),
    }  # fmt: skip
    if arch == "gpt_neox":
        part = pick(0.25, 0.5, 1.0) if width % 8 == 0 else 1.0
        out |= {"use_parallel_residual": coin(), "attention_bias": coin(), "layer_norm_eps": 1e-5, "hidden_act": pick("gelu", "gelu_fast")}
        return out | {"rope_parameters": {**rope_parameters(r, pick("default", "linear"), width, max_len), "partial_rotary_factor": part}}
    out |= {"num_key_value_heads": kv, "rms_norm_eps": pick(1e-5, 1e-6)} | ({"head_dim": width} if own_width else {})
    # Neighbouring families get neighbouring kinds, so that few seeds reach every kind.
    rope = lambda *kinds: rope_parameters(r, kinds[(seed + DECODERS.index(arch)) % len(kinds)], width, max_len)
    out["rope_parameters"] = rope(*ROPES) if arch not in ("phi3", "gemma3_text") else rope("default", "longrope") if arch == "phi3" else None
    window = {"sliding_window": int(r.integers(2, 9))}
    kinds = lambda: {"layer_types": [pick("sliding_attention", "full_attention") for _ in range(layers)]}
    match arch:
        case "llama":
            out |= {"attention_bias": coin(), "mlp_bias": coin()}
        case "mistral" | "mixtral":
            out |= pick(window, {"sliding_window": None})
        case "qwen2" | "qwen3":
            out |= pick({"use_sliding_window": False}, {"use_sliding_window": True, **window, "max_window_layers": int(r.integers(0, layers))})
            out |= {"attention_bias": coin()} if arch == "qwen3" else {}
        case "gemma":
            out |= {"attention_bias": coin()}
        case "gemma2":
            out |= {**window, **pick({}, kinds()), "query_pre_attn_scalar": int(r.integers(3, 30)), "attn_logit_softcapping": pick(None, 2.5), "final_logit_softcapping": pick(None, 3.5)}
        case "gemma3_text":
            out |= {**window, **pick({}, kinds()), "query_pre_attn_scalar": int(r.integers(3, 30))}
            out["rope_parameters"] = {"full_attention": rope_parameters(r, pick("default", "linear"), width, max_len), "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
        case "phi3":
            out |= pick(window, {"sliding_window": None}) | {"pad_token_id": 0, "original_max_position_embeddings": 12}
            if out["rope_parameters"]["rope_type"] == "longrope":
                out["rope_parameters"]["original_max_position_embeddings"] = 12
        case "olmo2":
            out |= {"attention_bias": coin(), "pad_token_id": 0}
    if arch == "mixtral":
        out |= {"num_local_experts": int(r.integers(3, 7)), "num_experts_per_tok": int(r.integers(1, 4)), "router_aux_loss_coef": 0.02}
    if arch in ("qwen2_moe", "qwen3_moe"):
        out |= {"num_experts": int(r.integers(3, 7)), "num_experts_per_tok": int(r.integers(1, 4)), "moe_intermediate_size": int(r.integers(5, 20)), "norm_topk_prob": coin()}
        out |= {"shared_expert_intermediate_size": int(r.integers(5, 20)), "qkv_bias": coin()} if arch == "qwen2_moe" else {"attention_bias": coin()}
    return out


def loud(model, seed: int):
    """Weights that make every part of the model heard: a dropped bias or a missing 1 + weight shows."""
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim > 1:
                p.copy_(noise / p.shape[-1] ** 0.5 if "embed" not in name and "wte" not in name else 0.7 * noise)
            else:
                offset = 1.0 if name.endswith("weight") and not getattr(model.config, "model_type", "").startswith("gemma") else 0.0
                p.copy_(offset + 0.2 * noise)
    return model.eval()


def make(arch: str, seed: int, directory, dtype="float32", reward=False, **more):
    """(torch model in evaluation mode, its directory on disk)."""
    import transformers

    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    own = {"t5": transformers.T5ForConditionalGeneration, "bert": transformers.BertForMaskedLM}
    cls = transformers.AutoModelForSequenceClassification if reward else own.get(arch, transformers.AutoModelForCausalLM)
    fields = {**config(arch, seed), **more, **({"num_labels": 1, "pad_token_id": 0} if reward else {})}
    cfg = transformers.AutoConfig.for_model(arch, **fields)
    cfg._experts_implementation = "eager"  # its grouped product wants widths that divide by 16
    make = cls if arch in own and not reward else lambda c: cls.from_config(c, attn_implementation="eager")
    model = loud(make(cfg), seed).to(getattr(__import__("torch"), dtype))
    if arch == "t5" and not model.config.scale_decoder_outputs:  # Flan-T5's: transformers 5 has no other way to make one
        torch = __import__("torch")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)).to(model.dtype))
        model.config.tie_word_embeddings = False
    model.save_pretrained(directory)
    return model
