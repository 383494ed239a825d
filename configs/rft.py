"""Rejection sampling in rounds, the policy's own good answers as demonstrations: grow once, improve several times with rising
thresholds (ReST, 2308.08998; trlX's RFT). On the embedded world of short reviews, in minutes on a laptop CPU:

    jaxalign pipeline --config=configs/rft.py --workdir=runs/rft

`--config=configs/rft.py:rest_em` is expert iteration as ReST-EM has it (2312.06585): answers that reach a threshold, at most ten of a
prompt, and every round fine-tunes the base anew. `--config=configs/rft.py:pool` keeps the best of all rounds so far (Llama 2,
2307.09288, section 3.2.3).
"""

from jaxalign import build


def get_config(arg=None):
    arg = build.preset(arg, "rest_em", "pool")
    c = build.base("rft", vocab=896, tied=False, max_len=128, dim=64, layers=2, heads=2, hidden=172)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    c.world = {
        "name": "jaxalign.tasks.reviews:World",
        "sizes": {"pretrain": 6000, "pretrain_eval": 100, "sft": 2000, "sft_eval": 100, "prompts": 1600, "prompts_eval": 128},
        "samples": 256,
        "sampling": {"max_new": 48},
        "frontier": {"prompts": 2, "each": 128},
    }
    c.order = ("pretrain", "sft")
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
    common = dict(count=3, each=256, candidates=8, labeller="jaxalign.tasks.review_labels:gold_reward", sampling=dict(max_new=48))
    tune = lambda init, path: build.stage(
        "lm",
        init=init,
        data=dict(path=path, batch_size=32, seq_len=128),
        train=dict(steps=20, save_every=10),
        optim=dict(lr=1e-3, warmup=2),
    )
    if arg == "rest_em":
        c.rounds = build.rounds("improve", **common, keep=dict(threshold=2.0, cap=10))
        c.stages.improve = tune("pretrain", "data/kept_{round}_1.jsonl")
        c.stages.improve.train.steps = 60  # from the base, as far as the first fine-tuning went
    elif arg == "pool":
        c.rounds = build.rounds("improve", **common)
        c.stages.improve = tune("{policy}", "data/kept_{rounds}_1.jsonl")
    else:
        c.rounds = build.rounds("first", "second", "third", **common, keep=dict(quantiles=(0.5, 0.7, 0.85), cap=0))
        for i, (name, init) in enumerate((("first", "{policy}"), ("second", "first_{round}"), ("third", "second_{round}")), 1):
            c.stages[name] = tune(init, f"data/kept_{{round}}_{i}.jsonl")
    return c
