"""Judged steps, ratings, probabilities and picks: from rows to batches."""

import numpy as np
import pytest

from jaxalign.data import formats, judged, sources
from jaxalign.data.templates import CHATML, PLAIN
from jaxalign.data.tokenizers import Bytes
from jaxalign.types import UserError

ROWS = [
    {"prompt": "1+1+1=", "steps": ["1+1=2", "2+1=4"], "labels": [True, False]},
    {"prompt": "2+2=", "completions": ["4", "so 4", "done"], "labels": [1, None, 0.25]},  # TRL's name for steps
    {"prompt": "2+3=", "steps": ["6", "hm", "5\n"], "ratings": [-1, 0, 1]},
]


@pytest.mark.parametrize("template", [PLAIN, CHATML])
def test_labels_stand_at_the_last_token_of_each_judged_step(template):
    tokenizer = Bytes()
    source = judged.steps_source(ROWS, tokenizer, max_len=None, batch_size=4, seed=0, template=template)
    batch = next(sources.eval_batches(source))
    wants = [[("1+1=2\n", 1), ("2+1=4", 0)], [("4\n", 1), (None, None), ("done", 0.25)], [("6\n", 0), ("hm\n", 1), ("5\n", 1)]]
    for row, want in enumerate(wants):
        tokens, mask = batch.rows.tokens[row], batch.rows.mask[row]
        at = np.flatnonzero(mask)
        assert batch.label[row][at].tolist() == [y for _, y in want if y is not None]
        n = batch.rows.segments[row].sum()
        for t, (text, _) in zip(at, [w for w in want if w[0]]):
            if t < n - 1:
                assert tokenizer.decode(tokens[: t + 1].tolist()).endswith(text)
        assert at[-1] == n - 1  # the last step ends with the stop token, as the answer of a policy does
        assert not batch.label[row][mask == 0].any()
    assert not batch.rows.segments[3].any() and not batch.rows.mask[3].any()  # the batch is filled up with an empty row
    assert source.report()["judged_steps"] == 7


def test_the_answer_reads_the_same_in_steps_and_whole():
    tokenizer = Bytes()
    cut = next(sources.eval_batches(judged.steps_source(ROWS[:1], tokenizer, max_len=None, batch_size=1, seed=0)))
    whole = next(sources.eval_batches(sources.tokens_source([{"prompt": "1+1+1=", "completion": "1+1=2\n2+1=4"}], tokenizer, seq_len=cut.label.shape[1], batch_size=1, seed=0, packing="pad")))
    np.testing.assert_array_equal(cut.rows.tokens, whole.tokens)  # bytes: a tokenizer that merges over line breaks may differ there


@pytest.mark.parametrize(
    "row, why",
    [
        ({"prompt": "a", "steps": ["b"], "labels": [2]}, "between 0"),
        ({"prompt": "a", "steps": ["b"], "labels": [True, False]}, "same length"),
        ({"prompt": "a", "steps": ["b"], "ratings": [0.5]}, "PRM|ratings"),
        ({"prompt": "a", "steps": ["b", " "], "labels": [1, 1]}, "empty"),
        ({"prompt": "a", "completions": ["b", "c"], "best": 2}, "best"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 1.5}, "probability"),
    ],
)
def test_what_is_refused(row, why):
    with pytest.raises(UserError, match=why):
        formats.canonical(row)


def test_a_step_set_is_what_it_says():
    assert formats.detect(ROWS[0]) == formats.detect(ROWS[1]) == formats.detect(ROWS[2]) == "steps"
    assert formats.detect({"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1], "labels": [1, 1]}) == "ranking"
    with pytest.raises(UserError, match="ambiguous"):
        formats.detect({"prompt": "a", "chosen": "b", "rejected": "c", "steps": ["d"]})
    with pytest.raises(UserError, match="dropped"):
        judged.steps_source([{"prompt": "a", "steps": ["b"], "labels": [None]}], Bytes(), max_len=None, batch_size=1, seed=0)


def test_the_best_of_k():
    assert formats.canonical({"prompt": "a", "completions": ["b", "c", "d"], "best": 1}).ranks == (1, 0, 1)


def test_ratings_become_margins():
    """Llama 2, table 27."""
    said = ["significantly better", "Better", "slightly better", "negligibly better / unsure"]
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c", "rating": x} for i, x in enumerate(said)]
    of = lambda rows, **how: next(sources.eval_batches(sources.pairs_source(rows, Bytes(), max_len=None, batch_size=4, seed=0, **how)))
    np.testing.assert_allclose(of(rows, margins="small").margin, [1, 2 / 3, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(of(rows, margins="large").margin, [3, 2, 1, 0])
    assert of(rows).margin.tolist() == [0] * 4 and of(rows).probability is None
    with pytest.raises(UserError, match="record|row.*'fine'"):
        of([{**rows[0], "rating": "fine"}], margins="small")
    soft = of([{**rows[0], "probability": 0.7}, rows[1]])
    np.testing.assert_allclose(soft.probability, [0.7, 1, 1, 1], rtol=1e-6)  # the last two are empty


def test_rankings_taken_apart():
    """4 candidates, one tie: C(4,2) - 1 pairs, each better one first; a source reads them as it reads rows."""
    row = {"prompt": "a", "completions": ["w", "x", "y", "z"], "ranks": [1, 0, 1, 2]}
    pairs = list(judged.pairs_of([row]))
    assert sorted((p.chosen, p.rejected) for p in pairs) == [("w", "z"), ("x", "w"), ("x", "y"), ("x", "z"), ("y", "z")]
    assert sources.pairs_source(judged.pairs_of([row, row]), Bytes(), max_len=None, batch_size=1, seed=0).size == 10
