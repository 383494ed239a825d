"""Every architecture against transformers itself, on checkpoints that transformers makes here, with dimensions drawn at random.

Each test is one column of the table in docs/families.md; `pytest tests/models --families=docs/families.md` writes it.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign import shard, tree
from jaxalign.models import FamilyModel, heads, hf
from jaxalign.objectives import lm
from jaxalign.ops import logprob, nn
from jaxalign.train import step
from jaxalign.types import Tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import zoo  # noqa: E402

B, T = 2, 24
SEEDS = 3  # of the dimensions; more in one go with ZOO_SEEDS


def restart(lengths, total):
    """(segments, positions) i32[1,total] of documents one after another, padding behind them."""
    segments, positions = np.zeros((1, total), np.int32), np.zeros((1, total), np.int32)
    start = 0
    for i, n in enumerate(lengths):
        segments[0, start : start + n], positions[0, start : start + n] = i + 1, np.arange(n)
        start += n
    return segments, positions


class Case:
    """One checkpoint in both worlds, and its tokens."""

    def __init__(self, arch, seed, directory):
        self.arch, self.seed, self.directory = arch, seed, directory
        self.torch = zoo.make(arch, seed, directory)
        self.model, self.params = hf.load(directory)
        self.vocab = self.model.config.vocab
        # Not token 0: transformers gives a padding id's embedding no gradient.
        self.tokens = np.random.default_rng(seed).integers(1, self.vocab, (B, T)).astype(np.int32)
        self.ones = np.ones((B, T), np.int32)
        self.positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        self.forward = jax.jit(self._forward)

    def _forward(self, params, tokens, segments, positions):
        x = self.model.hidden(params, tokens, segments, positions).x
        return x, logprob.logits(x, self.model.unembed(params))

    def ours(self, model=None):
        return self.forward(self.params, self.tokens, self.ones, self.positions)

    def theirs(self, tokens):
        with torch.no_grad():
            return self.torch(input_ids=torch.tensor(np.asarray(tokens)).long(), output_hidden_states=True)


@pytest.fixture(scope="module", params=zoo.CAUSAL)
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


@capability("import")
def test_logits_and_hidden_states(cases):
    for c in cases:
        x, logits = c.ours()
        want = c.theirs(c.tokens)
        np.testing.assert_allclose(logits, want.logits, atol=1e-4, err_msg=f"seed {c.seed}: {c.model.config}")
        np.testing.assert_allclose(x, want.hidden_states[-1], atol=1e-4, err_msg=f"seed {c.seed}")


@capability("export")
def test_round_trip_keeps_every_byte(cases, tmp_path):
    """HF -> jaxalign -> HF in a source dtype of each kind; then transformers loads what we wrote and says the same."""
    from safetensors import safe_open

    for c, dtype in zip(cases, ("float32", "bfloat16", "float16")):
        a, b = tmp_path / f"{c.seed}a", tmp_path / f"{c.seed}b"
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
        again = transformers.AutoModelForCausalLM.from_pretrained(b, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32).eval()
        original = transformers.AutoModelForCausalLM.from_pretrained(a, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32).eval()
        tokens = torch.tensor(c.tokens).long()
        with torch.no_grad():
            torch.testing.assert_close(again(tokens).logits, original(tokens).logits, rtol=0, atol=0)
        assert hf.read_config(b) == model


@capability("packed")
def test_packed_documents_read_nothing_of_each_other(cases):
    lengths = (9, 3, 7)
    segments, positions = restart(lengths, T)
    for c in cases:
        _, logits = c.forward(c.params, np.repeat(c.tokens[:1], B, 0), np.repeat(segments, B, 0), np.repeat(positions, B, 0))
        for end, n in zip(np.cumsum(lengths), lengths):
            want = c.theirs(c.tokens[:1, end - n : end]).logits[0]
            np.testing.assert_allclose(logits[0, end - n : end], want, atol=1e-4, err_msg=f"seed {c.seed}: {c.model.config}")


@capability("cache")
def test_cached_decoding_equals_the_full_forward(cases):
    """Prefill of 7 and 4 tokens (right-padded), then one at a time; scanned layers too. Texts stay within max_len: dynamic
    scaling is not causal past it (ops/rope.py)."""
    P, prompts = 7, np.array([7, 4])
    for c in cases:
        N = min(T, c.model.config.max_len, 12) - P
        for scan in (False, True):
            model = FamilyModel(c.model.family, dataclasses.replace(c.model.config, scan=scan))
            real = np.arange(P) < prompts[:, None]

            @jax.jit
            def run(params, tokens):
                h = model.hidden(params, tokens[:, :P], real.astype(np.int32), np.tile(np.arange(P), (B, 1)), cache=model.init_cache(B, P))

                def step(cache, x):
                    token, i = x
                    h = model.hidden(params, token[:, None], jnp.ones((B, 1), jnp.int32), jnp.asarray(prompts)[:, None] + i, cache=cache)
                    return h.cache, logprob.logits(h.x, model.unembed(params))[:, 0]

                return jax.lax.scan(step, nn.cache_grow(h.cache, P + N), (tokens[:, P : P + N].T, jnp.arange(N)))[1].swapaxes(0, 1)

            got = run(c.params, c.tokens)
            for b, n in enumerate(prompts):
                text = np.concatenate([c.tokens[b, :n], c.tokens[b, P : P + N]])
                np.testing.assert_allclose(got[b], c.theirs(text[None]).logits[0, n:], atol=1e-4, err_msg=f"seed {c.seed}, scan {scan}: {c.model.config}")


@capability("gradient")
def test_gradients_of_the_loss(cases):
    for c in cases:
        c.torch.zero_grad()
        tokens = torch.tensor(c.tokens).long()
        loss = c.torch(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads = {n: p.grad for n, p in c.torch.named_parameters()}
        dense = {k: torch.tensor(np.asarray(v)) for k, v in named(c).items()}

        @jax.jit
        def ours(params):
            x = c.model.hidden(params, c.tokens, c.ones, c.positions).x
            w = logprob.targets(jnp.ones((B, T)), c.ones)
            return logprob.linear_ce(logprob.before(x, c.ones), c.model.unembed(params), c.tokens, w).total / w.sum()

        value, got = jax.value_and_grad(ours)(c.params)
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
        got = named(c, got)
        assert got.keys() == dense.keys()
        for name, g in got.items():
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
    import re

    name = name.replace(".block_sparse_moe.", ".mlp.").replace("embed_out.weight", "lm_head.weight" if "lm_head.weight" in grads else "embed_out.weight")
    if m := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight", name):
        stem, e, which = m[1], int(m[2]), m[3]
        if which in ("w2", "down_proj"):
            return grads[f"{stem}.down_proj"][e]
        gate, up = grads[f"{stem}.gate_up_proj"][e].chunk(2, 0)
        return gate if which in ("w1", "gate_proj") else up
    return grads[name]


@capability("reward")
def test_a_reward_model_leaves_as_a_classifier(arch, tmp_path):
    """Ours -> AutoModelForSequenceClassification with one label, and back, in the same numbers."""
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
        batch = shard.place((case.tokens, case.ones, case.positions), mesh)
        _, logits = jax.jit(case._forward)(params, *batch)
    np.testing.assert_allclose(logits, case.ours()[1], atol=1e-4)
