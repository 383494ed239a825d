"""A vocabulary of single characters, as a tokenizer.json: for worlds whose texts are made of a few letters or digits."""

from __future__ import annotations

import json
from pathlib import Path

END, PAD = "<|endoftext|>", "<|pad|>"


def write_tokenizer(directory: str | Path, alphabet: str) -> Path:
    """Writes tokenizer.json and, beside it, tokenizer_config.json: an id per character in order, then END (EOS) and PAD. There is
    no BOS: the first character of a text is a prompt, or part of one, and nobody predicts it.

    A text with any other character loses it: the worlds that use this write all of their texts themselves.
    """
    ids = {c: i for i, c in enumerate(alphabet)}
    special = lambda text, i: {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(END, len(ids)), special(PAD, len(ids) + 1)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {**ids, END: len(ids), PAD: len(ids) + 1}, "merges": []},  # no merges: every character stands alone
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": PAD, "add_bos_token": False}), encoding="utf-8")
    return directory / "tokenizer.json"
