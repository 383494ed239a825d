"""trlX's random walks: from a policy that has seen only wandering walks to shortest ways, with every method there is.

One seed by hand, or one arm of it:

    jaxalign pipeline --config=jaxalign/reproduce/randomwalks.py --workdir=runs/randomwalks
    jaxalign pipeline --config=jaxalign/reproduce/randomwalks.py:ppo --workdir=runs/randomwalks-ppo

The graph, the walks and the metric are trlX's (examples/randomwalks, at seed 1000), and so are model and settings of PPO. Where
we differ: no dropout (0.1 there); the critic's head is linear (there two layers); advantages are whitened over the whole
rollout (there over each minibatch); and the policy to begin with is cloned here, of the same 1000 walks, because how trlX's
published one was made is not known.
"""

from jaxalign import build
from jaxalign.reproduce.runner import Claim, Reproduction, curve, last

REWARD = "jaxalign.tasks.randomwalks:gold"
UPDATES, EPISODES = 160, 140  # of trlX's PPO: 20 rollouts of 140 episodes, 4 epochs of 2 minibatches each
ARMS = ("ppo", "grpo", "dpo")


def get_config(arg=None):
    arm = build.preset(arg, "bc", *ARMS)
    c = build.base("randomwalks", family="gpt2", vocab=23, dim=144, layers=6, heads=12, max_len=32)
    c.tokenizer.path = "data/tokenizer.json"
    c.world = {
        "name": "jaxalign.tasks.randomwalks:World",
        "sizes": {"sft": 1000, "sft_eval": 1000, "pairs": 4000, "prompts": EPISODES, "prompts_eval": 20},
        "samples": 1000,
        "sampling": {"max_new": 9},
        "frontier": {"prompts": 20, "each": 256},
        "watch": {"each": 50},
    }
    adam = dict(schedule="constant", b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-6, max_grad_norm=None)
    train = dict(steps=UPDATES, eval_every=16, save_every=40, keep=1)
    rl = dict(reward=REWARD, epochs=4, minibatches=2)
    c.stages = {
        "sft": build.stage(
            "lm",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=100, seq_len=11, packing="pad"),
            train=dict(steps=200, eval_every=40, save_every=100, keep=1),
            optim=dict(adam, lr=1e-3),
        ),
        "ppo": build.stage(
            "ppo",
            init="sft",
            objective=dict(value_coef=1.2),
            data=dict(path="data/prompts.jsonl", batch_size=EPISODES),
            train=train,
            optim=dict(adam, lr=3e-4),
            rl=dict(rl, beta=0.0, gamma=1.0, lam=0.95, clip_score=1.0),
            sampling=dict(max_new=9),
        ),
        "grpo": build.stage(
            "grpo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=EPISODES // 7),
            train=train,
            optim=dict(adam, lr=3e-4),
            rl=dict(rl, group=7),
            sampling=dict(max_new=9),
        ),
        "dpo": build.stage(
            "dpo",
            init="sft",
            data=dict(path="data/pairs.jsonl", batch_size=100),
            train=train,
            optim=dict(adam, lr=3e-4),
        ),
    }
    c.order = ("sft", *(a for a in ARMS if arm in ("", a)))
    return c


REPRODUCTION = Reproduction(
    title="Random walks",
    get_config=get_config,
    curves={"bc": curve("sft", "eval/gold"), **{a: curve(a, "eval/gold") for a in ARMS}},
    figures={"bc": last("sft", "eval/gold", n=2), **{a: last(a, "eval/gold", n=3) for a in ARMS}},
    x="updates",
    y="optimality, 1 is the shortest way",
    tolerance=0.05,
    claims=(
        Claim("bc", 0.32, 0.36, "the walkers themselves reach 0.346, counted transitions of the data 0.355"),
        Claim("ppo", 0.97, 1.0, "trlX, pull requests 119 and 554: a perfect score (curves only); an independent re-implementation of its settings reached 0.972 (one seed)"),
        Claim("grpo", 0.95, 1.0, "within PPO's budget of episodes"),
        Claim("dpo", 0.95, 1.0, "no published number; the same walks, ranked by optimality"),
    ),
)
