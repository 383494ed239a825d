"""PPO against a reward model, or against any Python function (prompt, completion, record) -> float:

    jaxalign train --config=configs/ppo.py --workdir=runs/ppo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score
"""

from jaxalign import build


def get_config(arg=None):
    build.preset(arg)
    c = build.base("ppo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        "ppo",
        data=dict(path="prompts.jsonl", batch_size=64),
        train=dict(steps=400, save_every=40),
        optim=dict(lr=3e-6, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5),
        rl=dict(epochs=4, minibatches=1, beta=0.05, missing_eos_penalty=1.0),
        sampling=dict(max_new=128, temperature=0.7),
    )
    return c
