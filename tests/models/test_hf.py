"""Hugging Face directories: parity with transformers (tests/vectors/hf, see its README), round trips, refusals."""

import dataclasses
import json
import os
import re
import shutil
import struct
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
from jaxalign import shard, tree
from jaxalign.models import FamilyModel, decoder, heads, hf
from jaxalign.ops import kvcache, logprob, nn
from jaxalign.types import UserError
from safetensors.numpy import load_file, save_file

VECTORS = recordings.VECTORS / "hf"
FAMILIES = ["llama", "gpt2"]  # how they are spelled
VECTORED = [*FAMILIES, "qwen2", "qwen3", "gemma2"]  # what they compute
IO = {family: recordings.load(f"hf/{family}/io.npz") for family in VECTORED}
NORM = {"llama": "model.norm.weight", "gpt2": "transformer.ln_f.weight"}
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.fixture(scope="module", params=VECTORED)
def parity(request):
    directory = VECTORS / request.param
    model, params = hf.load(directory)

    @jax.jit
    def run(params, tokens, segments, positions):
        x = model.hidden(params, tokens, segments, positions).x
        return x, logprob.logits(x, model.unembed(params))

    return model, params, IO[request.param], run


# -- parity ---------------------------------------------------------------------------------------------------------


def test_logits_hidden_and_loss(parity):
    model, params, io, run = parity
    tokens = io["input_ids"].astype(np.int32)
    segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    x, logits = run(params, tokens, segments, positions)
    np.testing.assert_allclose(x, io["final_hidden_states"], atol=1e-4)
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4)

    @jax.jit
    def loss(params, x):
        weights = logprob.targets(jnp.ones(tokens.shape), segments)
        return logprob.linear_ce(logprob.before(x, segments), model.unembed(params), tokens, weights).nll / weights.sum()

    np.testing.assert_allclose(loss(params, x), io["loss_all_tokens"], rtol=1e-5)


def test_left_padding(parity):
    _, params, io, run = parity
    mask = io["left_pad_attention_mask"].astype(np.int32)
    _, logits = run(params, io["left_pad_input_ids"].astype(np.int32), mask, io["left_pad_position_ids"].astype(np.int32))
    np.testing.assert_allclose(logits * mask[..., None], io["left_pad_logits_valid"], atol=1e-4)


def test_packing(parity):
    _, params, io, run = parity
    rows = lambda k: np.repeat(io[k].astype(np.int32), 2, 0)  # two equal rows: the shape that is compiled already
    _, logits = run(params, rows("packed_input_ids"), rows("packed_segment_ids"), rows("packed_position_ids"))
    np.testing.assert_allclose(logits[:1], io["packed_logits"], atol=1e-4)


def test_greedy_continuation_through_the_cache(parity):
    model, params, io, _ = parity
    mask = io["left_pad_attention_mask"].astype(np.int32)
    want = io["greedy_new_tokens_from_left_pad"]
    (B, P), N = mask.shape, want.shape[1]
    suppress = jnp.zeros((model.config.vocab,)).at[2].set(-jnp.inf)

    def choose(params, x):
        return jnp.argmax(logprob.logits(x[:, -1:], model.unembed(params))[:, 0] + suppress, -1).astype(jnp.int32)

    @jax.jit
    def generate(params, tokens, segments, positions):
        h = model.hidden(params, tokens, segments, positions, cache=model.init_cache(B, P))

        def step(carry, i):
            token, cache = carry
            h = model.hidden(params, token[:, None], jnp.ones((B, 1), jnp.int32), positions[:, -1:] + 1 + i, cache=cache)
            return (choose(params, h.x), h.cache), token

        return jax.lax.scan(step, (choose(params, h.x), kvcache.grow(h.cache, P + N)), jnp.arange(N))[1].T

    got = generate(params, io["left_pad_input_ids"].astype(np.int32), mask, io["left_pad_position_ids"].astype(np.int32))
    np.testing.assert_array_equal(got, want)


def test_scanned_layers_give_the_same_logits(parity):
    model, params, io, run = parity
    scanned = FamilyModel(model.family, dataclasses.replace(model.config, scan=True))
    tokens = io["input_ids"].astype(np.int32)
    args = params, tokens, np.ones_like(tokens), np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    np.testing.assert_allclose(jax.jit(scanned.hidden)(*args).x, run(*args)[0], atol=1e-5)


# -- config.json ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """copy(family, **changed config fields) -> a directory of its own; a field set to ... is removed."""

    def make(family, **fields):
        out = tmp_path / family
        shutil.copytree(VECTORS / family, out, ignore=shutil.ignore_patterns("io.npz"))
        config = json.loads((out / "config.json").read_text())
        config = {k: v for k, v in {**config, **fields}.items() if v is not ...}
        (out / "config.json").write_text(json.dumps(config))
        return out

    return make


@pytest.mark.parametrize("family", [f for f in VECTORED if f != "qwen3"])
def test_config_of_transformers_4_equals_5(copy, family):
    old = copy(family)
    shutil.copy(VECTORS / family / "config_v4.json", old / "config.json")
    assert hf.read_config(old) == hf.read_config(VECTORS / family)


@pytest.mark.parametrize("family", VECTORED)
def test_equal_configs_are_equal_models_and_survive_export(tmp_path, family):
    model, params = hf.load(VECTORS / family)
    hf.save(tmp_path, model, params)
    assert hf.read_config(tmp_path) == model and hash(hf.read_config(tmp_path)) == hash(model)
    assert hf.read_config(tmp_path, scan=True, remat="full").config.scan


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "attention_bias", 1),
        ("llama", "mlp_bias", 1),
        ("llama", "hidden_act", "mish"),
        ("llama", "rope_scaling", {"type": "abf", "factor": 2.0}),
        ("llama", "pretraining_tp", 2),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("llama", "rope_theta", 5e5),  # contradicts rope_parameters
        ("llama", "sliding_window", 128),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "architectures", ["MixtralForCausalLM"]),
        ("llama", "architectures", "LlamaForCausalLM"),
        ("llama", "model_type", "mamba"),
        ("llama", "model_type", ["llama"]),
        ("llama", "hidden_size", ...),
        ("llama", "hidden_size", "32"),
        ("llama", "hidden_size", -32),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_hidden_layers", 2.0),
        ("llama", "num_hidden_layers", 10**12),
        ("llama", "vocab_size", 10**15),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "tie_word_embeddings", "yes"),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "tie_word_embeddings", False),
        ("gpt2", "n_positions", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(copy, family, field, value):
    directory = copy(family, **{field: value})
    with pytest.raises(UserError) as e:
        hf.load(directory)
    assert str(directory) in str(e.value)
    ours = {"num_hidden_layers": "layers", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied", "n_positions": "max_len", "vocab_size": "shape", "rope_parameters": "llama3|rotary", "rope_scaling": "rope"}
    ours |= {"attention_bias": "qkv_bias"}
    if value not in (0, "32", -32):  # these fail inside the Config, which speaks of its own fields
        assert field in str(e.value) or re.search(ours.get(field, "^$"), str(e.value))


def test_defaults_of_transformers_hold_where_config_is_silent(copy):
    gpt2 = copy("gpt2", tie_word_embeddings=..., n_inner=..., activation_function=..., attn_pdrop=0.1)  # as published
    assert hf.read_config(gpt2) == hf.read_config(VECTORS / "gpt2")
    assert not hf.read_config(copy("llama", tie_word_embeddings=...)).config.tied


# -- tensors --------------------------------------------------------------------------------------------------------


def raw(path) -> dict:
    """{name: (dtype, shape, bytes)}, read by hand: independent of the library that wrote it."""
    blob = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + n]), blob[8 + n :]
    return {k: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in header.items() if k != "__metadata__"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_round_trip_is_byte_identical(copy, tmp_path, family, kind):
    source = copy(family)
    tensors = {k: v.astype(jnp.dtype(kind)) for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model, params = hf.load(source, dtype=None)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(kind)}
    hf.save(tmp_path / "out", model, params)
    assert raw(tmp_path / "out" / "model.safetensors") == raw(source / "model.safetensors")
    model, params = hf.load(source)  # float32 holds both half formats exactly
    hf.save(tmp_path / "out", model, params, dtype=kind)
    assert raw(tmp_path / "out" / "model.safetensors") == raw(source / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == kind


def test_sharded_export_and_import(tmp_path):
    model, params = hf.load(VECTORS / "llama")
    hf.save(tmp_path, model, params)
    hf.save(tmp_path, model, params, shard_bytes=40_000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]  # 85 kB; the single file is gone
    assert all((tmp_path / f).stat().st_size < 45_000 for f in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 84608  # the source's last data offset
    _, again = hf.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_load_onto_a_mesh():
    model, want = hf.load(VECTORS / "llama")
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, params = hf.load(VECTORS / "llama", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert jax.tree.map(lambda x: x.sharding, params) == shard.shardings(model.specs(), mesh)
    assert params["layers"]["q"].addressable_shards[0].data.shape == (2, 16, 16)  # [L, D / fsdp, N H / tensor]


def test_scan_and_init_share_the_tree(parity):
    model, params, _, _ = parity
    shapes = lambda t: {k: v.shape for k, v in tree.flat(t, is_leaf=nn.is_spec).items()}
    assert shapes(model.specs()) == shapes(params)


def test_everything_wrong_is_listed_at_once(copy):
    directory = copy("llama")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["../../etc/passwd"] = np.zeros(1, np.float32)
    tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as e:
        hf.load(directory)
    for part in ("missing model.layers.1.mlp.up_proj.weight [56, 32]", "model.norm.weight has shape [31]", "unexpected model.layers.0.self_attn.q_proj.bias", "unexpected ../../etc/passwd", "is I8"):
        assert part in str(e.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_depth_is_named_layer_by_layer(copy, family):
    with pytest.raises(UserError, match=r"missing .*\.2\..*"):
        hf.load(copy(family, **{LAYERS[family]: 3}))


def test_another_depth_is_unexpected(copy):
    with pytest.raises(UserError, match=r"unexpected model.layers.1."):
        hf.load(copy("llama", num_hidden_layers=1))


def test_published_gpt2_has_no_prefix_and_carries_buffers(copy):
    directory = copy("gpt2")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(directory / "model.safetensors").items()}
    save_file({**tensors, "h.0.attn.bias": np.ones((1, 1, 64, 64), bool), "h.1.attn.masked_bias": np.zeros((), np.float32)}, directory / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(directory)[1], hf.load(VECTORS / "gpt2")[1])


def test_tied_head_may_be_present_if_equal(copy):
    directory = copy("llama")
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}, directory / "model.safetensors")
    assert "unembed" not in hf.load(directory)[1]
    save_file({**tensors, "lm_head.weight": head + 1}, directory / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        hf.load(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    np.testing.assert_array_equal(hf.load(directory)[1]["unembed"], head + 1)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match="missing lm_head.weight"):
        hf.load(directory)


# -- hostile directories --------------------------------------------------------------------------------------------


def header(content: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content + data


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x00" * 7,
        header(b"{}", length=2**62),
        header(b"not json"),
        header(json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode(), data=b"\0" * 8),
        header(json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode(), data=b"\0" * 4),
        header(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}).encode(), data=b"\0" * 8),
        b"\x80\x04\x95" + b"cos\nsystem\n" * 4,  # a pickle under another name
    ],
)
def test_malformed_safetensors(copy, blob):
    directory = copy("llama")
    (directory / "model.safetensors").write_bytes(blob)
    with pytest.raises(UserError, match="model.safetensors is not a valid safetensors file: ."):
        hf.load(directory)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"model_type": "llama"}', "\udcff"])
def test_malformed_config(copy, content):
    directory = copy("llama")
    (directory / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="config.json"):
        hf.load(directory)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "..\\x", 3])
def test_index_may_name_files_of_its_directory_only(copy, name):
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="plain file name|weight_map"):
        hf.load(directory)


def test_links_out_are_refused_but_the_hub_cache_is_not(copy, tmp_path):
    source = copy("llama")
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(source / name, outside / name)
    with pytest.raises(UserError, match="leads out"):
        hf.load(outside)
    blobs, revision = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    revision.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, blobs / name)
        os.symlink(f"../../blobs/{name}", revision / name)
    hf.load(revision)


def test_index_must_agree_with_its_files(tmp_path):
    model, params = hf.load(VECTORS / "llama")
    hf.save(tmp_path, model, params, shard_bytes=40_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks ghost.*holds model.norm.weight"):
        hf.load(tmp_path)


def test_pickles_are_never_opened(copy):
    directory = copy("llama")
    (directory / "model.safetensors").unlink()
    proof = directory / "executed"
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR.")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        hf.load(directory)
    assert not proof.exists()


# -- reward models and errors of save -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_round_trip(tmp_path, family):
    model, trunk = hf.load(VECTORS / family)
    D = model.config.dim
    params = {"trunk": trunk, "head": {"weight": jnp.arange(D, dtype=jnp.float32), "bias": jnp.zeros(())}}
    hf.save(tmp_path, heads.Scalar(model), params)
    kind, shape, data = raw(tmp_path / "model.safetensors")["score.weight"]
    assert (kind, shape) == ("F32", [1, D]) and data == np.arange(D, dtype=np.float32).tobytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and config["num_labels"] == 1
    again, loaded = hf.load(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_reward_bias_is_never_lost_silently(tmp_path):
    cfg = dict(vocab=16, dim=8, layers=1, heads=2, hidden=8, tied=False)
    model = decoder.model(**cfg)
    trunk = jax.tree.map(lambda s: jnp.ones(s.shape), model.specs(), is_leaf=nn.is_spec)
    params = {"trunk": trunk, "head": {"weight": jnp.ones(8), "bias": jnp.asarray(0.5)}}
    with pytest.raises(UserError, match="drop_bias"):
        hf.save(tmp_path, model, params)
    hf.save(tmp_path, model, params, drop_bias=True)
    assert "lm_head.weight" not in raw(tmp_path / "model.safetensors")  # a classifier has none
    again, loaded = hf.load(tmp_path)
    assert again == decoder.model(**{**cfg, "tied": True}) and loaded["head"]["bias"] == 0.5


def test_a_classifier_with_several_labels_is_refused(copy):
    with pytest.raises(UserError, match="num_labels 1, this classifier has 3"):
        hf.load(copy("llama", architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}))


def test_save_refuses_what_is_not_the_models(tmp_path):
    model, params = hf.load(VECTORS / "llama")
    with pytest.raises(UserError, match="missing norm.*unexpected lora"):
        hf.save(tmp_path, model, {**{k: v for k, v in params.items() if k != "norm"}, "lora": jnp.ones(1)})
    with pytest.raises(UserError, match="norm is"):
        hf.save(tmp_path, model, {**params, "norm": jnp.ones(3)})
    with pytest.raises(UserError, match="int8"):
        hf.save(tmp_path, model, {**params, "norm": params["norm"].astype(jnp.int8)})
    with pytest.raises(UserError, match="SimpleNamespace has no Hugging Face form"):
        hf.save(tmp_path, types.SimpleNamespace(), params)
    assert not (tmp_path / "config.json").exists()


def test_token_ids_come_from_the_tokenizer(tmp_path):
    class Tokenizer:
        bos_id, eos_id, pad_id = 1, 2, None

        def save(self, directory):
            (Path(directory) / "tokenizer.model").write_text("x")

    model, params = hf.load(VECTORS / "llama")
    hf.save(tmp_path, model, params, tokenizer=Tokenizer())
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content["bos_token_id"] == 1 and content["eos_token_id"] == 2 and content["pad_token_id"] is None
    assert (tmp_path / "tokenizer.model").exists()
