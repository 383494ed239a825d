"""From a config to stages ready to run: objectives, sources, optimizers, adapters. Nothing below knows ConfigDict or a flag.

Also the one import of configs, commands and notebooks: what `config` and `world` offer is offered here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxalign import chips, shard, tree
from jaxalign.build_rl import make_online, scorer, shares_prompt
from jaxalign.config import adapter, adapts, base, check_finite, embedded, family, fields, plain, policy_of, preset, rounds, stage, stages
from jaxalign.data import sources
from jaxalign.data.templates import PLAIN
from jaxalign.methods import OBJECTIVES, REWARDS, imported, method, nearest
from jaxalign.models import heads, lora, peft
from jaxalign.objectives.preference import pair_logps
from jaxalign.ops import branches, nn
from jaxalign.ops.advantage import GROUP_ADVANTAGES, KL_ESTIMATORS, SEVERAL
from jaxalign.ops.masked import WHITEN
from jaxalign.rl import environment, experience, reinforce, rewards
from jaxalign.rl.control import KL, SCORE_SCALES
from jaxalign.rl.matching import Weighted
from jaxalign.rl.reference import Precomputed, WithReference, add_reference
from jaxalign.rl.rollout import Sampling
from jaxalign.train import checkpoint, flops, optim, run, state, step
from jaxalign.train.log import RunLog, TensorBoard
from jaxalign.train.progress import Trace
from jaxalign.types import Objective, RivalPairs, Source, Tree, UserError
from jaxalign.world import World, adapted, adapted_by, barrier, data_source, drafter, generation, imported_config, judge_of, load_params, make_mesh, opened, prompt_rows, sampling, shown, trained, valued, world


def evaluation(objective: Objective, mesh, frozen: dict, source: sources.Offline, prepare: Callable = lambda b: b) -> Callable:
    """state -> the objective's own metrics over a held-out source, every example once. whole: its params lack nothing (a
    finished stage's, read back)."""

    @jax.jit
    def sums(params, frozen, aux, batch, key):
        full = tree.merge(params, frozen["base"]) if "base" in frozen else params
        stats = {k: step.mean(*v) for k, v in objective.stats(full, frozen, aux, batch).items()} if objective.stats else {}
        out = (objective.held_out or objective.loss)(full, frozen, aux, batch, key, stats)
        return {**out.metrics, **{f"loss/{k}": (t.total, t.weight) for k, t in out.terms.items()}}

    def evaluate(s: state.TrainState, counts: bool = False, whole: bool = False) -> dict[str, float]:
        total: dict[str, np.ndarray] = {}
        params = state.averaged(s)
        for batch in sources.eval_batches(source):
            out = sums(params, {k: v for k, v in frozen.items() if k != "base"} if whole else frozen, s.aux, prepare(shard.place(batch, mesh)), s.key)
            for k, v in jax.device_get(out).items():
                total[k] = total.get(k, 0.0) + np.array(v, np.float64)
        tokens = {"tokens": float(total["nll"][1])} if counts else {}
        return {k: float(t / n) if n > 0 else 0.0 for k, (t, n) in total.items()} | tokens

    return evaluate


# -- one stage ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stage:
    """A stage ready to run: `go()` trains it (or goes on with it), `save()` writes STAGE/params and, of adapters, STAGE/adapter."""

    world: World
    name: str
    workdir: Path
    config: ConfigDict
    model: Any  # what is trained: a Model, or heads.Scalar
    objective: Objective
    source: Source
    params: Tree
    frozen: dict
    base: Tree | None
    evaluate: Callable | None
    tx: Any
    schedule: Callable
    flops_per_token: float | None = None
    adapted: Tree | None = None  # after `go`, if there are adapters: the params before merging

    def begin(self) -> tuple[state.TrainState, Callable]:
        """(state at step 0, the jitted step)."""
        c = self.config
        st = state.create(self.params, self.tx, self.objective, self.world.config.seed, self.world.mesh, offload=c.optim.offload)
        of = jax.tree.map(lambda x: x.sharding, st)
        return st, step.make_step(self.objective, self.tx, accumulate=c.data.accumulate, max_grad_norm=c.optim.max_grad_norm, schedule=self.schedule, shardings=of)

    def go(self, profile: str = "") -> Tree:
        """Train to the end; returns the weights that later stages start from, adapters merged. `profile`: see `progress.Trace`."""
        w, c = self.world, self.config
        trace = Trace(profile if jax.process_index() == 0 else "", self.name)
        log = RunLog(self.workdir, process_index=jax.process_index(), mirrors=[TensorBoard(self.workdir / "tensorboard")] if w.config.tensorboard and jax.process_index() == 0 else ())
        with log:
            points = checkpoint.Checkpoints(self.workdir / "checkpoints", keep=c.train.keep)
            if c.get("normalise") is not None and c.normalisation.before and points.latest() is None:
                head = normalised(self, "reference", self.params if self.base is None else tree.merge(self.params, self.base))["head"]
                self.params = {**self.params, "head": head}
            st, fn = self.begin()
            if adapts(c):
                log.event("memory", **lora.memory(st.params, self.base, self.tx))
            st = run.train(
                st, fn, self.source, self.frozen, run.Loop(**plain(c.train)), mesh=w.mesh, log=log, checkpoints=points, evaluate=self.evaluate,
                flops_per_token=self.flops_per_token, trace=trace,
                peak_flops=chips.peak_flops(jax.devices()) if w.model.config.dtype == "bfloat16" else None, name=self.name, settings=settings(w.config, c) | ({} if self.base is None else {"frozen": state.fingerprint(self.base)}) | ({"teacher": state.fingerprint(self.frozen["teacher"])} if "teacher" in self.frozen else {}),
                config={**{k: v for k, v in plain(w.config).items() if k != "stage"}, "stage": self.name, "objective": c.objective.name, "section": plain(c)},
            )  # fmt: skip
            params = result(self.objective, c, st, self.base)
            if not adapts(c):
                return params
            self.adapted = params
            return lora.merge(params)

    def finish(self, params: Tree) -> Tree:
        """What is saved: for a reward model, with the scores that its `normalisation` names at mean 0 and std 1."""
        return normalised(self, self.config.normalisation.by, params) if self.config.get("normalise") else params

    def save(self, params: Tree) -> None:
        if self.adapted is not None and hasattr(self.world.model.family, "HF"):
            trunk, head = self.adapted.get("trunk", self.adapted), params.get("head")
            peft.save(self.workdir / "adapter", self.world.model, trunk, base=self.config.init or None, head=head, rs=self.config.adapter.rslora)
        checkpoint.save_tree(self.workdir / "params", params, {"stage": self.name, "objective": self.config.objective.name})


def result(objective: Objective, c: ConfigDict, s: state.TrainState, still: Tree | None) -> Tree:
    """What a stage would leave behind if it ended in this state, adapters not yet merged."""
    params = _whole(s, still)
    params = objective.finish(params, s.aux) if objective.finish else params
    return params["policy"] if "rl" in c else params


def _whole(s: state.TrainState, still: Tree | None) -> Tree:
    """The params of a state with those that stood still."""
    params = state.averaged(s)
    return params if still is None else tree.merge(params, still)


def normalised(s: Stage, by: str, params: Tree) -> Tree:
    """A reward model's params with gain and bias in the head: see `config.NORMALISATION`."""
    from jaxalign.data import rows
    from jaxalign.evals import policy

    c, w, n = s.config, s.world, s.config.normalisation
    if by == "candidates":
        source = data_source(w, c.data, c.data.path, c.data.batch_size, 0, shuffle=False)
        labelled = c.data.kind == "labelled"
        return rewards.normalise(params, policy.row_scores(s.model, params, source, w.mesh)[0] if labelled else np.concatenate([x for x, _ in policy.candidate_scores(s.model, params, source, w.mesh)]))
    if not n.path:
        raise UserError(f"{s.name}: normalisation.path is empty; name the file with {'demonstrations' if by == 'demonstrations' else 'prompts for the reference policy'} (JSONL)")
    if by == "demonstrations":
        longest = c.data.get("max_len") or s.source.report()["max_length"]
        source = data_source(w, ConfigDict({"seq_len": longest, "packing": "pad", "too_long": "drop", "max_drop": c.data.max_drop}), n.path, c.data.batch_size, 0, shuffle=False, kind="tokens")
        return rewards.normalise(params, policy.row_scores(s.model, params, source, w.mesh)[0], scale=False)
    reference = load_params(w, n.policy or c.init, w.model.specs(), f"{s.name}.normalisation.policy")
    records = [r for r, _ in rows.read(w.find(n.path))]
    records = [records[i % len(records)] for i in range(n.samples)]  # of few prompts, several answers
    how = sampling(w, ConfigDict({"max_new": n.max_new, "temperature": n.temperature}))
    key = nn.fold(jax.random.key(w.config.seed), "normalise", s.name)
    return rewards.normalise(params, policy.reference_scores(w.model, reference, how, prompt_rows(w, records, min(256, n.samples)), s.model, params, key, w.mesh))


HEADS = ("^head/", r"^value/(head/)?(weight|bias)$", "^value/(up|down)/", "^[qv]/")  # what trains beside the adapters


def settings(config: ConfigDict, c: ConfigDict) -> dict:
    """Everything that shapes training, to the source's fingerprint of the data; not how often it is saved or logged, nor the mesh."""
    out = {k: v for k, v in plain(c).items() if k != "reference_cache"} | {"init": c.init or config.model.path}
    out["optim"].pop("offload")  # where the state lies, like the mesh
    for k in ("reward_timeout", "reward_workers"):  # how long somebody waits for a score, not which it is
        out.get("rl", {}).pop(k, None)
    out["data"] = {k: v for k, v in out["data"].items() if k not in ("path", "eval_path")}
    return {**out, "train": {"steps": c.train.steps}, "model": plain(config.model), "seed": config.seed}


def check(config: ConfigDict) -> None:
    """Refuses, before any stage runs, what one of them could never do: values out of range, batches that do not divide."""
    check_finite(config)
    mesh = make_mesh(config)
    for name, c in stages(config).items():
        check_stage(mesh, name, c)


def check_stage(mesh, name: str, c: ConfigDict) -> tuple[optim.Optim, run.Loop]:
    """(optimizer settings, loop settings) of one stage, or what is wrong with it."""
    batch, shards = c.data.batch_size, shard.batch_shards(mesh)
    parts = c.rl.minibatches if "rl" in c else 1
    m = method(c.objective.name, c.data.kind)
    group = (c.rl.get(m.rows, 1) if m.rows else 1) if "rl" in c else 1  # rows that train, of a prompt
    pieces = max(c.data.accumulate, 1)
    if min(batch, parts, group) < 1 or c.data.accumulate < 0 or batch % shards or batch * group % (parts * pieces * shards):
        raise UserError(f"{name}: data.batch_size {batch} must be a multiple of data.accumulate {pieces} x data x fsdp x expert {shards}" + (f" x rl.minibatches {parts}" if "rl" in c else "") + (f"; it counts prompts, with rl.{m.rows} {group} answers each" if group > 1 else ""))
    try:
        if c.get("frozen_dtype", "float32") not in ("float32", "bfloat16"):
            raise UserError(f"frozen_dtype {c.frozen_dtype!r} must be float32 or bfloat16")
        if "rl" in c:
            Sampling(**plain(c.sampling)), (kl := KL(**{k: c.rl[k] for k in fields(KL) if k in c.rl})).update(kl.beta, 0.0, batch)  # so many episodes have to suit the horizon
            rewards.Limits(c.rl.reward_timeout, c.rl.reward_workers, c.rl.on_reward_error)
            environment.check(c.rl.environment, c.rl.turns, c.rl.context, c.sampling.max_new, bool(c.rl.reward or c.rl.get("judge")), bool(c.rl.rollout_devices))
            if c.rl.epochs < 1 or c.rl.staleness < 0 or (c.rl.get("importance_cap") is not None and c.rl.importance_cap <= 0):
                raise UserError(f"rl.epochs {c.rl.epochs} must be 1 or more, rl.staleness {c.rl.staleness} 0 or more, and rl.importance_cap {c.rl.get('importance_cap')} above 0")
            answers = batch * c.rl.get("group", 1)
            if c.rl.rollout_devices and answers % c.rl.rollout_devices:
                raise UserError(f"rl.rollout_devices {c.rl.rollout_devices} must divide the {answers} answers of a rollout")
            if "keep" in c.rl and not (1 <= c.rl.keep <= c.rl.group and 0 <= c.rl.quantile < 1):
                raise UserError(f"rl.keep {c.rl.keep} must be between 1 and rl.group {c.rl.group}, and rl.quantile {c.rl.quantile} at least 0 and below 1")
            if not 0 <= c.rl.get("on_policy", 1.0) <= 1:
                raise UserError(f"rl.on_policy {c.rl.on_policy}, the share of batches that the policy samples itself, must be between 0 and 1")
            if m.batch is RivalPairs and c.rl.group != 1:
                raise UserError(f"rl.group {c.rl.group}: {c.objective.name} compares one answer of the policy with one of the reference; set it to 1")
            if "group" in c.rl and c.rl.group < (2 if c.rl.get("baseline") == "group" else min(2, m.group)):
                raise UserError(f"rl.group {c.rl.group}: an answer's advantage is what it has over the others of its group, so that must be 2 or more")
            names = {"kl_estimator": [*KL_ESTIMATORS, "full"], "scale_rewards": {**GROUP_ADVANTAGES, **SEVERAL}, "old_logp": experience.OLD_LOGP[:2]}
            names |= {"importance_form": experience.IMPORTANCE, "whiten_form": WHITEN, "scale_score": SCORE_SCALES, "baseline": reinforce.BASELINES}
            for k, known in names.items():
                if k in c.rl and c.rl[k] not in known:
                    raise UserError(f"rl.{k} {c.rl[k]!r} is unknown;{nearest(str(c.rl[k]), list(known))}")
        if "normalisation" in c:
            n = c.normalisation
            if c.data.kind == "steps" and (c.normalise or n.before):
                raise UserError("the scores of steps are log-odds, which gain and bias would spoil; leave normalise and normalisation.before false")
            if n.by not in ("candidates", "reference", "demonstrations") or n.samples < 2:
                raise UserError(f"normalisation.by {n.by!r} is candidates, reference or demonstrations, and normalisation.samples {n.samples} 2 or more")
            if (n.before or c.normalise and n.by != "candidates") and not n.path:
                raise UserError(f"normalisation.path is empty: name the file with {'demonstrations' if n.by == 'demonstrations' else 'prompts for the reference policy'} (JSONL)")
            if n.before and n.by == "demonstrations":
                raise UserError("normalisation.before samples the reference policy for the prompts of normalisation.path, and by 'demonstrations' reads answers there; choose one")
        adapter(c)
        return optim.Optim(**plain(c.optim)), run.Loop(**plain(c.train))
    except UserError as e:
        raise UserError(f"{name}: {e}") from None


def make_stage(w: World, name: str, c: ConfigDict, workdir: Path) -> Stage:
    """Everything read, checked and loaded; nothing trained."""
    o, loop = check_stage(w.mesh, name, c)
    c = ConfigDict(c)
    c.init = c.init or w.config.model.path
    kind, seed, batch = c.objective.name, w.config.seed, c.data.batch_size
    m = method(kind, c.data.kind)
    options = {k: v for k, v in plain(c.objective).items() if k != "name"}
    key = nn.fold(jax.random.key(seed), "init", name)
    started = kind in REWARDS and c.init and w.imagined is None and checkpoint.holds(w.find(c.init), "head")  # goes on with a reward model
    trunk = load_params(w, c.init, (heads.Scalar(w.scored.model) if started else w.model).specs(), f"{name}.init") if c.init else None
    trunk, first = (trunk["trunk"], trunk["head"]) if started else (trunk, None)
    draw = lambda specs, what: shard.init(specs, nn.fold(key, what), w.mesh, w.rules) if w.imagined is None else w.imagined.weights(w, specs, what)
    frozen: dict[str, Tree] = {}
    prepare = weigh = lambda b: b
    if "teacher" in c:
        teacher, frozen["teacher"] = _teacher(w, name, c)
        options["teacher"] = teacher

    if kind not in (*REWARDS, "masked_lm") and kind in OBJECTIVES and not getattr(w.model, "causal", True):
        raise UserError(f"{name}: this model reads both ways and writes nothing; it can be trained with masked_lm, {' or '.join(REWARDS)}")
    if kind in REWARDS and w.scored is not w and started:
        w = w.scored
    elif kind in REWARDS and w.scored is not w:
        w, whole = w.scored, {} if trunk is None else tree.flat(trunk)
        fresh = tree.flat(draw(w.model.specs(), "trunk"))  # a pooler that no masked-LM head has
        trunk = tree.unflat({k: whole.get(k, x) for k, x in fresh.items()})
    if "rl" in c:
        model, objective, source, params = make_online(w, name, c, m, options, trunk, draw, key, frozen)
        longest = c.rl.context or source.prompts.report()["max_length"] + c.sampling.max_new
    else:
        if kind in REWARDS:
            model = heads.Scalar(w.model)
            trunk = trunk if trunk is not None else draw(w.model.specs(), "trunk")
            if c.head:
                key = nn.fold(jax.random.key(seed), "init", c.head)
            params = dict(zip(("trunk", "head"), adapted(w, c, key, trunk, draw(heads.specs(w.model.config.dim), "head") if first is None else first)))
        elif m.twins is not None:
            model = heads.Guided(w.model, m.twins)
            trunk = trunk if trunk is not None else draw(w.model.specs(), "policy")
            params = {"trunk": adapted(w, c, key, trunk)[0], **draw(heads.q_and_v_specs(w.model.config.dim, w.model.config.vocab, m.twins), "heads")}
        else:
            model, params = w.model, adapted(w, c, key, trunk if trunk is not None else draw(w.model.specs(), "policy"))[0]
        objective = m.maker(model, **options)
        share = objective.shared and c.data.get("share_prompt") and shares_prompt(model, w.mesh)
        cost = lambda *x: branches.cost(model.config.dim, *x)
        how = {"share_prompt": lambda apart, together: cost(together) < cost(apart, apart)} if share else {"mismatched": True} if objective.mismatched else {}
        w = dataclasses.replace(w, template=PLAIN) if m.plain else w
        source = data_source(w, c.data, c.data.path, batch, seed + 1_000_003 * c.data.get("order", 0), **how)
        longest = c.data.get("seq_len") or source.report()["max_length"]
        if kind != "reward_pairs" and (soft := source.report().get("soft_pairs")):
            raise UserError(f"{name}: {soft} pairs have a 'probability' below 1, which reward_pairs reads and {kind} does not; leave these rows out, or the field")
        if "reference" in c and not (c.reference or c.init):
            if kind in OBJECTIVES:
                raise UserError(f"{name}: {kind} needs a reference model; set init (and reference, if it is another) to a stage or a directory")
        elif "reference" in c:
            free = adapts(c) and not c.reference  # the frozen tree is the reference, at no cost
            reference = lora.base(params) if free else load_params(w, c.reference or c.init, w.model.specs(), f"{name}.reference", c.frozen_dtype)
            summed = objective.reference or pair_logps
            if objective.weights and w.imagined is None:
                weigh = lambda s, items=source: Weighted(s, items, w.model, reference, w.mesh, objective.weights)
            if w.imagined is None and (c.reference_cache or loop.steps * batch > source.size):  # else no item is drawn twice
                known = state.fingerprint(reference), repr(w.model.config), source.contents, *((repr(sorted(options.items())),) if objective.reference else ())
                source = Precomputed(source, w.model, reference, w.mesh, c.reference_cache and w.find(c.reference_cache), known, summed)
            else:
                source = WithReference(source, w.model, reference, w.mesh, summed)
            prepare = lambda b: add_reference(w.model, reference, b, summed)
    evaluate = None
    if c.data.get("eval_path") and "rl" not in c:
        every = {"top": 1.0} if "top" in c.data else {}  # of the held-out episodes all: to choose the best would flatter
        if c.data.get("standardise") and w.imagined is None:  # in the units that the model has learned, whatever these episodes earn
            every["standardise"] = tuple(source.report()[k] for k in ("return_mean", "return_std"))
        held_out = data_source(w, c.data, c.data.eval_path, batch, seed, shuffle=False, **how, **every)
        evaluate = evaluation(objective, w.mesh, frozen, held_out, prepare)
    if w.imagined is None and kind not in REWARDS and "watch" in (w.config.get("world") or {}):
        evaluate = _watched(w, name, c, model, objective, source, frozen, evaluate)
    remains = None
    if o.freeze or adapts(c):
        trained = optim.trainable(o, params)
        if adapts(c):
            trained = jax.tree.map(lambda a, b: a and b, trained, lora.trainable(params, (*HEADS, *(f"^trunk/{k}/" for k in peft.whole(w.model)))))
        params, remains = tree.split(params, trained)
        frozen["base"] = remains
    tx, schedule = optim.make(o, loop.steps, params)
    work = _flops(w, c, kind, longest, source)
    if work and (taught := options.get("teacher") and flops.of(options["teacher"], longest)):
        work += taught.forward()
    return Stage(w, name, Path(workdir), c, model, objective, weigh(source), params, frozen, remains, evaluate, tx, schedule, work)


def _teacher(w: World, name: str, c: ConfigDict) -> tuple[Any, Tree]:
    """(model, weights) of `teacher`: of its own family and shape, with the student's vocabulary; of the student's shape where weights
    lie alone, or are imagined."""
    if not c.teacher:
        raise UserError(f"{name}: {c.objective.name} needs a teacher; set teacher to a stage, a run directory or a Hugging Face directory")
    where = w.find(c.teacher)
    theirs = opened(where)[0] if (Path(where) / "config.json").exists() else w
    if theirs.tokenizer.fingerprint != w.tokenizer.fingerprint:
        raise UserError(f"{name}: the teacher {c.teacher!r} has another tokenizer than the student, so its probabilities are of other tokens; set tokenizer.path to the teacher's")
    theirs = dataclasses.replace(theirs, mesh=w.mesh, rules=w.rules, imagined=w.imagined)
    return theirs.model, load_params(theirs, str(Path(where).absolute()), theirs.model.specs(), f"{name}.teacher", c.frozen_dtype)


def _watched(w: World, name: str, c: ConfigDict, model, objective: Objective, source: Source, frozen: dict, evaluate: Callable | None) -> Callable:
    """`evaluate`, and with it what the policy does on the world's held-out prompts: world.watch.each answers to each of them, and
    where world.watch.reference names a stage their KL to it. Q heads decode with each of world.watch.guided.betas. A policy that is
    sampled through a mask while it trains (NLPO) is looked at without it, as it will be saved, and through it, as /masked."""
    from jaxalign.data.rows import read
    from jaxalign.evals.watch import watch

    said = w.config.world
    records = [r for r, _ in read(w.find("data/prompts_eval.jsonl")) for _ in range(said.watch.each)]
    gold = embedded(w.config).gold_rewards
    compared, order = said.watch.get("reference", ""), list(w.config.get("order", ()))
    if {compared, name} <= set(order) and order.index(name) < order.index(compared):
        compared = ""  # a stage before the one that others are compared with
    reference = load_params(w, compared, w.model.specs(), "world.watch.reference") if compared and w.stage_dir(compared) != w.stage_dir(name) else None
    twins, guided = getattr(model, "twins", None), plain(said.watch.get("guided") or ConfigDict())
    betas = guided.pop("betas", (1.0,)) if twins else ()
    who = {f"/beta_{b:g}": dataclasses.replace(model, beta=float(b)) for b in betas} or {"": w.model if twins is None else model}
    if lagging := getattr(source, "lagging", None):
        who["/masked"] = source.model
    how, prompts = sampling(w, said.sampling, **guided if twins else {}), prompt_rows(w, records, min(len(records), 256))
    looks = {k: watch(m, how, prompts, records, gold, w.decode, w.mesh, reference=reference) for k, m in who.items()}

    def both(s: state.TrainState, counts: bool = False, whole: bool = False) -> dict[str, float]:
        known = evaluate(s, counts, whole) if evaluate is not None else {}
        if whole:
            return known
        params = result(objective, c, s, frozen.get("base"))
        seen = {"/masked": lagging(_whole(s, frozen.get("base")), s.aux)["policy"]} if lagging else {}
        return known | {k + of: v for of, look in looks.items() for k, v in look(seen.get(of, params), s.key, int(s.step)).items()}

    return both


def _flops(w: World, c: ConfigDict, kind: str, longest: int, source: Source) -> float | None:
    """Model FLOPs per token that the stage trains on (`train.flops`); None of what has no formula."""
    f, adapted = flops.of(w.model, longest), adapts(c)
    if f is None or kind == "masked_lm":
        return None
    if kind in REWARDS:
        return f.training(adapted, unembed=False)
    if "rl" in c:
        named = [r for r in c.rl.reward.split(",") if r.strip() and ":" not in r and "judge=" not in r]
        return f.online(adapted, c.rl.epochs, critic=c.rl.get("value") == "reward", rewards=len(named), reference=any(d["beta"] for d in (c.objective, c.rl) if "beta" in d))
    return f.training(adapted) + (f.forward() if isinstance(source, WithReference) else 0.0)

