"""InstructGPT (Ouyang et al. 2022, 2203.02155) on the embedded reviews: SFT < PPO in win rate, what PPO forgets of its pretraining (the
alignment tax), and that pretraining gradients (PPO-ptx) give a part of it back.

One seed by hand, or one arm of it:

    jaxalign pipeline --config=jaxalign/reproduce/instructgpt.py --workdir=runs/instructgpt
    jaxalign pipeline --config=jaxalign/reproduce/instructgpt.py:ppo_ptx --workdir=runs/instructgpt-ptx

The reward model reads all K = 4 to 9 ranked answers of a prompt in one batch element, once. The tax is the loss on held-out pretraining
text, of which requests with their answers are only a part. Wins are by the gold reward, over SFT's answer to the same prompt.
"""

from jaxalign import build
from jaxalign.reproduce import reviews
from jaxalign.reproduce.runner import Claim, Reproduction, Seed, last

ARMS = ("ppo", "ppo_ptx")
UPDATES = 200


def get_config(arg=None):
    arm = build.preset(arg, *ARMS)
    c = reviews.config("instructgpt", ranked=1200, watch={"each": 2, "reference": "sft"})
    c.stages.reward = reviews.reward(steps=150)
    c.stages.ppo = reviews.ppo(UPDATES, rl=dict(beta=0.02))
    c.stages.ppo_ptx = reviews.ppo(UPDATES, rl=dict(beta=0.02, mix=dict(path="data/pretrain.jsonl", batch_size=16, seq_len=reviews.LENGTH)), objective=dict(ptx_coef=0.3))
    c.order = ("pretrain", "sft", "reward", *(a for a in ARMS if arm in ("", a)))
    return c


def then(seed: Seed) -> None:
    reviews.judge(seed, ("pretrain", *ARMS))


def tax(arm: str):
    """Nats a token of pretraining text more than SFT."""
    return lambda seed: reviews.judged(arm, "text")(seed) - reviews.judged("sft", "text")(seed)


def line(arm: str):
    return lambda seed: [(reviews.judged(a, "text")(seed), reviews.judged(a, "win")(seed)) for a in ("sft", arm)]


REPRODUCTION = Reproduction(
    title="SFT, PPO, PPO-ptx",
    get_config=get_config,
    then=then,
    curves={a: line(a) for a in ARMS},
    figures={
        "reward model, accuracy": last("reward", "eval/accuracy", n=1),
        **{f"{a}, win rate over SFT": reviews.judged(a, "win") for a in ARMS},
        **{f"{a}, gold": reviews.judged(a, "gold") for a in ("sft", *ARMS)},
        **{f"{a}, KL": reviews.judged(a, "kl") for a in ARMS},
        **{f"{a}, tax": tax(a) for a in ARMS},
        "ppo_ptx less ppo, win rate": lambda seed: reviews.judged("ppo_ptx", "win")(seed) - reviews.judged("ppo", "win")(seed),
        "share of the tax that ptx takes off": lambda seed: 1 - tax("ppo_ptx")(seed) / max(tax("ppo")(seed), 1e-3),
    },
    x="loss on pretraining text, nats a token",
    y="gold win rate over SFT",
    tolerance=0.1,
    tolerances={f"{a}, {what}": t for a in ARMS for what, t in (("gold", 0.5), ("KL", 4.0), ("tax", 0.25))} | {"sft, gold": 0.3, "share of the tax that ptx takes off": 0.2},
    claims=(
        Claim("ppo, win rate over SFT", 0.6, 1.0, "2203.02155, figure 1: SFT < PPO"),
        Claim("ppo_ptx less ppo, win rate", 0.0, 1.0, "there: PPO < PPO-ptx"),
        Claim("ppo, tax", 0.02, 10.0, "section 4.2: PPO loses on public language tasks"),
        Claim("share of the tax that ptx takes off", 0.1, 1.5, "there: mixing pretraining gradients in mitigates it"),
    ),
    notes="PPO-ptx wins more often at less than half the KL: PPO without it goes far past the point where gold reward is highest (over-optimisation, above), and the pretraining gradients hold it back.",
)
