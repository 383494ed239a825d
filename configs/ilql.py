"""ILQL from episodes with rewards, {"prompt", "completion", "reward"} or {"messages", "rewards"}:

    jaxalign train --config=configs/ilql.py --workdir=runs/ilql \
        --config.model.path=HF_DIR --config.stage.data.path=episodes.jsonl

and then, with --beta as large as the advantages deserve (0: the behaviour policy):

    jaxalign sample --run=runs/ilql --beta=4 --top_k=20 --prompt='Hello'

The settings are trlX's; `--config=configs/ilql.py:wordle`, `:visual_dialogue` and `:toxicity` have those of the authors' code.
"""

from jaxalign import build

# tau, cql_scale, lr, batch of the authors' code; gamma 0.99 and targets that move by 0.005 at every step in all three.
AUTHORS = {"wordle": (0.7, 1e-4, 1e-5, 1024), "visual_dialogue": (0.8, 1.0, 1e-5, 64), "toxicity": (0.6, 0.25, 1e-4, 64)}


def get_config(arg=None):
    arg = build.preset(arg, *AUTHORS)
    c = build.base("ilql", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    if arg:
        tau, cql_scale, lr, batch = AUTHORS[arg]
        c.stage = build.stage(
            "ilql_original",
            objective=dict(tau=tau, cql_scale=cql_scale),
            data=dict(path="episodes.jsonl", batch_size=batch),
            train=dict(steps=1000, save_every=200),
            optim=dict(lr=lr, schedule="constant", weight_decay=0.0),
        )
    else:
        c.stage = build.stage(
            "ilql",
            data=dict(path="episodes.jsonl", batch_size=128, standardise=True),
            train=dict(steps=1000, save_every=200),
            optim=dict(lr=5e-5, schedule="constant", b1=0.9, b2=0.95, weight_decay=1e-6, max_grad_norm=None),
        )
    return c
