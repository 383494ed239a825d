"""Reference log-probs once for all items: the numbers of the batches as drawn, kept under a name that says what they are of."""

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import shard
from jaxalign.data import judged, sources, tokenizers
from jaxalign.models import decoder
from jaxalign.rl.reference import Precomputed, WithReference, fields
from jaxalign.train.log import read_jsonl
from jaxalign.types import Pairs, SharedPairs, UserError

MESH = shard.make_mesh({}, jax.devices()[:1])
ROWS = [{"prompt": "ab" * (i % 3 + 1), "chosen": "c" * (i + 1), "rejected": "d" * (7 - i)} for i in range(7)]


MODEL = decoder.model(vocab=tokenizers.Bytes().vocab_size, dim=16, layers=1, heads=2, hidden=24)


def source(share=None, rows=ROWS, **how):
    return sources.pairs_source(rows, tokenizers.Bytes(), **{"max_len": 16, "batch_size": 4, "seed": 0, **how}, share_prompt=share)


@pytest.mark.parametrize("share", [None, lambda apart, together: True], ids=["apart", "shared"])
def test_all_at_once_or_as_drawn(share, tmp_path):
    """Batches run across epochs; the numbers are those of batches as drawn, in memory, from disk, and after a resume."""
    params = tiny.init(MODEL)
    drawn = WithReference(source(share), MODEL, params, MESH)
    memory = Precomputed(source(share), MODEL, params, MESH)
    disk = Precomputed(source(share), MODEL, params, MESH, tmp_path, ("a",))
    for _ in range(4):
        want, got, kept = drawn.next(None), memory.next(None), disk.next(None)
        assert type(got) is (SharedPairs if share else Pairs)
        for k in ("ref_chosen", "ref_rejected"):
            np.testing.assert_allclose(getattr(got, k), getattr(want, k), rtol=1e-5)
            np.testing.assert_array_equal(getattr(kept, k), getattr(got, k))
    assert memory.params is None and (np.asarray(want.ref_chosen) < 0).all()
    # another batch size and order, and no weights: it is all read
    again = Precomputed(source(share, batch_size=2, seed=5), MODEL, None, MESH, tmp_path, ("a",))
    again.next(None)
    np.testing.assert_array_equal(again.logps, memory.logps)
    again.load_state_dict({**again.state_dict(), "batch": 3})
    items = again.source.indices(3)
    np.testing.assert_array_equal(again.next(None).ref_chosen, memory.logps[0][items])


def test_another_key_or_a_damaged_file_is_computed(tmp_path):
    a, b = tiny.init(MODEL), tiny.init(MODEL, 1)
    first = Precomputed(source(), MODEL, a, MESH, tmp_path, ("a",))
    other = Precomputed(source(), MODEL, b, MESH, tmp_path, ("b",))
    first.next(None), other.next(None)
    assert len(list(tmp_path.glob("*.npz"))) == 2 and not np.allclose(first.logps, other.logps)
    data = bytearray(first.path.read_bytes())
    data[200] ^= 1
    first.path.write_bytes(data)
    mended = Precomputed(source(), MODEL, a, MESH, tmp_path, ("a",))
    mended.next(None)
    np.testing.assert_array_equal(mended.logps, first.logps)
    assert Precomputed(source(), MODEL, None, MESH, tmp_path, ("a",))._known() is not None  # written anew


def test_what_the_items_are():
    """The order, the batches and the layout of rows do not matter; which rows, and where they are cut, do."""
    same = source().contents
    assert same == source(batch_size=2, seed=3, shuffle=False).contents == source(lambda *_: True).contents
    assert len({same, source(rows=ROWS[:6]).contents, source(max_len=15).contents}) == 3


def test_runs_share_a_directory(tmp_path, monkeypatch):
    """The second run computes nothing, and says the same."""
    from jaxalign.rl import reference

    data = runs.prepared(tmp_path / "data")
    ran = []
    monkeypatch.setattr(Precomputed, "_computed", lambda self, f=Precomputed._computed: ran.append(1) or f(self))
    with runs.devices(1):
        for n in (1, 2):
            s, _ = runs.train(runs.config("dpo", data, **{"reference_cache": str(tmp_path / "cache"), "optim.lr": 1e-3}), tmp_path / f"run{n}")
            assert isinstance(s.source, reference.Precomputed) and s.source.source.report().get("shared_tokens", 0) >= 0
    assert len(ran) == 1
    a, b = (read_jsonl(tmp_path / f"run{n}" / "metrics.jsonl") for n in (1, 2))
    assert a == b


LABELS = [{"prompt": "ab" * (i % 3 + 1), "completion": "c" * (i + 1), "label": i % 2 == 0} for i in range(7)]
RANKS = [{"prompt": "ab" * (i % 3 + 1), "completions": ["c" * (i + 1), "d", "ee"][: 2 + i % 2], "ranks": [0, 1, 1][: 2 + i % 2]} for i in range(7)]
OTHERS = {
    "labelled": lambda **how: judged.labelled_source(LABELS, tokenizers.Bytes(), **{"max_len": 16, "batch_size": 4, "seed": 0, "mismatched": True, **how}),
    "rankings": lambda **how: sources.rankings_source(RANKS, tokenizers.Bytes(), **{"max_len": 16, "batch_size": 4, "seed": 0, **how}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_labels_and_rankings(kind, tmp_path):
    """In one pass, with mismatched rows and candidates that differ in number: what batches as drawn have, also read back."""
    params, make = tiny.init(MODEL), OTHERS[kind]
    drawn, kept = WithReference(make(), MODEL, params, MESH), Precomputed(make(), MODEL, params, MESH, tmp_path, (kind,))
    for _ in range(3):  # 12 of 7 items: across the end of an epoch
        want, got = drawn.next(None), kept.next(None)
        for k in fields(got):
            real = want.valid > 0 if kind == "rankings" else np.ones(4, bool)
            np.testing.assert_allclose(np.where(real, getattr(got, k), 0), np.where(real, getattr(want, k), 0), rtol=1e-5)
            assert (np.asarray(getattr(got, k))[np.asarray(real)] < 0).all()
    read = Precomputed(make(batch_size=2, seed=3), MODEL, None, MESH, tmp_path, (kind,))
    read.next(None)
    for a, b in zip(read.logps, kept.logps, strict=True):
        np.testing.assert_array_equal(a, b)
    if kind == "labelled":
        assert make().contents != make(mismatched=False).contents and fields(make(mismatched=False).next(None)) == ("ref",)


def test_a_way_of_summing_of_ones_own(tmp_path):
    """LD-DPO damps tails in policy and reference alike: alpha 0 leaves the first tokens, as many as the shorter answer has."""
    from jaxalign.objectives import dpo_variants, preference

    rows = [{"prompt": "a", "chosen": "bcdefg", "rejected": "x"}]
    params, damped = tiny.init(MODEL), dpo_variants.ld_dpo(MODEL, alpha=0.0).reference
    get = lambda **how: Precomputed(source(rows=rows, batch_size=1), MODEL, params, MESH, tmp_path, **how).next(None)
    whole, cut = get(key=("whole",)), get(key=("cut",), of_pairs=damped)
    logp = np.asarray(preference.token_logps(MODEL, params, whole.chosen)[0].logp)[0]
    first = np.flatnonzero(logp)[:2]  # of seven, the stop token among them; the rejected answer has two
    assert cut.ref_rejected == pytest.approx(whole.ref_rejected, rel=1e-6)
    assert whole.ref_chosen == pytest.approx(logp.sum(), rel=1e-5) and cut.ref_chosen == pytest.approx(logp[first].sum(), rel=1e-5)


def test_kto_whole_with_adapters(tmp_path):
    """The frozen base is the reference, kept on disk; loss 1/2 and no KL before the first update; held out, each batch has its own KL."""
    from jaxalign import build

    data = runs.prepared(tmp_path / "data")
    c = build.base("kto", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    path = f"{data}/labelled.jsonl"
    sections = dict(init=str(data / "start"), reference_cache=str(tmp_path / "cache"), adapter=dict(rank=2), data=dict(path=path, eval_path=path, batch_size=8))
    c.stage = build.stage("kto", **sections, train=dict(steps=2, eval_every=1), optim=dict(lr=3e-3))
    with runs.devices(1):
        s, _ = runs.train(c, tmp_path / "run")
    assert isinstance(s.source, Precomputed) and len(list((tmp_path / "cache").glob("*.npz"))) == 1
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-6) and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert np.isfinite([rows[-1]["eval/loss/preference"], rows[-1]["eval/kl"]]).all() and rows[1]["loss"] != rows[0]["loss"]


def test_no_reference_is_kept_for_one_that_moves():
    from jaxalign import build

    for name in ("tr_dpo", "simpo", "rrhf"):
        with pytest.raises(UserError, match="reference_cache is unknown"):
            build.stage(name, reference_cache="here")
