"""Every architecture against transformers itself, on checkpoints that transformers makes here, with dimensions drawn at random.

Each test is one column of the table in docs/families.md; `pytest tests/models --families=docs/families.md` writes it.
"""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign import shard, tree
from jaxalign.models import FamilyModel, heads, hf, lora, peft
from jaxalign.objectives import lm
from jaxalign.ops import kvcache, logprob, nn
from jaxalign.train import step
from jaxalign.types import Inputs, Tokens, UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import zoo  # noqa: E402

B, T, S = 2, 24, 17
SEEDS = int(os.environ.get("JAXALIGN_ZOO_SEEDS", 2))  # of the dimensions


def restart(lengths, total):
    """(segments, positions) i32[1,total] of documents one after another, padding behind them."""
    segments, positions = np.zeros((1, total), np.int32), np.zeros((1, total), np.int32)
    start = 0
    for i, n in enumerate(lengths):
        segments[0, start : start + n], positions[0, start : start + n] = i + 1, np.arange(n)
        start += n
    return segments, positions


class Case:
    """One checkpoint in both worlds, and its tokens; for an encoder-decoder also what its encoder reads."""

    def __init__(self, arch, seed, directory):
        self.arch, self.seed, self.directory = arch, seed, directory
        self.torch = zoo.make(arch, seed, directory)
        self.model, self.params = hf.load(directory)
        self.vocab = self.model.config.vocab
        # Not token 0: transformers gives a padding id's embedding no gradient.
        draw = lambda *shape: np.random.default_rng(seed).integers(1, self.vocab, shape).astype(np.int32)
        self.tokens, self.read = draw(B, T), draw(B, S) if arch == "t5" else None
        self.ones = np.ones((B, T), np.int32)
        self.positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        self.forward = jax.jit(self._forward)

    def inputs(self):
        return None if self.read is None else Inputs(self.read, np.ones_like(self.read), np.tile(np.arange(S, dtype=np.int32), (B, 1)))

    def _forward(self, params, tokens, segments, positions, inputs=None):
        x = self.model.hidden(params, tokens, segments, positions, inputs=inputs).x
        return x, logprob.logits(x, self.model.unembed(params))

    def ours(self, params=None):
        return self.forward(self.params if params is None else params, self.tokens, self.ones, self.positions, self.inputs())

    def theirs(self, tokens, read=None, model=None):
        """Their output for the same tokens; `read` (default: all that ours read) for the encoder."""
        wide = lambda x: torch.tensor(np.asarray(x)).long()
        model = self.torch if model is None else model
        if self.read is None:
            return model(input_ids=wide(tokens), output_hidden_states=True)
        return model(input_ids=wide(self.read if read is None else read), decoder_input_ids=wide(tokens), output_hidden_states=True)


@pytest.fixture(scope="module", params=[*zoo.CAUSAL, "t5", "bert"])
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def cases(arch, tmp_path_factory):
    return [Case(arch, seed, tmp_path_factory.mktemp(f"{arch}{seed}")) for seed in range(SEEDS)]


@pytest.fixture(scope="module")
def case(cases):
    return cases[0]


def capability(name):
    return pytest.mark.capability(name)


def auto(arch):
    return {"t5": transformers.T5ForConditionalGeneration, "bert": transformers.BertForMaskedLM}.get(arch, transformers.AutoModelForCausalLM)


def near(got, want, c, atol=1e-4):
    want = want.detach().numpy() if hasattr(want, "detach") else want
    np.testing.assert_allclose(got, want, atol=atol, err_msg=f"seed {c.seed}: {c.model.config}")


@capability("import")
def test_logits_and_hidden_states(cases):
    for c in cases:
        (x, logits), want = c.ours(), c.theirs(c.tokens)
        near(logits, want.logits, c)
        if c.arch != "bert":  # ours is behind the head's transform, theirs before it
            near(x, (want.decoder_hidden_states if c.arch == "t5" else want.hidden_states)[-1], c)


@capability("export")
def test_round_trip_keeps_every_byte(cases, tmp_path):
    """HF -> jaxalign -> HF in a source dtype of each kind; then transformers loads what we wrote and says the same."""
    from safetensors import safe_open

    for i, dtype in enumerate(("float32", "bfloat16", "float16")):
        c, a, b = cases[i % len(cases)], tmp_path / f"{i}a", tmp_path / f"{i}b"
        zoo.make(c.arch, c.seed, a, dtype)
        model, params = hf.load(a, dtype=None)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
        hf.save(b, model, params, shard_bytes=40_000)  # several files
        with safe_open(a / "model.safetensors", "pt") as f:
            want = {k: f.get_tensor(k) for k in f.keys()}
        got = {}
        for file in b.glob("*.safetensors"):
            with safe_open(file, "pt") as f:
                got |= {k: f.get_tensor(k) for k in f.keys()}
        assert got.keys() == want.keys()
        for k in want:
            assert got[k].dtype == want[k].dtype and torch.equal(got[k].view(torch.uint8), want[k].view(torch.uint8)), k
        again, original = (auto(c.arch).from_pretrained(d, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32).eval() for d in (b, a))
        torch.testing.assert_close(c.theirs(c.tokens, model=again).logits, c.theirs(c.tokens, model=original).logits, rtol=0, atol=0)
        assert hf.read_config(b) == model


@capability("packed")
def test_packed_documents_read_nothing_of_each_other(cases):
    lengths, reads = (9, 3, 7), (5, 8, 3)
    twice = lambda x: np.repeat(x[:1], B, 0)
    segments, positions = map(twice, restart(lengths, T))
    for c in cases:
        inputs = None if c.read is None else Inputs(twice(c.read), *map(twice, restart(reads, S)))
        _, logits = c.forward(c.params, twice(c.tokens), segments, positions, inputs)
        for end, n, e, m in zip(np.cumsum(lengths), lengths, np.cumsum(reads), reads):
            want = c.theirs(c.tokens[:1, end - n : end], None if c.read is None else c.read[:1, e - m : e])
            near(logits[0, end - n : end], want.logits[0], c)


@capability("cache")
def test_cached_decoding_equals_the_full_forward(cases):
    """Prefill of 7 and 4 tokens (right-padded), then one at a time; layers scanned under odd seeds. Texts stay within max_len: dynamic
    scaling is not causal past it (ops/rope.py)."""
    if not cases[0].model.causal:
        with pytest.raises(UserError, match="generates nothing"):
            cases[0].model.init_cache(1, 8)
        pytest.skip("reads both ways")
    P, prompts = 7, np.array([7, 4])
    for c in cases:
        N = min(T, getattr(c.model.config, "max_len", T), 12) - P
        model = FamilyModel(c.model.family, dataclasses.replace(c.model.config, scan=c.seed % 2 == 1))
        real = np.arange(P) < prompts[:, None]

        @jax.jit
        def run(params, tokens, inputs):
            h = model.hidden(params, tokens[:, :P], real.astype(np.int32), np.tile(np.arange(P), (B, 1)), inputs=inputs, cache=model.init_cache(B, P))

            def step(cache, x):
                token, i = x
                h = model.hidden(params, token[:, None], jnp.ones((B, 1), jnp.int32), jnp.asarray(prompts)[:, None] + i, cache=cache)
                return h.cache, logprob.logits(h.x, model.unembed(params))[:, 0]

            return jax.lax.scan(step, kvcache.grow(h.cache, P + N), (tokens[:, P : P + N].T, jnp.arange(N)))[1].swapaxes(0, 1)

        got = run(c.params, c.tokens, c.inputs())
        for b, n in enumerate(prompts):
            text = np.concatenate([c.tokens[b, :n], c.tokens[b, P : P + N]])
            near(got[b], c.theirs(text[None], None if c.read is None else c.read[b : b + 1]).logits[0, n:], c)


@capability("gradient")
def test_gradients_of_the_loss(cases):
    """Of the mean negative log-likelihood: of the next token, and for BERT of the token itself."""
    for c in cases:
        c.torch.zero_grad()
        shift = int(c.model.causal)
        logits, tokens = c.theirs(c.tokens).logits, torch.tensor(c.tokens).long()
        loss = torch.nn.functional.cross_entropy(logits[:, : T - shift].flatten(0, 1), tokens[:, shift:].flatten())
        loss.backward()
        grads = {n: p.grad for n, p in c.torch.named_parameters()}

        @jax.jit
        def ours(params):
            x = c.model.hidden(params, c.tokens, c.ones, c.positions, inputs=c.inputs()).x
            w = logprob.targets(jnp.ones((B, T)), c.ones) if shift else jnp.ones((B, T))
            return logprob.linear_ce(logprob.before(x, c.ones) if shift else x, c.model.unembed(params), c.tokens, w).total / w.sum()

        value, got = jax.value_and_grad(ours)(c.params)
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
        for name, g in named(c, got).items():
            want = their_gradient(grads, name)
            np.testing.assert_allclose(g, want, atol=1e-4 * max(1.0, float(abs(want).max())), err_msg=f"seed {c.seed} {name}")


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "qwen3_moe"], indirect=True)
def test_load_balancing_loss(cases):
    """router_aux x E x sum of f P over all layers at once, with its gradient, where some tokens are padding."""
    for c in cases:
        mask = c.ones.copy()
        if dict(c.model.config.rope_scaling).get("rope_type") != "dynamic":  # there transformers lets the longest row decide for all
            mask[1, 15:] = 0
        out = c.torch(input_ids=torch.tensor(c.tokens).long(), attention_mask=torch.tensor(mask), labels=torch.tensor(np.where(mask, c.tokens, -100)).long(), output_router_logits=True)
        objective = lm.lm(FamilyModel(c.model.family, dataclasses.replace(c.model.config, router_aux=c.torch.config.router_aux_loss_coef)))
        batch = Tokens(c.tokens, mask.astype(np.float32), mask, c.positions)
        loss, metrics, got = jax.jit(lambda p: step.gradient(objective, p, {}, (), batch, jax.random.key(0)))(c.params)
        np.testing.assert_allclose(metrics["aux_loss"], out.aux_loss.item(), rtol=1e-4)
        np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-4)
        c.torch.zero_grad(), out.loss.backward()
        grads = {n: p.grad for n, p in c.torch.named_parameters()}
        for name, g in named(c, got).items():
            np.testing.assert_allclose(g, their_gradient(grads, name), atol=1e-4 * max(1.0, float(abs(g).max())), err_msg=f"seed {c.seed} {name}")


@pytest.mark.parametrize("arch", ["t5"], indirect=True)
def test_an_exported_encoder_decoder_generates(cases, tmp_path):
    """generation_config.json names the token that opens the decoder's part; without it `generate` raises."""
    c = cases[0]
    hf.save(tmp_path, c.model, c.params, generation={"eos_token_id": [1]})
    made = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).generate(torch.tensor(c.read).long(), max_new_tokens=4, do_sample=False)
    assert made.shape[0] == B and (made[:, 0] == c.model.start).all()


@pytest.mark.parametrize("arch, name", [("t5", "encoder.embed_tokens.weight"), ("bert", "cls.predictions.decoder.weight")], indirect=["arch"])
def test_a_copy_that_is_none_is_named(cases, tmp_path, name):
    from safetensors.torch import load_file, save_file

    c = cases[0]
    shutil.copytree(c.directory, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    original = tensors[{"t5": "shared.weight", "bert": "bert.embeddings.word_embeddings.weight"}[c.arch]]
    save_file({**tensors, name: original.clone()}, tmp_path / "x" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "x")[1], c.params)
    save_file({**tensors, name: original + 1}, tmp_path / "x" / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} differs from"):
        hf.load(tmp_path / "x")


def named(c, params=None):
    """{HF name: array in HF's layout} of our tree."""
    leaves, out = tree.flat(c.params if params is None else params), {}
    for path, entries in hf.names(c.model).items():
        for name, index, transposed in entries:
            x = np.asarray(leaves[path][index])
            out[name] = x.T if transposed else x
    return out


def their_gradient(grads, name):
    """transformers 5 holds experts fused, [E, 2F, D] and [E, D, F], but writes them one by one."""
    name = name.replace(".block_sparse_moe.", ".mlp.").replace("embed_out.weight", "lm_head.weight" if "lm_head.weight" in grads else "embed_out.weight")
    if m := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight", name):
        stem, e, which = m[1], int(m[2]), m[3]
        if which in ("w2", "down_proj"):
            return grads[f"{stem}.down_proj"][e]
        gate, up = grads[f"{stem}.gate_up_proj"][e].chunk(2, 0)
        return gate if which in ("w1", "gate_proj") else up
    return grads[name] if grads[name] is not None else torch.zeros(())  # BERT's second token type


def targets(c, modules: bool) -> tuple[tuple[str, int, float], ...]:
    """Every matrix of the layers, with ranks and alphas that differ. `modules`: only those that are modules of their own in
    transformers 5, as PEFT needs them; it holds the experts of a layer as one fused parameter, and the router as a bare
    parameter of a class of its own, although the files still name each."""
    leaves = sorted(k for k, w in lora.weights(c.params).items() if "layers/" in k and w.ndim >= 3)
    if modules:
        leaves = sorted({m.leaf for m in peft.modules(c.model).values()} & set(leaves) - {k for k in leaves if re.search("experts/|router", k)})
    return tuple((f"^{leaf}$", 2 + i % 2, 3.0 + i) for i, leaf in enumerate(leaves))


def adapted(c, dora=False, modules=False):
    """Params with adapters whose b is not 0."""
    noise = np.random.default_rng(c.seed)
    tree_ = lora.attach(c.params, lora.Lora(targets(c, modules), dora=dora), jax.random.key(c.seed))
    ours = {f"{k}/b" for k, w in lora.weights(tree_).items() if nn.is_adapted(w)}
    return tree.map_named(lambda n, x: jnp.asarray(0.3 * noise.standard_normal(x.shape), x.dtype) if n in ours else x, tree_)


@capability("LoRA")
def test_adapters_compute_what_merged_weights_compute(case):
    for dora in (True, False):
        params = adapted(case, dora)
        logits = case.ours(params)[1]
        near(logits, case.ours(lora.merge(params))[1], case)
        near(case.ours(lora.base(params))[1], case.ours()[1], case, atol=0)
        assert abs(logits - case.ours()[1]).max() > 1e-2
    trained, frozen = tree.split(params, lora.trainable(params))

    @jax.jit
    def loss(t):
        return jnp.square(case._forward(tree.merge(t, frozen), case.tokens, case.ones, case.positions, case.inputs())[1]).mean()

    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.grad(loss)(trained)))
    quantised = lora.quantise(case.params, ((lora.MATRICES, "int8"),))
    assert np.corrcoef(case.ours(quantised)[1].ravel(), case.ours()[1].ravel())[0, 1] > 0.95


@capability("PEFT")
def test_peft_loads_our_adapter_and_we_load_it_back(case, tmp_path):
    library = pytest.importorskip("peft")
    params = adapted(case, modules=True)
    peft.save(tmp_path, case.model, params)
    theirs = library.PeftModel.from_pretrained(auto(case.arch).from_pretrained(case.directory, attn_implementation="eager", experts_implementation="eager"), tmp_path).eval()
    with torch.no_grad():
        near(case.ours(params)[1], case.theirs(case.tokens, model=theirs).logits, case, atol=2e-4)
    again = peft.load(tmp_path, case.model, case.params)
    near(case.ours(again)[1], case.ours(params)[1], case, atol=1e-5)


@capability("reward")
def test_a_reward_model_leaves_as_a_classifier(arch, tmp_path):
    """Ours -> AutoModelForSequenceClassification with one label, and back, in the same numbers."""
    if arch == "t5":  # transformers puts two layers on the decoder's EOS, which is another model than ours
        model, params = hf.load((zoo.make(arch, 7, tmp_path / "in"), tmp_path / "in")[1])
        with pytest.raises(UserError, match="cannot be exported"):
            hf.save(tmp_path / "out", model, {"trunk": params, "head": {"weight": jnp.zeros(model.config.dim), "bias": jnp.zeros(())}})
        pytest.skip("transformers has no such classifier")
    torch_model = zoo.make(arch, 7, tmp_path / "in", reward=True)
    model, params = hf.load(tmp_path / "in")
    tokens = np.random.default_rng(0).integers(1, model.config.vocab, (B, 12)).astype(np.int32)
    ones = np.ones_like(tokens)
    got = jax.jit(heads.Scalar(model).reward)(params, tokens, ones, np.cumsum(ones, 1, dtype=np.int32) - 1)
    with torch.no_grad():
        want = torch_model(input_ids=torch.tensor(tokens).long()).logits[:, 0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    hf.save(tmp_path / "out", model, params)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager", experts_implementation="eager").eval()
    again.config.pad_token_id = 0
    with torch.no_grad():
        np.testing.assert_allclose(again(input_ids=torch.tensor(tokens).long()).logits[:, 0], want, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(torch_model).__name__]


@capability("sharded on 8")
def test_eight_devices_say_what_one_says(case):
    mesh = shard.make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
    _, params = hf.load(case.directory, mesh=mesh)
    assert any(len({str(s.index) for s in x.addressable_shards}) > 1 for x in jax.tree.leaves(params))
    with jax.set_mesh(mesh):
        twice = jax.tree.map(lambda x: np.concatenate([x, x]), (case.tokens, case.ones, case.positions, case.inputs()))  # a row for each of fsdp x expert
        _, logits = jax.jit(case._forward)(params, *shard.place(twice, mesh))
    np.testing.assert_allclose(logits, np.concatenate([case.ours()[1]] * 2), atol=1e-4)
