"""Direct preference optimisation on pairs (chosen/rejected, explicit or implicit prompt, HH-RLHF strings):

    jaxalign train --config=configs/dpo.py --workdir=runs/dpo \
        --config.model.path=HF_DIR --config.stage.data.path=pairs.jsonl

`--config=configs/dpo.py:ipo` is the same with another loss; so are cdpo, hinge, orpo, simpo and all others that read pairs.
"""

from jaxalign import build

PAIRS = [name for name, m in build.OBJECTIVES.items() if m.kind == "pairs" and name not in build.REWARDS]
# Where 1e-6 is not what its authors or libraries train with.
RATES = {"orpo": 8e-6, "simpo": 5e-7, "alphapo": 5e-7, "dpo_norm": 5e-7}


def get_config(arg=None):
    name = build.preset(arg, *PAIRS) or "dpo"
    c = build.base(name, dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        name,
        data=dict(path="pairs.jsonl", batch_size=16, max_len=512),
        train=dict(steps=500, save_every=100),
        optim=dict(lr=RATES.get(name, 1e-6), warmup=20),
    )
    return c
