"""A reward model from K-rankings {"prompt", "completions", "ranks"}, all pairs of a prompt in one batch element:

    jaxalign train --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HF_DIR --config.stage.data.path=rankings.jsonl

`--config=configs/reward.py:pairs` (or best, regression, steps) learns from other judgements: pairs {"chosen", "rejected"}, rankings or
{"completions", "best"} of which only the best counts, scores {"completion", "score"}, judged steps {"steps", "labels"}.
"""

from jaxalign import build

FILES = {"": "rankings", "pairs": "pairs", "best": "rankings", "regression": "scores", "steps": "steps"}


def get_config(arg=None):
    kind = build.preset(arg, *list(FILES)[1:])
    c = build.base("reward", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        f"reward_{kind}" if kind else "reward",
        data=dict(path=f"{FILES[kind]}.jsonl", batch_size=8, max_len=512),
        train=dict(steps=500, save_every=100),
        optim=dict(lr=1e-5, warmup=10),
    )
    return c
