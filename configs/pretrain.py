"""Pretraining on raw text (.txt, JSONL with a "text" field, or these with .gz), with a vocabulary trained on it:

    jaxalign train --config=configs/pretrain.py --workdir=runs/pretrain \
        --config.tokenizer.train_on=corpus.txt --config.stage.data.path=corpus.txt
"""

from jaxalign import build


def get_config(arg=None):
    build.preset(arg)
    c = build.base("pretrain", vocab=4096, dim=288, layers=6, heads=6, hidden=768)
    c.tokenizer.train_on = "corpus.txt"
    c.stage = build.stage(
        "lm",
        data=dict(path="corpus.txt", batch_size=16, seq_len=256, packing="chop"),
        train=dict(steps=2000, save_every=200, log_every=10),
        optim=dict(lr=1e-3, warmup=100, weight_decay=0.1),
    )
    return c
