"""ROUGE, BLEU, chrF, TER and METEOR, each by the library that defines it: rouge_score, sacrebleu, nltk.

As rewards: functions (prompt, completion, record) -> float between 0 and 1 (TER: minus its errors), the best over record["reference"],
a text or several (or "references", "summary"). On sets of texts: `rouge`, `corpus_bleu`, `corpus_chrf`, `corpus_ter`.

METEOR needs WordNet, which nltk downloads and no package carries: without it, it is refused (its share of exact and stemmed matches
alone is another number). BERTScore is left out: it needs a published encoder, and what it measures with another is not BERTScore.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Sequence

from jaxalign.types import UserError

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _need(package: str):
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f'text metrics need {package}: pip install "jaxalign[metrics]"') from None


def _references(record: dict) -> list[str]:
    found = next((record[k] for k in ("reference", "references", "summary") if record.get(k) not in (None, [])), None)
    if found is None:
        raise ValueError(f"the record has no 'reference' to compare with; its fields are {sorted(record)}")
    return [found] if isinstance(found, str) else list(found)


class Rouge(NamedTuple):
    precision: float
    recall: float
    f1: float


@functools.cache
def _scorer(kinds: tuple[str, ...], stem: bool):
    _need("rouge_score")
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(kinds), use_stemmer=stem)


def rouge(text: str, reference: str, kinds: Sequence[str] = KINDS, *, stem: bool = False) -> dict[str, Rouge]:
    """Of one text. rougeLsum splits at newlines. `stem`: Porter's, as in most published tables of summaries."""
    return {k: Rouge(s.precision, s.recall, s.fmeasure) for k, s in _scorer(tuple(kinds), stem).score(reference, text).items()}


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU (Papineni et al. 2002) as sacrebleu's default, 13a and exp smoothing, 0 to 100. references[i]: those of texts[i]."""
    return _need("sacrebleu").corpus_bleu(list(texts), _streams(references)).score


def corpus_chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 (Popovic 2015), 0 to 100."""
    return _need("sacrebleu").corpus_chrf(list(texts), _streams(references)).score


def corpus_ter(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Translation edit rate (Snover et al. 2006): edits per 100 words of the reference; may be above 100."""
    return _need("sacrebleu").corpus_ter(list(texts), _streams(references)).score


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """sacrebleu's layout: the first reference of every text, then the second ... None where a text has fewer."""
    if not references or not all(references):
        raise ValueError("every text needs a reference to compare with, and there must be a text")
    return [[r[k] if k < len(r) else None for r in references] for k in range(max(map(len, references)))]


# -- rewards ----------------------------------------------------------------------------------------------------------


def _rouge(kind: str, completion: str, record: dict) -> float:
    return max(rouge(completion, r, (kind,), stem=bool(record.get("stem", False)))[kind].f1 for r in _references(record))


def rouge1(prompt: str, completion: str, record: dict) -> float:
    """F1 of shared words."""
    return _rouge("rouge1", completion, record)


def rouge2(prompt: str, completion: str, record: dict) -> float:
    """F1 of shared pairs of words."""
    return _rouge("rouge2", completion, record)


def rouge_l(prompt: str, completion: str, record: dict) -> float:
    """F1 of the longest common subsequence."""
    return _rouge("rougeL", completion, record)


def rouge_lsum(prompt: str, completion: str, record: dict) -> float:
    """`rouge_l` line by line."""
    return _rouge("rougeLsum", completion, record)


def bleu(prompt: str, completion: str, record: dict) -> float:
    """sacrebleu's sentence BLEU over all references, of the orders that the text has, / 100."""
    return _need("sacrebleu").sentence_bleu(completion, _references(record)).score / 100


def chrf(prompt: str, completion: str, record: dict) -> float:
    return _need("sacrebleu").sentence_chrf(completion, _references(record)).score / 100


def ter(prompt: str, completion: str, record: dict) -> float:
    """-TER / 100: 0 is no edit, -1 as many as the reference has words."""
    return -_need("sacrebleu").sentence_ter(completion, _references(record)).score / 100


def meteor(prompt: str, completion: str, record: dict, *, wordnet=None) -> float:
    """METEOR (Banerjee and Lavie 2005) as nltk has it, of words between blanks, lower case. Raises UserError without WordNet."""
    _need("nltk")
    from nltk.translate.meteor_score import meteor_score

    if wordnet is None:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError:
            raise UserError('METEOR needs WordNet: python -c "import nltk; nltk.download(\'wordnet\')" where there is a network, and NLTK_DATA set to a copy where there is none') from None
    return float(meteor_score([r.split() for r in _references(record)], completion.split(), wordnet=wordnet))
