"""Gao et al., Scaling Laws for Reward Model Overoptimization (2210.10760), with a reward that is known: against a learned proxy, best of n
and PPO without a KL penalty first gain and then lose true reward; the more the proxy has seen, and the larger it is, the later.

One seed by hand, run after run, each beside the others:

    jaxalign pipeline --config=jaxalign/reproduce/overoptimisation.py:base --workdir=runs/gao/base
    jaxalign pipeline --config=jaxalign/reproduce/overoptimisation.py:dim24 --workdir=runs/gao/dim24
    jaxalign pipeline --config=jaxalign/reproduce/overoptimisation.py:rl --workdir=runs/gao/rl

Gold is the rule of the embedded reviews, its labellers are noisy. Proxies of three sizes see one epoch of its comparisons; those of the
policy's own size, also a sixteenth of it. As in the paper the KL penalty is 0, and the forms are d (a - b d) for best of n and
d (a - b log d) for RL, in d = sqrt(KL from the policy they start from).
"""

import json

import numpy as np

from jaxalign import build
from jaxalign.evals import overoptimisation as forms
from jaxalign.evals import stats
from jaxalign.reproduce.runner import Claim, Reproduction, Seed, last

VOCAB, LENGTH, MAX_NEW = 512, 128, 56
SHAPES = {"dim8": dict(dim=8, layers=1, heads=1, hidden=24), "dim24": dict(dim=24, layers=1, heads=2, hidden=64), "base": dict(dim=64, layers=2, heads=2, hidden=172)}
MANY, FEW = 4096, 256  # comparisons that a proxy sees, each once
RATES = {"dim8": 6e-3, "dim24": 2.5e-3, "dim64": 2e-3}  # of the proxies: the narrower, the higher
PROXIES = {"dim8": ("dim8", "reward"), "dim24": ("dim24", "reward"), "dim64": ("base", "reward"), "dim64_few": ("base", "reward_few")}  # run and stage of each
UPDATES, EPOCHS, PROMPTS = 240, 4, 64
BEST_OF, ASKED = 256, 48
FAR = 20.0  # nats: best of 256 is at 4.5, and what a fit says of a turn much further on is not known
WORLD = "jaxalign.tasks.reviews:World"


def get_config(arg=None):
    arg = build.preset(arg, *SHAPES, "rl") or "base"
    c = build.base("overoptimisation", vocab=VOCAB, tied=False, max_len=LENGTH, **SHAPES.get(arg, SHAPES["base"]))
    own = arg == "base"
    at = "data/" if own else "../base/data/"
    if own:
        c.tokenizer.train_on, c.tokenizer.kind = "data/pretrain.jsonl", "bpe"
        c.world = {
            "name": WORLD,
            "sizes": {"pretrain": 30000, "pretrain_eval": 200, "sft": 4000, "sft_eval": 200, "prompts": 3000, "prompts_eval": 256},
            "ranked": 1500,  # prompts with 4 to 9 samples each: some 4,700 disjoint pairs
            "ranked_eval": 200,
            "samples": 256,
            "sampling": {"max_new": MAX_NEW},
        }
    else:
        c.tokenizer.path = "../base/tokenizer"
    if arg == "rl":
        c.world = {
            "name": WORLD,
            "sizes": {"prompts_eval": 256},
            "samples": 256,
            "sampling": {"max_new": MAX_NEW},
            "watch": {"each": 1, "reference": "../base/sft"},
        }
        c.stages = {f"ppo_{p}": _ppo("../" + "/".join(where)) for p, where in PROXIES.items()}
        c.order = tuple(f"ppo_{p}" for p in PROXIES)
        return c
    c.stages = {
        "pretrain": build.stage(
            "lm",
            data=dict(path=at + "pretrain.jsonl", eval_path=at + "pretrain_eval.jsonl", batch_size=16, seq_len=LENGTH),
            train=dict(steps=600, log_every=10, save_every=200, keep=1),
            optim=dict(lr=5e-3, schedule="linear", end=0.0, warmup=30, weight_decay=0.1),
        )
    }
    if own:
        c.stages.sft = build.stage(
            "lm",
            init="pretrain",
            data=dict(path=at + "sft.jsonl", eval_path=at + "sft_eval.jsonl", batch_size=32, seq_len=LENGTH),
            train=dict(steps=100, log_every=10),
            optim=dict(lr=1e-3, warmup=5),
        )
        c.stages.reward_few = _proxy(at, FEW, "sft", "dim64", batch=8)
    c.stages.reward = _proxy(at, MANY, "sft", "dim64") if own else _proxy(at, MANY, "pretrain", arg)
    c.order = ("pretrain", "sft", "reward", "reward_few") if own else ("pretrain", "reward")
    return c


def _proxy(at: str, pairs: int, init: str, size: str, batch: int = 32):
    return build.stage(
        "reward_pairs",
        init=init,
        data=dict(path=at + "pairs.jsonl", eval_path=at + "pairs_eval.jsonl", batch_size=batch, max_len=LENGTH),
        train=dict(steps=pairs // batch, log_every=4),
        optim=dict(lr=RATES[size], schedule="linear", end=0.0, warmup=2, b2=0.99, weight_decay=0.1),
    )


def _ppo(reward: str):
    return build.stage(
        "ppo",
        init="../base/sft",
        data=dict(path="../base/data/prompts.jsonl", batch_size=PROMPTS),
        train=dict(steps=UPDATES, eval_every=8, log_every=4, save_every=120, keep=1),
        optim=dict(lr=1e-4, schedule="constant", warmup=8, b1=0.9, b2=0.999, eps=1e-5),
        rl=dict(reward=reward, epochs=EPOCHS, minibatches=1, beta=0.0),
        sampling=dict(max_new=MAX_NEW),
    )


# -- best of n, from the samples of the policy that RL starts from -----------------------------------------------------


def best_of_n(seed: Seed) -> None:
    """seed-N/base/best_of_n.json: gold and each proxy's scores of BEST_OF answers to each of ASKED held-out prompts."""
    import jax

    from jaxalign.data import rows
    from jaxalign.evals.best import best_of
    from jaxalign.ops import nn

    path = seed.runs["base"] / "best_of_n.json"
    if path.exists():
        return
    w, _, params = build.trained(str(seed.runs["base"] / "sft"))
    records = [r for r, _ in rows.read(str(seed.runs["base"] / "data/prompts_eval.jsonl"))][:ASKED]
    scorers = {p: build.scorer(w, str(seed.runs[run] / stage)) for p, (run, stage) in PROXIES.items()}
    together = lambda rollout, prompts: np.stack([np.asarray(s(rollout, prompts)) for s in scorers.values()], 1)
    key = nn.fold(jax.random.key(seed.number), "best of n")
    kept: list[np.ndarray] = []

    def score(rollout, prompts):
        kept.append(together(rollout, prompts))
        return kept[-1][:, 0]

    made = best_of(w.model, params, build.sampling(w, build.ConfigDict({"max_new": MAX_NEW})), build.prompt_rows(w, records, 8), w.decode, score, key, w.mesh, BEST_OF)
    proxies = np.concatenate(kept).reshape(-1, BEST_OF, len(scorers))[: len(records)]
    world = build.imported(WORLD)(seed=seed.number)
    gold = world.gold_rewards([r["prompt"] for r in records for _ in range(BEST_OF)], [t for row in made.completions for t in row]).reshape(len(records), BEST_OF)
    path.write_text(json.dumps({"gold": np.round(gold, 4).tolist(), "proxies": {p: np.round(proxies[..., i].astype(float), 5).tolist() for i, p in enumerate(scorers)}}))


def points_bon(seed: Seed, proxy: str) -> np.ndarray:
    """[N,2]: KL, gold less that of one answer, at n = 1, 2, 4, ..., BEST_OF."""
    got = json.loads((seed.runs["base"] / "best_of_n.json").read_text())
    gold, scores = np.array(got["gold"]), np.array(got["proxies"][proxy])
    ns = [2**i for i in range(BEST_OF.bit_length())]
    return np.array([(stats.best_of_n_kl(n), stats.best_of_n(scores, gold, n) - gold.mean()) for n in ns])


def points_rl(seed: Seed, proxy: str) -> np.ndarray:
    """[N,3]: KL, gold less that of the start, and the proxy's own mean score at the nearest rollout before it."""
    start = np.array(json.loads((seed.runs["base"] / "best_of_n.json").read_text())["gold"]).mean()
    out, score = [], np.nan
    for r in seed.rows(f"ppo_{proxy}", "rl"):
        score = r.get("objective/scores", score)
        if "eval/kl" in r:
            out.append((max(r["eval/kl"], 0.0), r["eval/gold"] - start, score))
    return np.array(out)


def _turn(seed: Seed, proxy: str) -> forms.Turn:
    return forms.turn(*points_rl(seed, proxy)[:, :2].T)


def turnover(proxy: str):
    """The KL at which gold is highest."""
    return lambda seed: _turn(seed, proxy).kl


def peak(proxy: str):
    return lambda seed: _turn(seed, proxy).reward


def lost(proxy: str):
    """Gold at the peak less gold at the end."""
    return lambda seed: _turn(seed, proxy).reward - _turn(seed, proxy).end_reward


def gained(proxy: str):
    """What the proxy itself says was won between gold's peak and the end."""

    def figure(seed: Seed) -> float:
        scores = forms.smooth(points_rl(seed, proxy)[:, 2])
        return float(scores[-1] - scores[_turn(seed, proxy).at])

    return figure


def accuracy(proxy: str):
    run, stage = PROXIES[proxy]
    return last(stage, "eval/accuracy", n=1, run=run)


def _fitted(fit, points: np.ndarray) -> forms.Fit | None:
    """Of two constants through fewer than three points there is nothing to say."""
    return fit(*points.T) if len(np.unique(points[points[:, 0] > 0, 0])) > 2 else None


def rl_form(proxy: str):
    return lambda seed: _fitted(forms.fit_rl, points_rl(seed, proxy)[:, :2])


def bon_form(proxy: str):
    return lambda seed: _fitted(forms.fit_best_of_n, points_bon(seed, proxy))


def r2(form):
    return lambda proxy: lambda seed: f.r2 if (f := form(proxy)(seed)) else float("nan")


def root(form):
    """sqrt(KL) at which a fitted form is highest; a form that never turns, or beyond FAR, counts as FAR."""
    return lambda proxy: lambda seed: float(np.sqrt(min(f.turnover, FAR))) if (f := form(proxy)(seed)) else float("nan")


def later(form, a: str, b: str):
    """By how much a's turn is to the right of b's, in sqrt(KL)."""
    return lambda seed: root(form)(a)(seed) - root(form)(b)(seed)


def curve_rl(proxy: str):
    return lambda seed: [(float(np.sqrt(k)), float(g)) for k, g, _ in points_rl(seed, proxy)]


def curve_bon(proxy: str):
    return lambda seed: [(float(np.sqrt(k)), float(g)) for k, g in points_bon(seed, proxy)]


FORMS = {"RL": rl_form, "best of n": bon_form}
FIGURES = {"accuracy": accuracy, "RL, KL where gold is highest": turnover, "RL, gold there": peak, "RL, gold lost after it": lost, "RL, proxy won after it": gained}
FIGURES |= {f"{name}, R2 of the form": r2(form) for name, form in FORMS.items()} | {f"{name}, turn of the form": root(form) for name, form in FORMS.items()}
SMALL, LARGE, UNTAUGHT = "dim8", "dim64", "dim64_few"
REPRODUCTION = Reproduction(
    title="Over-optimisation of a learned reward",
    get_config=get_config,
    runs=("base", "dim8", "dim24", "rl"),
    then=best_of_n,
    curves={**{f"RL, {p}": curve_rl(p) for p in PROXIES}, **{f"best of n, {p}": curve_bon(p) for p in PROXIES}},
    figures={
        **{f"{what}, {p}": f(p) for what, f in FIGURES.items() for p in PROXIES},
        "RL, KL where gold is highest, large less small": lambda seed: turnover(LARGE)(seed) - turnover(SMALL)(seed),
        "RL, KL where gold is highest, all pairs less few": lambda seed: turnover(LARGE)(seed) - turnover(UNTAUGHT)(seed),
        "RL, gold there, large less small": lambda seed: peak(LARGE)(seed) - peak(SMALL)(seed),
        "RL, gold there, all pairs less few": lambda seed: peak(LARGE)(seed) - peak(UNTAUGHT)(seed),
        **{f"{name}, turn of the form, large less small": later(form, LARGE, SMALL) for name, form in FORMS.items()},
        **{f"{name}, turn of the form, all pairs less few": later(form, LARGE, UNTAUGHT) for name, form in FORMS.items()},
    },
    x="sqrt(KL), nats",
    y="gold reward less that of the start",
    tolerance=0.4,
    tolerances={f"RL, KL where gold is highest, {p}": 6.0 for p in (*PROXIES, "large less small", "all pairs less few")} | {f"RL, gold lost after it, {p}": 1.0 for p in PROXIES} | {f"RL, proxy won after it, {p}": 1.0 for p in PROXIES} | {f"{n}, turn of the form, {p}": 1.0 for n in FORMS for p in PROXIES},
    claims=(
        Claim(f"RL, gold lost after it, {SMALL}", 0.1, 10.0, "2210.10760, figure 1b: gold turns over"),
        Claim(f"RL, proxy won after it, {SMALL}", 0.01, 100.0, "there: while the proxy still rises"),
        Claim("RL, KL where gold is highest, large less small", 0.0, 100.0, "figure 1: the turn moves right with the proxy's size; as seen, without a form"),
        Claim("RL, KL where gold is highest, all pairs less few", 0.0, 100.0, "section 3.2: and with its data"),
        *(Claim(f"{name}, turn of the form, large less small", 0.0, 10.0, "figure 1: the turn moves right with the proxy's size") for name in FORMS),
        *(Claim(f"{name}, turn of the form, all pairs less few", 0.0, 10.0, "section 3.2: and with its data") for name in FORMS),
        Claim("RL, gold there, large less small", 0.0, 10.0, "figure 1: a larger proxy leaves more gold at the turn"),
        Claim("RL, gold there, all pairs less few", 0.0, 10.0, "section 3.2: and so do more comparisons"),
        *(Claim(f"{name}, R2 of the form, {p}", 0.8, 1.0, "the form, fitted; no number is printed there") for name in FORMS for p in PROXIES),
    ),
    notes="Where the form of RL fits badly (R2 below 0.8: a smooth rise, then a cliff, or a long plain after the fall) the turn it has is not where gold was highest; both are listed. Of best of n the form fits, "
    "and its turn moves right with size and with data, seed by seed.",
)
