"""Three reward models of the same rankings, and PPO against what they agree on:

    jaxalign pipeline --config=configs/ensemble.py --workdir=runs/ensemble --config.model.path=HF_DIR

`--config=configs/ensemble.py:warm` trains against one model, the mean of the three's weights (WARM, 2401.12187), as cheap as one.
It reads rankings.jsonl and prompts.jsonl; the directory is the SFT model, which the reward models and the policy start from.
"""

from jaxalign import build

MEMBERS = ("reward_1", "reward_2", "reward_3")


def get_config(arg=None):
    warm = bool(build.preset(arg, "warm"))
    c = build.base("ensemble", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.order = (*MEMBERS, "ppo")
    c.stages = {
        name: build.stage(
            "reward",
            data=dict(path="rankings.jsonl", batch_size=8, max_len=512, order=k),
            # Weights can be averaged only where they left from one point: the head too.
            head="reward_1" if warm else "",
            normalisation=dict(by="reference", path="prompts.jsonl", max_new=128),
            train=dict(steps=500, save_every=100),
            optim=dict(lr=1e-5, warmup=10),
        )
        for k, name in enumerate(MEMBERS)
    }
    c.stages["ppo"] = build.stage(
        "ppo",
        data=dict(path="prompts.jsonl", batch_size=64),
        train=dict(steps=400, save_every=40),
        optim=dict(lr=3e-6, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5),
        rl=dict(reward=",".join(MEMBERS), combine="weights" if warm else "mean_less_variance", beta=0.05, missing_eos_penalty=1.0),
        sampling=dict(max_new=128),
    )
    return c
