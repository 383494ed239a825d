"""Held-out metrics of what a pipeline has trained, beside the truth where the world knows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from absl import flags

from jaxalign.cli import answers, frontier as frontiers
from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_float("beta", 1.0, "of stages with Q heads (ILQL): how much advantages weigh when they sample", lower_bound=0.0, flag_values=fv)
    flags.DEFINE_integer("samples", 0, "samples per policy (0: what the config says); with --prompts, answers to each prompt (0: 1)", flag_values=fv)
    flags.DEFINE_integer("stride", 0, "of language models also the loss in windows of data.seq_len tokens that begin every so many", lower_bound=0, flag_values=fv)
    answers.define(fv)
    frontiers.define(fv)


def main(fv, rest):
    if fv.frontier:
        return frontiers.main(fv)
    needed(fv, "config", "workdir")
    from jaxalign import build

    config, workdir = fv.config, Path(fv.workdir)
    w = build.world(config, workdir)
    if fv.prompts:
        return answers.main(fv, w)
    world = build.embedded(config)
    if fv.samples and world is not None:
        with config.unlocked():
            config.world.samples = fv.samples
    out = evaluate(w, world, config, fv.beta, fv.stride)
    import jax

    if jax.process_index() == 0:
        print(json.dumps(out, indent=1))


def evaluate(w, world, config, beta: float = 1.0, stride: int = 0) -> dict:
    """{"world", stage: held-out figures}, and "policies", "frontier" and "best_of_n" in a world: of what the run directory holds."""
    from jaxalign import build

    out: dict = {"world": config.world.name if world is not None else None}
    stages = build.stages(config)
    done = [n for n in stages if (w.stage_dir(n) / "params" / "manifest.json").exists()]
    if not done:
        raise UserError(f"{w.workdir} holds no finished stage; run jaxalign pipeline or train first")
    for name in done:
        kind = stages[name].objective.name
        if kind == "lm" and stages[name].data.eval_path:
            out[name] = _language(w, world, stages[name], name, stride)
        elif kind in build.REWARDS and stages[name].data.eval_path:
            out[name] = _reward(w, world, stages[name], name)
        elif stages[name].data.get("eval_path"):
            out[name] = _objective(w, stages[name], name)
    if world is not None and "sft" in done:
        judge = _judge(w, stages, done)
        out["policies"] = _policies(w, world, config, [n for n in done if stages[n].objective.name not in build.REWARDS and n != "pretrain"], beta, judge)
        out["frontier"], out["best_of_n"] = frontier(w, world, config, judge)
    if len(out) == 1:
        raise UserError(f"nothing to evaluate: set data.eval_path of {' or '.join(done)} to a file of held-out rows")
    return out


def _objective(w, c, name: str) -> dict:
    """A stage's own metrics on its held-out rows."""
    import jax

    from jaxalign import build
    from jaxalign.train import state
    from jaxalign.train.log import read_jsonl

    s = build.make_stage(w, name, c, w.stage_dir(name))
    if s.objective.update_aux:  # a state of its own (a reference that moved, a running shift) is in checkpoints alone: what the run said at its end
        said = [r for r in read_jsonl(w.stage_dir(name) / "metrics.jsonl") if any(k.startswith("eval/") for k in r)]
        return {k.removeprefix("eval/"): v for k, v in said[-1].items() if k.startswith("eval/")} if said else {}
    params = build.load_params(w, str(w.stage_dir(name).absolute()), s.model.specs(), name)
    with jax.set_mesh(w.mesh):
        return s.evaluate(state.TrainState(0, params, (), s.objective.init_aux(params) if s.objective.init_aux else (), jax.random.key(0)), whole=True)


def _meter(w, c, **options):
    """params -> a language model's metrics on the held-out rows of a section; one program for all of them."""
    import jax

    from jaxalign import build
    from jaxalign.objectives import lm
    from jaxalign.train import state

    source = build.data_source(w, c.data, c.data.eval_path, c.data.batch_size, 0, shuffle=False, **options)
    metrics = build.evaluation(lm.lm(w.model), w.mesh, {}, source)

    def measure(params) -> dict:
        with jax.set_mesh(w.mesh):
            return metrics(state.TrainState(0, params, (), (), jax.random.key(0)), counts=True)

    return measure


def _language(w, world, c, name: str, stride: int = 0) -> dict:
    """Loss per predicted token on held-out text, and per byte; in a world on whole documents, one per row, beside its own on the
    same. stride: also with the context that windows of data.seq_len tokens give, one every so many tokens."""
    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import perplexity

    params = build.load_params(w, str(w.stage_dir(name).absolute()), w.model.specs(), name)
    whole = dict(packing="pad", too_long="error") if world is not None else {}  # the floor is that of whole documents
    got = _meter(w, c, **whole)(params)
    out = {"nll": got["nll"], "perplexity": perplexity.perplexity(got["nll"], 1), "tokens": int(got["tokens"]), "accuracy": got["mean_token_accuracy"]}
    encoded = _documents(w, c)
    size = sum(len(w.decode([t for t, m in zip(*e) if m]).encode()) for e in encoded)
    if size and sum(sum(m) for _, m in encoded) == out["tokens"]:  # nothing was cut off or left out
        out["bits_per_byte"] = perplexity.bits_per_byte(got["nll"] * got["tokens"], size)
    if stride:
        if not encoded:
            raise UserError(f"--stride: every row of {c.data.eval_path} must be readable, without data.format; or leave --stride out")
        strided = perplexity.strided(w.model, params, encoded, context=c.data.seq_len, stride=stride, batch=c.data.batch_size, mesh=w.mesh)
        out |= {"strided_perplexity": strided.perplexity, "strided_tokens": strided.tokens, "strided_bits_per_byte": perplexity.bits_per_byte(strided.nll, size)}
    if hasattr(world, "log_prob"):
        records = [r for r, _ in rows.read(w.find(c.data.eval_path))]
        logs = [world.log_prob(r["text"]) if "text" in r else world.demonstration_log_prob(r["prompt"], r["completion"]) for r in records]
        if all(map(math.isfinite, logs)):
            out["floor"] = -sum(logs) / out["tokens"]
            out["ratio"] = out["nll"] / out["floor"]
    return out


def _documents(w, c) -> list[tuple]:
    """(ids, mask) of every held-out row, whole; [] where some cannot be read, or only as data.format says."""
    from jaxalign.data import formats, rows
    from jaxalign.data.templates import encode_example

    try:
        return [encode_example(formats.canonical(r, where), w.tokenizer, w.template) for r, where in rows.read(w.find(c.data.eval_path))] if not c.data.get("format") else []
    except UserError:
        return []


def _reward(w, world, c, name: str) -> dict:
    """What a reward model says of held-out judgements, and in a world what the gold reward says of the same noisy labels."""
    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy
    from jaxalign.models import heads

    w = w.scored
    scalar = heads.Scalar(w.model)
    params = build.load_params(w, str(w.stage_dir(name).absolute()), scalar.specs(), name)
    source = build.data_source(w, c.data, c.data.eval_path, c.data.batch_size, 0, shuffle=False)
    if c.data.kind == "labelled":
        return _scores(*policy.row_scores(scalar, params, source, w.mesh))
    if c.data.kind == "steps":
        return _steps(policy.judged_steps(scalar, params, source, w.mesh))
    records = [r for r, _ in rows.read(w.find(c.data.eval_path))]
    return _comparisons(world, w.mesh, source, policy.candidate_scores(scalar, params, source, w.mesh), records)


def _comparisons(world, mesh, source, judged: list, records: list[dict]) -> dict:
    """Accuracy on all strict pairs, calibration, and what it goes with."""
    from jaxalign.evals import agreement, calibration, policy, stats

    margins, groups = [], []
    for i, (scores, ranks) in enumerate(judged):
        better = ranks[:, None] < ranks[None, :]
        gaps = (scores[:, None] - scores[None, :])[better]
        margins.append(gaps)
        groups.append(np.full(len(gaps), i))
    margins, groups = np.concatenate(margins), np.concatenate(groups)
    zero = np.zeros_like(margins)
    correct = stats.outcomes(margins, zero)
    out = {
        "accuracy": float((correct == 1).mean()),  # a tie is wrong, as in training
        "interval": list(stats.bootstrap(correct == 1, groups)),
        "tie_rate": float((correct == 0.5).mean()),
        "pairs": len(margins),
        "prompts": int(groups.max()) + 1,
        **calibration.calibration(margins, zero)._asdict(),
        "reliability": [b._asdict() for b in calibration.reliability(margins, zero)],
    }
    # Each half of the prompts judged at the temperature that the other half wants.
    halves = [(groups % 2 == k, groups % 2 != k) for k in (0, 1)] if groups.max() else []
    temperatures = [calibration.temperature(margins[other], zero[other]) for _, other in halves]
    if halves and all(0 < t < math.inf for t in temperatures):
        cooled = np.concatenate([margins[own] / t for (own, _), t in zip(halves, temperatures)])
        out |= {"temperature": calibration.temperature(margins, zero)} | {f"{k}_at_temperature": v for k, v in calibration.calibration(cooled, 0 * cooled)._asdict().items()}
    within = lambda each: np.concatenate([np.asarray(x, float) - np.mean(x) for x in each])  # what prompts differ in says nothing of answers
    scores = within([s for s, _ in judged])
    lengths = policy.candidate_lengths(source, mesh)
    if [len(x) for x in lengths] == [len(s) for s, _ in judged]:
        out["length_correlation"] = stats.pearson(scores, within(lengths))
    whole = len(records) == len(judged)  # else some rows were left out, and which one an answer is from is not known
    if whole and all(len(s) == 2 for s, _ in judged):
        for key in ("rating", "subset"):
            if all(isinstance(r.get(key), str) for r in records) and len(margins) == len(records):
                parts = agreement.by_group(margins, zero, [r[key] for r in records])
                out[f"by_{key}"] = {k: {**p._asdict(), "interval": list(p.interval)} for k, p in parts.items()}
                if key == "subset":
                    out["mean_of_subsets"] = agreement.mean_of_parts(parts)
    if whole and all(isinstance(r.get("votes"), list) for r in records):
        votes = np.array([[sum(map(bool, r["votes"])), len(r["votes"]) - sum(map(bool, r["votes"]))] for r in records])
        if len(set(votes.sum(1))) == 1 and votes[0].sum() > 1:
            out["labellers_kappa"] = agreement.fleiss_kappa(votes)
    if hasattr(world, "log_prob"):
        hits, golds = [], []
        for r in records:
            gold = world.gold_rewards([r["prompt"]] * len(r["completions"]), r["completions"])
            ranks = np.asarray(r["ranks"])
            gaps = (gold[:, None] - gold[None, :])[ranks[:, None] < ranks[None, :]]
            hits.append(stats.outcomes(gaps, np.zeros_like(gaps)))
            golds.append(gold)
        out["gold_accuracy"] = float(np.concatenate(hits).mean())
        if [len(g) for g in golds] == [len(s) for s, _ in judged]:
            out |= {"gold_pearson": stats.pearson(scores, within(golds)), "gold_spearman": stats.spearman(scores, within(golds))}
    return _finite(out)


def _scores(got: np.ndarray, said: np.ndarray) -> dict:
    """A regression on what people said."""
    from jaxalign.evals import stats

    d = got.astype(float) - said
    out = {"mean_squared_error": float((d**2).mean()), "mean_absolute_error": float(np.abs(d).mean()), "pearson": stats.pearson(got, said), "spearman": stats.spearman(got, said)}
    return _finite({**out, "explained_variance": float(1 - d.var() / said.var()) if np.ptp(said) else math.nan, "answers": len(d)})


def _steps(judged: list) -> dict:
    """Steps that are right or wrong, and the first wrong one of each answer. Labels of 1/2 are neither."""
    from jaxalign.evals import calibration, stats

    logits, labels = (np.concatenate(x).astype(float) for x in zip(*judged))
    answer = np.repeat(np.arange(len(judged)), [len(s) for s, _ in judged])
    sure = labels != 0.5
    towards = np.where(labels > 0.5, logits, -logits)[sure]  # above 0 where the model is right
    correct = stats.outcomes(towards, 0 * towards)
    first = lambda wrong: int(wrong.argmax()) if wrong.any() else -1
    found = [first(s < 0) == first(y < 0.5) for s, y in judged]
    return _finite({
        "accuracy": float((correct == 1).mean()), "interval": list(stats.bootstrap(correct == 1, answer[sure])), "first_error_found": float(np.mean(found)),
        "wrong_steps": float((labels < 0.5).mean()), "steps": len(labels), "answers": len(judged),
        **calibration.calibration(towards, 0 * towards)._asdict(), "reliability": [b._asdict() for b in calibration.reliability(towards, 0 * towards)],
    })  # fmt: skip


def _finite(out: dict) -> dict:
    """Without what could not be measured: JSON has no NaN."""
    return {k: v for k, v in out.items() if not isinstance(v, float) or math.isfinite(v)}


BETAS = (8.0, 4.0, 2.0, 1.5, 1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2)


def _judge(w, stages: dict, done: list[str]) -> tuple | None:
    """(network, weights) of the last finished reward model of whole answers; None where there is none."""
    from jaxalign import build
    from jaxalign.models import heads

    names = [n for n in done if stages[n].objective.name in build.REWARDS and stages[n].data.kind != "steps"]
    if not names or w.scored is not w:
        return None
    scalar = heads.Scalar(w.model)
    return scalar, build.load_params(w, str(w.stage_dir(names[-1]).absolute()), scalar.specs(), names[-1])


def frontier(w, world, config, judge: tuple | None = None) -> tuple[list[dict], list[dict]]:
    """Two lists, both from SFT samples of held-out prompts (`world.frontier`: how many prompts, and samples of each).

    [{"beta", "gold", "kl", "ess"}] of the policies that none can beat, pi* ~ pi_sft exp(gold / beta), as far as the effective
    sample size averages 100 or more per prompt; [{"n", "kl", "gold", "proxy"}] of the best of n by the learned reward `judge`."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import overoptimisation, policy, stats
    from jaxalign.ops import nn

    sft = build.load_params(w, "sft", w.model.specs(), "frontier")
    records = [r for r, _ in rows.read(w.find("data/prompts_eval.jsonl"))][: config.world.frontier.prompts]
    repeated = [r for r in records for _ in range(config.world.frontier.each)]
    key = nn.fold(jax.random.key(config.seed), "frontier")
    got = policy.sample(w.model, sft, build.sampling(w, config.world.sampling), build.prompt_rows(w, repeated, 256), w.decode, key, w.mesh, score=False, judge=judge)
    gold = world.gold_rewards([r["prompt"] for r in repeated], got.completions).reshape(len(records), -1)
    points = [(b, stats.tilted(gold, b)) for b in BETAS]
    best = []
    if judge is not None:
        proxy = got.proxy.reshape(gold.shape)
        ns = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= gold.shape[1]]
        best = [{"n": n, "kl": kl, "gold": g, "proxy": stats.best_of_n(proxy, proxy, n)} for n, (kl, g) in zip(ns, overoptimisation.best_of_n_points(proxy, gold, ns))]
    return [{"beta": b, "gold": t.reward, "kl": t.kl, "ess": t.ess} for b, t in points if t.ess >= 100], best


def _policies(w, world, config, names: list[str], beta: float, judge: tuple | None = None) -> dict:
    """Gold and learned reward, KL to SFT, win rate against SFT's samples of the same held-out prompts and Elo among all, how
    different the answers are, and the loss on pretraining text, which alignment may cost."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import diversity, policy, stats, tournament
    from jaxalign.ops import nn

    n = config.world.samples
    prompts = [r for r, _ in rows.read(w.find("data/prompts_eval.jsonl"))]
    records = [prompts[i % len(prompts)] for i in range(n)]
    batch = min(256, -(-n // 8) * 8)
    how = build.sampling(w, config.world.sampling)
    reference = build.load_params(w, "sft", w.model.specs(), "evaluation")
    got, gold, loss = {}, {}, {}
    text = build.stages(config).get("pretrain")
    measure = _meter(w, text) if text is not None and text.objective.name == "lm" and text.data.eval_path else None
    for name in names:
        model = build.valued(w, w.stage_dir(name), beta).model
        params = reference if name == "sft" else build.load_params(w, str(w.stage_dir(name).absolute()), model.specs(), name)
        source = build.prompt_rows(w, records, batch)
        key = nn.fold(jax.random.key(config.seed), "evaluate", name)
        got[name] = policy.sample(model, params, how, source, w.decode, key, w.mesh, reference=reference, judge=judge)
        if measure is not None and not hasattr(model, "next_logits"):  # that of a model, not of a way to decode it
            loss[name] = measure(params)["nll"]
        gold[name] = world.gold_rewards([r["prompt"] for r in records], got[name].completions)
    out = {}
    for name, s in got.items():
        out[name] = {
            "gold": float(gold[name].mean()),
            "gold_std": float(gold[name].std()),
            "kl": s.kl,
            "length": float(s.length.mean()),
            "truncated": float(s.truncated.mean()),
            "distinct_1": diversity.distinct(s.completions, 1),
            "distinct_2": diversity.distinct(s.completions, 2),
            "self_bleu": diversity.self_bleu(s.completions[:256]) if n > 1 else 0.0,
            "samples": [{"prompt": r["prompt"], "completion": t, "gold": float(g)} for r, t, g in list(zip(records, s.completions, gold[name]))[:8]],
        }
        if s.proxy is not None:
            out[name]["proxy"] = float(s.proxy.mean())
        if name in loss:
            out[name]["pretrain_nll"] = loss[name]
        if name != "sft" and "sft" in got:
            won = stats.wins(gold[name], gold["sft"], np.arange(n) % len(prompts))._asdict()
            out[name] |= _finite({**won, "win_interval": list(won["win_interval"])})
            if name in loss and "sft" in loss:
                out[name]["alignment_tax"] = loss[name] - loss["sft"]
    if len(got) > 1:
        names, met = list(got), [(i, j) for i in range(len(got)) for j in range(i)]
        won = np.concatenate([stats.outcomes(gold[names[i]], gold[names[j]]) for i, j in met])
        first, second = (np.repeat(x, n) for x in zip(*met))
        strengths = tournament.bradley_terry(tournament.table(first, second, won, len(names)), prior=1.0)
        for name, e in zip(names, tournament.elo(strengths)):
            out[name]["elo"] = float(e)
    return out
