"""Raw text to aligned models on a laptop CPU, in minutes:

    jaxalign pipeline --config=configs/quickstart.py --workdir=runs/quickstart

The embedded world of short reviews (`jaxalign.tasks.reviews`) writes the data, labels the rankings and knows the truth.
`--config=configs/quickstart.py:smoke` is the same road in a minute, too short for the figures.
"""

from jaxalign import build


def get_config(arg=None):
    full = not build.preset(arg, "smoke")
    shape = dict(dim=96, layers=3, heads=4, hidden=256) if full else dict(dim=64, layers=2, heads=2, hidden=172)
    c = build.base("quickstart", vocab=896, tied=False, max_len=128, **shape)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    c.world = {
        "name": "jaxalign.tasks.reviews:World",
        "sizes": {
            "pretrain": 70000 if full else 2000,
            "pretrain_eval": 2000 if full else 100,
            "sft": 8000 if full else 500,
            "sft_eval": 500 if full else 50,
            "prompts": 4000 if full else 200,
            "prompts_eval": 1000 if full else 40,
        },
        "ranked": 2400 if full else 48,  # prompts whose samples are ranked, K = 4 ... 9 each
        "ranked_eval": 520 if full else 24,  # prompts with K = 7: 21 pairs each
        "samples": 512 if full else 32,  # evaluation samples of each policy
        "sampling": {"max_new": 48},
        "frontier": {"prompts": 12 if full else 2, "each": 256 if full else 16},  # SFT samples that the optimum is estimated from
    }
    c.order = ("pretrain", "sft", "reward", "ppo", "dpo")
    steps = lambda n, small: n if full else small
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=128),
            train=dict(steps=steps(1100, 20), save_every=250),
            optim=dict(lr=4e-3, schedule="linear", end=0.0, warmup=steps(30, 5), weight_decay=0.1),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=32, seq_len=128),
            train=dict(steps=steps(80, 10), save_every=40),
            optim=dict(lr=1e-3, warmup=5),
        ),
        "reward": build.stage(
            "reward",
            init="sft",
            data=dict(path="data/rankings.jsonl", eval_path="data/rankings_eval.jsonl", batch_size=8),
            train=dict(steps=steps(300, 6), save_every=100),
            optim=dict(lr=8e-4, schedule="linear", end=0.0, warmup=10, b2=0.99, weight_decay=0.1),
        ),
        "ppo": build.stage(
            "ppo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=128 if full else 16),
            train=dict(steps=steps(64, 8), save_every=20 if full else 3),
            optim=dict(lr=3e-4, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5),
            rl=dict(reward="reward", epochs=4, minibatches=1, beta=0.05),
            sampling=dict(max_new=48),
        ),
        "dpo": build.stage(
            "dpo",
            init="sft",
            data=dict(path="data/pairs.jsonl", batch_size=32),
            train=dict(steps=steps(75, 6), save_every=50),
            optim=dict(lr=6e-4, warmup=5),
        ),
    }
    return c
