"""PPO against a reward model, or against any Python function (prompt, completion, record) -> float:

    jaxalign train --config=configs/ppo.py --workdir=runs/ppo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score

`--config=configs/ppo.py:original` is PPO as in lm-human-preferences (Ziegler et al. 2019), `:a2c` advantage actor-critic as in
Stable-Baselines3 and RL4LMs, `:trpo` a trust region in place of the clip.
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "original", "a2c", "trpo")
    c = build.base("ppo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    optim = dict(lr=3e-6, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5)
    if arg == "a2c":
        c.stage = build.stage(
            "a2c",
            data=dict(path="prompts.jsonl", batch_size=64),
            train=dict(steps=1600, save_every=160),
            optim=optim | dict(lr=1e-6, max_grad_norm=0.5),
            rl=dict(beta=0.1, target=0.1, controller="rl4lms", gamma=0.99, lam=1.0),
            sampling=dict(max_new=48),
        )
    elif arg == "trpo":
        c.stage = build.stage(
            "trpo",
            data=dict(path="prompts.jsonl", batch_size=64),
            train=dict(steps=800, save_every=80),
            optim=optim,
            rl=dict(epochs=8, minibatches=1, beta=0.05, missing_eos_penalty=1.0),
            sampling=dict(max_new=128, temperature=0.7),
        )
    elif arg == "original":
        c.stage = build.stage(
            "ppo",
            data=dict(path="prompts.jsonl", batch_size=512),
            train=dict(steps=1952, save_every=40),  # 4 of each of 488 rollouts: a million episodes, almost
            optim=optim | dict(name="adam_tf", lr=1e-5),
            rl=dict(epochs=4, minibatches=1, beta=0.15, target=6.0, horizon=10000.0, whiten_rewards=True, whiten_form="population", missing_eos_value=-1.0),
            sampling=dict(max_new=24, stop_after=16, temperature=0.7),
        )
    else:
        c.stage = build.stage(
            "ppo",
            data=dict(path="prompts.jsonl", batch_size=64),
            train=dict(steps=400, save_every=40),
            optim=optim,
            rl=dict(epochs=4, minibatches=1, beta=0.05, missing_eos_penalty=1.0),
            sampling=dict(max_new=128, temperature=0.7),
        )
    return c
