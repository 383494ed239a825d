"""Sums learned from a verifier alone: GRPO from less than three right answers in ten to more than nine.

One seed by hand, or one arm of it:

    jaxalign pipeline --config=jaxalign/reproduce/arithmetic.py --workdir=runs/arithmetic
    jaxalign pipeline --config=jaxalign/reproduce/arithmetic.py:grpo --workdir=runs/arithmetic-grpo

Problems are a + b + c, of one digit each; whoever wrote the demonstrations got four digits in ten of the answers wrong. A small model imitates them,
mistakes and all. From there GRPO samples answers and is told which are right. Beside it SFT goes on from the same weights, on as
many answers as GRPO samples: of the same writers (more_sft), or all of them right (right_sft), which nobody had to give GRPO. Held-out problems
are in nobody's training data.
"""

from jaxalign import build
from jaxalign.reproduce.runner import Claim, Reproduction, curve, last

ARMS = ("grpo", "more_sft", "right_sft")
UPDATES, PROMPTS, GROUP = 1200, 32, 8
ANSWERS = UPDATES * PROMPTS * GROUP


def get_config(arg=None):
    arm = build.preset(arg, *ARMS)
    c = build.base("arithmetic", vocab=16, dim=64, layers=2, heads=4, hidden=172, max_len=16)
    c.tokenizer.path = "data/tokenizer.json"
    c.world = {
        "name": "jaxalign.tasks.arithmetic:World",
        "options": {"digits": 1, "terms": 3, "operations": "+", "mistakes": 0.4},
        "sizes": {"sft": 20_000, "sft_eval": 500, "prompts": UPDATES * PROMPTS, "more_sft": ANSWERS, "answers": ANSWERS, "prompts_eval": 500},
        "samples": 1000,
        "sampling": {"max_new": 5},
        "frontier": {"prompts": 20, "each": 64},
        "watch": {"each": 2},
    }
    rows = dict(batch_size=PROMPTS * GROUP, seq_len=12, packing="pad")
    train = dict(steps=UPDATES, eval_every=40, save_every=200, keep=1, log_every=5)
    falling = dict(schedule="linear", end=0.0, warmup=10)
    more = lambda path: build.stage("lm", init="sft", data=dict(rows, path=path), train=train, optim=dict(falling, lr=1e-3))
    make = {
        "grpo": lambda: build.stage(
            "grpo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=PROMPTS),
            train=train,
            optim=dict(falling, lr=5e-4, b2=0.99),
            rl=dict(reward="jaxalign.tasks.arithmetic:verify", group=GROUP),
            sampling=dict(max_new=5),
        ),
        "more_sft": lambda: more("data/more_sft.jsonl"),
        "right_sft": lambda: more("data/answers.jsonl"),
    }
    c.order = ("sft", *(a for a in ARMS if arm in ("", a)))
    c.stages = {
        "sft": build.stage(
            "lm",
            data=dict(rows, path="data/sft.jsonl", eval_path="data/sft_eval.jsonl"),
            train=dict(steps=400, eval_every=100, save_every=200, keep=1, log_every=10),
            optim=dict(lr=3e-3, schedule="linear", end=0.0, warmup=50, b2=0.99, weight_decay=0.1),
        )
    } | {a: make[a]() for a in c.order[1:]}
    return c


REPRODUCTION = Reproduction(
    title="Sums from a verifier",
    get_config=get_config,
    curves={a: curve(a, "eval/gold") for a in ARMS},
    figures={"start": last("sft", "eval/gold", n=1), **{a: last(a, "eval/gold", n=2) for a in ARMS}},
    x="updates, of 256 answers each",
    y="exact match on held-out problems, sampled at temperature 1",
    tolerance=0.05,
    claims=(
        Claim("start", 0.0, 0.3, "where the arms begin; whoever wrote the demonstrations has 0.41"),
        Claim("grpo", 0.9, 1.0, "what a verifier should be able to teach"),
        Claim("more_sft", 0.3, 0.45, "imitation ends where those are whom it imitates: 0.41"),
    ),
)
