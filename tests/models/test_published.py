"""config.json as published: the fields of well-known checkpoints, in the spelling that their directories have, must be read whole.

Written from the models' cards and configurations; only fields are here, no weights. What must come out is stated beside each.
"""

import json

import pytest
from jaxalign.models import decoder, hf
from jaxalign.types import UserError

COMMON = {"torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}

PUBLISHED = {
    "Llama-2-7b": (
        {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000},
        dict(kv_heads=32, rope_theta=10000.0, tied=False, rope_scaling=()),
    ),
    "Llama-3.1-8B": (
        {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
         "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256},
        dict(kv_heads=8, head_dim=128, rope_theta=500000.0),
    ),
    "Mistral-7B-v0.1": (
        {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
        dict(window=4096, windowed=()),
    ),
    "Qwen2.5-0.5B": (
        {**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
         "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936},
        dict(qkv_bias=True, o_bias=False, window=None, tied=True),
    ),
    "Qwen3-0.6B": (
        {**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
         "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
        dict(qk_norm="head", head_dim=128, qkv_bias=False),
    ),
    "gemma-2b": (
        {**COMMON, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
         "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000},
        dict(activation="gelu_tanh", tied=True, embed_scale=True, norm_offset=1.0, head_dim=256),
    ),
    "gemma-2-2b": (
        {**COMMON, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "pad_token_id": 0,
         "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8,
         "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000},
        dict(attn_softcap=50.0, logit_softcap=30.0, query_scale=1 / 16, windowed=(True, False) * 13, norm="both"),
    ),
    "gemma-3-1b-it": (
        {**COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "pad_token_id": 0,
         "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
        dict(qk_norm="head", window=512, window_theta=10000.0, rope_theta=1000000.0, windowed=tuple(bool((i + 1) % 6) for i in range(26))),
    ),
    "Phi-3-mini-4k-instruct": (
        {**COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
         "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None,
         "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
        dict(fused=True, window=2047, rope_scaling=()),
    ),
    "Phi-3-mini-128k-instruct": (
        {**COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "vocab_size": 32064,
         "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}},
        dict(rope_scaling=(("rope_type", "longrope"), ("long_factor", (1.5,) * 48), ("original_max_position_embeddings", 4096), ("short_factor", (1.0,) * 48))),
    ),
    "Phi-4-mini-instruct": (
        {**COMMON, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "bos_token_id": 199999, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
         "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
         "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064, "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}},
        dict(rotary=0.75, tied=True),
    ),
    "OLMo-2-1124-7B": (
        {**COMMON, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
        dict(norm="post", qk_norm="whole"),
    ),
    "Mixtral-8x7B-v0.1": (
        {**COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
         "tie_word_embeddings": False, "vocab_size": 32000},
        dict(experts=8, experts_per_token=2, renormalise=True, router_aux=0.02, hidden=14336),
    ),
    "Qwen1.5-MoE-A2.7B": (
        {**COMMON, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
         "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False,
         "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
        dict(experts=60, hidden=1408, shared_hidden=5632, renormalise=False, qkv_bias=True),
    ),
    "Qwen3-30B-A3B": (
        {**COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
         "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
         "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
         "use_sliding_window": False, "vocab_size": 151936},
        dict(experts=128, experts_per_token=8, hidden=768, renormalise=True, qk_norm="head"),
    ),
    "gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
         "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
        dict(hidden=3072, max_len=1024),
    ),
    "pythia-70m": (
        {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
         "num_attention_heads": 8, "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304},
        dict(rotary=0.25, parallel=True, attn_bias=True),
    ),
    "bert-base-uncased": (
        {"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
         "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522},
        dict(head="masked", types=2),
    ),
}  # fmt: skip

T5 = {
    "d_ff": 2048, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_heads": 8, "num_layers": 6,
    "output_past": True, "pad_token_id": 0, "relative_attention_num_buckets": 32, "use_cache": True, "vocab_size": 32128, "architectures": ["T5ForConditionalGeneration"],
    "task_specific_params": {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}},
}  # fmt: skip


def read(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return hf._model(tmp_path / "config.json", config, {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_whole(tmp_path, name):
    config, want = PUBLISHED[name]
    model, arch, reward = read(tmp_path, config)
    got = {k: getattr(model.config, k) for k in want}
    assert got == want and not reward
    assert arch.causal == config["architectures"][0]
    # and what we would write says the same
    again, _, _ = read(tmp_path, {**arch.write(model.config), "model_type": config["model_type"], "architectures": config["architectures"]})
    assert again == model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_field_that_asks_for_another_model_is_refused_by_name(tmp_path, name):
    for field, value in {"attention_sinks": 4, "quantization_config": {"quant_method": "awq"}, "layer_scale": 0.1}.items():
        with pytest.raises(UserError, match=field):
            read(tmp_path, {**PUBLISHED[name][0], field: value})


@pytest.mark.parametrize("more, want", [({}, dict(gated=False, activation="relu", tied=True, scaled=True)), ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "n_positions": 512, "num_decoder_layers": 8, "relative_attention_max_distance": 128}, dict(gated=True, activation="gelu_tanh", tied=False, scaled=False, layers=8))], ids=["t5-small", "flan-t5-small"])
def test_t5_s_two_generations(tmp_path, more, want):
    model, _, _ = read(tmp_path, {**T5, **more})
    assert {k: getattr(model.config, k) for k in want} == want and model.start == 0


@pytest.mark.parametrize("kind, name", [("mamba", "MambaForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM"), ("gemma3", "Gemma3ForConditionalGeneration"), ("qwen3_next", "Qwen3NextForCausalLM")])
def test_other_architectures_are_refused_by_name(tmp_path, kind, name):
    with pytest.raises(UserError, match=f"model_type '{kind}' is not supported; jaxalign reads bert, gemma"):
        read(tmp_path, {**PUBLISHED["Llama-2-7b"][0], "model_type": kind, "architectures": [name]})


@pytest.mark.parametrize("name", [n for n in PUBLISHED if PUBLISHED[n][0]["model_type"] not in ("gpt2", "bert")])
def test_a_field_that_is_missing_is_what_transformers_takes_it_for(tmp_path, name):
    """Or it is asked for by name. Each field is left out in turn, and ours compared with what AutoConfig fills in."""
    transformers = pytest.importorskip("transformers")
    config = {k: v for k, v in PUBLISHED[name][0].items() if k not in ("auto_map", "quantization_config")}
    for field in sorted(set(config) - {"architectures", "model_type", "original_max_position_embeddings"}):
        less = {k: v for k, v in config.items() if k != field}
        try:
            ours, _, _ = read(tmp_path, less)
        except UserError as e:
            ours_for_it = {"num_key_value_heads": "kv_heads", "rope_scaling": "rope"}.get(field, field)  # 32, say, which do not divide the heads
            assert field in str(e) or ours_for_it in str(e), (field, e)
            continue
        filled = transformers.AutoConfig.for_model(config["model_type"], **{k: v for k, v in less.items() if k not in ("architectures", "model_type")}).to_dict()
        theirs, _, _ = read(tmp_path, {**{k: v for k, v in filled.items() if v is not None or k in less or k == "sliding_window"}, "architectures": config["architectures"]})
        assert ours.config == theirs.config, field


def test_scaled_windowed_layers_of_gemma_3_are_refused(tmp_path):
    config = PUBLISHED["gemma-3-1b-it"][0] | {"rope_theta": None, "rope_local_base_freq": None}
    both = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}}
    with pytest.raises(UserError, match="windowed layers are not scaled"):
        read(tmp_path, {**config, "rope_parameters": both})


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "intermediate_size"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 2**63, "8", [8], {"a": 1}, True, 0, -1])
def test_absurd_numbers_are_one_clear_error(tmp_path, field, value):
    with pytest.raises(UserError):
        read(tmp_path, {**PUBLISHED["Llama-2-7b"][0], field: value})


@pytest.mark.parametrize(
    "fields",
    [dict(fused=True, qkv_bias=True), dict(fused=True, mlp_bias=True), dict(experts=2, mlp_bias=True), dict(shared_hidden=4), dict(router_aux=0.1), dict(fused=True, experts=2, shared_hidden=4)],
    ids=lambda f: "+".join(f),
)
def test_fields_that_nothing_would_read_are_refused(fields):
    with pytest.raises(UserError, match="has no place in this model"):
        decoder.model(vocab=9, dim=8, layers=1, heads=2, hidden=6, **fields)
