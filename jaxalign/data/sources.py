"""Rows -> batches, for ever: deterministic, resumable, split over hosts. Everything is read, tokenised and checked when
the source is made; after that nothing can go wrong.

The order of an epoch is a permutation that depends on (seed, epoch) alone. Draw g of a run is item g mod size of epoch
g // size, and batch b holds draws [b B, (b+1) B): batches run across epoch borders, nothing is lost or repeated, and
the number of hosts changes nothing but who reads which rows. So the state of a source is one number.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Callable, Iterable, Iterator

import numpy as np

from jaxalign.data.corpus import Corpus, encode
from jaxalign.data.examples import Chat, Completion, Preference, Prompt, Ranking, Text, margin_of
from jaxalign.data.packing import Ragged, fill, fill_shared, pack, share
from jaxalign.data.rows import Rows
from jaxalign.data.templates import PLAIN, Template
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import Pairs, Prompts, Rankings, SharedPairs, Tokens, UserError

TOO_LONG = ("truncate", "drop", "split", "error")


class Offline:
    """A source over a fixed set of items (examples, or packed rows). Built by the functions below.

    size         items per epoch
    fingerprint  SHA-256 of all that decides what the batches hold: files, tokenizer, template, options
    """

    def __init__(
        self,
        make: Callable[[np.ndarray, np.ndarray], Any],
        size: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        shard: tuple[int, int],
        parts: dict[str, Any],
        counts: dict[str, Any],
    ):
        index, count = shard
        if batch_size < 1 or not 0 <= index < count or batch_size % count:
            raise UserError(f"shard {index} of {count}: batch_size {batch_size} (global) must be a multiple of {count}")
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs {epochs}: use 1 or more, or None to go on for ever")
        self.size, self.batch_size, self.shard = size, batch_size, (index, count)
        self._make, self._seed, self._shuffle, self._epochs = make, seed, shuffle, epochs
        self._counts, self._batch, self._orders = counts, 0, {}
        options = dict(parts["options"], batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._parts = {**parts, "options": options}
        self.fingerprint = hashlib.sha256(json.dumps(self._parts, sort_keys=True).encode()).hexdigest()

    def next(self, state: Any = None) -> Any:
        """This host's rows of the next batch. After the last epoch (it ends in empty rows) StopIteration."""
        if self._epochs is not None and self._batch * self.batch_size >= self._epochs * self.size:
            raise StopIteration(f"all {self._epochs} epochs are done")
        batch = self._make(*self._draws(self._batch))
        self._batch += 1
        return batch

    @property
    def contents(self) -> str:
        """SHA-256 of all that decides what the items hold, in whatever order and batches they are drawn."""
        options = {k: v for k, v in self._parts["options"].items() if k not in ("batch_size", "seed", "shuffle")}
        return hashlib.sha256(json.dumps({**self._parts, "options": options}, sort_keys=True).encode()).hexdigest()

    @property
    def epoch(self) -> float:
        """Epochs drawn so far, a fraction."""
        return self._batch * self.batch_size / self.size

    def indices(self, batch: int) -> np.ndarray:
        """i64[rows]: the items in this host's rows of a batch (-1 = an empty row)."""
        return self._draws(batch)[0]

    def report(self) -> dict[str, Any]:
        """What went in and what was left out: rows, skipped, dropped (by reason), truncated, examples, items, tokens,
        targets, mean_length, max_length, fill (share of slots that hold a token)."""
        return dict(self._counts, items=self.size)

    def state_dict(self) -> dict:
        return {"batch": self._batch, **self._parts}

    def load_state_dict(self, d: dict, force: bool = False) -> None:
        """Goes to where ``d`` was taken. Raises UserError when the data would not go on as it was, naming what
        changed; ``force`` goes on nevertheless."""
        changed = [k for k in ("files", "tokenizer", "template") if d.get(k) != self._parts[k]]
        then, now = d.get("options", {}), self._parts["options"]
        changed += [f"{k} ({then.get(k)} then, {now.get(k)} now)" for k in {**then, **now} if then.get(k) != now.get(k)]
        if changed and not force:
            date = then.get("date")
            dated = f' (the date of a chat template: add "strftime_now": "{date}" to tokenizer.variables)' if date != now.get("date") and date else ""
            raise UserError(
                f"the data is not what the checkpoint was trained on: changed {', '.join(changed)}. Restore what it "
                f"was{dated}, or start a new run"
            )
        self._batch = int(d["batch"])

    def _draws(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Items and stable ids of this host's draws; -1 past the end."""
        share = self.batch_size // self.shard[1]
        draw = batch * self.batch_size + self.shard[0] * share + np.arange(share)
        epoch = draw // self.size
        item = np.empty(share, np.int64)
        for e in np.unique(epoch):
            item[epoch == e] = self._order(int(e))[draw[epoch == e] % self.size]
        past = draw >= (self._epochs or np.inf) * self.size
        return np.where(past, -1, item), np.where(past, -1, epoch * self.size + item)

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            epoch = 0
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            self._orders[epoch] = permutation(self._seed, epoch, self.size) if self._shuffle else np.arange(self.size)
        return self._orders[epoch]

    def _pass(self) -> Iterator[Any]:
        share = self.batch_size // self.shard[1]
        for b in range(-(-self.size // self.batch_size)):
            item = b * self.batch_size + self.shard[0] * share + np.arange(share)
            item[item >= self.size] = -1
            yield self._make(item, item)


def eval_batches(source: Offline) -> Iterator[Any]:
    """One ordered pass over a source's items, each exactly once; the last batch is filled up with empty rows (mask and
    segments 0). Leaves the source's own position alone."""
    return source._pass()


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """i64[size]. Sorts raw Philox words, whose stream numpy promises to keep: `Generator.permutation` it may change."""
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")


# -- the four sources -----------------------------------------------------------------------------------------------


def tokens_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    template: Template = PLAIN,
    packing: str = "bfd",
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    too_long: str = "truncate",
    format: str | Callable | None = None,
    max_drop: float = 0.5,
    vocab_size: int | None = None,
) -> Offline:
    """`Tokens` [B,T] for pretraining (texts: all but BOS trained) and SFT (completions and chats: answers trained).

    Documents are packed once, in file order; every epoch shuffles the rows. ``too_long``: documents above seq_len are
    cut ("truncate", counted), left out ("drop", counted), continued as a new segment ("split") or refused ("error");
    packing "chop" cuts all documents by nature and ignores it. ``vocab_size``: rows of the model's embedding.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"too_long {too_long!r}: use one of {', '.join(TOO_LONG)}")
    whole = packing == "chop" or too_long == "split"

    def admit(example, group, counts):
        ids, mask = group[0]
        if len(ids) > seq_len and not whole:
            if too_long == "error":
                raise UserError(f"{len(ids)} tokens, above seq_len={seq_len}; shorten it or choose too_long")
            if too_long == "drop":
                return "too_long"
            if not any(mask[:seq_len]):
                return "prompt_too_long" if any(mask) else "no_target"
            counts["truncated"] += 1
            ids, mask = ids[:seq_len], mask[:seq_len]
        return [(ids, mask)] if any(mask) else "no_target"

    corpus = encode(rows, tokenizer, template, (Text, Completion, Chat), admit, format, max_drop, vocab_size)
    layout = pack(corpus.docs.lengths, seq_len, packing, split=whole)
    corpus.counts["fill"] = round(layout.fill, 4)
    options = dict(kind="tokens", seq_len=seq_len, packing=packing, too_long=too_long)
    return _offline(
        lambda item, draw: fill(corpus.docs, layout, item, tokenizer.pad_id),
        len(layout), corpus, options, batch_size, seed, shuffle, epochs, shard,
    )  # fmt: skip


def pairs_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    max_len: int | None,
    batch_size: int,
    seed: int,
    max_prompt_len: int | None = None,
    template: Template = PLAIN,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    format: str | Callable | None = None,
    max_drop: float = 0.5,
    vocab_size: int | None = None,
    share_prompt: Callable[[int, int], bool] | None = None,
    margins: str = "",
) -> Offline:
    """`Pairs` [B,T], T = max_len (None: the longest of the set). References are 0 until `rl.reference` fills them.

    share_prompt: where it says yes to (the length of rows apart, of shared ones), `SharedPairs`: the prompt once and both
    completions behind it in one row. The report counts the tokens that this saves an epoch as shared_tokens.

    A pair is dropped and counted, as a pair, when either side is above max_len or its prompt above max_prompt_len.
    """

    def admit(example, group, counts):
        prompt = max(_prompt_length(mask) for _, mask in group)
        if max_prompt_len is not None and prompt > max_prompt_len or max_len is not None and prompt >= max_len:
            return "prompt_too_long"
        if max_len is not None and max(len(ids) for ids, _ in group) > max_len:
            return "too_long"
        if not all(any(mask) for _, mask in group) or group[0][0] == group[1][0]:
            return "identical" if group[0][0] == group[1][0] else "no_target"
        said.append((margin_of(example, margins), example.probability))
        return group

    said: list[tuple[float, float]] = []  # margin, probability
    corpus = encode(rows, tokenizer, template, (Preference,), admit, format, max_drop, vocab_size)
    length, layout = _padded(corpus.docs, max_len)
    margin, probability = np.array(said, np.float32).T
    corpus.counts |= {"soft_pairs": int((probability < 1).sum())} if (probability < 1).any() else {}
    corpus.examples.clear()
    one = 2 * np.arange(len(margin))
    together = share(corpus.docs, one, one + 1) if share_prompt else None
    if together is not None and not share_prompt(length, together.seq_len):
        together = None
    if together is not None:
        corpus.counts["shared_tokens"] = int(together.length[::3].sum())

    def make(item, draw):
        side = lambda s: fill(corpus.docs, layout, np.where(item < 0, -1, 2 * item + s), tokenizer.pad_id)
        ref = lambda: np.zeros(len(item), np.float32)
        rest = ref(), ref(), np.where(item < 0, 0, margin[item]).astype(np.float32)
        if together is not None:
            return SharedPairs(fill_shared(corpus.docs, together, item, tokenizer.pad_id), *rest)
        return Pairs(side(0), side(1), *rest, *([np.where(item < 0, 1, probability[item]).astype(np.float32)] if (probability < 1).any() else []))

    options = dict(kind="pairs", max_len=max_len, max_prompt_len=max_prompt_len, **({"margins": margins} if margins else {}))  # not how rows are laid out: that is the machine's choice, and pairs stay the same
    return _offline(make, len(margin), corpus, options, batch_size, seed, shuffle, epochs, shard)


def rankings_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    max_len: int | None,
    batch_size: int,
    seed: int,
    max_k: int | None = None,
    template: Template = PLAIN,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    format: str | Callable | None = None,
    max_drop: float = 0.5,
    vocab_size: int | None = None,
) -> Offline:
    """`Rankings` [B,K,T], K = the most candidates any prompt of the set has (at most max_k).

    Candidates above max_len, and those after the first max_k, are left out and counted; a prompt whose remaining
    candidates rank nothing is dropped and counted.
    """

    def admit(example, group, counts):
        fits = [i for i, (ids, mask) in enumerate(group) if any(mask) and (max_len is None or len(ids) <= max_len)]
        kept = fits[:max_k]
        if len({example.ranks[i] for i in kept}) < 2:
            return "too_long" if len(fits) < len(group) else "ties"
        counts["candidates_too_long"] += len(group) - len(fits)
        counts["candidates_above_max_k"] += len(fits) - len(kept)
        ranks.append([example.ranks[i] for i in kept])
        return [group[i] for i in kept]

    if max_k is not None and max_k < 2:
        raise UserError(f"max_k {max_k}: a ranking needs two candidates or more")
    ranks: list[list[int]] = []
    corpus = encode(rows, tokenizer, template, (Ranking,), admit, format, max_drop, vocab_size)
    corpus.examples.clear()
    length, layout = _padded(corpus.docs, max_len)
    k = max(map(len, ranks))
    first = np.cumsum([0] + [len(r) for r in ranks])
    rank = np.array([r + [0] * (k - len(r)) for r in ranks], np.int32)
    corpus.counts["max_k"] = k

    def make(item, draw):
        slot = np.arange(k) + first[item][:, None]
        valid = (slot < first[item + 1][:, None]) & (item >= 0)[:, None]
        flat = fill(corpus.docs, layout, np.where(valid, slot, -1).reshape(-1), tokenizer.pad_id)
        candidates = Tokens(*(x.reshape(len(item), k, length) for x in flat))
        return Rankings(candidates, np.where(valid, rank[item], 0).astype(np.int32), valid.astype(np.float32))

    options = dict(kind="rankings", max_len=max_len, max_k=max_k)
    return _offline(make, len(ranks), corpus, options, batch_size, seed, shuffle, epochs, shard)


def prompts_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int | None,
    batch_size: int,
    seed: int,
    template: Template = PLAIN,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    format: str | Callable | None = None,
    max_drop: float = 0.5,
    vocab_size: int | None = None,
) -> Offline:
    """`Prompts` [B,P], P = max_prompt_len (None: the longest of the set), padded on the right.

    Prompts of completions, preferences, rankings and chats (before their last answer) serve too. Longer prompts are
    dropped and counted: a prompt without its beginning or its end is another prompt. ``row`` is epoch * size + item,
    so every draw of a run has its own (-1 in empty rows); ``records`` are the source's dicts.
    """

    def admit(example, group, counts):
        length = len(group[0][0])
        if max_prompt_len is not None and length > max_prompt_len:
            return "too_long"
        return group if length else "empty"  # a vocabulary may normalise a text away

    corpus = encode(rows, tokenizer, template, (Prompt,), admit, format, max_drop, vocab_size)
    length, layout = _padded(corpus.docs, max_prompt_len)
    records = [e.record for e in corpus.examples]

    def make(item, draw):
        t = fill(corpus.docs, layout, item, tokenizer.pad_id)
        row = np.where(item < 0, -1, draw & 0x7FFFFFFF).astype(np.int32)
        return Prompts(t.tokens, t.segments, t.positions, row, tuple(records[i] if i >= 0 else {} for i in item))

    options = dict(kind="prompts", max_prompt_len=max_prompt_len)
    return _offline(make, len(records), corpus, options, batch_size, seed, shuffle, epochs, shard)


def _offline(make, size, corpus: Corpus, options, batch_size, seed, shuffle, epochs, shard) -> Offline:
    return Offline(
        make, size, batch_size=batch_size, seed=seed, shuffle=shuffle, epochs=epochs, shard=shard, counts=corpus.counts,
        parts=dict(corpus.parts, options=dict(corpus.parts["options"], **options)),
    )  # fmt: skip


def _padded(docs: Ragged, max_len: int | None):
    """(T, one document a row). Without a limit T is the longest, rounded up to 8: accelerators dislike odd widths."""
    length = max_len or -(-int(docs.lengths.max()) // 8) * 8
    return length, pack(docs.lengths, length, "pad")


def _prompt_length(mask: list[int]) -> int:
    return mask.index(1) if 1 in mask else len(mask)
