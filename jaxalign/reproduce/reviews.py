"""What the reproductions on the embedded reviews share: a small policy that has read and seen demonstrations, and what is asked of
those that come after it."""

from __future__ import annotations

import json

import numpy as np

from jaxalign import build
from jaxalign.evals import stats
from jaxalign.reproduce.runner import Figure, Seed

VOCAB, LENGTH, MAX_NEW = 512, 128, 56
SHAPE = dict(dim=64, layers=2, heads=2, hidden=172)
WORLD = "jaxalign.tasks.reviews:World"
GOLD = "jaxalign.tasks.review_labels:gold_reward"
SIZES = {"pretrain": 30000, "pretrain_eval": 300, "sft": 4000, "sft_eval": 200, "prompts": 4000, "prompts_eval": 256}


def config(name: str, ranked: int, **world):
    """A config with its world and the stages pretrain and sft; `ranked` prompts have samples of the SFT policy ranked."""
    c = build.base(name, vocab=VOCAB, tied=False, max_len=LENGTH, **SHAPE)
    c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
    c.world = {"name": WORLD, "sizes": dict(SIZES), "ranked": ranked, "ranked_eval": 250, "samples": 512, "sampling": {"max_new": MAX_NEW}, **world}
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path="data/pretrain.jsonl", eval_path="data/pretrain_eval.jsonl", batch_size=16, seq_len=LENGTH),
            train=dict(steps=600, log_every=10, save_every=200, keep=1),
            optim=dict(lr=5e-3, schedule="linear", end=0.0, warmup=30, weight_decay=0.1),
        ),
        "sft": build.stage(
            "lm",
            init="pretrain",
            data=dict(path="data/sft.jsonl", eval_path="data/sft_eval.jsonl", batch_size=32, seq_len=LENGTH),
            train=dict(steps=100, log_every=10, keep=1),
            optim=dict(lr=1e-3, warmup=5),
        ),
    }
    return c


def reward(objective: str = "reward", steps: int = 150, **sections):
    """A reward model from the SFT policy, one pass over `steps` x 8 prompts."""
    data = dict(path="data/rankings.jsonl", eval_path="data/rankings_eval.jsonl", batch_size=8, max_len=LENGTH) | sections.pop("data", {})
    optim = dict(lr=8e-4, schedule="linear", end=0.0, warmup=10, b2=0.99, weight_decay=0.1)
    return build.stage(objective, init="sft", data=data, train=dict(steps=steps, log_every=5, keep=1) | sections.pop("train", {}), optim=optim, **sections)


def ppo(updates: int, *, reward: str = "reward", **sections):
    """PPO from the SFT policy; 4 updates of each rollout of 64 answers."""
    return build.stage(
        "ppo",
        init="sft",
        data=dict(path="data/prompts.jsonl", batch_size=64),
        train=dict(steps=updates, eval_every=max(updates // 12, 1), log_every=4, save_every=100, keep=1) | sections.pop("train", {}),
        optim=dict(lr=4e-4, schedule="linear", end=0.0, warmup=8, b1=0.9, b2=0.999, eps=1e-5) | sections.pop("optim", {}),
        rl=dict(reward=reward, epochs=4, minibatches=1) | sections.pop("rl", {}),
        sampling=dict(max_new=MAX_NEW) | sections.pop("sampling", {}),
        **sections,
    )


def judge(seed: Seed, names: tuple[str, ...], run: str = "", each: int = 4) -> dict[str, dict[str, float]]:
    """{policy: gold, kl to SFT, win rate over SFT's answers to the same held-out prompts, loss on held-out pretraining text}; kept in
    judged.json of the run."""
    import jax

    from jaxalign.data import rows
    from jaxalign.evals import policy
    from jaxalign.objectives import lm
    from jaxalign.ops import nn
    from jaxalign.train import state

    path = seed.runs[run] / "judged.json"
    if path.exists():
        return json.loads(path.read_text())
    out, gold = {}, {}
    w, _, sft = build.trained(str(seed.runs[run] / "sft"))
    prompts = [r for r, _ in rows.read(str(seed.runs[run] / "data/prompts_eval.jsonl"))]
    records = [r for r in prompts for _ in range(each)]
    text = build.data_source(w, build.ConfigDict({"seq_len": LENGTH}), "data/pretrain_eval.jsonl", 16, 0, kind="tokens", shuffle=False)
    loss = build.evaluation(lm.lm(w.model), w.mesh, {}, text)
    world = build.imported(WORLD)(seed=seed.number)
    how = build.sampling(w, build.ConfigDict({"max_new": MAX_NEW}))
    for name in ("sft", *names):
        params = sft if name == "sft" else build.trained(str(seed.runs[run] / name))[2]
        key = nn.fold(jax.random.key(seed.number), "judge", name)
        got = policy.sample(w.model, params, how, build.prompt_rows(w, records, 256), w.decode, key, w.mesh, reference=sft)
        gold[name] = world.gold_rewards([r["prompt"] for r in records], got.completions, records)
        with jax.set_mesh(w.mesh):
            nll = loss(state.TrainState(0, params, (), (), jax.random.key(0)))["nll"]
        out[name] = {"gold": float(gold[name].mean()), "kl": got.kl, "win": stats.win_rate(gold[name], gold["sft"]), "text": nll, "length": float(got.length.mean())}
    path.write_text(json.dumps(out, indent=1))
    return out


def judged(name: str, what: str, run: str = "") -> Figure:
    """A number of `judge`."""
    return lambda seed: float(json.loads((seed.runs[run] / "judged.json").read_text())[name][what])


def at_kl(points, kl: float) -> float:
    """The most reward of a set of (KL, reward) points at a KL: on the line between the corners of their upper hull, and not beyond
    the last of them that rises. NaN to the left of all."""
    from jaxalign.evals import overoptimisation

    x, y = zip(*overoptimisation.hull(*zip(*points)))
    return float(np.interp(kl, x, y)) if kl >= x[0] else float("nan")
