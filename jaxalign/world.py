"""What all stages of a config share: mesh, tokenizer, template, model, and how data and weights are read with them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxalign import shard, tree
from jaxalign.config import adapter, adapts, base, check_finite, family, plain, stages
from jaxalign.data import chosen, hub, judged, sources, trajectories
from jaxalign.data import tokenizers as toks
from jaxalign.data.jinja import Jinja
from jaxalign.data.rows import read
from jaxalign.data.templates import Template, encode_prompt, stop_ids
from jaxalign.methods import REWARDS, imported
from jaxalign.models import heads, peft
from jaxalign.ops import nn
from jaxalign.rl.rollout import Sampling, check_length
from jaxalign.train import checkpoint
from jaxalign.types import Model, Tree, UserError


@dataclasses.dataclass(frozen=True)
class World:
    """What all stages of a config share."""

    config: ConfigDict
    workdir: Path
    mesh: jax.sharding.Mesh
    rules: dict
    tokenizer: toks.Tokenizer
    template: Template | Jinja
    model: Model
    rollout_mesh: jax.sharding.Mesh | None = None  # of devices that only sample (rl.rollout_devices)
    imagined: Any = None  # of a plan: an object with `weights` and `source`, which makes shapes of what would be read

    def find(self, path: str) -> str:
        """A path or a stage's name, looked for in the run's own directory first."""
        inside = self.workdir / path
        return str(inside if inside.exists() else path)

    def stage_dir(self, name: str) -> Path:
        return self.workdir / name if "stages" in self.config else self.workdir

    def shard_of(self, batch: int) -> tuple[int, int]:
        return shard.local_rows(self.mesh, batch)

    @property
    def scored(self) -> World:
        """The same world for a reward model: of BERT, the trunk with a pooler in place of the masked-LM head."""
        return self if getattr(self.model, "causal", True) else dataclasses.replace(self, model=self.model.scored())

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids if i not in (self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id)])


def world(config: ConfigDict, workdir: str | os.PathLike) -> World:
    """Mesh, tokenizer and model. Trains the tokenizer if the config says on what and it is not there yet."""
    check_finite(config)
    mesh = make_mesh(config)
    name = config.tokenizer.template
    source = chosen.source(name, [str(workdir)])
    tokenizer = _tokenizer(config, Path(workdir), chosen.specials(name, source))
    template, tokenizer = chosen.template(name, source, tokenizer, config.tokenizer.get("variables") or "")
    if getattr(template, "date", None):
        config, template = _dated(config, Path(workdir), template)
    rules = dict(config.rules)
    model = model_of(config.model, tokenizer)
    start = getattr(model, "start", None)
    if start is not None and encode_prompt("a", tokenizer, template)[-1] != start:
        raise UserError(
            f"the decoder of this model starts with id {start}, so prompts must end with it: set tokenizer.template to encoder_decoder, "
            f"whose prompts end with the tokenizer's PAD (id {tokenizer.pad_id})" + ("" if start == tokenizer.pad_id else f", and model.start to {tokenizer.pad_id}")
        )
    return World(config, Path(workdir), mesh, rules, tokenizer, template, model, _rollout_mesh(config))


def _dated(config: ConfigDict, workdir: Path, template: Jinja) -> tuple[ConfigDict, Jinja]:
    """Both with the date that the template writes fixed: to that of the run's first day, which its config.json (or its stages')
    keeps. So a run that goes on tomorrow trains on the rows of today."""
    if "strftime_now" not in json.loads(config.tokenizer.get("variables") or "{}"):
        for path in (workdir / "config.json", *sorted(workdir.glob("*/config.json"))):
            try:
                kept = json.loads(json.loads(path.read_text(encoding="utf-8"))["tokenizer"]["variables"])["strftime_now"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not a run's, or of a run that fixed no date
            template = dataclasses.replace(template, variables=json.dumps({**json.loads(template.variables), "strftime_now": kept}, sort_keys=True))
            break
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.tokenizer.variables = template.variables
    return config, template


def make_mesh(config: ConfigDict):
    """The devices that train: all but those that only sample."""
    return shard.make_mesh({k: int(v) for k, v in config.mesh.items()}, **({"devices": jax.devices()[n:]} if (n := _samplers(config)) else {}))


def _samplers(config: ConfigDict) -> int:
    """How many devices, the first ones, only sample."""
    if isinstance(config.get("stage"), str) or not {"stage", "stages"} & set(config):
        return 0  # a finished run, opened to be looked at
    asked = {c.rl.rollout_devices for c in stages(config).values() if "rl" in c}
    if len(asked) > 1:
        raise UserError(f"rl.rollout_devices: the stages ask for {sorted(asked)}, and one mesh serves them all; give each the same")
    n = max(asked, default=0)
    if n and (jax.process_count() > 1 or not 0 < n < jax.device_count()):
        raise UserError(f"rl.rollout_devices {n}: one process, and more devices than these, are needed; there are {jax.process_count()} processes and {jax.device_count()} devices")
    return n


def _rollout_mesh(config: ConfigDict):
    n = _samplers(config)
    return shard.make_mesh({}, jax.devices()[:n]) if n else None


def _tokenizer(config: ConfigDict, workdir: Path, specials: tuple[str, ...]) -> toks.Tokenizer:
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
            toks.train_sentencepiece(texts, str(temp), config.model.vocab, c.kind, specials=specials)
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


def model_of(c: ConfigDict, tokenizer: toks.Tokenizer) -> Model:
    if c.path:
        from jaxalign.models import hf

        model = hf.read_config(c.path, dtype=c.dtype, remat=c.get("remat") or "none")
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
    """Weights of a stage, a run directory or an HF directory, into their shards. dtype None: as they are saved. Where the specs are a
    model's alone, of a stage with Q and value heads the model alone."""
    if w.imagined is not None:
        return w.imagined.weights(w, specs, what, dtype)
    path = w.find(where)
    if os.path.isdir(params := os.path.join(path, "params")):
        saved = checkpoint.structure(params)
        only = "trunk" if {"trunk", "v"} <= set(saved) and "trunk" not in specs else None  # of a policy with Q and value heads, the policy
        saved = tree.flat(saved[only] if only else saved)
        kind = lambda k: saved[k].dtype if k in saved else "float32"
        target = tree.map_named(lambda k, x: jax.ShapeDtypeStruct(x.shape, kind(k), sharding=x.sharding), shard.abstract(specs, w.mesh, w.rules))
        held = tree.flat(checkpoint.load_tree(params, target, only)[0])
        return tree.unflat({k: x if dtype in (None, x.dtype.name) else x.astype(dtype) for k in list(held) for x in [held.pop(k)]})  # leaf by leaf
    if os.path.exists(os.path.join(path, "model.safetensors")) or os.path.exists(os.path.join(path, "model.safetensors.index.json")):
        from jaxalign.models import hf

        return hf.load(path, dtype=dtype, mesh=w.mesh, rules=w.rules)[1]
    raise UserError(f"{what}: {where!r} is neither a finished stage of {w.workdir}, nor a run directory with params/, nor an HF directory with model.safetensors")


def data_source(w: World, c: ConfigDict, path: str, batch: int, seed: int, *, shuffle: bool = True, kind: str | None = None, **more) -> sources.Offline:
    """A source over `path` as the data section says."""
    make = {
        "tokens": sources.tokens_source, "pairs": sources.pairs_source, "rankings": sources.rankings_source, "labelled": judged.labelled_source,
        "steps": judged.steps_source, "prompts": sources.prompts_source, "trajectories": trajectories.trajectories_source,
    }  # fmt: skip
    kind = kind or c.kind
    if w.imagined is not None:
        return w.imagined.source(w, c, kind, batch, mismatched=more.get("mismatched", False))
    if not path:
        raise UserError(f"data.path is empty: name the file with the {kind} to train on (JSONL)")
    paths = [w.find(p) for p in path.split(",")]
    options = {k: c.get(k) for k in ("seq_len", "packing", "too_long", "max_len", "max_prompt_len", "max_k", "max_drop", "top", "standardise", "margins") if k in c and k not in more and k in inspect.signature(make[kind]).parameters}
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


def opened(run: str, template: str = "", tokenizer: str = "") -> tuple[World, str, bool]:
    """(world, stage name, whether it is a reward model) of a stage's directory, by the config.json that it keeps, or of a
    Hugging Face directory, which is read as it is."""
    directory = Path(run)
    if not (directory / "config.json").exists():
        inside = sorted(str(p.parent.parent) for p in directory.glob("*/params/manifest.json"))
        which = f"; the stages in it are {', '.join(inside)}" if inside else ""
        raise UserError(f"{run} holds no config.json: name a stage's directory, such as runs/quickstart/ppo, or a Hugging Face directory{which}")
    try:
        said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{directory / 'config.json'} is not readable JSON: {e}") from None
    if not isinstance(said, dict) or not {"stage", "model_type", "architectures"} & set(said):
        raise UserError(f"{directory / 'config.json'} is neither a stage's nor a Hugging Face model's: it has no \"stage\" and no \"model_type\"")
    published = "stage" not in said
    if published:
        from jaxalign.models import hf

        said, classes = imported_config(directory.name, run, hf.read_config(run)), said.get("architectures") or ()
    config = ConfigDict(said)
    if tokenizer:
        config.tokenizer.path = tokenizer if tokenizer == "bytes" else str(Path(tokenizer).absolute())
        if os.path.isdir(tokenizer) and hub.about(tokenizer).chat_template:
            config.tokenizer.template = "hf"
    if template:
        config.tokenizer.template = template
    w = world(config, directory.parent if "stages" in config else directory)
    kind = config.objective  # of the stage; one of a round's is a template in `stages`
    return w, config.stage, any("ForSequenceClassification" in c for c in classes) if published else kind in REWARDS


def trained(run: str, dtype: str | None = "float32", *, template: str = "", tokenizer: str = "", adapter: str = "", writes: bool = False, beta: float = 1.0, clip: float | None = None) -> tuple[World, str, Tree]:
    """(world, stage name, weights) of a finished stage's directory, or of a Hugging Face directory with its own chat template.

    dtype: as `load_params`. template, tokenizer: others than its own. adapter: a PEFT directory, or a stage that left one, attached to the weights and not merged.
    writes: refuse, before any weight is read, a model that can not continue a text. beta, clip: of a stage with Q heads, how it decodes.
    """
    w, name, reward = opened(run, template, tokenizer)
    if writes:
        if reward:
            raise UserError(f"{run} holds a reward model: it scores texts and writes none; name a policy's directory")
        if not getattr(w.model, "causal", True):
            raise UserError(f"{run} holds a model that reads both ways (model.family {w.config.model.family}): it can not continue a text; name a causal one")
    w = w.scored if reward else valued(w, run, beta, clip)
    params = load_params(w, str(Path(run).absolute()), heads.Scalar(w.model).specs() if reward else w.model.specs(), run, dtype)
    return w, name, adapted_by(w, params, adapter) if adapter else params


def valued(w: World, stage: str | os.PathLike, beta: float = 1.0, clip: float | None = None) -> World:
    """The same world where a stage's weights are a model alone; where they hold Q and value heads too, with a model that decodes by
    them (`models.heads.Guided`)."""
    params = Path(stage) / "params"
    names = tree.flat(checkpoint.structure(params)) if w.imagined is None and params.is_dir() else {}
    if not any(k.startswith("v/") for k in names):
        return w
    twins = len({k.split("/")[1] for k in names if k.startswith("q/")})
    return dataclasses.replace(w, model=heads.Guided(w.model, twins, beta, clip))


def adapted(w: World, c: ConfigDict, key, params: Tree, head: Tree | None = None) -> tuple[Tree, Tree | None]:
    """(params, head) of a trunk with the stage's adapters on a frozen, perhaps quantised, base; as given where it asks for none."""
    if not adapts(c):
        return params, head
    if w.imagined is not None:
        return w.imagined.adapted(w, c, params, head)
    path = Path(w.find(c.adapter.path)) if c.adapter.path else None
    path = path / "adapter" if path and (path / "adapter").is_dir() else path
    return peft.begin(w.model, params, head, adapter(c), nn.fold(key, "adapter"), quantised=c.adapter.quantise, path=path, mesh=w.mesh, rules=w.rules)


def adapted_by(w: World, params: Tree, adapter: str) -> Tree:
    """The weights (of a reward model: {"trunk", "head"}) with the adapter of a PEFT directory, or of a stage that left one."""
    path = Path(w.find(adapter))
    path = path / "adapter" if (path / "adapter").is_dir() else path
    if not (path / peft.CONFIG).exists():
        raise UserError(f"--adapter={adapter}: there is no {path / peft.CONFIG}; name a PEFT directory, or a stage that was trained with adapters")
    if isinstance(w.model, heads.Guided):
        return {**params, "trunk": peft.load(path, w.model.trunk, params["trunk"], mesh=w.mesh, rules=w.rules)}
    if "trunk" not in params:
        return peft.load(path, w.model, params, mesh=w.mesh, rules=w.rules)
    trunk, head = peft.load(path, w.model, params["trunk"], head=params["head"], mesh=w.mesh, rules=w.rules)
    return {"trunk": trunk, "head": head}


class Generation(NamedTuple):
    """What generation_config.json of the Hugging Face directory that a model comes from asks for."""

    path: str = ""
    stop: tuple[int, ...] = ()  # eos_token_id, one or several
    settings: dict = {}  # temperature, top_k, top_p, as far as it says them; nothing unless it says do_sample


def generation(w: World) -> Generation:
    """Of a model trained here only the stop ids are taken: how its base was sampled from says nothing of it."""
    named = (Path(p) / "generation_config.json" for p in (w.config.model.path, w.config.tokenizer.path) if p)
    if (path := next((p for p in named if p.exists()), None)) is None:
        return Generation()
    try:
        c = json.loads(path.read_text(encoding="utf-8"))
        stop = c.get("eos_token_id")
        stop = tuple(stop if isinstance(stop, list) else [] if stop is None else [stop])
        if not all(type(i) is int and 0 <= i < w.model.config.vocab for i in stop):
            raise ValueError(f"eos_token_id {c['eos_token_id']!r} is no id of this vocabulary")
        settings = {k: c[k] for k in ("temperature", "top_k", "top_p") if c.get(k) is not None and c.get("do_sample")}
        if not all(type(v) in (int, float) for v in settings.values()):
            raise ValueError(f"{settings} are not numbers")
        Sampling(1, **settings)
    except (ValueError, AttributeError, UserError) as e:
        raise UserError(f"{path}: {e}; mend it or remove the file") from None
    return Generation(str(path), stop, settings if not {"section", "stages"} & set(w.config) else {})


def imported_config(name: str, hf: str, model: Model, objective: str = "lm") -> dict:
    """What `trained` reads of weights that came from HF form. `model` may be another than HF's config.json describes."""
    from jaxalign.models.hf import read_config

    where = str(Path(hf).absolute())
    shape = {"path": where} if model == read_config(where) else {"family": model.family.__name__.split(".")[-1], **dataclasses.asdict(model.config)}
    c = base(name, **shape)
    c.tokenizer.path = where
    if getattr(model, "start", None) is not None:
        c.tokenizer.template = "encoder_decoder"
    elif hub.about(hf).chat_template:
        c.tokenizer.template = "hf"
    return {**plain(c), "stage": name, "objective": objective}


def shown(record: dict) -> str:
    """A prompt as one would print it."""
    prompt = record.get("prompt", record)
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def sampling(w: World, c: ConfigDict, **over) -> Sampling:
    return Sampling(**{**plain(c), **over}, stop=stop_ids(w.tokenizer, w.template), pad=w.tokenizer.pad_id)


def drafter(w: World, how: Sampling) -> tuple | None:
    """(model, weights) of the run or directory that how.draft names; None where it names none."""
    if how.draft in ("", "ngram"):
        return None
    small = opened(w.find(how.draft), "", "")[0]
    if small.tokenizer.vocab_size != w.tokenizer.vocab_size or any(small.tokenizer.encode(t) != w.tokenizer.encode(t) for t in ("The same words, 1 23!", "Ünicode \n\n x=y")):
        raise UserError(f"sampling.draft {how.draft}: its tokenizer is another one; a draft must write in the same ids")
    return small.model, load_params(w, how.draft, small.model.specs(), "sampling.draft")


def judge_of(w: World, path: str, what: str) -> tuple:
    """(model, weights, tokenizer, template) of the run or directory that judges: with a vocabulary and a template of its own."""
    other = opened(w.find(path), "", "")[0]
    return other.model, load_params(w, path, other.model.specs(), what), other.tokenizer, other.template


def prompt_rows(w: World, rows, batch: int) -> sources.Offline:
    """Prompts (records, or `read(path)`) in their own order, for sampling and evaluation, `batch` or a few more at a time."""
    shards = shard.batch_shards(w.mesh)
    batch = -(-batch // shards) * shards
    return sources.prompts_source(
        rows, w.tokenizer, batch_size=batch, seed=0, template=w.template, shuffle=False, shard=w.shard_of(batch), vocab_size=w.model.config.vocab, max_prompt_len=None
    )  # fmt: skip
