"""NLPO against a reward model, or against any Python function (prompt, completion, record) -> float:

    jaxalign train --config=configs/nlpo.py --workdir=runs/nlpo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score

The settings are those of RL4LMs for IMDB, but for the KL controller: theirs multiplies by 1 + 0.1 clip(error, +-0.2) once a rollout, which
is rl.horizon of ten rollouts here.
"""

from jaxalign import build


def get_config(arg=None):
    build.preset(arg)
    c = build.base("nlpo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        "nlpo",
        objective=dict(top_mask=0.9, min_tokens_to_keep=100, target_update_iterations=5),
        data=dict(path="prompts.jsonl", batch_size=64),
        train=dict(steps=500, save_every=50),
        optim=dict(lr=1e-6, schedule="constant", b1=0.9, b2=0.999, weight_decay=0.0, max_grad_norm=0.5),
        rl=dict(epochs=5, minibatches=2, beta=0.1, target=4.8, horizon=640.0),  # 0.1 nats a token, 48 tokens
        sampling=dict(max_new=48),
    )
    return c
