"""Span corruption put together again, its shares and its draws; NEFTune's noise; DFT as TRL has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.models import t5
from jaxalign.objectives import lm, span
from jaxalign.ops import nn
from jaxalign.types import Tokens, UserError

SFT = recordings.load("sft.npz", "per_token_logps", "shift_mask", "*_from_logps")
EOS, START, SENTINEL = 1, 0, 99
T5 = t5.model(vocab=100, dim=8, layers=1, heads=2, hidden=16, head_dim=4)
HOW = dict(sentinel=SENTINEL, eos=EOS, start=START, rate=0.15, length=3.0)


def texts(lengths, T, seed=0):
    r = np.random.default_rng(seed)
    n = np.array(lengths)[:, None]
    real = np.arange(T) < n
    tokens = np.where(real, r.integers(2, 60, real.shape), 0)
    return Tokens(tokens.astype(np.int32), real.astype(np.float32), real.astype(np.int32), np.where(real, np.arange(T), 0).astype(np.int32))


def put_back(tokens, mask, real):
    """(text, pieces that were cut out) of a corrupted row, by reading it as T5 would."""
    row = list(tokens[real > 0])
    at = row.index(START)
    assert row[at - 1] == EOS and row[-1] == EOS and mask[: at + 1].sum() == 0 and mask[at + 1 : len(row)].all() and mask[len(row) :].sum() == 0
    encoder, decoder = row[: at - 1], row[at + 1 : -1]
    pieces, sentinel = {}, None
    for t in decoder:
        if t == SENTINEL - len(pieces):
            sentinel = t
            pieces[t] = []
        else:
            pieces[sentinel].append(t)
    out = []
    for t in encoder:
        out += pieces[t] if t in pieces else [t]
    assert all(pieces.values()) and [t for t in encoder if t > 60] == sorted(pieces, reverse=True)  # none is empty, all are named in order
    return out, list(pieces.values())


def test_a_corrupted_text_is_whole_again():
    lengths = [64, 40, 7, 2, 1, 0, 33]
    batch = texts(lengths, 64)
    rows = jax.jit(lambda b, k: span.corrupt(b, k, **HOW))(batch, jax.random.key(0))
    for b, n in enumerate(lengths):
        tokens, mask, real = (np.asarray(x[b]) for x in rows[:3])
        if n < 2:
            assert not real.any() and not mask.any()
            continue
        text, pieces = put_back(tokens, mask, real)
        assert text == list(batch.tokens[b, :n])
        cut = sum(map(len, pieces))
        assert cut == min(max(round(n * 0.15), 1), n - 1) and len(pieces) == max(round(cut / 3), 1)


def test_the_end_of_a_text_is_not_cut_out():
    batch = texts([10, 10], 12)
    batch.tokens[0, 9] = EOS
    rows = jax.jit(lambda b, k: span.corrupt(b, k, **HOW))(batch, jax.random.key(1))
    assert put_back(*(np.asarray(x[0]) for x in rows[:3]))[0] == list(batch.tokens[0, :9])


def test_draws_follow_the_row_and_cover_it():
    batch = texts([40] * 8, 40)
    run = jax.jit(lambda b, k: span.corrupt(b, k, **HOW).tokens)
    first = run(batch, jax.random.key(0))
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    np.testing.assert_array_equal(first[order], run(jax.tree.map(lambda x: x[order], batch), jax.random.key(0)))
    assert (first != run(batch, jax.random.key(1))).any()
    same = texts([40] * 200, 40)
    same.tokens[:] = 2 + np.arange(40)  # of other tokens each, so that one knows where a piece was
    rows = jax.vmap(lambda x, k: jax.tree.map(lambda y: y[0], span.corrupt(jax.tree.map(lambda y: y[None], x), k, **HOW)))(same, jax.random.split(jax.random.key(0), 200))
    cut = np.zeros(40)
    for tokens, mask, segments, _ in zip(*map(np.asarray, rows)):
        for piece in put_back(tokens, mask, segments)[1]:
            cut[np.array(piece) - 2] += 1
    assert cut[0] == 0 and cut[1:].min() > 0 and abs(cut.sum() / 200 - 6) < 1e-9  # the first token is always kept


def test_span_corruption_trains_an_encoder_decoder_only():
    with pytest.raises(UserError, match="encoder-decoder"):
        span.span_corruption(tiny.LLAMA, sentinel_id=3)
    with pytest.raises(UserError, match="sentinel_id"):
        span.span_corruption(T5)
    objective = span.span_corruption(T5, sentinel_id=SENTINEL)
    batch = texts([24, 20, 9, 0, 24, 13, 2, 24], 24)
    params = nn.init(T5.specs(), jax.random.key(0))
    whole, parts = (tiny.gradient(objective, n)(params, batch) for n in (1, 4))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    assert tiny.far(parts[2], whole[2]) < 1e-4 and abs(float(whole[1]["nll"]) - np.log(100)) < 2


# -- what SFT has besides ------------------------------------------------------------------------------------------------


def test_dft_is_trls():
    run = lambda make: tiny.gradient(make(tiny.Replay()))({"logps": SFT["per_token_logps"]}, tiny.replay_rows(SFT["shift_mask"]))
    for name, make in (("dft", lm.dft), ("nll", lm.lm)):
        loss, m, grads = run(make)
        np.testing.assert_allclose(loss, SFT[f"loss__{name}_from_logps"], rtol=1e-5)
        np.testing.assert_allclose(grads["logps"], SFT[f"grad__{name}_from_logps"], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(m["nll"], SFT["loss__nll_from_logps"], rtol=1e-5)


def test_neftune():
    """Uniform within alpha / sqrt(L D) of each document's own length, none on padding, whatever stands beside a row; a tied
    unembedding stays as it is; and what is held out is read without noise."""
    batch = tiny.rows(np.random.default_rng(0), 8, 12)
    params = tiny.init(tiny.LLAMA)
    draw = jax.jit(lambda b: lm.noisy(params, b, jax.random.key(0), 5.0)["embed"])
    noise = np.asarray(draw(batch).noise)
    length = (batch.segments != 0).sum(1)
    for b in range(8):
        bound = 5 / np.sqrt(length[b] * 16)
        real = noise[b, : length[b]]
        assert np.abs(real).max() <= bound and np.abs(real).max() > 0.9 * bound and not noise[b, length[b] :].any()
        assert abs(real.std() / (bound / np.sqrt(3)) - 1) < 0.25
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 4))), batch)  # padding changes the draw, not the size
    assert np.abs(draw(wide).noise[:, 12:]).max() == 0
    noised = {**params, "embed": draw(batch)}
    np.testing.assert_array_equal(tiny.LLAMA.unembed(noised).weight, params["embed"])
    table = nn.embed(noised["embed"], batch.tokens, "float32") - nn.embed(params["embed"], batch.tokens, "float32")
    np.testing.assert_allclose(table, noise, atol=1e-6)
    objective = lm.lm(tiny.LLAMA, neftune=5.0)
    whole, parts = (tiny.gradient(objective, n)(params, batch) for n in (1, 4))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    assert tiny.far(parts[2], whole[2]) < 1e-5
    plain = tiny.gradient(lm.lm(tiny.LLAMA))(params, batch)
    assert abs(whole[0] - plain[0]) > 1e-4
    held = jax.jit(lambda p: objective.held_out(p, {}, (), batch, jax.random.key(0), {}).terms["lm"])(params)
    np.testing.assert_allclose(held.total / held.weight, plain[0], rtol=1e-6)
    with pytest.raises(UserError, match="elsewhere"):
        lm.noisy({"wte": 0}, batch, jax.random.key(0), 5.0)
