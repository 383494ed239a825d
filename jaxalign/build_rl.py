"""From a config's stage that samples to its objective, its source and its params: who answers, who scores, what is made of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxalign import shard
from jaxalign.config import OF_SAMPLING, adapts, fields, plain
from jaxalign.data.templates import stop_ids
from jaxalign.methods import Method, experience_of, has_critic, imported, nearest
from jaxalign.models import heads, lora
from jaxalign.objectives import ppo
from jaxalign.objectives.reward import AGGREGATE
from jaxalign.ops import nn
from jaxalign.ops.advantage import SEVERAL
from jaxalign.rl import comparisons, environment, experience, given, masking, online, own_judge, rewards
from jaxalign.rl.control import KL, ScoreScale
from jaxalign.rl.rollout import check_length
from jaxalign.types import Duels, Experience, Tree, UserError
from jaxalign.world import World, adapted, data_source, drafter, judge_of, load_params, opened, sampling, trained


def make_online(w: World, name: str, c: ConfigDict, m: Method, options: dict, policy: Tree | None, draw: Callable, key, frozen: dict):
    rl, model, maker, critic = c.rl, w.model, m.maker, has_critic(m.maker)
    if not c.init:
        raise UserError(f"{name}: {c.objective.name} needs a policy to start from; set init to a stage or a directory")
    policy, _ = adapted(w, c, key, policy)
    reference = None
    penalties = [d["beta"] for d in (options, rl) if "beta" in d]  # in the loss, off the reward
    if critic or m.reference and (any(penalties) or not penalties):  # without a KL penalty nothing asks for one
        reference = lora.base(policy) if adapts(c) and not rl.reference else load_params(w, rl.reference or c.init, model.specs(), f"{name}.rl.reference", c.frozen_dtype)
    scalar = heads.Scalar(model)
    named = [r.strip() for r in rl.reward.split(",") if r.strip()]
    if not (named or rl.get("judge") or rl.environment or "teacher" in c):
        raise UserError(f"{name}: rl.reward is empty; name a reward model's stage or directory, or a function as package.module:function")
    if named and rl.get("judge"):
        raise UserError(f"{name}: rl.reward and rl.judge are both set, and one of them says which answer is better; empty the other")
    if rl.combine not in (known := [*rewards.COMBINE, "weights"]) or rl.steps not in (ways := ["", *AGGREGATE, "each"]):
        raise UserError(f"{name}: rl.combine {rl.combine!r} is unknown;{nearest(rl.combine, known)}" if rl.combine not in known else f"{name}: rl.steps {rl.steps!r} is unknown;{nearest(rl.steps, ways)}")
    make = experience_of(m)
    if rl.combine == "apart" and ("reward_weights" not in fields(make) or len(named) < 2 or rl.environment or rl.steps == "each"):
        raise UserError(f"{name}: rl.combine apart is for two or more rewards of whole answers, in methods that compare the answers of a group; choose another way")
    if rl.combine == "apart" and rl.get("scale_rewards") not in SEVERAL and not rl.weights:
        raise UserError(f"{name}: rl.combine apart keeps rewards apart; say how they add up, by rl.weights or rl.scale_rewards {', '.join(SEVERAL)}")
    if rl.weights and (len(rl.weights) != len(named) or rl.combine not in ("mean", "apart")):
        raise UserError(f"{name}: rl.weights {tuple(rl.weights)} are those of a sum: one for each of the {len(named)} names of rl.reward, and rl.combine mean, or apart")
    asked = {r for r in named if r.startswith("judge=")}
    networks = {r: _judge(w, name, r) for r in named if ":" not in r and r not in asked}
    scalar = next(iter(networks.values()), scalar)  # of which a critic of its own is made
    learned = {r: load_params(w, r, m.specs(), f"{name}.rl.reward") for r, m in networks.items()}
    if rl.combine == "weights":
        if len(learned) < len(named):
            raise UserError(f"{name}: rl.combine weights averages reward models, and {[r for r in named if r not in learned]} are functions; choose another way, or leave them out")
        if len(set(networks.values())) > 1:
            raise UserError(f"{name}: rl.combine weights averages models of one shape, and {', '.join(named)} differ; choose another way")
        learned = {named[0]: rewards.averaged(list(learned.values())) if w.imagined is None else learned[named[0]]}
        named = named[:1]
    # Not their heads: scores are compared at a finer grain than bf16 has.
    cast = (lambda x: x.astype(c.frozen_dtype)) if w.imagined is None else lambda x: jax.ShapeDtypeStruct(x.shape, c.frozen_dtype, sharding=x.sharding)
    learned = {r: {**p, "trunk": jax.tree.map(cast, p["trunk"])} for r, p in learned.items()}
    if w.imagined is not None:
        w.imagined.judges = [(networks[r], p) for r, p in learned.items()]
    breaks = rewards.line_breaks(w.tokenizer.decode, w.tokenizer.vocab_size, model.config.vocab) if rl.steps and w.imagined is None else np.zeros(model.config.vocab, bool)
    judge = lambda r: rewards.process(networks[r], learned[r], breaks, rl.steps) if rl.steps else rewards.learned(networks[r], learned[r])
    limits = rewards.Limits(rl.reward_timeout, rl.reward_workers, rl.on_reward_error)
    if asked and w.imagined is not None:
        raise UserError(f"{name}: plan does not know the programs of a judge; leave {', '.join(sorted(asked))} out of rl.reward")
    opinion = lambda r: own_judge.judged(own_judge.Own(*judge_of(w, r.removeprefix("judge="), f"{name}.rl.reward"), w.mesh), w.decode, w.mesh, rl.rubric)
    one = lambda r, short: judge(r) if r in learned else opinion(r) if r in asked else rewards.python(r, w.decode, w.mesh, name=short, limits=limits)
    if named or rl.environment:
        scorer = rewards.several({short: one(r, short) for r, short in zip(named, rewards.short_names(named))}, tuple(rl.weights) if rl.combine == "mean" else (), rl.combine, rl.uncertainty)
    elif rl.get("judge"):
        scorer = comparisons.pairwise(imported(rl.judge), w.decode, w.mesh, rl.group + (m.rival is not None))
    else:
        scorer = rewards.none
    prompts = data_source(w, c.data, c.data.path, c.data.batch_size, w.config.seed)
    longest = prompts.report()["max_length"]
    if rl.environment:
        check_length(model, rl.context, f"{name}: rl.context")
    else:
        check_length(model, longest + c.sampling.max_new, f"{name}: prompts of {c.data.path} with sampling.max_new")
    special = tuple(sorted({*stop_ids(w.tokenizer, w.template), w.tokenizer.bos_id, w.tokenizer.eos_id, w.tokenizer.pad_id} - {None}))
    of_sampling = {"temperature": c.sampling.temperature or 1.0, "max_new": c.sampling.max_new * (rl.turns if rl.environment else 1), "special": special, "updates": rl.epochs * rl.minibatches}
    takes = lambda f: {k: of_sampling[k] for k in OF_SAMPLING if k in fields(f)}
    maker, options = functools.partial(maker, **takes(maker)), {k: v for k, v in options.items() if k not in OF_SAMPLING}
    shaping = {**plain(ConfigDict({k: rl[k] for k in fields(make) if k in rl})), **takes(make)}
    if rl.combine == "apart":
        shaping["reward_weights"] = tuple(rl.weights)
    if rl.staleness and shaping.get("importance_cap", 0) is None:
        shaping["importance_cap"] = 2.0  # what an older policy sampled is not trained on as if it were its own
    if m.batch is Duels and (rl.staleness or rl.epochs * rl.minibatches > 1):
        raise UserError(f"{name}: {c.objective.name} has no correction for answers of an older policy; set rl.staleness to 0, rl.epochs and rl.minibatches to 1")
    if rl.get("scale_score", "none") != "none" and rl.clip_score is not None and (rl.environment or rl.steps == "each"):
        raise UserError(f"{name}: rl.clip_score clips the score of each turn or step, and rl.scale_score divides by the spread of their sums; leave one of the two")
    how = dict(reference=reference, apart=rl.combine == "apart", epochs=rl.epochs, minibatches=rl.minibatches, seed=w.config.seed, decode=w.decode, frozen=frozen, staleness=rl.staleness, rollout_mesh=w.rollout_mesh)
    actor = model
    if m.actor is not None:
        if rl.staleness:
            raise UserError(f"{name}: rl.staleness {rl.staleness}: {c.objective.name} trains on what its masks of today allowed; set it to 0")
        actor, how["lagging"] = m.actor(model, **options, special=special), masking.beside(frozen)
    if critic:
        value, head = _critic(w, name, c, scalar, learned, draw, key)
        mix = None
        if options.get("ptx_coef"):
            mix = data_source(w, ConfigDict({"seq_len": rl.mix.seq_len}), rl.mix.path, rl.mix.batch_size, w.config.seed, kind="tokens")
        step_of = lambda params, reference, rollout, scores, beta, *scale, call=_call: call(make, actor, value, params, reference, rollout, scores, beta, *scale, **shaping)
        how |= dict(kl=KL(rl.beta, rl.target, rl.horizon, rl.controller), mix=mix, kind=Experience)
        if rl.scale_score != "none":
            adjust = {"missing_eos_penalty": rl.missing_eos_penalty, "missing_eos_value": rl.missing_eos_value, "clip": rl.clip_score}
            how["score_scale"] = ScoreScale(rl.scale_score, functools.partial(rewards.adjust, **adjust))
        if options.get("target_kl"):
            how["stop"] = functools.partial(ppo.went_too_far, options["target_kl"])
        objective, params = maker(model, value, **options), {"policy": policy, "value": head}
    else:
        shaping["group"] = rl.group
        if rl.epochs * rl.minibatches == 1 and shaping.get("old_logp") == "forward" and shaping["importance_cap"] is None:
            shaping["old_logp"] = "current"
        if c.data.get("share_prompt") and shares_prompt(model, w.mesh) and not rl.environment:
            parts = rl.minibatches * max(c.data.accumulate, 1) * shard.batch_shards(w.mesh)
            shaping["answers_per_row"] = experience.answers_per_row(rl.group, longest, c.sampling.max_new, model.config.dim, c.data.batch_size * rl.group, parts)
        whole = lambda scores: scores if scores.ndim == 1 or rl.combine == "apart" else scores.sum(1)  # of each answer: without a critic nothing tells its tokens apart
        step_of = lambda params, reference, rollout, scores, beta, call=_call: call(make, model, params, reference, rollout, whole(scores), **shaping)
        how |= dict(group=rl.group, kind=m.batch, rival=m.rival and functools.partial(m.rival, **{k: rl[k] for k in fields(m.rival)}), rounds=rl.get("dynamic_rounds", 0))
        objective, params = maker(model, **options), {"policy": policy}
    sampler = sampling(w, c.sampling)
    how["draft"] = drafter(w, sampler)
    if rl.environment:
        if w.imagined is not None:
            raise UserError(f"{name}: plan does not know how long conversations with an environment are; leave rl.environment empty")
        if m.rival:
            raise UserError(f"{name}: {c.objective.name} compares with the answer of a rival, who takes no turns; leave rl.environment empty")
        how["play"] = environment.Play(imported(rl.environment), actor, sampler, w.tokenizer, w.template, w.mesh, turns=rl.turns, context=rl.context, group=rl.get("group", 1), seconds=rl.reward_timeout)
    source = online.OnlineSource
    if rl.get("on_policy", 1.0) != 1:
        texts = ConfigDict({**plain(c.data), "seq_len": longest + c.sampling.max_new, "packing": "pad", "too_long": "truncate"})
        rows = c.data.batch_size * rl.group // rl.minibatches  # as many as a step has of sampled ones
        source, how = given.InTurns, how | dict(given=data_source(w, texts, c.data.path, rows, w.config.seed, kind="tokens"), on_policy=rl.on_policy)
    return model, objective, source(prompts, actor, scorer, sampler, w.mesh, step_of, **how), params


def scorer(w: World, named: str, decode: Callable | None = None) -> Callable:
    """A scorer of rollouts (`rl.rewards`) by its name: a reward model's directory or stage, or "package.module:function"."""
    if ":" in named:
        return rewards.python(named, decode or w.decode, w.mesh)
    judge, _, params = trained(w.find(named))
    if "trunk" not in params:
        raise UserError(f"{named} holds a policy: name a reward model's directory, or a function as package.module:function")
    if judge.tokenizer.vocab_size != w.tokenizer.vocab_size or any(judge.tokenizer.encode(t) != w.tokenizer.encode(t) for t in ("The same words, 1 23!", "Ünicode \n\n x=y")):
        raise UserError(f"{named}: its tokenizer is another than the policy's; a reward model must read the same ids")
    return rewards.learned(heads.Scalar(judge.model), params)


def _judge(w: World, name: str, where: str) -> heads.Scalar:
    """The network of a reward model: of the policy's shape, unless a run directory says that it has its own."""
    said = Path(w.find(where)) / "config.json"
    if not said.exists() or "stage" not in json.loads(said.read_text(encoding="utf-8")):
        return heads.Scalar(w.model)
    theirs = opened(str(said.parent))[0]
    if theirs.tokenizer.fingerprint != w.tokenizer.fingerprint:
        raise UserError(f"{name}: rl.reward {where}: its tokenizer is another than the policy's; a reward model must read the same ids")
    return heads.Scalar(theirs.model)


def _critic(w: World, name: str, c: ConfigDict, scalar, learned: dict, draw: Callable, key):
    """(network, params) of PPO's critic; network None: a head on the policy."""
    rl = c.rl
    first = next(iter(learned), None)  # of which a critic of its own is made
    if rl.value == "head":
        return None, draw(heads.specs(w.model.config.dim, zero=True), "value")
    if rl.value == "mlp":
        return None, draw(heads.mlp_specs(w.model.config.dim), "value")
    if rl.value != "reward" or first is None:
        raise UserError(f"{name}: rl.value is 'head', 'mlp' or 'reward' (which needs rl.reward to be a model), not {rl.value!r}")
    if not adapts(c):
        # A copy: the trained critic's buffers are donated, the reward model's are not.
        return scalar, load_params(w, first, scalar.specs(), f"{name}.rl.reward")
    if c.adapter.path:
        raise UserError(f"{name}: adapter.path is the policy's; a critic of its own (rl.value reward) needs adapter.rank instead")
    # Frozen buffers are never donated, so the critic's base may be the reward model itself; its head trains.
    trunk, head = learned[first]["trunk"], learned[first]["head"]
    f32 = (lambda x: jnp.array(x, jnp.float32)) if w.imagined is None else lambda x: x  # a copy: the critic trains
    return scalar, {"trunk": adapted(w, c, nn.fold(key, "value"), trunk)[0], "head": jax.tree.map(f32, head)}


def _call(f: Callable, *args, **kwargs):
    """What `plan` puts something else in the place of, to see f and its arguments."""
    return f(*args, **kwargs)


def shares_prompt(model, mesh) -> bool:
    """Whether texts with one prompt may stand in one row: the family must allow it, and attention know branches, as the
    blocked form of CPUs does; kernels compare segments, and cut rows travel in pieces."""
    return getattr(model, "branches", False) and mesh.shape["context"] == 1 and mesh.devices.flat[0].platform == "cpu"
