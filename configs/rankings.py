"""Direct preference optimisation on whole rankings of several answers to a prompt:

    jaxalign train --config=configs/rankings.py --workdir=runs/rankings \
        --config.model.path=HF_DIR --config.stage.data.path=rankings.jsonl

`--config=configs/rankings.py:rrhf` is RRHF, which needs no reference.
"""

from jaxalign import build


def get_config(arg=None):
    name = build.preset(arg, "pl_dpo", "rrhf") or "pl_dpo"
    c = build.base(name, dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        name,
        data=dict(path="rankings.jsonl", batch_size=8, max_len=512, max_k=4),
        train=dict(steps=500, save_every=100),
        optim=dict(lr=1e-6, warmup=20),
    )
    return c
