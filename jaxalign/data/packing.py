"""Documents -> rows of T tokens.

    bfd   best-fit decreasing: documents by length, longest first (equal ones in order), each into the fullest row that
          has room. Close to full rows, no document cut. (Ding et al. 2404.10830)
    chop  documents in order as one stream, cut every T tokens. No padding but in the last row; a cut document goes on
          as a new segment whose positions restart.
    pad   one document a row, in order.

Rows are in order of creation, documents within a row in order of placement.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Sequence

import numpy as np

from jaxalign.types import BRANCH, Tokens, UserError

STRATEGIES = ("bfd", "chop", "pad")


class Ragged(NamedTuple):
    """Sequences of different lengths, end to end: sequence i is ``ids[offsets[i]:offsets[i+1]]``."""

    ids: np.ndarray  # i32[total]
    mask: np.ndarray  # u8[total]; 1 = a target
    offsets: np.ndarray  # i64[n+1]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which piece of which document lies where. Row r holds pieces ``rows[r]:rows[r+1]``, from the left."""

    seq_len: int
    doc: np.ndarray  # i64[pieces]
    start: np.ndarray  # i64[pieces]; first token of the piece in its document
    length: np.ndarray  # i64[pieces]
    rows: np.ndarray  # i64[rows+1]

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def fill(self) -> float:
        """Share of the token slots that hold a token."""
        return float(self.length.sum() / max(len(self) * self.seq_len, 1))


def pack(lengths: Sequence[int], seq_len: int, strategy: str = "bfd", split: bool = False) -> Packing:
    """Lays documents of the given lengths into rows of ``seq_len``.

    Documents above seq_len are truncated (their head is kept) under bfd and pad, or with ``split`` become several
    pieces, each a segment of its own; chop always splits. Empty documents take no room.
    Raises UserError for a strategy or length that makes no sense.
    """
    lengths = np.asarray(lengths, np.int64)
    if strategy not in STRATEGIES:
        raise UserError(f"packing {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if seq_len < 1:
        raise UserError(f"seq_len {seq_len}: must be at least 1")
    if strategy == "chop":
        return _chop(lengths, seq_len)
    doc = np.flatnonzero(lengths)
    start = np.zeros(len(doc), np.int64)
    length = np.minimum(lengths[doc], seq_len)
    if split:
        pieces = -(-lengths[doc] // seq_len)
        doc = np.repeat(doc, pieces)
        start = _within(pieces) * seq_len
        length = np.minimum(lengths[doc] - start, seq_len)
    if strategy == "pad":
        return Packing(seq_len, doc, start, length, np.arange(len(doc) + 1))
    row = _best_fit(length, seq_len)
    order = np.lexsort((np.arange(len(doc)), -length, row))
    rows = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
    return Packing(seq_len, doc[order], start[order], length[order], rows)


def fill(docs: Ragged, packing: Packing, rows: Sequence[int], pad_id: int) -> Tokens:
    """The given rows as arrays [len(rows), T]; row -1 is empty (segments and mask 0). O(tokens), no loop."""
    cell, source, number, position = _cells(docs, packing, rows)
    out = Tokens(np.full((len(rows), packing.seq_len), pad_id, np.int32), *(np.zeros((len(rows), packing.seq_len), t) for t in (np.float32, np.int32, np.int32)))
    out.tokens.reshape(-1)[cell] = docs.ids[source]
    out.mask.reshape(-1)[cell] = docs.mask[source] * (position > 0)  # a segment's first token is never a target
    out.segments.reshape(-1)[cell] = number + 1
    out.positions.reshape(-1)[cell] = position
    return out


def share(docs: Ragged, chosen: np.ndarray, rejected: np.ndarray, seq_len: int | None = None) -> Packing:
    """Pairs of documents, one pair a row: what both begin with and neither trains on, then the rest of the one and of the
    other. seq_len None: the longest such row, rounded up to 8."""
    first = [docs.offsets[x] for x in (chosen, rejected)]
    least = np.minimum(docs.lengths[chosen], docs.lengths[rejected])
    common = np.zeros(len(chosen), np.int64)
    for i, (a, b, n) in enumerate(zip(*first, least)):
        a, b = slice(a, a + n), slice(b, b + n)
        apart = (docs.ids[a] != docs.ids[b]) | (docs.mask[a] > 0) | (docs.mask[b] > 0)
        common[i] = np.argmax(apart) if apart.any() else n
    length = np.stack([common, docs.lengths[chosen] - common, docs.lengths[rejected] - common], 1)
    start = np.stack([0 * common, common, common], 1)
    longest = seq_len or -(-int(length.sum(1).max(initial=1)) // 8) * 8
    return Packing(longest, np.stack([chosen, chosen, rejected], 1).reshape(-1), start.reshape(-1), length.reshape(-1), 3 * np.arange(len(chosen) + 1))


def fill_shared(docs: Ragged, packing: Packing, rows: Sequence[int], pad_id: int) -> Tokens:
    """Rows that `share` laid out: a trunk and its branches (segments u32), whose positions go on from the trunk's end."""
    cell, source, number, position = _cells(docs, packing, rows)
    shape = (len(rows), packing.seq_len)
    out = Tokens(np.full(shape, pad_id, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.uint32), np.zeros(shape, np.int32))
    at = source - docs.offsets[np.searchsorted(docs.offsets, source, side="right") - 1]  # in its document
    out.tokens.reshape(-1)[cell] = docs.ids[source]
    out.mask.reshape(-1)[cell] = docs.mask[source] * (at > 0)
    out.segments.reshape(-1)[cell] = 1 + (number << BRANCH)
    out.positions.reshape(-1)[cell] = at
    return out


def splice(docs: Ragged, left: np.ndarray, cut: np.ndarray, right: np.ndarray, skip: np.ndarray, seq_len: int | None = None) -> Packing:
    """One text a row: the first `cut` tokens of document `left`, then document `right` from its token `skip` on, ended at seq_len
    (None: the longest such row, rounded up to 8)."""
    rest = docs.lengths[right] - skip
    longest = seq_len or -(-int((cut + rest).max(initial=1)) // 8) * 8
    length = np.stack([cut, np.minimum(rest, longest - cut)], 1)
    start = np.stack([0 * cut, skip], 1)
    return Packing(longest, np.stack([left, right], 1).reshape(-1), start.reshape(-1), length.reshape(-1), 2 * np.arange(len(left) + 1))


def fill_spliced(docs: Ragged, packing: Packing, rows: Sequence[int], pad_id: int) -> Tokens:
    """Rows that `splice` laid out: both pieces are one segment, and positions run through."""
    out = fill_shared(docs, packing, rows, pad_id)
    segments = (out.segments > 0).astype(np.int32)
    return out._replace(segments=segments, positions=np.arange(packing.seq_len, dtype=np.int32) * segments)


def _cells(docs: Ragged, packing: Packing, rows: Sequence[int]):
    """Of every token of the rows: its slot among all of them, its place in docs, the number of its piece in the row, and its
    place in the piece."""
    rows = np.asarray(rows, np.int64)
    first = np.where(rows < 0, 0, packing.rows[rows])
    count = np.where(rows < 0, 0, packing.rows[rows + 1] - first)  # row -1 reads rows[0]: harmless
    piece = np.repeat(first, count) + _within(count)
    length = packing.length[piece]
    edge = np.cumsum(length) - length  # where each piece starts in the stream of all of them
    at_row = np.repeat(np.arange(len(rows)), count)
    row_edge = np.concatenate([[0], np.cumsum(length)])[np.cumsum(count) - count]
    position = _within(length)
    cell = np.repeat(at_row * packing.seq_len + edge - row_edge[at_row], length) + position
    source = np.repeat(docs.offsets[packing.doc[piece]] + packing.start[piece], length) + position
    return cell, source, np.repeat(_within(count), length), position


def _within(counts: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _chop(lengths: np.ndarray, seq_len: int) -> Packing:
    """Pieces are what lies between two neighbouring borders, of a document or of a row."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.unique(np.concatenate([ends - lengths, np.arange(0, total, seq_len), [total]]))
    start, length = borders[:-1], np.diff(borders)
    doc = np.searchsorted(ends, start, side="right")
    rows = np.searchsorted(start, np.arange(0, total + seq_len, seq_len))
    return Packing(seq_len, doc, start - (ends - lengths)[doc], length, rows)


def _best_fit(length: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece. The bits of one integer say which free spaces exist, so that the least one that suffices is
    found by a shift: near-linear time, where scanning the rows would be quadratic."""
    row = np.empty(len(length), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by free space
    spaces = rows = 0
    for i in np.argsort(-length, kind="stable").tolist():
        n = int(length[i])
        room = spaces >> n
        if room:
            space = n + (room & -room).bit_length() - 1
            r = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, r = seq_len, rows
            rows += 1
        row[i] = r
        if left := space - n:
            open_rows[left].append(r)
            spaces |= 1 << left
    return row
