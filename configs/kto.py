"""Kahneman-Tversky optimisation on answers that are good or bad ("label": true or false; pairs serve as well):

    jaxalign train --config=configs/kto.py --workdir=runs/kto \
        --config.model.path=HF_DIR --config.stage.data.path=labelled.jsonl

`--config=configs/kto.py:bco` (or bco_matched, apo_zero_unpaired) is the same with another loss.
"""

from jaxalign import build


def get_config(arg=None):
    name = build.preset(arg, "kto", "bco", "bco_matched", "apo_zero_unpaired") or "kto"
    c = build.base(name, dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        name,
        data=dict(path="labelled.jsonl", batch_size=32, max_len=512),  # KTO's z is a mean over the batch: no fewer than 4 rows
        train=dict(steps=500, save_every=100),
        optim=dict(lr=1e-6, warmup=20),
    )
    return c
