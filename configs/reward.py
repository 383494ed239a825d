"""A reward model from K-rankings {"prompt", "completions", "ranks"}, all pairs of a prompt in one batch element:

    jaxalign train --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HF_DIR --config.stage.data.path=rankings.jsonl

`--config=configs/reward.py:pairs` reads pairs {"chosen", "rejected"} instead.
"""

from jaxalign import build


def get_config(arg=None):
    c = build.base("reward", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        "reward_pairs" if build.preset(arg, "pairs") else "reward",
        data=dict(path="rankings.jsonl", batch_size=8, max_len=512),
        train=dict(steps=500, save_every=100),
        optim=dict(lr=1e-5, warmup=10),
    )
    return c
