"""Round trips, composition, determinism; no text ever becomes a special token."""

import os
import random

import pytest
from hypothesis import given, settings, strategies as st

from jaxalign.data import tokenizers
from jaxalign.types import UserError

_random = random.Random(0)
_WORDS = ["".join(_random.choice(("ka", "to", "mi", "sun", "el")) for _ in range(n % 4 + 1)) for n in range(80)]
CORPUS = [" ".join(_random.choices(_WORDS, k=12)) + "\n\tend  of it, naïvely…" for _ in range(60)]
text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\u2581<|>s/")), max_size=40)


@pytest.fixture(scope="module", params=["bytes", "unigram", "bpe"])
def tok(request, tmp_path_factory):
    if request.param == "bytes":
        return tokenizers.Bytes()
    path = str(tmp_path_factory.mktemp("sp") / "tokenizer.model")
    specials = ["<|im_start|>", "<|im_end|>"]
    return tokenizers.train_sentencepiece(CORPUS, path, 330, request.param, specials=specials)


@settings(max_examples=150, deadline=None)
@given(a=text, b=text)
def test_exact_round_trip_and_composition(tok, a, b):
    assert tok.decode(tok.encode(a)) == a
    assert tok.decode(tok.encode(a) + tok.encode(b)) == a + b
    assert tok.encode_batch([a, b]) == [tok.encode(a), tok.encode(b)]
    assert all(0 <= i < tok.vocab_size for i in tok.encode(a + b))


def test_text_is_never_special(tok):
    special = {tok.bos_id, tok.eos_id, tok.pad_id, tok.special_id("<|im_end|>")}
    for t in ("<s>", "</s>", "<pad>", "<unk>", "<|im_end|>", "<0x41>"):
        ids = tok.encode(t)
        assert not special & set(ids) and tok.decode(ids) == t


def test_special_tokens_say_nothing_and_unknown_ids_do_not_raise(tok):
    ids = [tok.bos_id, *tok.encode("a b"), tok.eos_id, tok.pad_id]
    assert tok.decode(ids) == "a b"
    assert tok.decode([*tok.encode("a"), tok.vocab_size + 3]) == "a\ufffd"
    assert tok.decode([]) == "" and tok.encode("") == []


def test_save_and_load(tok, tmp_path):
    tok.save(str(tmp_path))
    again = tokenizers.load(str(tmp_path))
    assert again.fingerprint == tok.fingerprint and again.encode("katomi end") == tok.encode("katomi end")


def test_lone_surrogate(tok):
    with pytest.raises(UserError, match="surrogate at character 1"):
        tok.encode("a\ud800b")


def test_training_is_deterministic_wherever_it_is_written(tmp_path):
    a = tokenizers.train_sentencepiece(CORPUS, str(tmp_path / "a.model"), 320)
    b = tokenizers.train_sentencepiece(iter(CORPUS), str(tmp_path / "deep" / "b.model"), 320)
    assert a.fingerprint == b.fingerprint
    assert a.vocab_size == 320 and (a.pad_id, a.bos_id, a.eos_id) == (0, 2, 3)


def test_every_digit_is_its_own_token(tmp_path):
    t = tokenizers.train_sentencepiece(["12 12 12 1212 cats"] * 20, str(tmp_path / "a.model"), 268, "bpe")
    assert [t.decode([i]) for i in t.encode("1212")] == ["1", "2", "1", "2"]


def test_long_lines_are_learned_from(tmp_path):
    # 6,000 characters in one line: the trainer alone would skip it and then find no text at all.
    t = tokenizers.train_sentencepiece(["unicorn " * 750], str(tmp_path / "a.model"), 272, "bpe")
    assert len(t.encode("unicorn")) < 7


@pytest.mark.parametrize(
    "texts, size, match",
    [
        (["a b"], 20000, "more than the texts can fill; use at most"),
        (CORPUS, 100, "use at least"),
        ([], 300, "no text"),
        (["".join(chr(0x4E00 + i) for i in range(300))] * 2, 330, "does not hold the characters"),
    ],
)
def test_training_errors_name_the_remedy(texts, size, match, tmp_path):
    with pytest.raises(UserError, match=match):
        tokenizers.train_sentencepiece(texts, str(tmp_path / "a.model"), size, character_coverage=1.0)


def test_load_errors(tmp_path):
    bad = tmp_path / "x.model"
    bad.write_bytes(b"not a model")
    for spec, match in [(bad, "not a SentencePiece"), (tmp_path / "no.model", "No such file"), (tmp_path, "holds no")]:
        with pytest.raises(UserError, match=match):
            tokenizers.load(os.fspath(spec))
