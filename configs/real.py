"""The whole road on public text and human preferences, on a laptop CPU in under an hour:

    python benchmarks/real.py --data=DIR --workdir=runs/real

writes the files named below from public data sets (docs/results.md says which), runs `jaxalign pipeline` on this config,
and tabulates what came out. With files of your own in WORKDIR/data the second part alone is

    jaxalign pipeline --config=configs/real.py --workdir=runs/real
"""

from jaxalign import build


def get_config(arg=None):
    small = bool(build.preset(arg, "smoke"))
    shape = dict(dim=32, layers=1, heads=2, hidden=64) if small else dict(dim=192, layers=4, heads=6, hidden=512)
    c = build.base("real", vocab=512 if small else 4096, tied=True, max_len=512, **shape)
    c.tokenizer.update(train_on="data/pretrain.jsonl", kind="bpe", template="human_assistant")
    c.order = ("pretrain", "sft", "reward", "dpo", "ppo")
    steps = lambda n: 2 if small else n
    pairs = dict(path="data/pairs.jsonl", eval_path="data/pairs_eval.jsonl", batch_size=16, max_len=384, max_prompt_len=256, max_drop=0.9 if small else 0.5)
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=128, packing="chop"),
            train=dict(steps=steps(1500), save_every=500, eval_every=steps(250)),
            optim=dict(lr=3e-3, schedule="linear", end=0.0, warmup=50, weight_decay=0.1),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=16, seq_len=256),
            train=dict(steps=steps(100), save_every=50, eval_every=steps(10)),
            optim=dict(lr=1e-3, schedule="linear", end=0.0, warmup=10),
        ),
        "reward": build.stage(
            "reward_pairs",
            init="sft",
            data=pairs,
            train=dict(steps=steps(100), save_every=50, eval_every=steps(20)),
            optim=dict(lr=3e-4, schedule="linear", end=0.0, warmup=10, weight_decay=0.1),
        ),
        "dpo": build.stage(
            "dpo",
            init="sft",
            data=pairs,
            train=dict(steps=steps(100), save_every=50, eval_every=steps(20)),
            optim=dict(lr=1e-4, schedule="linear", end=0.0, warmup=10),
        ),
        "ppo": build.stage(
            "ppo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=32, max_prompt_len=128, max_drop=0.9),
            train=dict(steps=steps(160), save_every=40),
            optim=dict(lr=1e-4, schedule="linear", end=0.0, b1=0.9, b2=0.999, eps=1e-5),
            rl=dict(reward="reward", epochs=4, minibatches=1, beta=0.05, missing_eos_penalty=1.0),
            sampling=dict(max_new=48),
        ),
    }
    return c
