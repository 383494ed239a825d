"""From a config to the functions and frozen dataclasses that do the work. Nothing below knows ConfigDict or a flag."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any, Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxalign import shard, tree
from jaxalign.config import OBJECTIVES, REWARDS, base, check_finite, family, fields, imported, nearest, plain, preset, stage, stages
from jaxalign.data import sources
from jaxalign.data import tokenizers as toks
from jaxalign.data.rows import read
from jaxalign.data.templates import TEMPLATES, Template, stop_ids
from jaxalign.models import heads
from jaxalign.objectives import ppo
from jaxalign.ops import nn
from jaxalign.ops.advantage import KL_ESTIMATORS
from jaxalign.rl import experience, rewards
from jaxalign.rl.control import KL
from jaxalign.rl.reference import WithReference
from jaxalign.rl.rollout import Sampling, check_length
from jaxalign.train import checkpoint, optim, run, state, step
from jaxalign.train.log import RunLog, TensorBoard
from jaxalign.types import Model, Objective, Source, Tree, UserError

# Dense bf16 FLOP/s of one device, from the makers' data sheets; f32 runs report FLOP/s only.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12}


# -- the parts ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """What all stages of a config share."""

    config: ConfigDict
    workdir: Path
    mesh: jax.sharding.Mesh
    rules: dict
    tokenizer: toks.Tokenizer
    template: Template
    model: Model

    def find(self, path: str) -> str:
        """A path or a stage's name, looked for in the run's own directory first."""
        inside = self.workdir / path
        return str(inside if inside.exists() else path)

    def stage_dir(self, name: str) -> Path:
        return self.workdir / name if "stages" in self.config else self.workdir

    def shard_of(self, batch: int) -> tuple[int, int]:
        return shard.local_rows(self.mesh, batch)

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids if i not in (self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id)])


def world(config: ConfigDict, workdir: str | os.PathLike) -> World:
    """Mesh, tokenizer and model. Trains the tokenizer if the config says on what and it is not there yet."""
    check_finite(config)
    if config.tokenizer.template not in TEMPLATES:
        raise UserError(f"tokenizer.template {config.tokenizer.template!r} is unknown;{nearest(config.tokenizer.template, list(TEMPLATES))}")
    template = TEMPLATES[config.tokenizer.template]
    mesh = _mesh(config)
    tokenizer = _tokenizer(config, Path(workdir), template)
    rules = dict(config.rules)
    return World(config, Path(workdir), mesh, rules, tokenizer, template, _model(config.model, tokenizer))


def _mesh(config: ConfigDict):
    return shard.make_mesh({k: int(v) for k, v in config.mesh.items()})


def _tokenizer(config: ConfigDict, workdir: Path, template: Template) -> toks.Tokenizer:
    c = config.tokenizer
    if c.path:
        inside = workdir / c.path
        return toks.load(str(inside) if inside.exists() else c.path)
    own = workdir / "tokenizer" / "tokenizer.model"
    if c.train_on:
        if jax.process_index() == 0 and not own.exists():  # the others ask nothing of the disk before the barrier
            paths = [str(workdir / p if (workdir / p).exists() else p) for p in c.train_on.split(",")]
            texts = (_text(r, where) for r, where in read(paths))
            temp = own.with_suffix(f".{os.getpid()}.tmp")
            toks.train_sentencepiece(texts, str(temp), config.model.vocab, c.kind, specials=template.specials)
            os.replace(temp, own)
        barrier("tokenizer")
    if own.exists():
        return toks.load(str(own))
    if config.model.path:
        return toks.load(config.model.path)
    return toks.Bytes()


def _text(record: dict, where: str) -> str:
    if not isinstance(record.get("text"), str):
        raise UserError(f"{where}: tokenizer.train_on wants rows with a \"text\", this one has {sorted(record)}; name a .txt file or JSONL of texts")
    return record["text"]


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _model(c: ConfigDict, tokenizer: toks.Tokenizer) -> Model:
    if c.path:
        from jaxalign.models import hf

        model = hf.read_config(c.path, dtype=c.dtype)
    else:
        shape = {k: v for k, v in plain(c).items() if k not in ("family", "path")}
        shape["vocab"] = shape["vocab"] or tokenizer.vocab_size
        for k in ("vocab", "dim", "layers", "heads"):
            if not (isinstance(shape[k], int) and shape[k] > 0):
                raise UserError(f"model.{k} must be a positive whole number, got {shape[k]!r}")
        model = family(c.family).model(**shape)
    if model.config.vocab < tokenizer.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab} embedding rows; set model.vocab to at least that")
    return model


def load_params(w: World, where: str, specs: Tree, what: str, dtype: str | None = "float32") -> Tree:
    """Weights of a stage, a run directory or an HF directory, into their shards. dtype None: as they are saved."""
    path = w.find(where)
    if os.path.isdir(params := os.path.join(path, "params")):
        saved = tree.flat(checkpoint.structure(params))
        kind = lambda k: saved[k].dtype if k in saved else "float32"
        target = tree.map_named(lambda k, x: jax.ShapeDtypeStruct(x.shape, kind(k), sharding=x.sharding), shard.abstract(specs, w.mesh, w.rules))
        held = tree.flat(checkpoint.load_tree(params, target)[0])
        return tree.unflat({k: x if dtype in (None, x.dtype.name) else x.astype(dtype) for k in list(held) for x in [held.pop(k)]})  # leaf by leaf
    if os.path.exists(os.path.join(path, "model.safetensors")) or os.path.exists(os.path.join(path, "model.safetensors.index.json")):
        from jaxalign.models import hf

        return hf.load(path, dtype=dtype, mesh=w.mesh, rules=w.rules)[1]
    raise UserError(f"{what}: {where!r} is neither a finished stage of {w.workdir}, nor a run directory with params/, nor an HF directory with model.safetensors")


def data_source(w: World, c: ConfigDict, path: str, batch: int, seed: int, *, shuffle: bool = True, kind: str | None = None, **more) -> sources.Offline:
    """A source over `path` as the data section says."""
    make = {"tokens": sources.tokens_source, "pairs": sources.pairs_source, "rankings": sources.rankings_source, "prompts": sources.prompts_source}
    kind = kind or c.kind
    if not path:
        raise UserError(f"data.path is empty: name the file with the {kind} to train on (JSONL)")
    paths = [w.find(p) for p in path.split(",")]
    options = {k: c.get(k) for k in ("seq_len", "packing", "too_long", "max_len", "max_prompt_len", "max_k", "max_drop") if k in c and k not in more and k in inspect.signature(make[kind]).parameters}
    if ":" in (form := c.get("format") or ""):
        form = imported(form)  # record -> example
    skip = c.get("on_bad_row") == "skip"
    aside = w.workdir / f"quarantine-{Path(paths[0]).name}" if skip and jax.process_index() == 0 else None
    rows = read(
        paths, on_bad_row="skip" if skip else "error", quarantine=aside and str(aside), text_split=c.get("text_split", "blank"), max_bad_fraction=c.get("max_bad_fraction", 0.01)
    )  # fmt: skip
    source = make[kind](
        rows, w.tokenizer, batch_size=batch, seed=seed, template=w.template, shuffle=shuffle, shard=w.shard_of(batch), vocab_size=w.model.config.vocab, format=form or None, **options, **more
    )  # fmt: skip
    longest = source.report()["max_length"]
    check_length(w.model, min(longest, options.get("seq_len") or longest), path)
    return source


def trained(run: str, dtype: str | None = "float32") -> tuple[World, str, Tree]:
    """(world, stage name, weights) of a finished stage's directory, from the config.json that it keeps. dtype: as `load_params`."""
    directory = Path(run)
    if not (directory / "config.json").exists():
        raise UserError(f"{run} holds no config.json: name a stage's directory, such as runs/quickstart/ppo")
    config = ConfigDict(json.loads((directory / "config.json").read_text()))
    name = config.stage
    w = world(config, directory.parent if "stages" in config else directory)
    kind = config.stages[name].objective.name if "stages" in config else config.objective
    specs = heads.Scalar(w.model).specs() if kind in REWARDS else w.model.specs()
    return w, name, load_params(w, str(directory.absolute()), specs, run, dtype)


def imported_config(name: str, hf: str, model: Model, objective: str = "lm") -> dict:
    """What `trained` reads of weights that came from HF form. `model` may be another than HF's config.json describes."""
    from jaxalign.models.hf import read_config

    where = str(Path(hf).absolute())
    shape = {"path": where} if model == read_config(where) else {"family": model.family.__name__.split(".")[-1], **dataclasses.asdict(model.config)}
    c = base(name, **shape)
    c.tokenizer.path = where
    return {**plain(c), "stage": name, "objective": objective}


def shown(record: dict) -> str:
    """A prompt as one would print it."""
    prompt = record.get("prompt", record)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def sampling(w: World, c: ConfigDict, **over) -> Sampling:
    return Sampling(**{**plain(c), **over}, stop=stop_ids(w.tokenizer, w.template), pad=w.tokenizer.pad_id)


def prompt_rows(w: World, rows, batch: int) -> sources.Offline:
    """Prompts (records, or `read(path)`) in their own order, for sampling and evaluation, `batch` or a few more at a time."""
    shards = shard.batch_shards(w.mesh)
    batch = -(-batch // shards) * shards
    return sources.prompts_source(
        rows, w.tokenizer, batch_size=batch, seed=0, template=w.template, shuffle=False, shard=w.shard_of(batch), vocab_size=w.model.config.vocab, max_prompt_len=None
    )  # fmt: skip


def evaluation(objective: Objective, mesh, frozen: dict, source: sources.Offline, prepare: Callable = lambda b: b) -> Callable:
    """state -> the objective's own metrics over a held-out source, every example once."""

    @jax.jit
    def sums(params, frozen, aux, batch, key):
        full = tree.merge(params, frozen["base"]) if "base" in frozen else params
        stats = {k: step.mean(*v) for k, v in objective.stats(full, frozen, aux, batch).items()} if objective.stats else {}
        out = objective.loss(full, frozen, aux, batch, key, stats)
        return {**out.metrics, **{f"loss/{k}": (t.total, t.weight) for k, t in out.terms.items()}}

    def evaluate(s: state.TrainState, counts: bool = False) -> dict[str, float]:
        total: dict[str, np.ndarray] = {}
        for batch in sources.eval_batches(source):
            out = sums(s.params, frozen, s.aux, prepare(shard.place(batch, mesh)), s.key)
            for k, v in jax.device_get(out).items():
                total[k] = total.get(k, 0.0) + np.array(v, np.float64)
        tokens = {"tokens": float(total["nll"][1])} if counts else {}
        return {k: float(t / n) if n > 0 else 0.0 for k, (t, n) in total.items()} | tokens

    return evaluate


def peak_flops() -> float | None:
    kind = jax.devices()[0].device_kind
    return next((v * jax.device_count() for k, v in PEAK.items() if k in kind), None)


# -- one stage ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stage:
    """A stage ready to run: `go()` trains it (or goes on with it) and writes STAGE/params. `specs` are of what is saved."""

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

    def go(self) -> Tree:
        """Train to the end; returns (and saves) the weights that later stages start from."""
        w, c = self.world, self.config
        log = RunLog(self.workdir, process_index=jax.process_index(), mirrors=[TensorBoard(self.workdir / "tensorboard")] if w.config.tensorboard and jax.process_index() == 0 else ())
        with log:
            points = checkpoint.Checkpoints(self.workdir / "checkpoints", keep=c.train.keep)
            st = state.create(self.params, self.tx, self.objective, w.config.seed, w.mesh)
            fn = step.make_step(
                self.objective, self.tx, accumulate=c.data.accumulate, max_grad_norm=c.optim.max_grad_norm, schedule=self.schedule,
                shardings=jax.tree.map(lambda x: x.sharding, st),
            )  # fmt: skip
            length = c.data.get("seq_len") or 0
            st = run.train(
                st, fn, self.source, self.frozen, run.Loop(**plain(c.train)), mesh=w.mesh, log=log, checkpoints=points, evaluate=self.evaluate,
                flops_per_token=w.model.flops_per_token(length) if c.objective.name == "lm" and hasattr(w.model, "flops_per_token") else None,
                peak_flops=peak_flops() if w.model.config.dtype == "bfloat16" else None, name=self.name, settings=_settings(w.config, c),
                config={**{k: v for k, v in plain(w.config).items() if k != "stage"}, "stage": self.name, "objective": c.objective.name, "section": plain(c)},
            )  # fmt: skip
            params = tree.merge(st.params, self.base) if self.base is not None else st.params
            return params["policy"] if c.objective.name == "ppo" else params

    def finish(self, params: Tree) -> Tree:
        """What is saved: for a reward model, with its scores of the candidates it was trained on at mean 0 and std 1."""
        c, w = self.config, self.world
        if not c.get("normalise"):
            return params
        from jaxalign.evals import policy

        source = data_source(w, c.data, c.data.path, c.data.batch_size, 0, shuffle=False)
        scores = np.concatenate([s for s, _ in policy.candidate_scores(self.model, params, source, w.mesh)])
        return rewards.normalise(params, scores)

    def save(self, params: Tree) -> None:
        checkpoint.save_tree(self.workdir / "params", params, {"stage": self.name, "objective": self.config.objective.name})


def _settings(config: ConfigDict, c: ConfigDict) -> dict:
    """Everything that shapes training, to the source's fingerprint of the data; not how often it is saved or logged, nor the mesh."""
    out = plain(c)
    out["data"] = {k: v for k, v in out["data"].items() if k not in ("path", "eval_path")}
    return {**out, "train": {"steps": c.train.steps}, "model": plain(config.model), "seed": config.seed}


def check(config: ConfigDict) -> None:
    """Refuses, before any stage runs, what one of them could never do: values out of range, batches that do not divide."""
    check_finite(config)
    mesh = _mesh(config)
    for name, c in stages(config).items():
        check_stage(mesh, name, c)


def check_stage(mesh, name: str, c: ConfigDict) -> tuple[optim.Optim, run.Loop]:
    """(optimizer settings, loop settings) of one stage, or what is wrong with it."""
    batch, shards = c.data.batch_size, shard.batch_shards(mesh)
    parts = c.rl.minibatches if "rl" in c else 1
    if min(batch, c.data.accumulate, parts) < 1 or batch % (parts * c.data.accumulate * shards):
        raise UserError(f"{name}: data.batch_size {batch} must be a multiple of data.accumulate {c.data.accumulate} x data x fsdp {shards}" + (f" x rl.minibatches {parts}" if "rl" in c else ""))
    try:
        if "rl" in c:
            Sampling(**plain(c.sampling)), KL(c.rl.beta, c.rl.target, c.rl.horizon)
            if c.rl.epochs < 1 or c.rl.kl_estimator not in KL_ESTIMATORS:
                raise UserError(f"rl.epochs {c.rl.epochs} must be 1 or more, and rl.kl_estimator {c.rl.kl_estimator!r} one of {', '.join(KL_ESTIMATORS)}")
        return optim.Optim(**plain(c.optim)), run.Loop(**plain(c.train))
    except UserError as e:
        raise UserError(f"{name}: {e}") from None


def make_stage(w: World, name: str, c: ConfigDict, workdir: Path) -> Stage:
    """Everything read, checked and loaded; nothing trained."""
    o, loop = check_stage(w.mesh, name, c)
    c = ConfigDict(c)
    c.init = c.init or w.config.model.path
    kind, seed, batch = c.objective.name, w.config.seed, c.data.batch_size
    maker, _ = OBJECTIVES.get(kind) or (imported(kind), None)
    options = {k: v for k, v in plain(c.objective).items() if k != "name"}
    key = nn.fold(jax.random.key(seed), "init", name)
    trunk = load_params(w, c.init, w.model.specs(), f"{name}.init") if c.init else None
    draw = lambda specs, what: shard.init(specs, nn.fold(key, what), w.mesh, w.rules)
    frozen: dict[str, Tree] = {}
    prepare = lambda b: b

    if kind == "ppo":
        model, objective, source, params = _make_ppo(w, name, c, options, trunk if trunk is not None else draw(w.model.specs(), "policy"), draw, workdir)
    else:
        source = data_source(w, c.data, c.data.path, batch, seed)
        if kind in REWARDS:
            model = heads.Scalar(w.model)
            params = {"trunk": trunk if trunk is not None else draw(w.model.specs(), "trunk"), "head": draw(heads.specs(w.model.config.dim), "head")}
        else:
            model, params = w.model, trunk if trunk is not None else draw(w.model.specs(), "policy")
        objective = maker(model, **options)
        if "reference" in c and not (c.reference or c.init):
            if kind in OBJECTIVES:
                raise UserError(f"{name}: {kind} needs a reference model; set init (and reference, if it is another) to a stage or a directory")
        elif "reference" in c:
            reference = load_params(w, c.reference or c.init, w.model.specs(), f"{name}.reference")
            source = WithReference(source, w.model, reference, w.mesh)
            from jaxalign.rl.reference import add_reference

            prepare = lambda b: add_reference(w.model, reference, b)
    evaluate = None
    if c.data.get("eval_path"):
        held_out = data_source(w, c.data, c.data.eval_path, batch, seed, shuffle=False)
        evaluate = evaluation(objective, w.mesh, frozen, held_out, prepare)
    remains = None
    if o.freeze:
        params, remains = tree.split(params, optim.trainable(o, params))
        frozen["base"] = remains
    tx, schedule = optim.make(o, loop.steps, params)
    return Stage(w, name, Path(workdir), c, model, objective, source, params, frozen, remains, evaluate, tx, schedule)


def _make_ppo(w: World, name: str, c: ConfigDict, options: dict, policy: Tree, draw: Callable, workdir: Path):
    rl, model = c.rl, w.model
    if not c.init:
        raise UserError(f"{name}: ppo needs a policy to start from; set init to a stage or a directory")
    reference = load_params(w, rl.reference or c.init, model.specs(), f"{name}.rl.reference")
    scalar = heads.Scalar(model)
    if ":" in rl.reward:
        scorer, reward_params = rewards.python(imported(rl.reward), w.decode, w.mesh), None
    elif rl.reward:
        reward_params = load_params(w, rl.reward, scalar.specs(), f"{name}.rl.reward")
        scorer = rewards.learned(scalar, reward_params)
    else:
        raise UserError(f"{name}: rl.reward is empty; name a reward model's stage or directory, or a function as package.module:function")
    if rl.value == "head":
        value, critic = None, draw(heads.specs(model.config.dim, zero=True), "value")
    elif rl.value == "reward" and reward_params is not None:
        # A copy: the trained critic's buffers are donated, the reward model's are not.
        value, critic = scalar, load_params(w, rl.reward, scalar.specs(), f"{name}.rl.reward")
    else:
        raise UserError(f"{name}: rl.value is 'head' or 'reward' (which needs rl.reward to be a model), not {rl.value!r}")
    objective = ppo.ppo(model, value, **{**options, "temperature": c.sampling.temperature or 1.0})
    prompts = data_source(w, c.data, c.data.path, c.data.batch_size, w.config.seed)
    check_length(model, prompts.report()["max_length"] + c.sampling.max_new, f"{name}: prompts of {c.data.path} with sampling.max_new")
    mix = None
    if options["ptx_coef"]:
        mix = data_source(w, ConfigDict({"seq_len": rl.mix.seq_len}), rl.mix.path, rl.mix.batch_size, w.config.seed, kind="tokens")
    shaping = {k: rl[k] for k in fields(experience.make_experience) if k in rl}
    source = experience.PPOSource(
        prompts, model, value, reference, scorer, sampling(w, c.sampling), w.mesh, epochs=rl.epochs, minibatches=rl.minibatches,
        kl=KL(rl.beta, rl.target, rl.horizon), seed=w.config.seed, mix=mix, decode=w.decode, **plain(ConfigDict(shaping)),
    )  # fmt: skip
    return model, objective, source, {"policy": policy, "value": critic}
