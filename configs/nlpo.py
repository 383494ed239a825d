"""NLPO against a reward model, or against any Python function (prompt, completion, record) -> float:

    jaxalign train --config=configs/nlpo.py --workdir=runs/nlpo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score

The settings are those of RL4LMs for IMDB. Its two synthetic tasks, from a small policy that has read a corpus of each, NLPO beside PPO:

    jaxalign pipeline --config=configs/nlpo.py:increasing --workdir=runs/increasing
    jaxalign pipeline --config=configs/nlpo.py:dates --workdir=runs/dates

They are rewarded for numbers that increase, and for a date written as 2026-11-22. RL4LMs' rates are for GPT-2; a model of two layers
that starts from nothing wants higher ones, and a mask of a smaller vocabulary keeps fewer tokens.
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "increasing", "dates")
    if arg:
        return _synthetic(arg)
    c = build.base("nlpo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        "nlpo",
        objective=dict(top_mask=0.9, min_tokens_to_keep=100, target_update_iterations=5),
        data=dict(path="prompts.jsonl", batch_size=64),
        train=dict(steps=500, save_every=50),
        optim=dict(lr=1e-6, schedule="constant", b1=0.9, b2=0.999, weight_decay=0.0, max_grad_norm=0.5),
        rl=dict(epochs=5, minibatches=2, beta=0.1, target=0.1, controller="rl4lms"),
        sampling=dict(max_new=48),
    )
    return c


def _synthetic(task):
    world, reward, max_new = {"increasing": ("Increasing", "increasing_numbers", 36), "dates": ("Dates", "date", 44)}[task]
    c = build.base("nlpo", vocab=64, dim=64, layers=2, heads=4, hidden=172, max_len=64)
    c.tokenizer.path = "data/tokenizer.json"
    c.world = {
        "name": f"jaxalign.tasks.synthetic:{world}",
        "sizes": {"sft": 8000, "sft_eval": 200, "prompts": 2000, "prompts_eval": 128},
        "samples": 256,
        "sampling": {"max_new": max_new},
        "frontier": {"prompts": 2, "each": 128},
        "watch": {"each": 2, "reference": "sft"},
    }
    rl = dict(reward=f"jaxalign.tasks.synthetic:{reward}", epochs=5, minibatches=2, beta=0.02, target=2.0, controller="rl4lms")
    online = lambda name, objective=(): build.stage(
        name,
        init="sft",
        objective=dict(objective),
        data=dict(path="data/prompts.jsonl", batch_size=64),
        train=dict(steps=400, eval_every=50, save_every=100),
        optim=dict(lr=3e-4, warmup=10, max_grad_norm=0.5),
        rl=rl,
        sampling=dict(max_new=max_new),
    )
    c.order = ("sft", "ppo", "nlpo")
    c.stages = {
        "sft": build.stage(
            "lm",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=64, seq_len=64, packing="pad"),
            train=dict(steps=300, eval_every=100, save_every=100),
            optim=dict(lr=3e-3, schedule="linear", end=0.0, warmup=20),
        ),
        "ppo": online("ppo"),
        "nlpo": online("nlpo", dict(top_mask=0.9, min_tokens_to_keep=2, target_update_iterations=5)),
    }
    return c
