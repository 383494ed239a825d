"""Direct preference optimisation on pairs (chosen/rejected, explicit or implicit prompt, HH-RLHF strings):

    jaxalign train --config=configs/dpo.py --workdir=runs/dpo \
        --config.model.path=HF_DIR --config.stage.data.path=pairs.jsonl

`--config=configs/dpo.py:ipo` (or cdpo, hinge) is the same with another loss.
"""

from jaxalign import build


def get_config(arg=None):
    c = build.base("dpo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        build.preset(arg, "dpo", "cdpo", "ipo", "hinge") or "dpo",
        data=dict(path="pairs.jsonl", batch_size=16, max_len=512),
        train=dict(steps=500, save_every=100),
        optim=dict(lr=1e-6, warmup=20),
    )
    return c
