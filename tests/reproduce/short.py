"""A reproduction of a few steps, for the tests of reproductions."""

from jaxalign import build
from jaxalign.reproduce.runner import Claim, Reproduction, curve, first, last


def get_config(arg=None):
    build.preset(arg)
    c = build.base("short", family="gpt2", vocab=23, dim=8, layers=1, heads=2, max_len=16)
    c.tokenizer.path = "data/tokenizer.json"
    c.world = {
        "name": "jaxalign.tasks.randomwalks:World",
        "sizes": {"sft": 64, "prompts": 20, "prompts_eval": 20},
        "sampling": {"max_new": 9},
        "watch": {"each": 2, "reference": "sft"},
    }
    train = dict(steps=4, eval_every=2)
    c.stages = {
        "sft": build.stage("lm", data=dict(path="data/sft.jsonl", batch_size=16, seq_len=11, packing="pad"), train=train, optim=dict(lr=1e-2)),
        "grpo": build.stage(
            "grpo",
            init="sft",
            data=dict(path="data/prompts.jsonl", batch_size=8),
            train=train,
            rl=dict(reward="jaxalign.tasks.randomwalks:gold", group=2, epochs=2),
            sampling=dict(max_new=9),
        ),
    }
    c.order = ("sft", "grpo")
    return c


REPRODUCTION = Reproduction(
    title="A short one",
    get_config=get_config,
    curves={"kl": curve("grpo", "eval/gold", x="eval/kl"), "bc": curve("sft", "eval/gold")},
    figures={"grpo": last("grpo", "eval/gold", n=2), "loss": first("sft", "loss")},
    x="steps",
    y="optimality",
    tolerance=0.01,
    tolerances={"loss": 0.1},
    claims=(Claim("loss", 0.0, 0.5, "nobody"),),
    seeds=2,
)
