"""Weights of answers by their prompts: which states embed a prompt, and that rows keep their weights in any batch."""

import jax
import numpy as np
import pytest
import tiny
from jaxalign import shard
from jaxalign.data import judged, tokenizers
from jaxalign.models import decoder
from jaxalign.objectives import kto
from jaxalign.rl import matching
from jaxalign.types import Tokens, UserError

MESH = shard.make_mesh({}, jax.devices()[:1])
BYTES = tokenizers.Bytes()
MODEL = decoder.model(vocab=BYTES.vocab_size, dim=16, layers=1, heads=2, hidden=24)
# Good answers are mostly to questions about tea, bad ones to questions about soup.
ROWS = [{"prompt": "tea" if (i % 10 < 8) == (i % 2 == 0) else "soup", "completion": "yes"[: 1 + i % 3], "label": i % 2 == 0} for i in range(70)]


def source(**how):
    return judged.labelled_source(ROWS, BYTES, **{"max_len": 16, "batch_size": 4, "seed": 0, **how})


def weighted(items):
    return matching.Weighted(items, items, MODEL, tiny.init(MODEL), MESH, lambda x, good: kto.density_ratio(x, good, 0.0, 99.0))


def test_a_prompt_is_embedded_alone():
    """The mean over the prompt's tokens by hand; another answer changes nothing, and what has no prompt is 0."""
    params, r = tiny.init(tiny.LLAMA), np.random.default_rng(0)
    rows = tiny.rows(r, 6, 12)
    rows.mask[5] = rows.segments[5]
    got = matching.embeddings(tiny.LLAMA, params, rows)
    for i in range(5):
        n = int(rows.mask[i].argmax())
        alone = Tokens(*(np.asarray(a[i : i + 1, :n]) for a in rows))
        x = np.asarray(tiny.LLAMA.hidden(params, alone.tokens, alone.segments, alone.positions).x)[0]
        np.testing.assert_allclose(got[i], x.mean(0), rtol=1e-4, atol=1e-5)
    assert not np.any(got[5])
    other = rows._replace(tokens=np.where(rows.mask > 0, 1 + rows.tokens % 7, rows.tokens))
    np.testing.assert_allclose(matching.embeddings(tiny.LLAMA, params, other), got, rtol=1e-5, atol=1e-6)


def test_rows_keep_their_weights():
    """Good ones 1, bad ones by their prompt, whatever the batch size, order and epoch; after a restart too. One event says how it went."""
    a, known = weighted(source()), {}
    for _ in range(40):  # 160 of 70: into the third epoch
        items = a.items.indices(a.state_dict()["batch"])
        batch = a.next(None)
        for i, w, label in zip(items, batch.weight, batch.label):
            assert known.setdefault(i, w) == w and (w == 1 or label == 0)
    tea, soup = ({known[i] for i, row in enumerate(ROWS) if row["prompt"] == p and not row["label"]} for p in ("tea", "soup"))
    assert len(known) == 70 and min(tea) > 1.5 and max(soup) < 0.7
    (said,) = a.events()
    assert said["kind"] == "matched_prompts" and said["rows"] == 70 and said["told_apart"] == pytest.approx(0.8) and a.events() == []
    b = weighted(source(batch_size=8, seed=3))
    b.load_state_dict({**b.state_dict(), "batch": 5})
    items = b.items.indices(5)
    np.testing.assert_allclose(b.next(None).weight, [known[i] for i in items], rtol=1e-4)


def test_a_large_set_is_sampled(monkeypatch):
    """The classifier learns from every k-th batch, and weighs all rows."""
    monkeypatch.setattr(matching, "ENOUGH", 20)
    a = weighted(source())
    a.next(None)
    assert 20 <= a.events()[0]["rows"] < 30 and len(a.weights) == 70 and (a.weights[1::2] != 1).all()


@pytest.mark.parametrize("enough, bad", [(4096, range(57, 64)), (32, range(0, 64, 9))])
def test_halves_have_both_kinds(monkeypatch, enough, bad):
    """In a file sorted by label, and where every second batch is read: what a classifier learns from has both, and weighs all bad ones."""
    monkeypatch.setattr(matching, "ENOUGH", enough)
    rows = [{**row, "label": i not in bad} for i, row in enumerate(ROWS[:64])]
    items = judged.labelled_source(rows, BYTES, max_len=16, batch_size=8, seed=0)
    taught = []
    fit = lambda x, good: taught.append(good) or kto.density_ratio(x, good, 0.0, 99.0)  # noqa: E731
    a = matching.Weighted(items, items, MODEL, tiny.init(MODEL), MESH, fit)
    a.next(None)
    assert all(0 < g.sum() < len(g) for g in taught) and abs(len(taught[0]) - len(taught[1])) <= matching.BLOCKS and (a.weights[list(bad)] != 1).all()


def test_halves_of_a_few():
    for n in range(2, 30):
        for good in (np.arange(2 * n) < n, np.arange(n + 2) > 1):
            half = matching.halves(good)
            assert all({*half[kind]} == {0, 1} for kind in (good, ~good))
    assert np.array_equal(matching.halves(np.arange(64) % 4 > 0), np.repeat([0, 1] * 4, 8))  # answers to a prompt, one of four bad


def test_one_kind_is_counted_over_the_whole_set():
    rows = [{**row, "label": i > 0} for i, row in enumerate(ROWS)]
    with pytest.raises(UserError, match="of the 70 labels 69 are good.*two of each"):
        weighted(judged.labelled_source(rows, BYTES, max_len=16, batch_size=4, seed=0)).next(None)


def test_no_row_is_weighed_by_what_it_taught(monkeypatch):
    """Noise of many dimensions and coin tosses for labels: learned by heart they would be told apart."""
    r = np.random.default_rng(0)
    noise, toss = r.standard_normal((400, 200)), r.random(400) < 0.5
    rows = [{"prompt": f"{i:03}", "completion": "yes", "label": bool(g)} for i, g in enumerate(toss)]
    items = judged.labelled_source(rows, BYTES, max_len=16, batch_size=50, seed=0)
    batches = iter(np.split(noise, 8))
    monkeypatch.setattr(matching, "embeddings", lambda *_: next(batches))
    a = weighted(items)
    a.next(None)
    assert abs(a.events()[0]["told_apart"] - 0.5) < 0.1
    by_heart = kto.density_ratio(noise, toss)(noise)
    assert ((by_heart > 1) == toss).mean() > 0.75
