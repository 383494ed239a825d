"""Preferences between answers that the policy writes while it trains, judged by a reward model, a Python function, or a judge that
compares two answers:

    jaxalign train --config=configs/online_dpo.py --workdir=runs/online-dpo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score

`--config=configs/online_dpo.py:xpo` (or nash_md, nash_md_token, raft, online_ipo, online_hinge) is another method on the same road.
On the embedded world of short reviews, with its gold reward and a policy made on the way:

    jaxalign pipeline --config=configs/online_dpo.py:reviews --workdir=runs/online-dpo-reviews
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "xpo", "nash_md", "nash_md_token", "raft", "online_ipo", "online_hinge", "reviews")
    if arg == "reviews":
        return _reviews()
    c = build.base("online_dpo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        arg or "online_dpo",
        data=dict(path="prompts.jsonl", batch_size=64 if arg != "raft" else 16),
        train=dict(steps=400, save_every=40),
        optim=dict(lr=5e-7 if arg != "raft" else 2e-5, warmup=10),
        rl=dict(missing_eos_penalty=1.0),
        sampling=dict(max_new=128, temperature=0.9 if arg not in ("nash_md", "nash_md_token") else 1.0),
    )
    return c


def _reviews():
    """All of them from one policy, with as many answers each."""
    c = build.base("online_dpo", vocab=896, tied=False, max_len=128, dim=64, layers=2, heads=2, hidden=172)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    c.world = {
        "name": "jaxalign.tasks.reviews:World",
        "sizes": {"pretrain": 6000, "pretrain_eval": 100, "sft": 2000, "sft_eval": 100, "prompts": 1600, "prompts_eval": 128},
        "samples": 256,
        "sampling": {"max_new": 48},
        "frontier": {"prompts": 2, "each": 128},
    }
    c.order = ("pretrain", "sft", "online_dpo", "xpo", "nash_md", "raft")
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=128),
            train=dict(steps=200, save_every=100),
            optim=dict(lr=6e-3, schedule="linear", end=0.0, warmup=10),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=32, seq_len=128),
            train=dict(steps=60, save_every=30),
            optim=dict(lr=2e-3, warmup=5),
        ),
    }
    for name, batch, lr, rl in (
        ("online_dpo", 32, 6e-4, dict()),
        ("xpo", 32, 6e-4, dict(reference="sft")),
        ("nash_md", 32, 6e-4, dict()),
        ("raft", 8, 1e-3, dict(group=8)),
    ):
        c.stages[name] = build.stage(
            name,
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=batch),
            train=dict(steps=40, save_every=20),
            optim=dict(lr=lr, warmup=4),
            rl=dict(reward="jaxalign.tasks.review_labels:gold_reward", **rl),
            sampling=dict(max_new=48),
        )
    return c
