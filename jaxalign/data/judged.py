"""Answers that were judged -> batches: whole ones (`types.Labelled`), step by step (`types.Steps`); rankings taken apart into pairs."""

from __future__ import annotations

from typing import Callable, Iterable, Iterator

import numpy as np

from jaxalign.data.corpus import encode
from jaxalign.data.examples import Label, Preference, Ranking
from jaxalign.data.examples import Steps as Judged
from jaxalign.data.formats import canonical
from jaxalign.data.packing import fill, fill_spliced, splice
from jaxalign.data.rows import Rows, given
from jaxalign.data.sources import Offline, _offline, _padded, _prompt_length
from jaxalign.data.templates import PLAIN, Template
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import Labelled, Steps


def labelled_source(
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
    mismatched: bool = False,
) -> Offline:
    """`Labelled` [B,T], T = max_len (None: the longest of the set). A preference serves as two rows, labels 1 and 0.

    mismatched: each row also brings its prompt with the answer to another one, ended at max_len: that of the next prompt of the
    set, the last one's being the first. So the partner of an item is the same in every epoch, batch and process, and its
    reference log-prob can be computed once. (TRL shifts answers inside a batch, before shuffling.)

    An answer above max_len, or whose prompt is above max_prompt_len, is dropped and counted.
    """
    label: list[float] = []
    start: list[int] = []  # where the answer begins
    asked: list[int] = []  # which prompt it answers

    def admit(example, group, counts):
        begins = [_prompt_length(mask) for _, mask in group]
        if max_prompt_len is not None and max(begins) > max_prompt_len or max_len is not None and max(begins) >= max_len:
            return "prompt_too_long"
        if max_len is not None and max(len(ids) for ids, _ in group) > max_len:
            return "too_long"
        if not all(any(mask) for _, mask in group):
            return "no_target"
        label.extend((1.0, 0.0) if isinstance(example, Preference) else (example.label,))
        start.extend(begins)
        asked.extend(hash(tuple(ids[:n])) for (ids, _), n in zip(group, begins))
        return group

    corpus = encode(rows, tokenizer, template, (Label, Preference), admit, format, max_drop, vocab_size)
    corpus.examples.clear()
    length, layout = _padded(corpus.docs, max_len)
    labels, begin, one = np.array(label, np.float32), np.array(start), np.arange(len(label))
    other = _another_prompts(np.array(asked))
    crossed = splice(corpus.docs, one, begin, other, begin[other], max_len) if mismatched else None

    def make(item, draw):
        ref = np.zeros(len(item), np.float32)
        more = (fill_spliced(corpus.docs, crossed, item, tokenizer.pad_id), ref.copy()) if mismatched else ()
        return Labelled(fill(corpus.docs, layout, item, tokenizer.pad_id), np.where(item < 0, 0, labels[item]).astype(np.float32), ref, *more)

    options = dict(kind="labelled", max_len=max_len, max_prompt_len=max_prompt_len, mismatched=mismatched)
    return _offline(make, len(labels), corpus, options, batch_size, seed, shuffle, epochs, shard)


def _another_prompts(prompt: np.ndarray) -> np.ndarray:
    """i64[n]: for each item one that answers another prompt, in the next run of items with one prompt, at the same place in it."""
    at, n = np.arange(len(prompt)), len(prompt)
    start = np.flatnonzero(prompt != np.roll(prompt, 1))
    if not len(start):  # they all answer one prompt
        return (at + 1) % n
    run = np.searchsorted(start, at, side="right") - 1  # -1, the last, runs across the end
    length = (np.roll(start, -1) - start) % n
    after = (run + 1) % len(start)
    return (start[after] + (at - start[run]) % n % length[after]) % n


def steps_source(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    *,
    max_len: int | None,
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
    """`Steps` [B,T], T = max_len (None: the longest of the set). Each step is tokenised alone, so that its end is a token's end.

    An answer above max_len is dropped and counted: its last steps would be missing, and what they made of it.
    """
    label: list[float] = []
    begin: list[int] = [0]  # where each answer's labels begin

    def admit(example, group, counts):
        ids, step = group[0]
        if max_len is not None and len(ids) > max_len:
            return "too_long"
        end = {k: t for t, k in enumerate(step) if k}  # the last token of each step stays
        if len(end) < len(example.steps):
            return "empty_step"  # a vocabulary may normalise a text away
        judged = [(end[k], x) for k, x in enumerate(example.labels, 1) if x is not None]
        label.extend(x for _, x in judged)
        begin.append(len(label))
        counts["judged_steps"] += len(judged)
        mask = np.zeros(len(ids), int)
        mask[[t for t, _ in judged]] = 1
        return [(ids, mask.tolist())]

    corpus = encode(rows, tokenizer, template, (Judged,), admit, format, max_drop, vocab_size)
    _, layout = _padded(corpus.docs, max_len)
    labels, first = np.array(label, np.float32), np.array(begin)

    def make(item, draw):
        tokens = fill(corpus.docs, layout, item, tokenizer.pad_id)
        out = np.zeros(tokens.tokens.shape, np.float32)
        out[tokens.mask > 0] = np.concatenate([labels[:0], *(labels[first[i] : first[i + 1]] for i in item if i >= 0)])  # row by row, as they stand
        return Steps(tokens, out)

    options = dict(kind="steps", max_len=max_len)
    return _offline(make, len(first) - 1, corpus, options, batch_size, seed, shuffle, epochs, shard)


def pairs_of(rows: Rows | Iterable[dict]) -> Iterator[Preference]:
    """Every pair of every ranking that does not tie, as a row of its own, in order. A source over them shuffles the pairs of all
    prompts: what InstructGPT (2203.02155, section 3.5) warns of, since each answer of a prompt is then seen K - 1 times an epoch."""
    for record, where in given(rows):
        example = canonical(record, where)
        if not isinstance(example, Ranking):
            yield example
            continue
        ranked = list(zip(example.ranks, example.completions))
        yield from (Preference(example.prompt, a, b) for i, a in ranked for j, b in ranked if i < j and a != b)
