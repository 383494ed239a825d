"""InstructGPT's reason for one batch element per prompt (2203.02155, section 3.5): all C(K,2) pairs of a prompt's K ranked answers from one
forward, or the same pairs shuffled as if they were independent, each answer then in up to K - 1 updates of one epoch.

One seed by hand:

    jaxalign pipeline --config=jaxalign/reproduce/rankings.py --workdir=runs/rankings

Both read the same rankings for the same number of epochs, in as many updates, on as many pairs each; accuracy is on all strict pairs of
held-out rankings.
"""

from jaxalign import build
from jaxalign.reproduce import reviews
from jaxalign.reproduce.runner import Claim, Reproduction, Seed

EPOCHS, PROMPTS, LENGTH = 4, 500, 96
PAIRS = 152  # a batch: 8 prompts of 4 to 9 answers have 19 pairs each on average
STEPS = PROMPTS // 8
ARMS = ("together", "shuffled")


def get_config(arg=None):
    arm = build.preset(arg, *ARMS)
    c = reviews.config("rankings", ranked=PROMPTS)
    train = dict(steps=EPOCHS * STEPS, eval_every=STEPS, log_every=5)
    c.stages.together = reviews.reward(data=dict(max_len=LENGTH), train=train)
    c.stages.shuffled = reviews.reward("reward_pairs", data=dict(path="data/all_pairs.jsonl", eval_path="data/all_pairs_eval.jsonl", batch_size=PAIRS, max_len=LENGTH), train=train)
    c.order = ("pretrain", "sft", *(a for a in ARMS if arm in ("", a)))
    return c


def epochs(arm: str):
    return lambda seed: [(r["step"] / STEPS, r["eval/accuracy"]) for r in seed.rows(arm) if "eval/accuracy" in r]


def after(arm: str, epoch: int):
    return lambda seed: epochs(arm)(seed)[epoch - 1][1]


def gap(arm: str):
    """Accuracy on what was trained on, over the last epoch, less the held-out one."""

    def figure(seed: Seed) -> float:
        own = [r["accuracy"] for r in seed.rows(arm) if "accuracy" in r and r["step"] > (EPOCHS - 1) * STEPS]
        return sum(own) / len(own) - after(arm, EPOCHS)(seed)

    return figure


REPRODUCTION = Reproduction(
    title="Rankings together, or as shuffled pairs",
    get_config=get_config,
    curves={a: epochs(a) for a in ARMS},
    figures={
        **{f"{a}, epoch {e}": after(a, e) for a in ARMS for e in (1, EPOCHS)},
        **{f"{a}, trained on less held out": gap(a) for a in ARMS},
        "together less shuffled, epoch 1": lambda s: after("together", 1)(s) - after("shuffled", 1)(s),
        f"together less shuffled, epoch {EPOCHS}": lambda s: after("together", EPOCHS)(s) - after("shuffled", EPOCHS)(s),
    },
    x="epochs",
    y="accuracy on held-out pairs",
    tolerance=0.02,
    tolerances={f"together less shuffled, epoch {e}": 0.012 for e in (1, EPOCHS)},
    claims=(
        Claim(f"together less shuffled, epoch {EPOCHS}", 0.0, 1.0, "2203.02155, section 3.5: shuffled pairs overfit within an epoch, prompts as batch elements do not"),
        Claim("together less shuffled, epoch 1", 0.0, 1.0, "there: also higher after a single epoch"),
    ),
    notes="After one epoch the shuffled pairs are ahead, in every seed. Both arms make as many updates there, and a batch of shuffled pairs holds answers to many more prompts: its gradient is the better one as "
    "long as no answer has been seen often. From the third epoch on it is behind, and by then it knows what it was trained on far better than what is held out. InstructGPT saw that within its first epoch, with a model that "
    "can remember an answer it has seen once; this one has two layers.",
)
