"""Vocabularies of BERT (vocab.txt) and T5 (spiece.model): the ids that transformers gives, and there and back."""

import io
import json

import pytest
from hypothesis import given, settings, strategies as st

from jaxalign.data import tokenizers
from jaxalign.types import UserError

transformers = pytest.importorskip("transformers")
VOCAB = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat ##s sat hello wor ##ld cafe café Hello ! , . ' don t 你 好 [unused0] 12 ##3 a ##a".split()
TEXTS = ["Hello world!", "the cats sat, don't.", "CAFÉ café cafe\u0301", "你好世界", "unknown zebra", "123 12", " two  spaces\n", "[MASK] the [SEP]", "aaa [unused0]", ""]
WORDS = ["the cat sat on the mat", "hello world café", "translate English to German"] * 8


@pytest.fixture(params=[None, {"do_lower_case": False}, {"strip_accents": False}, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}])
def bert(request, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    if request.param is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(request.param | {"tokenizer_class": "BertTokenizer"}))
    return tmp_path, transformers.BertTokenizerFast.from_pretrained(str(tmp_path))


def check_bert(t, theirs):
    assert (t.bos_id, t.eos_id, t.pad_id, t.special_id("[MASK]"), t.names["mask_token"]) == (2, 3, 0, 4, "[MASK]")
    for text in TEXTS:
        if "[" not in text:
            assert [t.bos_id, *t.encode(text, True), t.eos_id] == theirs(text).input_ids, text
            assert t.decode(t.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        elif "unused" not in text:  # special tokens are a template's to write
            assert not {2, 3, 4} & set(t.encode(text))
            assert tokenizers.encode_with_specials(t, text) == theirs(text).input_ids[1:-1]


def test_wordpiece_as_transformers(bert, tmp_path):
    directory, theirs = bert
    t = tokenizers.load(str(directory))
    check_bert(t, theirs)
    t.save(str(tmp_path / "ours"))
    again = tokenizers.load(str(tmp_path / "ours"))
    assert (again.fingerprint, again.names) == (t.fingerprint, t.names)
    check_bert(t, transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours")))
    theirs.save_pretrained(str(tmp_path / "theirs"))  # a tokenizer.json, in which no file names an EOS
    check_bert(tokenizers.load(str(tmp_path / "theirs")), theirs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["the", "Cats", "zebra", "CAFÉ", "你好", "don't", "hello"]), min_size=2, max_size=6), st.sampled_from([" ", ", ", "!"]))
def test_wordpiece_composes_at_words(words, between):
    from jaxalign.data import fast

    t = fast.wordpiece("\n".join(VOCAB).encode())
    whole = between.join(words)
    at = len(words[0])
    assert t.encode(whole[:at]) + t.encode(whole[at:]) == t.encode(whole)


def test_wordpiece_of_others_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"vocab.txt: has no '\[UNK\]'"):
        tokenizers.load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(UserError, match="is BertJapaneseTokenizer's, which cuts words otherwise"):
        tokenizers.load(str(tmp_path))


@pytest.fixture(scope="module", params=["identity", "nmt_nfkc"])
def spiece(request):
    import sentencepiece

    m = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=m, vocab_size=30, model_type="unigram", normalization_rule_name=request.param,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return m.getvalue()


def check_t5(t, theirs, n):
    assert (t.bos_id, t.eos_id, t.pad_id, t.vocab_size) == (None, 1, 0, 30 + n) == (None, 1, 0, len(theirs))
    for i in {0, n // 2, n - 1} if n else ():
        assert t.special_id(f"<extra_id_{i}>") == theirs.convert_tokens_to_ids(f"<extra_id_{i}>") == 30 + n - 1 - i
    for text in ("the cat sat on", "hello world café", "German to English!", "a", "the"):
        assert [*t.encode(text, True), t.eos_id] == theirs(text).input_ids, text
        assert t.decode(t.encode(text)) in (text, text.replace("!", " ⁇ "), text.replace("!", ""))  # what is unknown says nothing, or this


@pytest.mark.parametrize("said, n", [({"tokenizer_class": "T5Tokenizer"}, 100), ({"tokenizer_class": "T5TokenizerFast", "extra_ids": 7}, 7), (None, 100)])
def test_t5_as_transformers(spiece, said, n, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece)
    if said:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    else:
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    theirs = transformers.T5Tokenizer.from_pretrained(str(tmp_path))
    t = tokenizers.load(str(tmp_path))
    assert isinstance(t, tokenizers.SentencePiece)
    check_t5(t, theirs, n)
    t.save(str(tmp_path / "ours"))
    again = tokenizers.load(str(tmp_path / "ours"))
    assert again.fingerprint == t.fingerprint
    check_t5(again, transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours")), n)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    (tmp_path / "theirs/spiece.model").write_bytes(spiece)
    json_one = tokenizers.load(str(tmp_path / "theirs"))  # the tokenizer.json is taken
    assert not isinstance(json_one, tokenizers.SentencePiece)
    check_t5(json_one, theirs, n)
    spec = json.loads((tmp_path / "theirs/tokenizer.json").read_text())
    spaces = [{"type": "Strip", "strip_left": False, "strip_right": True}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}]
    spec["normalizer"] = {"type": "Sequence", "normalizers": [*([spec["normalizer"]] if spec["normalizer"] else []), *spaces]}  # as converters write it
    (tmp_path / "theirs/tokenizer.json").write_text(json.dumps(spec))
    strips = tokenizers.load(str(tmp_path / "theirs"))
    check_t5(strips, theirs, n)
    assert strips.decode(strips.encode("the ") + strips.encode("cat")) == "the cat"
    assert json_one.encode("the cat") + json_one.encode(" sat\non") == json_one.encode("the cat sat on")


@pytest.mark.parametrize("name, kind", [("spiece.model", "AlbertTokenizer"), ("spiece.model", "PegasusTokenizerFast"), ("sentencepiece.bpe.model", "")])
def test_models_whose_ids_are_not_the_files_are_refused(spiece, name, kind, tmp_path):
    (tmp_path / name).write_bytes(spiece)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if kind else {}))
    with pytest.raises(UserError, match=f"{name}: .*other ids than this file.*save a tokenizer.json"):
        tokenizers.load(str(tmp_path))
