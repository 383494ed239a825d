"""Vocabularies of the Hub: the ids other programs give, text that stays text, files that go there and back."""

import base64
import gzip
import json
import os
import pathlib
import pickle
import tracemalloc

import pytest
import tokenizers as hf
from hypothesis import given, settings, strategies as st

from jaxalign.data import fast, hub, tokenizers
from jaxalign.types import UserError

DATA = pathlib.Path(os.environ.get("JAXALIGN_DATA") or pathlib.Path(__file__).parents[3] / "shared" / "data")
here = pytest.mark.skipif(not DATA.is_dir(), reason="public data files not here")
WORDS = ["the cat sat", " on the mat", "don't 123 stop", "naïve café", "x = y**2\n\n    return", "日本語 text"] * 8
CHATML = ["<|im_start|>", "<|im_end|>"]
text = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\u2581<|>s/at0")), max_size=30)
text = st.one_of(text, st.sampled_from(["</s>", "<unk>", "<0x41>", "a<|im_end|>b", "<｜User｜>", " </s> "]))


def byte_level() -> bytes:
    t = hf.Tokenizer(hf.models.BPE())
    t.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(WORDS, hf.trainers.BpeTrainer(vocab_size=330, special_tokens=["</s>", *CHATML], initial_alphabet=alphabet, show_progress=False))
    t.add_tokens([hf.AddedToken("<think>", special=False), hf.AddedToken("<｜User｜>", special=False)])
    return t.to_str().encode()


def llama(kind: str) -> bytes:
    """As Llama 2's and Mistral's: a space before every text, bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>", *CHATML]
    letters = sorted({c for w in WORDS for c in w.replace(" ", "\u2581")})
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), *letters, "\u2581the", "\u2581t", "th", "at"]
    vocab = {p: i for i, p in enumerate(pieces)}
    if kind == "unigram":
        t = hf.Tokenizer(hf.models.Unigram([(p, -float(i) / 9) for p, i in vocab.items()], unk_id=0, byte_fallback=True))
        t.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        back = [hf.decoders.ByteFallback(), hf.decoders.Metaspace(prepend_scheme="always", split=False)]
    else:
        merges = [("t", "h"), ("\u2581", "t"), ("a", "t")]
        t = hf.Tokenizer(hf.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        t.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")])
        back = [hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse(), hf.decoders.Strip(" ", 1, 0)]
    t.decoder = hf.decoders.Sequence(back)
    t.post_processor = hf.processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 1)])
    t.add_special_tokens([hf.AddedToken(s, special=True, normalized=False) for s in special])
    return t.to_str().encode()


MADE = {"byte": byte_level, "bpe": lambda: llama("bpe"), "unigram": lambda: llama("unigram")}


@pytest.fixture(scope="module", params=MADE)
def data(request):
    return MADE[request.param]()


@pytest.fixture(scope="module")
def tok(data):
    return fast.Fast(data)


@settings(max_examples=150, deadline=None)
@given(a=text, b=text)
def test_exact_round_trip_and_composition(tok, a, b):
    # U+2581 inside a run of unknown text has no spelling of its own in a Unigram of HF's; bytes give it one.
    assert tok.decode(tok.encode(a)) == a
    assert tok.decode(tok.encode(a) + tok.encode(b)) == a + b
    assert tok.decode([tok.bos_id or tok.eos_id, *tok.encode(a, True)]) == a
    assert tok.encode_batch([a, b], [True, False]) == [tok.encode(a, True), tok.encode(b)]
    assert all(0 <= i < tok.vocab_size for i in tok.encode(a + b))


@settings(max_examples=150, deadline=None)
@given(a=text)
def test_text_is_never_special(tok, a):
    assert not set(tok.specials.values()) & set(tok.encode(a))


def test_the_same_ids_as_the_package(data, tok):
    """Where a text opens a document and holds nothing special, ours are the vocabulary's own ids."""
    own = hf.Tokenizer.from_str(data.decode())
    for t in WORDS[:6] + ["the", "at the"]:
        if not t.startswith(" "):
            assert tok.encode(t, True) == own.encode(t, add_special_tokens=False).ids
    parsed = tokenizers.encode_with_specials(tok, "<|im_start|>the<|im_end|>")
    assert parsed == [tok.special_id("<|im_start|>"), *tok.encode("the"), tok.special_id("<|im_end|>")]
    assert tokenizers.decode_with_specials(tok, parsed) == "<|im_start|>the<|im_end|>"
    assert tok.decode([*parsed, tok.vocab_size + 5]) == "the\ufffd"


def test_added_tokens_that_are_no_special_ones_are_words():
    t = fast.Fast(byte_level())
    think = hf.Tokenizer.from_str(byte_level().decode()).token_to_id("<think>")
    assert t.encode("a<think>b").count(think) == 1 and t.decode([think]) == "<think>"
    assert "<｜User｜>" in t.specials and "<think>" not in t.specials  # its shape says what it is for


def test_bos_is_the_vocabularys_own_idea(tok, data):
    assert (tok.bos_id is None) == ("TemplateProcessing" not in data.decode())
    assert tok.pad_id == tok.eos_id == tok.special_id("</s>")
    said = hub.About(names={"bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}, add_bos=True)
    other = fast.Fast(data, said)
    assert other.bos_id == other.special_id("<|im_start|>") and other.pad_id == other.special_id("<|im_end|>")
    assert fast.Fast(data, hub.About(add_bos=False)).bos_id is None
    assert other.fingerprint != tok.fingerprint == fast.Fast(data).fingerprint


def test_workers_get_the_same(tok):
    again = pickle.loads(pickle.dumps(tok))
    assert again.fingerprint == tok.fingerprint and again.encode("the cat") == tok.encode("the cat")


def test_there_and_back(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tok = tok.carrying(hub.with_template(tok.beside, template))
    tok.save(str(tmp_path))
    again = tokenizers.load(str(tmp_path))
    assert (again.fingerprint, again.chat_template, again.names) == (tok.fingerprint, template, tok.names)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = [tok.bos_id] * (tok.bos_id is not None) + tok.encode("the cat sat", True)
    assert theirs("the cat sat").input_ids == ours
    assert theirs.eos_token_id == tok.eos_id and theirs.chat_template == template
    again.save(str(tmp_path / "b"))
    for f in os.listdir(tmp_path / "b"):
        assert (tmp_path / "b" / f).read_bytes() == (tmp_path / f).read_bytes(), f


def test_added_is_explicit_and_goes_last(tok, tmp_path):
    more = tok.added(["<|tool|>", "<|im_end|>"])
    assert more.vocab_size == tok.vocab_size + 1 and more.special_id("<|tool|>") == tok.vocab_size
    more.save(str(tmp_path))
    again = tokenizers.load(str(tmp_path))
    assert again.special_id("<|tool|>") == tok.vocab_size and again.decode(again.encode("<|tool|>")) == "<|tool|>"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_for_programs_that_read_only_json(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    t = tokenizers.train_sentencepiece(WORDS, str(tmp_path / "x.model"), 296, kind, specials=CHATML)
    t = t.carrying(hub.with_template(t.beside, "{{ messages }}"))
    t.save(str(tmp_path / "d"))
    assert tokenizers.differences(str(tmp_path / "d")) == []
    again = tokenizers.load(str(tmp_path / "d"))
    assert isinstance(again, tokenizers.SentencePiece) and again.fingerprint == t.fingerprint and again.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "d"))
    for s in WORDS[:6]:
        assert theirs(s).input_ids == [t.bos_id, *t.encode(s)] and theirs.decode(t.encode(s)) == s
    more = again.added(["<|tool|>"])
    more.save(str(tmp_path / "e"))
    back = tokenizers.load(str(tmp_path / "e"))
    assert back.special_id("<|tool|>") == t.vocab_size == 296 and back.encode("the cat") == t.encode("the cat")
    assert pickle.loads(pickle.dumps(more)).special_id("<|tool|>") == 296
    # One that was changed on one side only is told.
    spec = json.loads((tmp_path / "d/tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "d/tokenizer.json").write_text(json.dumps(spec))
    assert any("Hello" in d.text for d in tokenizers.differences(str(tmp_path / "d")))


def test_gpt2_files_are_the_same_vocabulary(tmp_path):
    spec = json.loads(byte_level())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    t = tokenizers.load(str(tmp_path))
    whole = fast.Fast(byte_level())
    assert all(t.encode(w) == whole.encode(w) for w in WORDS) and t.special_id("<|im_end|>") == whole.special_id("<|im_end|>")
    (tmp_path / "merges.txt").write_text("q zz\n")
    with pytest.raises(UserError, match="merge 1, 'q zz', is not of this vocabulary"):
        tokenizers.load(str(tmp_path))


def test_tiktoken(tmp_path):
    package = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)}
    for w in (b"th", b" t", b"the", b" the", b"at", b"cat", b" cat", b"12", b"\xe6\x97", b"\n\n", b"whole words"):
        ranks[w] = len(ranks)  # the last one no merge reaches
    special = {"<|endoftext|>": len(ranks)}
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items()))
    theirs = package.Encoding("x", pat_str=fast.TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    ours = fast.tiktoken(str(path), special)

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(text, st.sampled_from(WORDS), st.text("the cat12\n日", max_size=20)))
    def same(t):
        assert ours.encode(t) == theirs.encode(t, disallowed_special=()) and ours.decode(ours.encode(t)) == t

    same()
    assert tokenizers.encode_with_specials(ours, "the<|endoftext|>") == theirs.encode("the<|endoftext|>", allowed_special="all")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in special.items()}}))
    assert tokenizers.load(str(tmp_path)).fingerprint == fast.tiktoken(str(path), about=hub.about(str(tmp_path))).fingerprint
    path.write_bytes(b"abc\n")
    with pytest.raises(UserError, match="x.tiktoken:1: not 'base64 rank'"):
        fast.tiktoken(str(path))


def test_bad_files_are_refused_in_one_line(tmp_path):
    good = byte_level()
    cases = [
        ({"tokenizer.json": good[:500]}, "not a tokenizer.json"),
        ({"tokenizer.json": b"[]"}, "not a tokenizer.json"),
        ({"tokenizer.json": b'{"model": {"type": "Nothing"}}'}, "not a tokenizer.json that this version"),
        ({"tokenizer.json": good.replace(b"</s>", b"<eot>").replace(b"<|im_end|>", b"<|im_stop|>")}, "nothing says which token is EOS"),
        ({"tokenizer.json": good, "tokenizer_config.json": b"{"}, "tokenizer_config.json: no JSON"),
        ({"tokenizer.json": good, "tokenizer_config.json": b"[1]"}, "must be an object"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [{"id": 0}]}'}, "not a tokenizer.json .KeyError"),
        ({"tokenizer.json": good, "tokenizer_config.json": b'{"eos_token": "<eot>"}'}, "has no '<eot>', which the files beside it name as EOS"),
        ({"tokenizer.json": good, "added_tokens.json": b'{"<x>": 9000}'}, "should have id 9000"),
        ({"tokenizer.json.gz": gzip.compress(good)[:300]}, "tokenizer.json.gz"),
        ({"tokenizer.json": good, "chat_template.jinja": b"\xff"}, "not UTF-8"),
        ({"vocab.json": b"{}"}, "holds no tokenizer.model, tokenizer.json"),
        ({"tokenizer.model": b"none"}, "not a SentencePiece"),
    ]
    for n, (files, match) in enumerate(cases):
        d = tmp_path / str(n)
        d.mkdir()
        for name, data in files.items():
            (d / name).write_bytes(data)
        with pytest.raises(UserError, match=match) as e:
            tokenizers.load(str(d))
        assert "\n" not in str(e.value)


def test_a_compressed_file_may_not_fill_the_memory(tmp_path):
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(bytes(1 << 20), 1) * 300)
    tracemalloc.start()
    with pytest.raises(UserError, match="tokenizer.json.gz: more than 256 MiB once unpacked"):
        tokenizers.load(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20


def test_names_may_be_objects_and_compressed(tmp_path):
    (tmp_path / "tokenizer.json.gz").write_bytes(gzip.compress(byte_level()))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}, "pad_token": "</s>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}')
    t = tokenizers.load(str(tmp_path))
    assert (t.eos_id, t.pad_id, t.bos_id) == (t.special_id("<|im_end|>"), t.special_id("</s>"), None) and t.chat_template == "yes"


EXPECTED = json.loads((DATA / "tokenizers/expected_ids.json").read_text()) if DATA.is_dir() else {"ids": {}}


@here
@pytest.mark.parametrize("name", EXPECTED["ids"])
def test_real_vocabularies(name):
    want, t = EXPECTED["ids"][name], tokenizers.load(str(DATA / "tokenizers" / name))
    assert t.vocab_size == want["vocab_size"]
    for text, ids, back in zip(EXPECTED["strings"], want["encode"], want["decode"], strict=True):
        if name.endswith(".model"):
            # As its makers read a text: special tokens are text there, too. A unigram with its own normaliser throws
            # spaces away; ours keeps them, and so gives other ids where there are two or an end has one.
            assert t.published.encode(text) == ids and t.published.decode(ids) == back
            if "mistral" in name:
                assert t.encode(text, True) == ids and t.decode([t.bos_id, *ids]) == back
        else:
            assert tokenizers.encode_with_specials(t, text) == ids and tokenizers.decode_with_specials(t, ids) == back
            assert t.decode(t.encode(text)) == (back if "neox" in name else text)  # that one composes its accents (NFC)
            assert not set(t.specials.values()) & set(t.encode(text))


@here
def test_one_vocabulary_in_two_forms():
    d = str(DATA / "tokenizers")
    assert hub.compare(tokenizers.load(d + "/gpt2/vocab.json.gz"), tokenizers.load(d + "/gpt2/tokenizer.json.gz")) == []
    m = tokenizers.load(d + "/mistral_v1")
    assert hub.compare(m, fast.Fast(fast.of_sentencepiece(m._proto, m.specials, m._dummy_prefix))) == []
