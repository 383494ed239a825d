"""Held-out metrics of what a pipeline has trained, beside the truth where the world knows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_integer("samples", 0, "samples per policy (0: what the config says)", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    from jaxalign import build

    config, workdir = fv.config, Path(fv.workdir)
    w = build.world(config, workdir)
    world = build.imported(config.world.name)(seed=config.seed) if "world" in config else None
    if fv.samples and world is not None:
        with config.unlocked():
            config.world.samples = fv.samples
    out = evaluate(w, world, config)
    import jax

    if jax.process_index() == 0:
        print(json.dumps(out, indent=1))


def evaluate(w, world, config) -> dict:
    """{"world", stage: held-out figures}, and "policies" and "frontier" in a world: of what the run directory holds."""
    from jaxalign import build

    out: dict = {"world": config.world.name if world is not None else None}
    stages = build.stages(config)
    done = [n for n in stages if (w.stage_dir(n) / "params" / "manifest.json").exists()]
    if not done:
        raise UserError(f"{w.workdir} holds no finished stage; run jaxalign pipeline or train first")
    for name in done:
        kind = stages[name].objective.name
        if kind == "lm" and stages[name].data.eval_path:
            out[name] = _language(w, world, stages[name], name)
        elif kind in build.REWARDS and stages[name].data.eval_path:
            out[name] = _reward(w, world, stages[name], name)
        elif stages[name].data.get("eval_path"):
            out[name] = _objective(w, stages[name], name)
    if world is not None and "sft" in done:
        out["policies"] = _policies(w, world, config, [n for n in done if stages[n].objective.name not in build.REWARDS and n != "pretrain"])
        out["frontier"] = frontier(w, world, config)
    if len(out) == 1:
        raise UserError(f"nothing to evaluate: set data.eval_path of {' or '.join(done)} to a file of held-out rows")
    return out


def _objective(w, c, name: str) -> dict:
    """A stage's own metrics on its held-out rows."""
    import jax

    from jaxalign import build
    from jaxalign.train import state

    s = build.make_stage(w, name, c, w.stage_dir(name))
    params = build.load_params(w, str(w.stage_dir(name).absolute()), s.model.specs(), name)
    with jax.set_mesh(w.mesh):
        return s.evaluate(state.TrainState(0, params, s.objective.init_aux(params) if s.objective.init_aux else (), (), jax.random.key(0)), whole=True)


def _language(w, world, c, name: str) -> dict:
    """Loss per predicted token on held-out text; in a world on whole documents, one per row, beside its own on the same."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.objectives import lm
    from jaxalign.train import state

    params = build.load_params(w, str(w.stage_dir(name).absolute()), w.model.specs(), name)
    whole = dict(packing="pad", too_long="error") if world is not None else {}  # the floor is that of whole documents
    source = build.data_source(w, c.data, c.data.eval_path, c.data.batch_size, 0, shuffle=False, **whole)
    metrics = build.evaluation(lm.lm(w.model), w.mesh, {}, source)
    empty = state.TrainState(0, params, (), (), jax.random.key(0))
    with jax.set_mesh(w.mesh):
        got = metrics(empty, counts=True)
    out = {"nll": got["nll"], "perplexity": math.exp(got["nll"]), "tokens": int(got["tokens"]), "accuracy": got["mean_token_accuracy"]}
    if hasattr(world, "log_prob"):
        records = [r for r, _ in rows.read(w.find(c.data.eval_path))]
        logs = [world.log_prob(r["text"]) if "text" in r else world.demonstration_log_prob(r["prompt"], r["completion"]) for r in records]
        if all(map(math.isfinite, logs)):
            out["floor"] = -sum(logs) / out["tokens"]
            out["ratio"] = out["nll"] / out["floor"]
    return out


def _reward(w, world, c, name: str) -> dict:
    """Accuracy on all strict pairs of the held-out rankings, and the gold reward's on the same noisy labels."""
    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy, stats
    from jaxalign.models import heads

    w = w.scored
    scalar = heads.Scalar(w.model)
    params = build.load_params(w, str(w.stage_dir(name).absolute()), scalar.specs(), name)
    source = build.data_source(w, c.data, c.data.eval_path, c.data.batch_size, 0, shuffle=False)
    margins, groups = [], []
    for i, (scores, ranks) in enumerate(policy.candidate_scores(scalar, params, source, w.mesh)):
        better = ranks[:, None] < ranks[None, :]
        gaps = (scores[:, None] - scores[None, :])[better]
        margins.append(gaps)
        groups.append(np.full(len(gaps), i))
    margins, groups = np.concatenate(margins), np.concatenate(groups)
    correct = stats.outcomes(margins, np.zeros_like(margins))
    out = {
        "accuracy": float(correct.mean()),
        "interval": list(stats.bootstrap(correct, groups)),
        "pairs": len(margins),
        "prompts": int(groups.max()) + 1,
        **stats.calibration(margins, np.zeros_like(margins))._asdict(),
    }
    if hasattr(world, "log_prob"):
        records = [r for r, _ in rows.read(w.find(c.data.eval_path))]
        hits = []
        for r in records:
            gold = world.gold_rewards([r["prompt"]] * len(r["completions"]), r["completions"])
            ranks = np.asarray(r["ranks"])
            gaps = (gold[:, None] - gold[None, :])[ranks[:, None] < ranks[None, :]]
            hits.append(stats.outcomes(gaps, np.zeros_like(gaps)))
        out["gold_accuracy"] = float(np.concatenate(hits).mean())
    return out


BETAS = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2)


def frontier(w, world, config) -> list[dict]:
    """[{"beta", "gold", "kl", "ess"}] of the policies that none can beat, pi* ~ pi_sft exp(gold / beta), from SFT samples of
    held-out prompts (`world.frontier`: how many prompts, and samples of each), as far as the effective sample size
    averages 100 or more per prompt."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy, stats
    from jaxalign.ops import nn

    sft = build.load_params(w, "sft", w.model.specs(), "frontier")
    records = [r for r, _ in rows.read(w.find("data/prompts_eval.jsonl"))][: config.world.frontier.prompts]
    repeated = [r for r in records for _ in range(config.world.frontier.each)]
    key = nn.fold(jax.random.key(config.seed), "frontier")
    got = policy.sample(w.model, sft, build.sampling(w, config.world.sampling), build.prompt_rows(w, repeated, 256), w.decode, key, w.mesh, score=False)
    gold = world.gold_rewards([r["prompt"] for r in repeated], got.completions).reshape(len(records), -1)
    points = [(b, stats.tilted(gold, b)) for b in BETAS]
    return [{"beta": b, "gold": t.reward, "kl": t.kl, "ess": t.ess} for b, t in points if t.ess >= 100]


def _policies(w, world, config, names: list[str]) -> dict:
    """Gold reward, KL to SFT and win rate against SFT's samples of the same held-out prompts."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy, stats
    from jaxalign.ops import nn

    n = config.world.samples
    prompts = [r for r, _ in rows.read(w.find("data/prompts_eval.jsonl"))]
    records = [prompts[i % len(prompts)] for i in range(n)]
    batch = min(256, -(-n // 8) * 8)
    how = build.sampling(w, config.world.sampling)
    reference = build.load_params(w, "sft", w.model.specs(), "evaluation")
    got, gold = {}, {}
    for name in names:
        params = reference if name == "sft" else build.load_params(w, str(w.stage_dir(name).absolute()), w.model.specs(), name)
        source = build.prompt_rows(w, records, batch)
        key = nn.fold(jax.random.key(config.seed), "evaluate", name)
        got[name] = policy.sample(w.model, params, how, source, w.decode, key, w.mesh, reference=reference)
        gold[name] = world.gold_rewards([r["prompt"] for r in records], got[name].completions)
    out = {}
    for name, s in got.items():
        out[name] = {
            "gold": float(gold[name].mean()),
            "gold_std": float(gold[name].std()),
            "kl": float((s.logp - s.ref_logp).mean()),
            "length": float(s.length.mean()),
            "truncated": float(s.truncated.mean()),
            "samples": [{"prompt": r["prompt"], "completion": t, "gold": float(g)} for r, t, g in list(zip(records, s.completions, gold[name]))[:8]],
        }
        if name != "sft" and "sft" in got:
            pair = gold[name], gold["sft"]
            out[name] |= {"win_rate": stats.win_rate(*pair), "win_interval": list(stats.win_interval(*pair, np.arange(n) % len(prompts)))}
    return out
