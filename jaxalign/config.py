"""What a config may say. Defaults are read off the signatures they belong to, so a field is written down once.

A config has `name`, `seed`, `mesh`, `model`, `tokenizer` and either one `stage` or several `stages` in `order`. Only this
file, `world`, `build`, `build_rl` and `plan` know ConfigDict.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import types
import typing
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxalign.methods import COMPARED, REWARDS, experience_of, has_critic, has_teacher, imported, method, nearest
from jaxalign.models import bert, decoder, gpt2, lora, neox, t5
from jaxalign.ops import quant
from jaxalign.rl import experience
from jaxalign.rl.control import KL
from jaxalign.rl.rollout import Sampling
from jaxalign.train import optim, run
from jaxalign.types import GroupExperience, UserError

FAMILIES = {"decoder": decoder, "gpt2": gpt2, "neox": neox, "t5": t5, "bert": bert}
# What an objective or an experience takes from the sampling section, the tokenizer (ids that are special) and rl (updates of a rollout).
OF_SAMPLING = ("temperature", "max_new", "special", "updates")

# What the data section of each kind of batch has besides what they all have.
KINDS = {
    "tokens": {"eval_path": "", "seq_len": 256, "packing": "bfd", "too_long": "truncate"},
    "pairs": {"eval_path": "", "max_len": config_dict.placeholder(int), "max_prompt_len": config_dict.placeholder(int)},
    "rankings": {"eval_path": "", "max_len": config_dict.placeholder(int), "max_k": config_dict.placeholder(int)},
    "labelled": {"eval_path": "", "max_len": config_dict.placeholder(int), "max_prompt_len": config_dict.placeholder(int)},
    "steps": {"eval_path": "", "max_len": config_dict.placeholder(int)},
    "prompts": {"max_prompt_len": config_dict.placeholder(int)},
    "trajectories": {"eval_path": "", "max_len": config_dict.placeholder(int), "top": 1.0, "standardise": False},
}

# Of reward models: what their scores are measured against. Gain and bias are folded into the head.
NORMALISATION = {
    # at the end: the answers that were trained on, of which "candidates" get mean 0 and std 1; samples of the "reference" policy, the
    # same; or "demonstrations", mean 0 and the scale as it is
    "by": "candidates",
    "before": False,  # also before training, by samples of the reference
    "path": "",  # prompts for the reference, or demonstrations
    "policy": "",  # the reference; "": the stage's own init
    "samples": 256,
    "max_new": 64,
    "temperature": 1.0,
}

# Of every stage: low-rank matrices beside frozen weights.
ADAPTER = {
    "rank": 0,  # 0: none, every weight is trained
    "alpha": 16.0,
    "targets": "",  # regex over parameter names; "": every matrix of the layers
    "patterns": (),  # more targets: (regex, rank, alpha) each
    "rslora": False,
    "dora": False,
    "quantise": "",  # of the frozen matrices of the layers: bfloat16, int8 or nf4
    "path": "",  # a PEFT directory, or a stage that wrote one, to start from (with rank 0: it knows its own)
}


def _field(default: Any, annotation: Any) -> Any:
    """A ConfigDict value: None becomes a typed placeholder, so that the command line may set it."""
    if default is not None:
        return default
    kinds = [t for t in typing.get_args(annotation) if t is not types.NoneType]
    return config_dict.placeholder(kinds[0] if kinds else str)


def fields(thing: Any, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Defaults of a dataclass, or of a function's keyword-only arguments."""
    hints = typing.get_type_hints(thing)
    if dataclasses.is_dataclass(thing):
        pairs = [(f.name, f.default) for f in dataclasses.fields(thing) if f.default is not dataclasses.MISSING]
    else:
        pairs = [(p.name, p.default) for p in inspect.signature(thing).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return {k: _field(v, hints.get(k)) for k, v in pairs if k not in skip}


def family(name: str) -> Any:
    """The module of a model family: one of FAMILIES, or any by import path ("my_package.my_family")."""
    if name in FAMILIES:
        return FAMILIES[name]
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"model.family {name!r} is unknown ({e}); the families are {', '.join(FAMILIES)}, or give a module's import path") from None


def preset(arg: str | None, *known: str) -> str:
    """What stands behind the colon of `--config=FILE.py:ARG`: "" or one of `known`."""
    if arg and arg not in known:
        raise UserError(f"--config=...:{arg}: " + (f"there is no such preset;{nearest(arg, list(known))}" if known else "this config has no presets"))
    return arg or ""


def base(name: str, **model: Any) -> ConfigDict:
    """What every config shares. `model`: a family and the fields of its Config, or path=DIRECTORY of a checkpoint."""
    name_of_family = model.pop("family", "decoder")
    known = [f.name for f in dataclasses.fields(family(name_of_family).Config)]
    for k in model:
        if k not in ("path", *known):
            raise UserError(f"model.{k} is unknown;{nearest(k, known)}")
    shape = {f.name: 0 for f in dataclasses.fields(family(name_of_family).Config) if f.default is dataclasses.MISSING}
    return ConfigDict(
        {
            "name": name,
            "seed": 0,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1},
            "rules": (),  # (logical axis, mesh axis) pairs that replace those of shard.RULES
            "model": {"family": name_of_family, "path": "", **shape, **fields(family(name_of_family).Config), **model},
            # path: a directory, a vocabulary's file or "bytes"; train_on: a file of text. Neither: that of model.path, else bytes.
            # template: plain, chatml, human_assistant, "hf" (the tokenizer's own) or a .jinja file; variables: JSON, for Jinja.
            "tokenizer": {"path": "", "train_on": "", "kind": "unigram", "template": "plain", "variables": ""},
            "tensorboard": False,
        }
    )


def stage(objective: str, /, **sections: dict[str, Any]) -> ConfigDict:
    """One training run. `sections` fill objective, data, train, optim and (where it samples) rl; unknown keys are refused.

    `init` names where the weights come from: another stage, a run directory or an HF directory; "" is model.path if the
    config has one, else they are drawn.
    """
    m = method(objective, sections.get("data", {}).get("kind", "tokens"))
    maker, kind, critic = m.maker, m.kind, has_critic(m.maker)
    if kind not in KINDS:
        raise UserError(f"data.kind {kind!r} is unknown; it is one of {', '.join(KINDS)}")
    c = {
        "init": "",
        "objective": {"name": objective, **fields(maker, skip=OF_SAMPLING)},
        "data": {
            "kind": kind,
            "path": "",  # one file, several with commas, or a pattern
            "batch_size": 8,
            "accumulate": 0,  # micro-batches of a step; 0: one, and on a CPU as many as its caches like
            "format": config_dict.placeholder(str),  # None: detected row by row
            "text_split": "blank",
            "on_bad_row": "error",
            "max_bad_fraction": 0.01,
            "max_drop": 0.5,
            **copy.deepcopy(KINDS[kind]),  # a placeholder is a reference: two stages must not share one
        },
        "train": {**fields(run.Loop), "steps": 100},
        "optim": fields(optim.Optim),
        "adapter": dict(ADAPTER),
    }
    if kind == "pairs" and objective not in REWARDS or kind == "prompts" and not critic and m.experience is experience.group_experience:
        c["data"]["share_prompt"] = True  # what answers one prompt stands with it in one row, where that is exact and costs less
    if objective in REWARDS:
        c["normalise"] = objective in COMPARED  # at the end; the others predict what people said, in its own unit
        c["normalisation"] = dict(NORMALISATION)
        c["head"] = ""  # the stage with whose drawn head this one starts; "": its own. Members whose weights are averaged share one
        c["data"]["order"] = 0  # another number: the same rows in another order, for the members of an ensemble
        if objective == "reward_pairs":
            c["data"]["margins"] = ""  # small or large: a row's "rating" becomes a margin (`data.formats.MARGINS`)
    elif kind in ("pairs", "labelled", "rankings") and m.reference:
        c["reference"] = ""  # "": the stage's own init
        c["reference_cache"] = ""  # a directory to keep the reference's log-probs in, for other runs
    if has_teacher(maker):
        c["teacher"] = ""  # a stage, run directory or HF directory: whose distribution is learned
    if (kind in ("pairs", "labelled", "rankings", "prompts") or has_teacher(maker)) and objective not in REWARDS:
        c["frozen_dtype"] = "float32"  # of the models that are only read (reference, learned rewards): float32 | bfloat16, half the memory
    if kind == "prompts":
        c["rl"] = {
            # A reward model's stage or directory, "package.module:function" (prompt, completion, record) -> float, or judge=DIR, a
            # language model that rates answers; several, with commas, are an ensemble, or with weights a sum.
            "reward": "",
            "weights": (),  # of a sum, one for each reward; with combine apart, of their advantages
            "combine": "mean",  # of an ensemble: mean | min | median | mean_less_variance | mean_less_std | weights (one model: the mean of all weights)
            "uncertainty": 0.1,  # what mean_less_variance takes off per unit of variance, mean_less_std per unit of standard deviation
            "steps": "",  # of a process reward model: min | product | last, what its steps' scores make, or each, a reward at every step's end; "": models of whole answers
            "rubric": "",  # what a judge is told to look at
            "reward_timeout": 60.0,  # seconds for one call of a reward function, which then runs in a process of its own; 0: in this one, without a limit
            "reward_workers": 1,  # such processes, which score rows side by side
            "on_reward_error": "error",  # error | nan (no score for that row) | a number (that score)
            "environment": "",  # "package.module:Class" to take turns with, in place of rl.reward (`rl.environment`)
            "turns": 1,  # of the policy in a conversation with an environment, at most
            "context": 0,  # tokens of a whole conversation, at most
            "reference": "",  # "": the stage's own init
            "epochs": 4 if critic else 1,
            "minibatches": 1,
            "staleness": 0,  # train on what the params of so many iterations ago sampled
            "rollout_devices": 0,  # so many devices sample and the others train; 0: all do both, in turn
        }
        if critic:
            c["rl"] |= {
                "value": "head",  # head: linear, on the policy's trunk, from 0; mlp: with a hidden layer, drawn (trlX); reward: a network of its own that starts as the reward model
                **fields(KL),
                "scale_score": "none",  # what scores are divided by: none | running | first (`rl.control.ScoreScale`)
                **fields(experience_of(m), skip=OF_SAMPLING),
                "mix": {"path": "", "batch_size": 8, "seq_len": 256},  # pretraining text for PPO-ptx
            }
        else:
            c["rl"] |= {"group": m.group, **fields(m.experience, skip=(*OF_SAMPLING, "group", "answers_per_row", "reward_weights")), **(fields(m.rival) if m.rival else {})}
            if m.batch is GroupExperience:
                c["rl"]["dynamic_rounds"] = 0  # throw groups of equal rewards away and draw more prompts, so many times at most; 0: train on all
            c["rl"]["judge"] = ""  # in place of reward: "package.module:function" (prompt, first, second, record) -> P(first is better)
        c["rl"] |= m.rl
        c["sampling"] = {"max_new": 64, **fields(Sampling, skip=("stop", "pad"))}
    c = ConfigDict(c).lock()
    _known(c, sections, "stage")
    for name, values in sections.items():
        if isinstance(values, dict):
            c[name].update(_known(c[name], values, name))
        else:
            c.update({name: values})
    return c


def adapts(c: ConfigDict) -> bool:
    """Whether the stage trains adapters (and heads), not every weight."""
    return bool(c.adapter.rank or c.adapter.patterns or c.adapter.path)


def adapter(c: ConfigDict) -> lora.Lora | None:
    """What the stage's adapter section asks to attach; None where that is nothing, or a PEFT directory says it."""
    a = c.adapter
    if a.quantise not in ("", *quant.KINDS):
        raise UserError(f"adapter.quantise {a.quantise!r} is unknown; it is empty or one of {', '.join(quant.KINDS)}")
    if a.quantise and not adapts(c):
        raise UserError(f"adapter.quantise {a.quantise} freezes the weights, and nothing would train; set adapter.rank")
    if a.path and (a.rank or a.patterns):
        raise UserError("adapter.path and adapter.rank: the directory says the ranks; set adapter.rank to 0, or leave path empty")
    unread = () if a.rank else ("alpha", "targets") if a.patterns else ("alpha", "targets", "dora") if a.path else ("alpha", "targets", "rslora", "dora")
    if given := [f"adapter.{k} {a[k]!r}" for k in unread if a[k] != ADAPTER[k]]:
        why = "adapter.path brings its own" if a.path else "each of adapter.patterns has its own" if a.patterns else "every weight would be trained, without adapters"
        raise UserError(f"{', '.join(given)} with adapter.rank 0: {why}; set adapter.rank, or leave {'it' if len(given) == 1 else 'them'} out")
    first = ((a.targets or lora.MATRICES, a.rank, a.alpha),) if a.rank else ()
    return lora.Lora((*first, *plain(a.patterns)), rs=a.rslora, dora=a.dora) if first or a.patterns else None


def _known(c: ConfigDict, values: dict, where: str) -> dict:
    for k in values:
        if k not in c:
            raise UserError(f"{where}.{k} is unknown;{nearest(k, list(c))}")
    return values


def embedded(c: ConfigDict) -> Any:
    """The world that writes a config's data and knows its gold reward, made of world.name, world.options and the seed; None without one."""
    return imported(c.world.name)(seed=c.seed, **plain(c.world.get("options", ConfigDict()))) if "world" in c else None


def check_finite(c: ConfigDict, where: str = "config") -> None:
    """A locked ConfigDict takes NaN and infinity without a word; we do not."""
    for k in c.keys():
        v = c.get(k)
        if isinstance(v, ConfigDict):
            check_finite(v, f"{where}.{k}")
        elif isinstance(v, float) and not math.isfinite(v):
            raise UserError(f"{where}.{k} must be finite, got {v}")


def plain(c: Any) -> Any:
    return {k: plain(c.get(k)) for k in c.keys()} if isinstance(c, ConfigDict) else tuple(map(plain, c)) if isinstance(c, (list, tuple)) else c


def rounds(*order: str, **over: Any) -> dict[str, Any]:
    """The section `rounds` of a pipeline: after the stages of its `order` those of `order` here, again and again, as NAME_1, NAME_2, ...

    In the texts of these stages {round} is the round's number, {rounds} (of a file) the files of all rounds so far, {policy} the
    policy that the round begins with, and the name of a stage of the round's own stands with {round}: reward="reward_{round}".
    The files of a round, data/{rankings,held,pairs,best}_{round}.jsonl and data/kept_{round}_{1,2,...}.jsonl, are made when a stage reads
    them, of what that policy answers then (`cli.rounds`).
    """
    section = {
        "count": 2,
        "order": order,
        "start": "sft",  # the policy of the first round: a stage or a directory
        "policy": order[-1] if order else "",  # which stage of a round is its new policy
        "prompts": "data/prompts.jsonl",
        "each": 64,  # prompts of a round, the next ones of the file
        "held_out": 32,  # prompts of a round, of the file's last that no round asks for rankings, whose answers are ranked for data/held_{round}.jsonl
        "candidates": 4,  # answers to each
        "sampling": {"max_new": 64, **fields(Sampling, skip=("stop", "pad"))},
        # Who says which answer is better: "" the world's labellers; "people", who write data/rankings_{round}.jsonl; a function
        # "package.module:function" (prompt, completion, record) -> float, higher is better; a reward model's stage.
        "labeller": "",
        "scorer": "",  # the same, of best_ and kept_ files; "": the labeller
        # kept_{round}_{i}: answers that reach quantiles[i - 1] of the scores (of their prompt's, or of the whole round's), and the
        # threshold where there is one; each text once, of a prompt at most `cap` (0: all).
        "keep": {"quantiles": (0.0,), "of": "prompt", "threshold": config_dict.placeholder(float), "cap": 1},
        "hint": "",  # STaR: "package.module:function" (record) -> prompt, asked again where nothing was kept; what it brings is kept without the hint
    }
    c = ConfigDict(section).lock()
    for k, v in _known(c, over, "rounds").items():
        c[k].update(_known(c[k], v, f"rounds.{k}")) if isinstance(v, dict) else c.update({k: v})
    return c


def stages(config: ConfigDict) -> dict[str, ConfigDict]:
    """{name: stage} in order: those of a pipeline, each round's one after the other, or the one of a train config."""
    if "stages" not in config:
        return {config.get("stage_name", config.name): config.stage}
    out = {n: config.stages[n] for n in config.order}
    if "rounds" in config:
        r = config.rounds
        if wrong := [n for n in (*r.order, r.policy) if n not in config.stages or n not in r.order]:
            raise UserError(f"rounds.order and rounds.policy: no stage {wrong[0]!r};{nearest(wrong[0], list(config.stages))}")
        for k in range(1, r.count + 1):
            out |= {f"{n}_{k}": of_round(config.stages[n], k, policy_of(config, k)) for n in r.order}
    return out


def policy_of(config: ConfigDict, k: int) -> str:
    """The policy that round k begins with."""
    return config.rounds.start if k == 1 else f"{config.rounds.policy}_{k - 1}"


def of_round(c: ConfigDict, k: int, policy: str) -> ConfigDict:
    """A stage of a round, its texts filled in."""
    c = c.copy_and_resolve_references()

    def fill(text: str) -> str:
        if "{rounds}" in text:
            return ",".join(text.replace("{rounds}", str(i)) for i in range(1, k + 1))
        return text.replace("{round}", str(k)).replace("{policy}", policy)

    def walk(at: ConfigDict) -> None:
        for key in at.keys():
            v = at.get(key)
            if isinstance(v, ConfigDict):
                walk(v)
            elif isinstance(v, str):
                at[key] = fill(v)

    walk(c)
    return c
