"""The simpler ways to learn from episodes with rewards. `:filtered_bc` clones the best tenth of them:

    jaxalign train --config=configs/offline.py:filtered_bc --workdir=runs/filtered \
        --config.model.path=HF_DIR --config.stage.data.path=episodes.jsonl

`:bc` clones all, `:advantage_weighted_bc` weighs every token by what came of it, `:awac` by Q - V, `:mc_returns` regresses Q on the
returns and decodes with it. `:single_step` is ILQL at tau 0.5: Q of the behaviour policy, improved upon once, by decoding.
"""

from jaxalign import build

OBJECTIVES = {"bc": "filtered_bc", "awac": "ilql", "single_step": "ilql"}


def get_config(arg=None):
    arg = build.preset(arg, "filtered_bc", "bc", "advantage_weighted_bc", "awac", "mc_returns", "single_step") or "filtered_bc"
    c = build.base("offline", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    bc = arg in ("bc", "filtered_bc")
    c.stage = build.stage(
        OBJECTIVES.get(arg, arg),
        objective={"awac": dict(tau=0.5, beta=1.0, cql_scale=0.0), "single_step": dict(tau=0.5)}.get(arg, {}),
        data=dict(path="episodes.jsonl", batch_size=64, top=0.1 if arg == "filtered_bc" else 1.0, standardise=not bc),
        train=dict(steps=1000, save_every=200),
        optim=dict(lr=5e-5, schedule="constant", warmup=10),
    )
    return c
