"""Every token once, no overlap, in the documented order; segments, positions and masks by first principles."""

import time

import numpy as np
import pytest
import recordings
from hypothesis import given, settings, strategies as st

from jaxalign.data.packing import Packing, Ragged, fill, pack
from jaxalign.types import UserError

SFT = recordings.load("sft.npz", "packed_*")
lengths_ = st.lists(st.integers(0, 25), max_size=30)


def ragged(lengths):
    """Token ids that tell document and place: 100 * document + place."""
    ids = np.array([100 * d + t for d, n in enumerate(lengths) for t in range(n)], np.int32)
    return Ragged(ids, np.ones(len(ids), np.uint8), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@settings(max_examples=300, deadline=None)
@given(lengths=lengths_, seq_len=st.integers(1, 12), strategy=st.sampled_from(["bfd", "chop", "pad"]), split=st.booleans())
def test_every_token_once(lengths, seq_len, strategy, split):
    packing = pack(lengths, seq_len, strategy, split)
    batch = fill(ragged(lengths), packing, np.arange(len(packing)), pad_id=-7)
    want = [100 * d + t for d, n in enumerate(lengths) for t in range(n if split or strategy == "chop" else min(n, seq_len))]
    used = batch.segments > 0
    assert sorted(batch.tokens[used].tolist()) == want
    assert (batch.tokens[~used] == -7).all() and not batch.mask[~used].any() and not batch.positions[~used].any()
    assert [x.dtype for x in batch] == [np.int32, np.float32, np.int32, np.int32]
    for r in range(len(packing)):
        n = used[r].sum()
        assert n and used[r, :n].all()  # filled from the left, no hole, no empty row
        seg, pos, tok, mask = (x[r, :n] for x in (batch.segments, batch.positions, batch.tokens, batch.mask))
        assert seg[0] == 1 and set(np.diff(seg)) <= {0, 1}
        starts = np.flatnonzero(np.diff(seg, prepend=0))
        for s, e in zip(starts, [*starts[1:], n]):
            assert pos[s:e].tolist() == list(range(e - s))  # positions restart
            assert len(set(tok[s:e] // 100)) == 1  # one document a segment
            assert (np.diff(tok[s:e]) == 1).all()  # whole and in order
            assert mask[s:e].tolist() == [0.0] + [1.0] * (e - s - 1)  # the first token is never a target
    if strategy == "chop":
        assert batch.tokens[used].tolist() == want and len(packing) == -(-len(want) // seq_len)
    if strategy == "pad":
        assert batch.tokens[used].tolist() == want and (batch.segments <= 1).all()


def test_positions_of_trl():
    """Its collator's, of rows packed with given documents: they begin again with each."""
    lengths, counts, want = SFT["packed_seq_lengths_flat"], SFT["packed_row_counts"], SFT["packed_position_ids_flat"]
    rows = np.concatenate([[0], np.cumsum(counts)])
    of_row = [int(lengths[a:b].sum()) for a, b in zip(rows, rows[1:])]
    batch = fill(ragged(lengths.tolist()), Packing(max(of_row), np.arange(len(lengths)), 0 * lengths, lengths, rows), np.arange(len(counts)), pad_id=0)
    assert np.concatenate([p[:n] for p, n in zip(batch.positions, of_row)]).tolist() == want.tolist()
    assert [np.bincount(s)[1:].tolist() for s in batch.segments] == [lengths[a:b].tolist() for a, b in zip(rows, rows[1:])]


def naive_best_fit(lengths, seq_len):
    """Scan all rows for the fullest that fits; the one changed last among equals."""
    rows = []
    for d in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        fits = [r for r in rows if r["free"] >= lengths[d]]
        row = min(fits, key=lambda r: (r["free"], -r["changed"])) if fits else {"free": seq_len, "docs": []}
        if not fits:
            rows.append(row)
        row["free"] -= lengths[d]
        row["docs"].append(d)
        row["changed"] = sum(len(r["docs"]) for r in rows)
    return [r["docs"] for r in rows]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=40))
def test_best_fit_is_best_fit(lengths):
    packing = pack(lengths, 12, "bfd")
    rows = [packing.doc[a:b].tolist() for a, b in zip(packing.rows, packing.rows[1:])]
    assert rows == naive_best_fit(lengths, 12)


def test_by_hand():
    # 5 opens row 0, 4 row 1; 3 fills row 1 less (1 free) than ... row 0 has 3 free, row 1 has 4: 3 goes to row 0 (full).
    packing = pack([3, 5, 4, 2, 2], 8, "bfd")
    batch = fill(ragged([3, 5, 4, 2, 2]), packing, [0, 1], pad_id=0)
    assert batch.tokens.tolist() == [[100, 101, 102, 103, 104, 0, 1, 2], [200, 201, 202, 203, 300, 301, 400, 401]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 3, 3]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    assert packing.fill == 1.0
    chopped = fill(ragged([3, 5]), pack([3, 5], 4, "chop"), [1, 0], pad_id=0)
    assert chopped.tokens.tolist() == [[101, 102, 103, 104], [0, 1, 2, 100]]
    assert chopped.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]  # the cut document restarts


def test_empty_rows_and_any_order():
    docs, packing = ragged([2, 3]), pack([2, 3], 4, "pad")
    batch = fill(docs, packing, [-1, 1, -1, 0, 1], pad_id=9)
    assert batch.segments.sum(1).tolist() == [0, 3, 0, 2, 3] and (batch.tokens[0] == 9).all() and not batch.mask[2].any()
    empty = fill(docs, packing, [], pad_id=9)
    assert empty.tokens.shape == (0, 4)


def test_hundred_thousand_documents_in_near_linear_time():
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000)
    start = time.perf_counter()
    packing = pack(lengths, 2048, "bfd")
    assert time.perf_counter() - start < 5  # 0.3 s here; scanning rows would take minutes
    assert packing.fill > 0.99


def test_errors():
    with pytest.raises(UserError, match="use one of bfd, chop, pad"):
        pack([1], 4, "ffd")
    with pytest.raises(UserError, match="seq_len 0"):
        pack([1], 0)
