"""Pretraining on raw text (.txt, JSONL with a "text" field, or these with .gz), with a vocabulary trained on it:

    jaxalign train --config=configs/pretrain.py --workdir=runs/pretrain \
        --config.tokenizer.train_on=corpus.txt --config.stage.data.path=corpus.txt

`--config=configs/pretrain.py:masked_lm` and `:span_corruption` go on with a BERT or a T5 (`--config.model.path=DIR`, which brings its
vocabulary), whose [MASK] or first sentinel is `--config.stage.objective.mask_id`, `--config.stage.objective.sentinel_id`.
"""

from jaxalign import build


def get_config(arg=None):
    name = build.preset(arg, "lm", "masked_lm", "span_corruption") or "lm"
    c = build.base("pretrain", vocab=4096, dim=288, layers=6, heads=6, hidden=768)
    if name == "lm":
        c.tokenizer.train_on = "corpus.txt"
    c.stage = build.stage(
        name,
        **({} if name == "lm" else {"objective": {"mask_id": 103} if name == "masked_lm" else {"sentinel_id": 32099}}),
        data=dict(path="corpus.txt", batch_size=16, seq_len=256, packing="chop"),
        train=dict(steps=2000, save_every=200, log_every=10),
        optim=dict(lr=1e-3, warmup=100, weight_decay=0.1),
    )
    return c
