"""Reference log-probs once for all items: the numbers of the batches as drawn, kept under a name that says what they are of."""

import jax
import numpy as np
import pytest
import runs
import tiny
from jaxalign import shard
from jaxalign.data import sources, tokenizers
from jaxalign.models import decoder
from jaxalign.rl.reference import Precomputed, WithReference
from jaxalign.train.log import read_jsonl
from jaxalign.types import Pairs, SharedPairs

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
