"""Reinforcement learning from human feedback, round after round: the policy of now answers, its answers are ranked, a new reward
model learns from the ranks of all rounds so far, and PPO makes the next policy. In minutes on a laptop CPU, with the embedded
world of short reviews for labellers:

    jaxalign pipeline --config=configs/iterated.py --workdir=runs/iterated

`--config=configs/iterated.py:dpo` is iterative DPO: of 8 answers the best against the worst by the gold reward, the reference
being what the round began with. `--config=configs/iterated.py:people` stops in every round for labels that people write.
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "dpo", "people", "smoke")
    c = build.base("iterated", vocab=896, tied=False, max_len=128, dim=64, layers=2, heads=2, hidden=172)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    small = arg == "smoke"
    steps = lambda n: max(n // 16, 2) if small else n
    sizes = {"pretrain": 6000, "pretrain_eval": 100, "sft": 2000, "sft_eval": 100, "prompts": 1600, "prompts_eval": 128}
    c.world = {
        "name": "jaxalign.tasks.reviews:World",
        "sizes": {k: n // 5 if small else n for k, n in sizes.items()},
        "samples": 32 if small else 256,
        "sampling": {"max_new": 48},
        "frontier": {"prompts": 2, "each": 16 if small else 128},
    }
    c.order = ("pretrain", "sft")
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=128),
            train=dict(steps=steps(200), save_every=100),
            optim=dict(lr=6e-3, schedule="linear", end=0.0, warmup=10),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=32, seq_len=128),
            train=dict(steps=steps(60), save_every=30),
            optim=dict(lr=2e-3, warmup=5),
        ),
    }
    if arg == "dpo":
        c.rounds = build.rounds("dpo", count=3, each=256, candidates=8, labeller="jaxalign.tasks.review_labels:gold_reward", sampling=dict(max_new=48))
        c.stages.dpo = build.stage(
            "dpo",
            init="{policy}",  # and so the reference; "sft" for the first policy in every round
            data=dict(path="data/best_{round}.jsonl", batch_size=32),
            train=dict(steps=24, save_every=12),
            optim=dict(lr=6e-4, warmup=3),
        )
        return c
    c.rounds = build.rounds("reward", "ppo", count=2 if small else 3, each=24 if small else 200, held_out=16 if small else 64, candidates=5, labeller="people" if arg == "people" else "", sampling=dict(max_new=48))
    c.stages.reward = build.stage(
        "reward",
        init="sft",
        data=dict(path="data/rankings_{rounds}.jsonl", eval_path="data/held_{round}.jsonl", batch_size=8),
        train=dict(steps=steps(100), save_every=50),
        optim=dict(lr=8e-4, schedule="linear", end=0.0, warmup=10, b2=0.99, weight_decay=0.1),
    )
    c.stages.ppo = build.stage(
        "ppo",
        init="{policy}",
        data=dict(path="data/prompts.jsonl", batch_size=16 if small else 64),
        train=dict(steps=steps(32), save_every=8),
        optim=dict(lr=3e-4, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5),
        rl=dict(reward="reward_{round}", reference="sft", epochs=2 if small else 4, beta=0.05),
        sampling=dict(max_new=48),
    )
    return c
