"""Cross entropy of `lm`: transformers' numbers, and packing."""

import jax
import numpy as np
import pytest
import recordings
import tiny
from jaxalign.objectives import lm
from jaxalign.types import Tokens

SFT = recordings.load("sft.npz", "logits", "labels", "loss__mean", "grad__mean", "loss__num_items50", "loss__label_smoothing*")


def sft_batch():
    labels = SFT["labels"]
    B, T = labels.shape
    mask = (labels != -100).astype(np.float32)
    return Tokens(np.where(mask > 0, labels, 0).astype(np.int32), mask, np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1)))


def test_transformers_cross_entropy():
    """ForCausalLMLoss shifts labels itself, as we do: logits [B,T,V] and unshifted labels in, value and gradient out."""
    batch = sft_batch()
    objective = lm.lm(tiny.ReplayLogits(SFT["logits"].shape[-1]))
    loss, metrics, grads = tiny.gradient(objective)({"logits": SFT["logits"]}, batch)
    np.testing.assert_allclose(loss, SFT["loss__mean"], rtol=1e-5)
    np.testing.assert_allclose(grads["logits"], SFT["grad__mean"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(metrics["nll"], SFT["loss__mean"], rtol=1e-5)
    z = SFT["logits"][:, :-1]
    right = (z.argmax(-1) == batch.tokens[:, 1:])[batch.mask[:, 1:] > 0]
    np.testing.assert_allclose(metrics["mean_token_accuracy"], right.mean(), rtol=1e-6)
    # num_items_in_batch = 50: the same sum over another weight, which is what our Term keeps apart
    term = jax.jit(lambda p: objective.loss(p, {}, (), batch, None, {}).terms["lm"])({"logits": SFT["logits"]})
    np.testing.assert_allclose(term.total / 50, SFT["loss__num_items50"], rtol=1e-5)
    assert term.weight == (batch.mask[:, 1:]).sum()  # a masked-in first token would not count: nothing predicts it


@pytest.mark.parametrize("smoothing", [0.1, 0.2])
def test_transformers_label_smoothing(smoothing):
    run = tiny.gradient(lm.lm(tiny.ReplayLogits(SFT["logits"].shape[-1]), smoothing=smoothing))
    loss, metrics, _ = run({"logits": SFT["logits"]}, sft_batch())
    np.testing.assert_allclose(loss, SFT[f"loss__label_smoothing{smoothing}"], rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], SFT["loss__mean"], rtol=1e-5)  # the metric stays plain


def packed(rows: Tokens, bins: list[list[int]], T: int) -> Tokens:
    """Rows put one after another: bins[i] are the rows of packed row i; segments count from 1, positions restart."""
    out = Tokens(*(np.zeros((len(bins), T), a.dtype) for a in rows))
    for b, members in enumerate(bins):
        at = 0
        for s, i in enumerate(members):
            n = int((rows.segments[i] != 0).sum())
            for new, old in zip(out, rows):
                new[b, at : at + n] = old[i, :n]
            out.segments[b, at : at + n] = s + 1
            at += n
    return out


@pytest.mark.parametrize("model", [tiny.LLAMA, tiny.GPT2], ids=["llama", "gpt2"])
def test_packed_is_padded(model):
    """GPT-2 also shows that positions restart: its positions are absolute. The mask of a first token is ignored."""
    r = np.random.default_rng(0)
    rows = tiny.rows(r, 8, 8)
    rows.mask[2:4, 0] = 1  # "a target" at the first token: in a packed row it has a neighbour to its left
    wide = packed(rows, [[0, 5, 2], [3, 1], [7, 4, 6]], 24)
    assert wide.mask.sum() == rows.mask.sum() and wide.segments.max() == 3
    run = tiny.gradient(lm.lm(model, smoothing=0.1, z_loss=1e-2))
    (a, ma, ga), (b, mb, gb) = run(tiny.init(model), rows), run(tiny.init(model), wide)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(ma["entropy"], mb["entropy"], rtol=1e-6)
    assert tiny.far(ga, gb) <= 1e-6
    wrong = run(tiny.init(model), wide._replace(segments=np.minimum(wide.segments, 1)))[0]
    assert abs(wrong - a) > 1e-3  # the borders matter: without them this test would pass for any attention
