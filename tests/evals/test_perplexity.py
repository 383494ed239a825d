"""Strided windows: every target once, with the context that was promised; the loss by one forward per token."""

import math

import jax
import numpy as np
import pytest
import tiny
from jaxalign import shard
from jaxalign.evals import perplexity
from jaxalign.rl.experience import token_logps
from jaxalign.types import Tokens, UserError


@pytest.mark.parametrize("length, context, stride", [(3, 8, 3), (8, 8, 3), (9, 8, 3), (30, 8, 3), (29, 8, 7), (1, 4, 1)])
def test_windows_score_each_target_once(length, context, stride):
    ids, scored, begin = list(range(length)), [], 0
    for w, m in perplexity.windows(ids, [1] * length, context, stride):
        assert w == ids[begin : begin + context] and (len(w) == context or begin + len(w) == length)
        at = [w[i] for i in np.flatnonzero(m)]
        if begin:
            assert min(i for i in np.flatnonzero(m)) >= context - stride
        scored, begin = scored + at, begin + stride
    assert scored == ids[1:]  # the first is predicted by nothing


def test_strided_loss_is_that_of_single_tokens():
    rng = np.random.default_rng(0)
    documents = [(rng.integers(1, tiny.V, n).tolist(), [0] * 3 + [1] * (n - 3)) for n in (4, 9, 21)]
    params, mesh = tiny.init(tiny.LLAMA), shard.make_mesh({"data": -1})
    got = perplexity.strided(tiny.LLAMA, params, documents, context=8, stride=3, batch=8, mesh=mesh)
    rows = []
    for ids, mask in documents:
        for t in np.flatnonzero(mask):
            begin = 0 if t < 8 else 3 * math.ceil((t - 7) / 3)  # the first window that holds it
            piece = ids[begin : t + 1]
            rows.append((piece + [0] * (8 - len(piece)), len(piece)))
    length = np.array([n for _, n in rows])[:, None]
    at = np.arange(8)
    tokens = Tokens(np.array([r for r, _ in rows], np.int32), (at == length - 1).astype(np.float32), (at < length).astype(np.int32), np.where(at < length, at, 0).astype(np.int32))
    alone = -float(jax.jit(lambda p: token_logps(tiny.LLAMA, p, tokens).logp.sum())(params))
    assert got.tokens == len(rows) == 1 + 6 + 18
    assert got.nll == pytest.approx(alone, rel=1e-5) and got.perplexity == pytest.approx(math.exp(alone / got.tokens), rel=1e-5)


def test_units():
    assert perplexity.bits_per_byte(math.log(2) * 24, 12) == pytest.approx(2) and perplexity.perplexity(1e9, 10) == math.inf


def test_nothing_to_predict_is_refused():
    with pytest.raises(UserError, match="no token to predict"):
        perplexity.strided(tiny.LLAMA, tiny.init(tiny.LLAMA), [([3], [1]), ([4], [1])], context=8, stride=3, batch=8, mesh=shard.make_mesh({"data": -1}))
