"""What is particular to an encoder-decoder and to an encoder: rows that hold both sides, masked language modelling, and both on
the roads of `train` (parity with transformers is in test_parity.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign import build, tree
from jaxalign.data.templates import TEMPLATES, encode_example, encode_prompt
from jaxalign.data.examples import Chat, Completion, Message, Text
from jaxalign.data.tokenizers import Bytes
from jaxalign.models import bert, t5
from jaxalign.objectives import lm
from jaxalign.ops import logprob, nn
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import step
from jaxalign.types import Inputs, Prompts, Tokens, UserError

T5 = t5.model(vocab=40, dim=12, layers=2, heads=2, hidden=16, head_dim=6, gated=True, activation="gelu_tanh", buckets=8, max_distance=20, start=3)
BERT = bert.model(vocab=50, dim=16, layers=2, heads=2, hidden=24, max_len=64)


def params(model, seed=0):
    return jax.tree.map(lambda x: 2 * x, jax.jit(lambda k: nn.init(model.specs(), k))(jax.random.key(seed)))


def row(*parts, total):
    """(tokens, segments, positions) i32[total]: documents of (prompt, completion), start token 3 between them."""
    tokens, segments, positions = (np.zeros(total, np.int32) for _ in range(3))
    at = 0
    for i, (prompt, completion) in enumerate(parts):
        ids = [*prompt, 3, *completion]
        tokens[at : at + len(ids)], segments[at : at + len(ids)], positions[at : at + len(ids)] = ids, i + 1, np.arange(len(ids))
        at += len(ids)
    return tokens, segments, positions


def test_rows_of_prompt_and_completion_equal_given_inputs():
    """Also packed, and where the start token comes again in the completion, which is a token like any other."""
    p, docs = params(T5), [([5, 6, 7, 8], [9, 10, 3, 11]), ([12, 13], [14, 15, 16])]
    tokens, segments, positions = (x[None] for x in row(*docs, total=18))
    x = jax.jit(T5.hidden)(p, tokens, segments, positions).x[0]
    at = 0
    for prompt, completion in docs:
        side = lambda ids: (np.array([ids], np.int32), np.ones((1, len(ids)), np.int32), np.arange(len(ids), dtype=np.int32)[None])
        want = T5.hidden(p, *side([3, *completion]), inputs=Inputs(*side(prompt))).x[0]
        at += len(prompt)
        np.testing.assert_allclose(x[at : at + len(completion) + 1], want, atol=1e-5)
        at += len(completion) + 1


def test_what_a_decoder_token_can_see():
    """Its own document's whole prompt, its own past, nothing else."""
    p = params(T5)
    tokens, segments, positions = (x[None] for x in row(([5, 6, 7], [9, 10, 11]), ([12, 13], [14, 15]), total=14))
    # every slot a row of the table of its own, but for the start tokens, which are told by their id
    ids = np.where(tokens == 3, 3, 20 + np.arange(14)[None]).astype(np.int32)

    @jax.jit
    def reach(table):
        x = lambda e: T5.hidden({**p, "embed": e}, ids, segments, positions).x[0]
        w = jax.random.normal(jax.random.key(0), (12,))
        return jax.vmap(lambda t: jnp.abs(jax.grad(lambda e: (x(e)[t] * w).sum())(table)).sum(-1))(jnp.arange(14))

    seen = np.asarray(reach(p["embed"]))[:, 20 + np.arange(14)] > 0
    np.testing.assert_array_equal(seen[4], [1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])  # first completion token of the first document
    np.testing.assert_array_equal(seen[6], [1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(seen[11], [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0])


def test_sampled_log_probs_are_those_of_the_training_forward():
    """`rollout` knows nothing of encoders; rows of different lengths, padded on either side."""
    p = params(T5)
    prompts = [[5, 6, 7, 8, 3], [9, 3]]
    tokens, segments = np.zeros((2, 5), np.int32), np.zeros((2, 5), np.int32)
    tokens[0], tokens[1, 3:] = prompts[0], prompts[1]
    segments[0], segments[1, 3:] = 1, 1
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]], np.int32)
    out = generate(T5, Sampling(max_new=6, stop=(1,)), p, Prompts(tokens, segments, positions, np.arange(2, dtype=np.int32)), jax.random.key(1))
    x = T5.hidden(p, out.tokens, out.segments, out.positions).x
    again = logprob.logprob(logprob.before(x, out.segments), T5.unembed(p), out.tokens, out.mask).logp
    np.testing.assert_allclose(again, out.logp, atol=1e-5)
    assert out.mask.sum() > 4


def test_template_of_an_encoder_decoder():
    template, tok = TEMPLATES["encoder_decoder"], Bytes()
    ids, mask = encode_example(Completion("ab", "c"), tok, template)
    assert ids == [256, 97, 98, 257, 258, 99, 257] and mask == [0, 0, 0, 0, 0, 1, 1]
    assert encode_prompt("ab", tok, template) == ids[:5]
    assert encode_example(Chat((Message("user", "ab"), Message("assistant", "c"))), tok, template) == (ids, mask)
    with pytest.raises(UserError, match="no prompt for the encoder"):
        encode_example(Text("abc"), tok, template)
    with pytest.raises(UserError, match="one answer to one prompt"):
        encode_example(Chat((Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))), tok, template)


# -- masked language modelling --------------------------------------------------------------------------------------


def texts(B=64, T=48):
    r = np.random.default_rng(0)
    length = r.integers(5, T + 1, (B, 1))
    real = np.arange(T) < length
    tokens = np.where(real, r.integers(1, 49, (B, T)), 0).astype(np.int32)
    mask = (real & (np.arange(T) > 0)).astype(np.float32)
    return Tokens(tokens, mask, real.astype(np.int32), np.where(real, np.arange(T), 0).astype(np.int32))


def test_corruption_follows_bert():
    batch = texts()
    chosen, read = map(np.asarray, lm.corrupt(batch, jax.random.key(0), 49, 0.15, 50))
    n, eligible = chosen.sum(), batch.mask.sum()
    assert abs(n / eligible - 0.15) < 3 * (0.15 * 0.85 / eligible) ** 0.5
    assert not (chosen * (1 - batch.mask)).any() and (read == batch.tokens)[chosen == 0].all()
    masked, same = (read == 49)[chosen > 0].mean(), (read == batch.tokens)[chosen > 0].mean()
    assert abs(masked - 0.8 - 0.1 / 50) < 3 * (0.16 / n) ** 0.5 and abs(same - 0.1 - 0.1 / 50) < 3 * (0.09 / n) ** 0.5
    again = np.asarray(lm.corrupt(batch, jax.random.key(1), 49, 0.15, 50)[0])
    assert (again != chosen).any()


def test_corruption_depends_on_the_row_and_not_on_its_neighbours():
    batch = texts(8)
    chosen, read = lm.corrupt(batch, jax.random.key(0), 49, 0.15, 50)
    other = jax.tree.map(lambda x: x[::-1], batch)
    for a, b in zip(lm.corrupt(other, jax.random.key(0), 49, 0.15, 50), (chosen, read)):
        np.testing.assert_array_equal(a[::-1], b)
    swapped = batch._replace(tokens=batch.tokens[:, ::-1])  # the same tokens in another order draw anew
    assert (np.asarray(lm.corrupt(swapped, jax.random.key(0), 49, 0.15, 50)[0]) != chosen).any()


def test_masked_loss_is_that_of_the_chosen_tokens_and_accumulates():
    batch, objective, p = texts(8), lm.masked(BERT, mask_id=49), params(BERT)
    chosen, read = map(np.asarray, lm.corrupt(batch, jax.random.key(0), 49, 0.15, 50))
    x = BERT.hidden(p, read, batch.segments, batch.positions).x
    logp = np.asarray(jax.nn.log_softmax(logprob.logits(x, BERT.unembed(p))))
    want = -(np.take_along_axis(logp, batch.tokens[..., None], 2)[..., 0] * chosen).sum() / chosen.sum()
    run = lambda n: jax.jit(lambda p: step.gradient(objective, p, {}, (), batch, jax.random.key(0), n))(p)
    loss, metrics, grads = run(1)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run(4)[2], grads)


@pytest.mark.parametrize("options", [{}, {"mask_id": 50}, {"mask_id": 49, "rate": 0.0}])
def test_a_mask_that_is_no_token_is_refused(options):
    with pytest.raises(UserError, match="masked_lm needs"):
        lm.masked(BERT, **options)


# -- on the road ----------------------------------------------------------------------------------------------------


@pytest.fixture
def road(tmp_path):
    r = np.random.default_rng(0)
    words = ["red", "blue", "green", "cold", "warm"]
    say = lambda: " ".join(r.choice(words, 3))
    rows = [{"prompt": f"say {say()}", "completion": say(), "chosen": say(), "rejected": say() + " no"} for _ in range(16)]
    write = lambda name, keys: (tmp_path / name).write_text("".join(json.dumps({k: x[k] for k in keys}) + "\n" for x in rows))
    write("sft.jsonl", ("prompt", "completion")), write("pairs.jsonl", ("prompt", "chosen", "rejected")), write("prompts.jsonl", ("prompt",))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": say()}) + "\n" for _ in range(32)))
    return tmp_path


def run(directory, name, model, tokenizer, kind, init="", **sections):
    c = build.base(name, **model)
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.tokenizer.update(tokenizer)
    data = {"batch_size": 8, "path": str(directory / sections.pop("path"))} | sections.pop("data", {})
    c.stage = build.stage(kind, data=data, train={"steps": 3, "log_every": 1}, optim={"lr": 3e-3}, init=init, **sections)
    out = directory / name
    w = build.world(c, out)
    stage = build.make_stage(w, name, c.stage, out)
    stage.save(stage.go())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TINY_T5 = dict(family="t5", dim=16, layers=1, heads=2, hidden=24, head_dim=8, vocab=0, start=258)


def test_t5_through_sft_reward_dpo_and_ppo(road):
    seq2seq = {"path": "bytes", "template": "encoder_decoder"}
    go = lambda name, objective, **k: run(road, name, TINY_T5, seq2seq, objective, **k)
    sft = go("sft", "lm", path="sft.jsonl", data={"seq_len": 96})
    assert sft[-1]["nll"] < sft[0]["nll"]
    start = str(road / "sft")
    go("reward", "reward_pairs", path="pairs.jsonl", init=start)
    assert abs(go("dpo", "dpo", path="pairs.jsonl", init=start)[0]["loss"] - np.log(2)) < 1e-5  # policy = reference
    ppo = go("ppo", "ppo", path="prompts.jsonl", init=start, rl={"reward": str(road / "reward"), "epochs": 1}, sampling={"max_new": 6})
    assert abs(ppo[0]["val/ratio"] - 1) < 1e-5 and ppo[0]["logprob_gap"] < 1e-4
    w, _, p = build.trained(str(road / "ppo"))
    assert tree.size(p) == nn.count(w.model.specs())


def test_an_encoder_decoder_wants_its_template(road):
    with pytest.raises(UserError, match="set tokenizer.template to encoder_decoder"):
        run(road, "x", TINY_T5, {"path": "bytes"}, "lm", path="sft.jsonl")
    with pytest.raises(UserError, match="model.start to 258"):
        run(road, "x", {**TINY_T5, "start": 0}, {"path": "bytes", "template": "encoder_decoder"}, "lm", path="sft.jsonl")
    with pytest.raises(UserError, match="no prompt for the encoder"):
        run(road, "x", TINY_T5, {"path": "bytes", "template": "encoder_decoder"}, "lm", path="texts.jsonl")


def test_bert_masked_then_a_reward_model(road):
    tiny = dict(family="bert", dim=16, layers=1, heads=2, hidden=24, vocab=260, max_len=64)
    log = run(road, "mlm", tiny, {"path": "bytes"}, "masked_lm", path="texts.jsonl", data={"seq_len": 48}, objective={"mask_id": 259})
    assert all(np.isfinite(m["nll"]) for m in log)
    run(road, "rm", tiny, {"path": "bytes"}, "reward_pairs", path="pairs.jsonl", init=str(road / "mlm"))
    w, _, p = build.trained(str(road / "rm"))
    assert w.model.config.head == "pooled" and "pooler" in p["trunk"] and "masked" not in p["trunk"]
    for objective in ("lm", "dpo"):
        with pytest.raises(UserError, match="reads both ways and writes nothing"):
            run(road, objective, tiny, {"path": "bytes"}, objective, path="sft.jsonl" if objective == "lm" else "pairs.jsonl", init=str(road / "mlm"))


@pytest.mark.parametrize("both_ways", [False, True])
def test_buckets_are_transformers_s_at_every_border(both_ways):
    torch, attention = pytest.importorskip("torch"), pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    gap = np.arange(-300, 301)
    for buckets in (8, 12, 32, 64):
        for most in (*range(buckets // 2 + 1, 60), 128, 200):
            want = attention._relative_position_bucket(torch.tensor(gap), bidirectional=both_ways, num_buckets=buckets, max_distance=most)
            np.testing.assert_array_equal(t5.bucket(jnp.asarray(gap), buckets, most, both_ways), want, err_msg=f"{buckets} {most}")
