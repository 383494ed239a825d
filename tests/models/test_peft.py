"""PEFT directories against peft itself: the same logits both ways, the same gradients; everything else refused."""

import json
import re
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign import shard, tree
from jaxalign.models import heads, hf, lora, peft, peft_config
from jaxalign.ops import logprob
from jaxalign.types import UserError
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")

FAMILIES = ["llama", "gpt2"]
V = 32


def checkpoint(family: str, seed: int, reward: bool = False, **over):
    """A transformers model of sizes drawn from a seed, loud enough that its layers matter."""
    r = np.random.default_rng(seed)
    torch.manual_seed(seed)
    heads, width = int(r.choice([2, 4])), int(r.choice([4, 8]))
    common = dict(vocab_size=V, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if family == "llama":
        c = transformers.LlamaConfig(
            **common, hidden_size=heads * width, intermediate_size=int(r.integers(9, 30)), num_hidden_layers=int(r.integers(2, 4)), num_attention_heads=heads,
            num_key_value_heads=heads // 2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False, **over,
        )  # fmt: skip
        return (transformers.LlamaForSequenceClassification if reward else transformers.LlamaForCausalLM)(c).eval()
    if family == "bert":
        c = transformers.BertConfig(
            **common, hidden_size=heads * width, intermediate_size=int(r.integers(9, 30)), num_hidden_layers=2, num_attention_heads=heads, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(c).eval()
    c = transformers.GPT2Config(**common, n_embd=heads * width, n_layer=int(r.integers(2, 4)), n_head=heads, n_positions=64, initializer_range=0.3)
    return (transformers.GPT2ForSequenceClassification if reward else transformers.GPT2LMHeadModel)(c).eval()


# What peft calls the modules, and what we call the weights: (target_modules, rank_pattern, alpha_pattern), our targets.
TARGETS = {
    "llama": ((["q_proj", "v_proj", "down_proj"], {"down_proj": 2}, {"v_proj": 7}), (("/q$", 4, 8), ("/v$", 4, 7), ("/down$", 2, 8))),
    "gpt2": ((["c_attn", "mlp.c_proj"], {"mlp.c_proj": 2}, {"c_attn": 7}), (("/qkv/w$", 4, 7), ("/down/w$", 2, 8))),
    "bert": ((["query", "attention.output.dense"], {"attention.output.dense": 2}, {"query": 7}), (("/q/w$", 4, 7), ("/o/w$", 2, 8))),
}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "rsdora": {"use_rslora": True, "use_dora": True}}


def lora_config(family, **over):
    modules, ranks, alphas = TARGETS[family][0]
    given = dict(r=4, lora_alpha=8, target_modules=modules, rank_pattern=ranks, alpha_pattern=alphas, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    return theirs.LoraConfig(**{**given, **over})


def shaken(model, seed=0):
    """Adapters that do something: b starts at 0 and magnitudes at the norms."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(1 + 0.2 * torch.randn_like(p)) if "magnitude" in name else p.copy_(0.3 * torch.randn_like(p))
    return model


TOKENS = np.random.default_rng(0).integers(3, V, (2, 9)).astype(np.int32)
ONES, POSITIONS = np.ones_like(TOKENS), np.broadcast_to(np.arange(9, dtype=np.int32), TOKENS.shape)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


def logits(model, params):
    return np.asarray(jax.jit(lambda p: logprob.logits(model.hidden(p, TOKENS, ONES, POSITIONS).x, model.unembed(p)))(params))


@pytest.fixture
def pair(tmp_path):
    """pair(family, seed) -> (transformers model, our model, our params) of the same weights."""

    def make(family, seed, **over):
        model = checkpoint(family, seed, **over)
        model.save_pretrained(tmp_path / "base")
        return model, *hf.load(tmp_path / "base")

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_gives_the_same_logits(family, kind, pair, tmp_path):
    base, model, params = pair(family, len(kind))
    before = torch_logits(base)
    adapted = shaken(theirs.get_peft_model(base, lora_config(family, **KINDS[kind])))
    adapted.eval().save_pretrained(tmp_path / "adapter")
    ours = peft.load(tmp_path / "adapter", model, params)
    want = torch_logits(adapted)
    assert np.abs(want - before).max() > 0.1
    np.testing.assert_allclose(logits(model, ours), want, atol=1e-4)
    np.testing.assert_allclose(logits(model, lora.merge(ours)), want, atol=1e-4)
    # The frozen tree is the model without it: the very same buffers.
    assert all(a is b for a, b in zip(jax.tree.leaves(lora.base(ours)), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(family, kind, pair, tmp_path):
    base, model, params = pair(family, len(kind) + 10)
    how = lora.Lora(TARGETS[family][1], rs="rs" in kind, dora="dora" in kind)
    ours = jiggled(lora.attach(params, how, jax.random.key(1)))
    peft.save(tmp_path / "adapter", model, ours, base="some/base", rs=how.rs)
    loaded = theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not any("lora" in n and p.requires_grad for n, p in loaded.named_parameters())  # as saved: for inference
    np.testing.assert_allclose(torch_logits(loaded), logits(model, ours), atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["use_dora"] == how.dora and config["use_rslora"] == how.rs
    assert {type(v) for v in (config["lora_alpha"], *config["alpha_pattern"].values())} == {int}
    again = peft.load(tmp_path / "adapter", model, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, ours)


def jiggled(params, seed=0):
    r = np.random.default_rng(seed)
    f = lambda n, x, t: x if not t else x * 1.2 if n.endswith("/magnitude") else jnp.asarray(x + 0.3 * r.standard_normal(x.shape), jnp.float32)
    return tree.map_named(f, params, lora.trainable(params))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_torch(family, kind, pair, tmp_path):
    """Of the mean cross entropy in a, b and magnitude, through every layer; DoRA's norm gets none on either side."""
    base, model, params = pair(family, 5)
    adapted = shaken(theirs.get_peft_model(base, lora_config(family, **KINDS[kind])))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor(TOKENS).long()
    adapted(ids, labels=ids).loss.backward()
    grads = {n.replace(".default", "").removesuffix(".weight"): p.grad.numpy() for n, p in adapted.named_parameters() if p.grad is not None}
    ours = peft.load(tmp_path / "adapter", model, params)
    trained, frozen = tree.split(ours, lora.trainable(ours))

    @jax.jit
    @jax.grad
    def loss(p):
        full = tree.merge(p, frozen)
        out = logprob.logprob(logprob.before(model.hidden(full, TOKENS, ONES, POSITIONS).x, ONES), model.unembed(full), TOKENS, logprob.targets(jnp.ones(TOKENS.shape), ONES))
        return -out.logp.sum() / (2 * 8)

    got = tree.flat(loss(trained))
    seen = 0
    for m in peft.modules(model).values():
        for part, (name, _) in m.tensors(1, kind == "dora").items():
            if f"{m.leaf}/{part}" in got:
                g = m.turned(part, np.asarray(got[f"{m.leaf}/{part}"][m.index]))
                np.testing.assert_allclose(g, grads[name.removesuffix(".weight")], rtol=2e-3, atol=2e-6)
                seen += np.abs(g).max() > 1e-4
    assert seen == len(grads) == len(got) * model.config.layers


def test_embedding_and_unembedding(pair, tmp_path):
    """Their own forms in peft, and of the other orientation here."""
    base, model, params = pair("llama", 3)
    ours = jiggled(lora.attach(params, lora.Lora((("embed$", 3, 6), ("/o$", 2, 2))), jax.random.key(0)))
    assert set(lora.adapters(ours)) == {"embed", "unembed", "layers/o"}
    peft.save(tmp_path / "adapter", model, ours)
    assert set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]) == {"embed_tokens", "lm_head", "o_proj"}
    np.testing.assert_allclose(torch_logits(theirs.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), logits(model, ours), atol=1e-4)
    back = peft.load(tmp_path / "adapter", model, params)
    np.testing.assert_allclose(logits(model, back), logits(model, ours), atol=1e-6)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_copies_of_the_base_in_an_adapter_of_peft(targets, pair, tmp_path):
    """peft adds the base's own weight where it adapts an embedding: read over where it is ours, refused where it is not."""
    base, model, params = pair("llama", 4)
    adapted = shaken(theirs.get_peft_model(base, lora_config("llama", target_modules=targets, rank_pattern={}, alpha_pattern={}))).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    copies = [n for n in tensors if n.endswith("base_layer.weight")]
    assert len(copies) == len(set(targets) - {"q_proj"})
    np.testing.assert_allclose(logits(model, peft.load(tmp_path / "adapter", model, params)), torch_logits(adapted), atol=1e-4)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # the same base, held in half the bits
    peft.load(tmp_path / "adapter", model, rounded)
    for name in copies:
        save_file({**tensors, name: tensors[name] + 1}, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"{re.escape(name)}: not the base's own weight"):
            peft.load(tmp_path / "adapter", model, params)


def test_export_of_what_is_not_merged(pair, tmp_path):
    """The remedy by name, not a list of leaves; and what merging does to each leaf."""
    _, model, params = pair("llama", 3)
    ours = lora.attach(lora.quantise(params, (("/k$", "int8"), ("/o$", "bfloat16"))), lora.Lora((("/q$", 2, 2),)), jax.random.key(0))
    with pytest.raises(UserError, match=r"layers/k; layers/q: adapted or quantised.*merge first \(lora.merge\)"):
        hf.save(tmp_path / "out", model, ours)
    with pytest.raises(UserError, match="trunk/layers/k; trunk/layers/q: adapted"):
        hf.save(tmp_path / "out", model, {"trunk": ours, "head": {"weight": jnp.zeros(model.config.dim), "bias": jnp.zeros(())}})
    merged = lora.merge(ours)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"float32"}
    assert {k for k, x in tree.flat(merged).items() if x is not tree.flat(params)[k]} == {"layers/q", "layers/k", "layers/o"}
    hf.save(tmp_path / "out", model, merged)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "out")[1], merged)


def test_layers_may_differ(pair, tmp_path):
    """A regex for one layer, another rank in one: zeros fill the stack, and get no gradient."""
    base, model, params = pair("llama", 7)
    config = lora_config("llama", target_modules=r".*(layers\.0\..*q_proj|v_proj)", rank_pattern={r"layers\.1\..*v_proj": 2}, alpha_pattern={})
    adapted = shaken(theirs.get_peft_model(base, config)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ours = peft.load(tmp_path / "adapter", model, params)
    want = torch_logits(adapted)
    np.testing.assert_allclose(logits(model, ours), want, atol=1e-4)
    assert (np.asarray(ours["layers"]["q"]["scale"]) > 0).tolist() == [True] + [False] * (model.config.layers - 1)
    peft.save(tmp_path / "again", model, ours)
    np.testing.assert_allclose(logits(model, peft.load(tmp_path / "again", model, params)), want, atol=1e-4)


@pytest.mark.parametrize("family, whole", [("llama", ()), ("gpt2", ()), ("bert", ()), ("bert", ("pooler",))])
def test_reward_model_with_its_score(family, whole, tmp_path):
    """peft always saves the classifier whole, BERT's pooler where it is told to, as we do."""
    base = checkpoint(family, 4, reward=True)
    base.save_pretrained(tmp_path / "base")
    model, params = hf.load(tmp_path / "base")
    adapted = shaken(theirs.get_peft_model(base, lora_config(family, task_type="SEQ_CLS", modules_to_save=list(whole) or None))).eval()
    with torch.no_grad():
        trained = [p for n, p in adapted.named_parameters() if ".modules_to_save." in n]
        assert len(trained) == (1 if family != "bert" else 4 if whole else 2)  # weights and biases
        for p in trained:
            p.add_(0.5 * torch.randn_like(p))
    adapted.save_pretrained(tmp_path / "adapter")
    trunk, head = peft.load(tmp_path / "adapter", model, params["trunk"], head=params["head"])
    score = lambda t, h: np.asarray(heads.Scalar(model).reward({"trunk": t, "head": h}, TOKENS, ONES, POSITIONS))
    want = torch_logits(adapted)[:, 0]
    assert np.abs(score(params["trunk"], params["head"]) - want).max() > 0.1
    np.testing.assert_allclose(score(trunk, head), want, atol=1e-4)
    peft.save(tmp_path / "ours", model, trunk, head={**head, "bias": head["bias"] + 0.25})
    fresh = type(base).from_pretrained(tmp_path / "base").eval()
    want = want + 0.25 * (family == "bert")  # the others' score has no bias in transformers, where the file's metadata keeps it
    np.testing.assert_allclose(torch_logits(theirs.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval())[:, 0], want, atol=1e-4)
    again = peft.load(tmp_path / "ours", model, params["trunk"], head=params["head"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, (trunk, {**head, "bias": head["bias"] + 0.25}))


def test_a_module_that_trains_whole_is_no_target(tmp_path):
    checkpoint("bert", 1).save_pretrained(tmp_path / "base")
    model, params = hf.load(tmp_path / "base")
    with pytest.raises(UserError, match="pooler/w trains whole in a classifier"):
        peft.begin(model, params["trunk"], params["head"], lora.Lora((("pooler/w|/q/w$", 2, 2),)), jax.random.key(0))


def test_onto_a_mesh(pair, tmp_path):
    _, model, params = pair("llama", 1)
    ours = jiggled(lora.attach(params, lora.Lora((("/(q|down)$", 4, 8),), dora=True), jax.random.key(0)))
    peft.save(tmp_path / "adapter", model, ours)
    mesh = shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s), params, shard.shardings(model.specs(), mesh))
    got = peft.load(tmp_path / "adapter", model, placed, mesh=mesh)
    want = shard.shardings(lora.Adapted(model, lora.Lora((("/(q|down)$", 4, 8),), dora=True)).specs(), mesh)
    assert jax.tree.map(lambda x: x.sharding, got) == want
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(model, got), logits(model, jax.tree.map(np.asarray, ours)), atol=1e-5)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(pair, tmp_path):
    """(model, params, directory of an adapter, change(**fields of its config))"""
    _, model, params = pair("llama", 2)
    peft.save(tmp_path / "adapter", model, jiggled(lora.attach(params, lora.Lora((("/(q|v)$", 4, 8),)), jax.random.key(0))))
    path = tmp_path / "adapter" / "adapter_config.json"

    def change(**fields):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return model, params, tmp_path / "adapter", change


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("modules_to_save", ["embed_tokens"]),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("target_parameters", ["x"]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("something_new", 1),
        ("r", 0),
        ("r", True),
        ("lora_alpha", float("nan")),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", ["q_proj"]),
        ("use_dora", "yes"),
        ("target_modules", [1]),
        ("target_modules", "("),
        ("target_modules", "(" * 500 + ")" * 500),
        ("exclude_modules", "a{99999999999}"),
        ("rank_pattern", {"(?i)q_proj": 3}),  # a flag in the middle of peft's own expression
        ("target_modules", "x" * 1001),
        ("target_modules", ["nothing"]),
        ("target_modules", None),
    ],
)
def test_what_would_be_another_function_is_refused_by_name(written, field, value):
    model, params, directory, change = written
    change(**{field: value})
    with pytest.raises(UserError, match=field):
        peft.load(directory, model, params)


CATASTROPHE = "(([a-z_.0-9])+)+!"  # two ways to cut each character: 2^n of them for a name of n


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_never_end_is_refused(written, field, monkeypatch):
    model, params, directory, change = written
    monkeypatch.setattr(peft_config, "SECONDS", 0.5)
    change(**{field: CATASTROPHE if "modules" in field else {CATASTROPHE: 4}})
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"{field}: matching .* takes more than 0.5 seconds.*; write a list of module names"):
        peft.load(directory, model, params)
    assert time.monotonic() - begin < 20


NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(30) for p in "qkvo"] + [f"model.layers.{i}.mlp.down_proj" for i in range(30)] + ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)",
        r".*layers\.(1[0-9]|2[0-3])\..*_proj",
        r"model\.layers\.\d+\.self_attn\.(q|k)_proj",
        "q_proj",
        # What unsloth writes.
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    ],
)
def test_names_are_matched_as_peft_matches_them(pattern):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    keys = {pattern: 3, "down_proj": 5}
    given = dict(r=4, lora_alpha=8, rank_pattern=keys, alpha_pattern=keys)
    for targets, excluded in ((pattern, None), ([pattern], None), (["q_proj", "down_proj"], pattern), ("nothing", None)):
        got = peft_config.adapted({**given, "target_modules": targets, "exclude_modules": excluded}, "x", NAMES)
        hits = [n for n in NAMES if check_target_module_exists(theirs.LoraConfig(target_modules=targets, exclude_modules=excluded), n)]
        assert list(got) == hits
        pick = lambda n, default: keys.get(get_pattern_key(list(keys), n), default)
        assert got == {n: (pick(n, 4), pick(n, 8)) for n in hits}


def test_everything_wrong_is_listed_at_once(written):
    model, params, directory, _ = written
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b, *_ = sorted(tensors)
    tensors[a] = tensors[a][:-1]
    del tensors[b]
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 8), np.float32)
    tensors[sorted(tensors)[3]] = np.zeros((4, 8), np.int8)
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(UserError) as e:
        peft.load(directory, model, params)
    for part in (f"{a} has shape [3,", f"missing {b} [", "unexpected base_model.model.lm_head.lora_A.weight"):
        assert part in str(e.value), e.value


def test_a_pickle_is_never_opened(written):
    model, params, directory, _ = written
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        peft.load(directory, model, params)


@pytest.mark.parametrize("blob", [b"", struct.pack("<Q", 2**62) + b"{}", b"\x80\x04\x95cos\nsystem\n"])
def test_malformed_weights(written, blob):
    model, params, directory, _ = written
    (directory / "adapter_model.safetensors").write_bytes(blob)
    with pytest.raises(UserError, match="not a valid safetensors file"):
        peft.load(directory, model, params)


def test_forms_that_peft_does_not_have(pair, tmp_path):
    _, model, params = pair("gpt2", 2)
    with pytest.raises(UserError, match="no adapters"):
        peft.save(tmp_path / "x", model, params)
    with pytest.raises(UserError, match="tied"):
        peft.save(tmp_path / "x", model, lora.attach(params, lora.Lora((("embed", 2, 2),)), jax.random.key(0)))
    with pytest.raises(UserError, match="no Hugging Face form"):
        peft.modules(heads.Scalar(model))
    mixed = lora.attach(lora.attach(params, lora.Lora((("qkv/w", 2, 2),), dora=True), jax.random.key(0)), lora.Lora((("up/w", 2, 2),)), jax.random.key(0))
    with pytest.raises(UserError, match="all or none"):
        peft.save(tmp_path / "x", model, mixed)
    assert not (tmp_path / "x").exists()


def test_a_second_adapter_is_refused(written):
    model, params, directory, _ = written
    with pytest.raises(UserError, match=re.escape("layers/q has an adapter already")):
        peft.load(directory, model, peft.load(directory, model, params))
