"""Rows -> one flat array of checked tokens, with an account of every row that did not make it."""

from __future__ import annotations

import array
import collections
import dataclasses
import hashlib
from typing import Any, Callable, Iterable

import numpy as np

from jaxalign.data.examples import Chat, Completion, Example, Label, Preference, Prompt, Ranking, Steps, Text, Trajectory, Unusable
from jaxalign.data.formats import canonical
from jaxalign.data.packing import Ragged
from jaxalign.data.rows import Rows, given
from jaxalign.data.templates import Template, encode_sequences, segments
from jaxalign.data.tokenizers import Tokenizer
from jaxalign.types import UserError

_CHUNK = 1024  # examples tokenised at once: enough to keep the tokenizer's threads busy, little enough to hold


@dataclasses.dataclass
class Corpus:
    docs: Ragged  # the sequences of the first example, then of the second ...
    examples: list[Example]  # only of the kinds whose sources need more than tokens
    counts: dict[str, Any]  # see sources.Offline.report
    parts: dict[str, Any]  # what a fingerprint is made of


def encode(
    rows: Rows | Iterable[dict],
    tokenizer: Tokenizer,
    template: Template,
    kinds: tuple[type, ...],
    admit: Callable[[Example, list, collections.Counter], list | str],
    format: str | Callable | None,
    max_drop: float,
    vocab_size: int | None,
) -> Corpus:
    """Reads all rows, keeps the examples of the given kinds that ``admit`` lets in.

    admit(example, [(ids, mask), ...], counts) -> the sequences to keep, or the reason to drop the example.

    Raises UserError, besides what reading raises, when more than ``max_drop`` of the examples were dropped, when no
    token is left to train on, and when an id is not in the vocabulary.
    """
    rows = given(rows)
    dropped, counts = collections.Counter(), collections.Counter()
    ids, mask, lengths, examples = array.array("i"), bytearray(), array.array("q"), []

    def flush(chunk):
        written = []
        for example, where, record in chunk:
            try:
                with _at(where):
                    written.append((example, where, segments(example, template)))
            except UserError as e:  # such as a system turn, under a template that has none
                rows.refuse(e, record)
        encoded = iter(encode_sequences([s for *_, group in written for s in group], tokenizer))
        for example, where, group in written:
            with _at(where):
                kept = admit(example, [next(encoded) for _ in group], counts)
            if isinstance(kept, str):
                dropped[kept] += 1
                continue
            counts["examples"] += 1
            for tokens, targets in kept:
                ids.extend(tokens)
                mask.extend(targets)
                lengths.append(len(tokens))
            if Preference in kinds or Prompt in kinds:
                examples.append(example)

    chunk: list[tuple[Example, str, Any]] = []
    for record, where in rows:
        try:
            chunk.append((_as(kinds, canonical(record, where, format), record, where), where, record))
        except Unusable as e:
            dropped[e.reason] += 1
        except UserError as e:
            rows.refuse(e, record)
        if len(chunk) == _CHUNK:
            flush(chunk)
            chunk = []
    flush(chunk)
    rows.settle()  # again: rows that a template refused were not known when reading ended

    total = counts["examples"] + dropped.total()
    if not counts["examples"] or dropped.total() > max_drop * total:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "none given"
        raise UserError(
            f"{dropped.total()} of {total} examples were dropped ({why}), more than max_drop={max_drop:g} allows; "
            "raise the length limits, mend the data, or raise max_drop"
        )
    flat = Ragged(
        np.array(ids, np.int32),
        np.frombuffer(mask, np.uint8),
        np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]),
    )
    _check_ids(flat.ids, tokenizer, vocab_size)
    targets = int(flat.mask.sum())
    if not targets and Prompt not in kinds:
        raise UserError("no token of the whole set is a target, so training would change nothing; check the template")
    account = {
        **rows.counts,
        "dropped": dict(dropped),
        "truncated": 0,
        **counts,
        "tokens": len(flat.ids),
        "targets": targets,
        "mean_length": round(float(flat.lengths.mean()), 2),
        "max_length": int(flat.lengths.max()),
    }
    name = getattr(format, "__qualname__", type(format).__qualname__) if callable(format) else format
    parts = {
        "files": rows.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "template": hashlib.sha256(repr(template).encode()).hexdigest(),
        "options": {"format": name, **({"date": date} if (date := getattr(template, "date", None)) else {})},
    }
    return Corpus(flat, examples, account, parts)


class _at:
    """Puts file and line before an error that does not know them."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if isinstance(error, UserError) and not str(error).startswith(self.where):
            raise UserError(f"{self.where}: {error}") from None


def _as(kinds: tuple[type, ...], example: Example, record: Any, where: str) -> Example:
    """The example, as one of the kinds a source takes."""
    if isinstance(example, kinds):
        return example
    if isinstance(example, Trajectory):  # what it earned is nothing to this source
        return _as(kinds, example.said, record, where)
    if Prompt in kinds:
        record = record if isinstance(record, dict) else {}
        if isinstance(example, (Completion, Preference, Ranking, Label, Steps)):
            return Prompt(example.prompt, record)
        if isinstance(example, Chat):
            return Prompt(example.messages[:-1], record)
    if Ranking in kinds and isinstance(example, Preference):
        if example.probability < 1:
            raise UserError(f"{where}: 'probability' {example.probability:g}: a ranking is certain; train reward_pairs, which reads it, or leave it out")
        return Ranking(example.prompt, (example.chosen, example.rejected), (0, 1))
    if Label in kinds and isinstance(example, (Completion, Chat)) and isinstance(record, dict):
        return canonical(record, where, "label")  # says what is missing
    if Text in kinds and isinstance(example, Label):
        raise UserError(
            f"{where}: 'label' makes this a good or bad answer, as KTO reads them, and plain training would learn from the bad "
            'ones too; filter them and say format="completion" or "chat"'
        )
    wanted = " or ".join(k.__name__.lower() for k in kinds)
    kind = type(example).__name__.lower()
    raise UserError(f"{where}: is a {kind}, but this source takes {wanted} rows; use another source or file")


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """A gather clamps a bad id without a word and cross-entropy makes NaN of it: so it is caught here."""
    least, most = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    limit = tokenizer.vocab_size if vocab_size is None else min(vocab_size, tokenizer.vocab_size)
    if least < 0 or most >= limit:
        bad = least if least < 0 else most
        raise UserError(
            f"token id {bad} is outside the vocabulary of {limit} (tokenizer {tokenizer.vocab_size}, model "
            f"{vocab_size or 'not given'}); use the tokenizer the model was made for"
        )
