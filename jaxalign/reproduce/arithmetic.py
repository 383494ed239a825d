"""Sums learned from a verifier alone: GRPO from less than three right answers in ten to more than nine.

One seed by hand, or one arm of it:

    jaxalign pipeline --config=jaxalign/reproduce/arithmetic.py --workdir=runs/arithmetic
    jaxalign pipeline --config=jaxalign/reproduce/arithmetic.py:grpo --workdir=runs/arithmetic-grpo

A small model sees a few demonstrations of a + b with two digits each, and stops while most of its answers are wrong. From
there GRPO samples answers and is told which are right; SFT, from the same weights, is given the right answer to as many
problems as GRPO samples answers. Held-out problems are in nobody's training data.
"""

from jaxalign import build
from jaxalign.reproduce.runner import Claim, Reproduction, curve, first, last

ARMS = ("grpo", "more_sft")
UPDATES, PROMPTS, GROUP = 300, 32, 8


def get_config(arg=None):
    arm = build.preset(arg, *ARMS)
    c = build.base("arithmetic", vocab=16, dim=96, layers=3, heads=4, hidden=256, max_len=16)
    c.tokenizer.path = "data/tokenizer.json"
    c.world = {
        "name": "jaxalign.tasks.arithmetic:World",
        "options": {"digits": 2, "terms": 2, "operations": "+"},
        "sizes": {"sft": 20000, "sft_eval": 500, "prompts": 20000, "answers": UPDATES * PROMPTS * GROUP, "prompts_eval": 500},
        "samples": 1000,
        "sampling": {"max_new": 5},
        "frontier": {"prompts": 20, "each": 64},
        "watch": {"each": 1},
    }
    train = dict(steps=UPDATES, eval_every=20, save_every=100, keep=1, log_every=5)
    supervised = dict(batch_size=256, seq_len=12, packing="pad")
    c.stages = {
        "sft": build.stage(
            "lm",
            data=dict(supervised, path="data/sft.jsonl", eval_path="data/sft_eval.jsonl"),
            train=dict(steps=400, eval_every=50, keep=1, log_every=10),
            optim=dict(lr=1e-3, schedule="constant", warmup=20),
        ),
        "grpo": build.stage(
            "grpo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=PROMPTS),
            train=train,
            optim=dict(lr=5e-4, schedule="constant", warmup=10),
            rl=dict(reward="jaxalign.tasks.arithmetic:verify", group=GROUP),
            sampling=dict(max_new=5),
        ),
        "more_sft": build.stage(
            "lm",
            init="sft",
            data=dict(supervised, path="data/answers.jsonl"),
            train=train,
            optim=dict(lr=1e-3, schedule="constant", warmup=10),
        ),
    }
    c.order = ("sft", *(a for a in ARMS if arm in ("", a)))
    return c


REPRODUCTION = Reproduction(
    title="Sums from a verifier",
    get_config=get_config,
    curves={a: curve(a, "eval/gold") for a in ARMS},
    figures={"start": last("sft", "eval/gold", n=1), **{a: last(a, "eval/gold") for a in ARMS}},
    x="updates, of 256 answers each",
    y="exact match on held-out problems, sampled at temperature 1",
    tolerance=0.05,
    claims=(
        Claim("start", 0.0, 0.3, "where the arms begin"),
        Claim("grpo", 0.9, 1.0, "what a verifier alone should teach"),
    ),
)
