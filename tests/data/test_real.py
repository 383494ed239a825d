"""Public data sets as users meet them. Needs the files named by JAXALIGN_DATA (or ../shared/data); else skipped."""

import gzip
import json
import os
import pathlib

import pytest

from jaxalign.data import formats, tokenizers
from jaxalign.data.sources import pairs_source, prompts_source, rankings_source, tokens_source
from jaxalign.data.templates import CHATML, HUMAN_ASSISTANT, PLAIN, encode_sequences, segments
from jaxalign.types import UserError

DATA = pathlib.Path(os.environ.get("JAXALIGN_DATA") or pathlib.Path(__file__).parents[3] / "shared" / "data")
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="public data files not here")
TOK = tokenizers.Bytes()


def read(name, **kw):
    return formats.read(str(DATA / name), **kw)


def test_hh_dialogues_come_back_to_the_letter():
    rows = read("preference/hh_harmless_base_test.jsonl.gz", on_bad_row="skip")
    exact = 0
    for record, where in rows:
        try:
            example = formats.canonical(record, where)
        except UserError as e:
            rows.refuse(e, record)
            continue
        chosen, rejected = encode_sequences(segments(example, HUMAN_ASSISTANT), TOK)
        exact += TOK.decode(chosen[0]) == record["chosen"] and TOK.decode(rejected[0]) == record["rejected"]
        start = [mask.index(1) for _, mask in (chosen, rejected)]
        assert start[0] == start[1] and chosen[0][: start[0]] == rejected[0][: start[0]]
    assert rows.counts["skipped"] == 10  # empty turns, or two of one speaker
    assert exact == 1831


def test_hh_pairs():
    rows = read("preference/hh_harmless_base_test.jsonl.gz", on_bad_row="skip")
    report = pairs_source(rows, TOK, max_len=1024, batch_size=4, seed=0, template=HUMAN_ASSISTANT).report()
    assert report["rows"] == 1841 and report["examples"] + sum(report["dropped"].values()) + report["skipped"] == 1841


@pytest.mark.parametrize("name, n", [("preference/dpo_en_demo.json.gz", 249), ("preference/v1_dpo_demo.jsonl", 10)])
def test_preferences(name, n):
    assert pairs_source(read(name), TOK, max_len=None, batch_size=2, seed=0, template=CHATML).report()["examples"] == n


@pytest.mark.parametrize(
    "name, template, n",
    [
        ("sft/v1_sft_demo.jsonl", CHATML, 412),
        ("sft/sharegpt_dummy_conversation.json", HUMAN_ASSISTANT, 500),
        ("sft/p3/*.jsonl", PLAIN, 631),
        ("pretrain/c4_demo.jsonl", PLAIN, 253),
    ],
)
def test_token_rows(name, template, n):
    source = tokens_source(read(name), TOK, seq_len=512, batch_size=2, seed=0, template=template, too_long="split")
    assert source.report()["examples"] == n and source.next().mask.any()


def test_texts():
    assert len(list(read("pretrain/tinystories_sample.txt", text_split="<|endoftext|>"))) == 5
    assert len(list(read("pretrain/wiki_demo.txt.gz", text_split="line"))) == 27
    source = tokens_source(read("pretrain/botchan.txt", text_split="file"), TOK, seq_len=256, batch_size=2, seed=0, packing="chop")
    book = (DATA / "pretrain/botchan.txt").read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    assert source.report()["tokens"] == len(book) + 2  # BOS, EOS


def test_reply_trees_by_a_function():
    def tree(record):
        ranked = [r for r in record["prompt"]["replies"] if "rank" in r]
        return formats.Ranking(
            record["prompt"]["text"], tuple(r["text"] for r in ranked), tuple(r["rank"] for r in ranked)
        )

    source = rankings_source(
        read("ranking/oasst_en_100_tree.jsonl"), TOK, max_len=2048, max_k=9, batch_size=2, seed=0, template=CHATML, format=tree
    )
    assert source.report()["examples"] + sum(source.report()["dropped"].values()) == 81


def test_kto_and_alpaca_are_not_taken_for_something_else():
    for name, match in [
        ("preference/kto_en_demo.json", "KTO"),
        ("sft/alpaca_en_demo.json", "no known format"),
        ("preference/instruction_data_with_preference.json", "rename 'instruction'"),
        ("preference/alpaca_eval_annotations.json.gz", "no known format"),
    ]:
        with pytest.raises(UserError, match=match):
            tokens_source(read(name), TOK, seq_len=64, batch_size=2, seed=0)


def test_prompts():
    source = prompts_source(read("verifiable/humaneval.jsonl"), TOK, max_prompt_len=1024, batch_size=2, seed=0)
    assert all("test" in r for r in source.next().records)


def test_the_split_of_the_real_road(tmp_path, monkeypatch):
    """`benchmarks/real.py`: nothing that is held out is trained on, and no row is lost but the ten that are unusable."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / "benchmarks")
    import real

    counts = real.prepare(DATA, tmp_path)
    rows = {k: [json.loads(line) for line in (tmp_path / f"{k}.jsonl").read_text("utf-8").splitlines()] for k in counts}
    assert counts == {k: len(v) for k, v in rows.items()}
    assert counts["sft"] + counts["sft_eval"] == 897 and counts["pairs"] + counts["pairs_eval"] == 1831
    said = lambda record: json.dumps([m.content for m in formats.canonical(record).prompt])
    train, held = ({said(r) for r in rows[k]} for k in ("pairs", "pairs_eval"))
    assert len(held) > 150 and not train & held and {said(r) for r in rows["prompts"]} == train
    asked = [{r["messages"][0]["content"] for r in rows[k]} for k in ("sft", "sft_eval")]
    assert not asked[0] & asked[1]
    whole, end = (sum(len(r["text"]) for r in rows[k]) for k in ("pretrain", "pretrain_eval"))
    assert 0.04 < end / (whole + end) < 0.06 and counts["pretrain"] == 6


def test_published_vocabularies_agree_with_the_reference():
    expected = json.loads((DATA / "tokenizers/expected_ids.json").read_text())
    for name, exact in [("mistral_v1/tokenizer.model", True), ("sentencepiece_unigram/test_model.model", False)]:
        tok = tokenizers.load(str(DATA / "tokenizers" / name))
        for text, ids in zip(expected["strings"], expected["ids"][name]["encode"], strict=True):
            if exact and "\u2581" not in text and text:
                assert tok.encode(text, start=True) == ids
                assert tok.decode([tok.bos_id, *ids]) == text  # a document comes back without the vocabulary's space
            if exact:
                assert tok.decode(tok.encode("Hello") + tok.encode(text)) == "Hello" + text
            elif text and text == " ".join(text.split()):
                assert tok.encode(text, start=True) == ids


def test_gzip_and_plain_are_one_data_set(tmp_path):
    name = "preference/v1_dpo_demo.jsonl"
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as f:
        f.write((DATA / name).read_bytes())
    assert [r for r, _ in formats.read(str(tmp_path / "x.jsonl.gz"))] == [r for r, _ in read(name)]
