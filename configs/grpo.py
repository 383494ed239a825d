"""GRPO against a reward model, or against any Python function (prompt, completion, record) -> float:

    jaxalign train --config=configs/grpo.py --workdir=runs/grpo \
        --config.model.path=HF_DIR --config.stage.data.path=prompts.jsonl \
        --config.stage.rl.reward=my_package.rewards:score

Behind the colon stands a relative: `:dr` (Dr. GRPO), `:token` (the mean over tokens), `:dapo`, `:cispo`, `:sapo`, `:gspo`,
`:gspo_token`, `:gmpo`, `:vespo`, `:rloo`, `:reinforce_pp`, `:reinforce_pp_baseline`, `:remax`, and `:gdpo`, for several rewards (with commas) at once.
On the embedded world of short reviews, with its gold reward and a policy made on the way, in under a minute on a laptop CPU:

    jaxalign pipeline --config=configs/grpo.py:reviews --workdir=runs/grpo-reviews
"""

from jaxalign import build

# preset -> (objective, what of its rl section is not the method's own default, prompts per rollout)
PRESETS = {
    "": ("grpo", {}, 16),
    "dr": ("dr_grpo", {}, 16),
    "token": ("token_grpo", {}, 16),
    "dapo": ("dapo", {"overlong_buffer": 51}, 16),  # a fifth of max_new, as 4096 of 20480 in the paper
    "cispo": ("cispo", {"minibatches": 2}, 16),
    "sapo": ("sapo", {"minibatches": 4}, 16),
    "gspo": ("gspo", {"minibatches": 4}, 16),  # the paper's: without several updates a rollout there is no ratio to clip
    "gspo_token": ("gspo_token", {"minibatches": 4}, 16),
    "gmpo": ("gmpo", {"minibatches": 2}, 16),
    "vespo": ("vespo", {"minibatches": 4}, 16),
    "rloo": ("rloo", {}, 32),
    "reinforce_pp": ("reinforce_pp", {"minibatches": 2}, 128),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {"minibatches": 2}, 16),
    "remax": ("remax", {}, 64),
    "gdpo": ("grpo", {"scale_rewards": "gdpo", "combine": "apart"}, 16),
}


def get_config(arg=None):
    arg = build.preset(arg, *filter(None, PRESETS), "reviews")
    if arg == "reviews":
        return _reviews()
    name, rl, prompts = PRESETS[arg]
    c = build.base("grpo", dim=256, layers=6, heads=8, hidden=688, vocab=0)
    c.stage = build.stage(
        name,
        data=dict(path="prompts.jsonl", batch_size=prompts),
        train=dict(steps=400, save_every=40),
        optim=dict(lr=1e-6, schedule="constant", warmup=10),
        rl=rl,
        sampling=dict(max_new=256),
    )
    return c


def _reviews():
    c = build.base("grpo_reviews", vocab=896, tied=False, max_len=128, dim=64, layers=2, heads=2, hidden=172)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    c.world = {
        "name": "jaxalign.tasks.reviews:World",
        "sizes": {"pretrain": 3000, "pretrain_eval": 100, "sft": 1500, "sft_eval": 100, "prompts": 400, "prompts_eval": 64},
        "samples": 64,
        "sampling": {"max_new": 48},
        "frontier": {"prompts": 2, "each": 16},
    }
    c.order = ("pretrain", "sft", "grpo")
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=128),
            train=dict(steps=100),
            optim=dict(lr=6e-3, schedule="linear", end=0.0, warmup=10),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=32, seq_len=128),
            train=dict(steps=30),
            optim=dict(lr=2e-3, warmup=5),
        ),
        "grpo": build.stage(
            "grpo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=8),
            train=dict(steps=30),
            optim=dict(lr=1e-3, warmup=3),
            rl=dict(reward="jaxalign.tasks.review_labels:gold_reward", group=8),
            sampling=dict(max_new=48),
        ),
    }
    return c
