"""Supervised fine-tuning on your own JSONL (prompt/completion, messages or text), from scratch or from an HF directory:

    jaxalign train --config=configs/sft.py --workdir=runs/sft \
        --config.model.path=DIR --config.stage.data.path=train.jsonl

`--config=configs/sft.py:dft` is the same with dynamic fine-tuning's loss.
"""

from jaxalign import build


def get_config(arg=None):
    c = build.base("sft", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        build.preset(arg, "lm", "dft") or "lm",
        data=dict(path="train.jsonl", batch_size=16, seq_len=512),
        train=dict(steps=1000, save_every=200, log_every=10),
        optim=dict(lr=2e-5, warmup=20, schedule="cosine"),
    )
    return c
