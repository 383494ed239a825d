"""Hugging Face directories (config.json and safetensors) <-> a model and its params, strict both ways.

`weights` reads and writes the files as streams; there is no pickle path. A family says how transformers spells it with
HF = {model_type: `models.Architecture`}, next to its code.

Dropout rates in config.json are ignored: they change training, not the function. Everything else that we do not
implement is refused by name, because a field that is read over is a model that is silently another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxalign import shard, tree
from jaxalign.models import Architecture, FamilyModel, bert, decoder, gpt2, neox, t5, weights
from jaxalign.models.weights import DTYPES, Part, listing
from jaxalign.ops.nn import Spec, is_spec, is_weight
from jaxalign.types import Tree, UserError

FAMILIES = (decoder, gpt2, neox, t5, bert)
ARCHITECTURES = {kind: (family, a) for family in FAMILIES for kind, a in family.HF.items()}

# Fields that do not change the function: token ids (the tokenizer knows them), dropout, bookkeeping, generation. auto_map names code
# that came with the checkpoint; it is never run, and what the other fields say is checked all the same.
HARMLESS = re.compile(
    r"(architectures|model_type|name_or_path|_name_or_path|transformers_version|dtype|torch_dtype|use_cache|initializer_range|initializer_factor"
    r"|(bos|eos|pad|sep|cls|unk|mask|decoder_start)_token(_id)?|\w*dropout\w*|[a-z]+_pdrop|task_specific_params|id2label|label2id"
    r"|problem_type|num_labels|return_dict|output_\w+|tokenizer_class|chunk_size_feed_forward|n_ctx|summary_\w+"
    r"|reorder_and_upcast_attn|cache_implementation|auto_map|gradient_checkpointing|_attn_implementation\w*|attn_implementation|unsloth_\w+|jaxalign_\w+"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p"
    r"|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|num_return_sequences|remove_invalid_values)"
)

MANY_LAYERS = 10_000  # more than anybody's model; a hostile config.json may ask for any number

SHARD_BYTES = 5 * 10**9  # transformers' own limit per file


# -- reading --------------------------------------------------------------------------------------------------------


def _model(path: Path, config: dict, overrides: dict) -> tuple[FamilyModel, Architecture, bool]:
    """config.json -> (model, its spelling, whether it is a reward model). Raises UserError for anything we would read over."""
    c = dict(config)
    names, kind = c.get("architectures"), c.get("model_type")
    family, arch = ARCHITECTURES.get(kind, (None, None)) if isinstance(kind, str) else (None, None)
    if arch is None:
        raise UserError(f"{path}: model_type {kind!r} is not supported; jaxalign reads {', '.join(sorted(ARCHITECTURES))}")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in (arch.causal, arch.classifier):
        known = " and ".join(filter(None, (arch.causal, arch.classifier)))
        raise UserError(f"{path}: architectures {names!r} is not supported; of {kind} jaxalign reads {known}")
    reward = names[0] == arch.classifier
    if reward:
        labels = c.get("num_labels", len(c["id2label"]) if isinstance(c.get("id2label"), dict) else None)
        if labels != 1:
            raise UserError(f"{path}: a reward model has num_labels 1, this classifier has {labels}")
    try:
        for field, allowed in arch.fixed.items():
            value = c.pop(field, allowed[0])
            if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
                raise UserError(f"{path}: {field} {value!r} is not supported; it may be {' or '.join(map(repr, allowed))}")
        layers = c.get("num_hidden_layers", 1)
        if type(layers) is int and layers > MANY_LAYERS:  # before anything is made per layer
            raise UserError(f"{path} asks for {layers} layers")
        cfg = family.Config(**arch.read(c), **overrides)
    except KeyError as e:
        raise UserError(f"{path} lacks the field {e.args[0]!r}") from e
    except (TypeError, ValueError, ArithmeticError, AttributeError) as e:
        raise UserError(f"{path} does not describe a model: {e}") from e
    except UserError as e:
        raise UserError(f"{path}: {e}" if str(path) not in str(e) else str(e)) from e
    for field in dataclasses.fields(cfg):
        if not _fits(field, value := getattr(cfg, field.name)):
            want = {"int": "a positive whole number", "float": "a positive number", "bool": "true or false"}[field.type.split(" ")[0]]
            raise UserError(f"{path} gives {value!r} for {field.name}; it must be {want}")
    # What is null, false or empty asks for nothing.
    if left := sorted(k for k, v in c.items() if not HARMLESS.fullmatch(k) and v not in (None, False, "", [], {})):
        raise UserError(f"{path}: {', '.join(f'{k} = {c[k]!r}' for k in left)}: not supported, and ignoring it would load another model; remove it if it changes nothing")
    made = FamilyModel(family, cfg)
    return made.scored() if reward else made, arch, reward


def _fits(field, value) -> bool:
    """Numbers are positive (or 0 where 0 is the default), None only where it is the default."""
    kind = field.type.split(" ")[0]
    if value is None or kind not in ("int", "float", "bool"):
        return value is not None or field.default is None
    if kind == "bool":
        return type(value) is bool
    return type(value) in ((int,) if kind == "int" else (int, float)) and abs(value) < 2**63 and (value > 0 or (value == 0 and field.default == 0))


def read_config(directory, **overrides) -> FamilyModel:
    """The model that a directory's config.json describes, without its weights.

    overrides: fields of the Config that config.json does not have (scan, remat; here also dtype, of activations).
    """
    directory = Path(directory)
    made, arch, _ = _model(directory / "config.json", weights.read_json(directory, "config.json"), overrides)
    if not arch.tied_by_file:
        return made
    with contextlib.ExitStack() as stack:
        return _settled(made, arch, weights.tensors(directory, stack))


def _settled(model: FamilyModel, arch: Architecture, tensors: dict) -> FamilyModel:
    """The model, tied if its file holds no unembedding, where config.json does not say."""
    if not arch.tied_by_file:
        return model
    return FamilyModel(model.family, dataclasses.replace(model.config, tied=arch.names(model.config)["unembed"][0] not in tensors))


def _renamed(name: str, arch: Architecture) -> str:
    """Today's name of a tensor that an older file may spell otherwise."""
    end = next((old for old in arch.renamed if name.endswith(old)), "")
    return name.removesuffix(end) + arch.renamed.get(end, "")


def names(model: FamilyModel, reward: bool = False, prefix: str | None = None) -> dict[str, list[tuple[str, tuple, bool]]]:
    """{our leaf: [(HF name, index into the leaf, transposed), ...]}: one entry per layer (and expert) of a stacked leaf.

    `reward`: of params {"trunk", "head"}. `prefix`: what the file says in place of the architecture's own.
    """
    arch = architecture(model)
    table = dict(arch.names(model.config))
    specs = model.specs()
    if reward:
        specs = {"trunk": model.scored().specs(), "head": _head(model.config.dim, arch)}
        table = {f"trunk/{k}": v for k, v in table.items()} | {k: (v, False) for k, v in arch.score.items()}
    out = {}
    for path, spec in tree.flat(specs, is_leaf=is_spec).items():
        name, transposed = table[path]
        lead = spec.shape[: name.count("{}")]
        if prefix is not None and prefix != arch.prefix:
            name = prefix + name.removeprefix(arch.prefix)
        out[path] = [(name.format(*i), i, transposed) for i in itertools.product(*map(range, lead))]
    return out


def architecture(model: FamilyModel) -> Architecture:
    """How transformers spells the model. Raises UserError where it has no such model."""
    if not isinstance(model, FamilyModel) or not hasattr(model.family, "HF"):
        raise UserError(f"{type(model).__name__} has no Hugging Face form; transformers knows the families {', '.join(sorted(ARCHITECTURES))}")
    kinds = model.family.HF
    return kinds[model.config.arch] if len(kinds) > 1 else next(iter(kinds.values()))


def _head(dim: int, arch: Architecture) -> dict:
    """Specs of transformers' one-label head."""
    bias = {"bias": Spec((1,), (None,))} if "head/bias" in arch.score else {}
    return {"weight": Spec((1, dim), (None, None)), **bias}


def _check(where, tensors: dict, names: dict, specs: dict, arch: Architecture, cfg, reward: bool):
    """Everything that is wrong, in one UserError, before a byte of weights is read."""
    want = {}
    for path, entries in names.items():
        for name, index, transposed in entries:
            shape = specs[path].shape[len(index) :]
            want[name] = shape[::-1] if transposed else shape
    wrong = [f"missing {n} {list(s)}" for n, s in want.items() if n not in tensors]
    unembed = arch.names(cfg).get("unembed", ("lm_head.weight", False))[0]
    for name in sorted(set(tensors)):
        t = tensors[name]
        if name in want:
            if t.shape != want[name]:
                wrong.append(f"{name} has shape {list(t.shape)}, the config needs {list(want[name])}")
            elif t.kind not in DTYPES:
                wrong.append(f"{name} is {t.kind}, jaxalign reads {', '.join(DTYPES)}: take an unquantised checkpoint, or dequantise it first")
        elif name in arch.copies and arch.copies[name] in tensors:
            if not weights.same(tensors[arch.copies[name]], t):
                wrong.append(f"{name} differs from {arch.copies[name]}, which it must repeat")
        elif re.search(arch.buffers, name):
            continue
        elif name == unembed and not reward:  # here the config says tied, or the name would be wanted
            embed = names["embed"][0][0]
            if embed in tensors and not weights.same(tensors[embed], t):
                wrong.append(f"{name} differs from the embedding although the config ties them; set tie_word_embeddings to false")
        else:
            wrong.append(f"unexpected {name} in {t.path.name}")
    if wrong:
        raise UserError(f"{where} does not fit its config.json: {listing(wrong)}")


def load(directory, *, dtype: str | None = "float32", mesh=None, rules: dict | None = None, **overrides) -> tuple[FamilyModel, Tree]:
    """A Hugging Face directory -> (model, params).

    dtype: of the params; None keeps the file's. With a mesh every device gets its slice, and this process reads only the
    rows that its own devices hold, each once (see `weights`). overrides: scan, remat. A reward model (``*ForSequenceClassification`` with one label) gives
    params {"trunk": ..., "head": {"weight" [D], "bias" []}}; its trunk is tied, since it has no lm_head.

    Raises UserError, before reading any weight, with everything that is missing, unexpected or misshaped, and for config
    fields that we do not implement; while reading, for numbers that float16 cannot hold. Sources: safetensors format 0.x; config.json of transformers 4 and 5.
    """
    directory = Path(directory)
    if dtype not in (None, *DTYPES.values()):
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES.values())}")
    config = weights.read_json(directory, "config.json")
    made, arch, reward = _model(directory / "config.json", config, overrides)
    with contextlib.ExitStack() as stack:
        tensors, pool = weights.tensors(directory, stack), stack.enter_context(weights.threads())
        tensors = {_renamed(n, arch): t for n, t in tensors.items()}
        made = _settled(made, arch, tensors)
        cfg, specs = made.config, made.specs()
        flat, out = tree.flat({"trunk": specs, "head": _head(cfg.dim, arch)} if reward else specs, is_leaf=is_spec), {}
        # GPT2Model saved without its head (openai-community/gpt2 itself) has no prefix.
        prefix = arch.prefix if any(n.startswith(arch.prefix) for n in tensors) else ""
        for path, spec in flat.items():  # before anything is made per layer or expert: the number may be a hostile one
            many = math.prod(n for n, axis in zip(spec.shape, spec.axes) if axis in ("layers", "expert"))
            if many > len(tensors):
                raise UserError(f"{directory}: config.json asks for {many} tensors of {path}, the checkpoint holds {len(tensors)} in all")
        table = names(made, reward, prefix)
        _check(directory, tensors, table, flat, arch, cfg, reward)
        for path, spec in flat.items():
            parts = [Part(tensors[n], index, transposed) for n, index, transposed in table[path]]
            kinds = {DTYPES[p.tensor.kind] for p in parts}
            if dtype is None and len(kinds) > 1:
                raise UserError(f"{directory}: the layers of {path} have several dtypes ({', '.join(sorted(kinds))}); give one dtype to load them in")
            sharding = mesh and NamedSharding(mesh, shard.partition(spec, mesh, rules))
            out[path] = weights.read(spec.shape, jnp.dtype(dtype or kinds.pop()), parts, sharding, pool)
    params = tree.unflat(out)
    if reward:
        bias = config.get("jaxalign_score_bias", 0.0)
        if type(bias) not in (int, float) or not math.isfinite(bias):
            raise UserError(f"{directory}/config.json: jaxalign_score_bias {bias!r} is not a number")
        weight, own = (np.asarray(params["head"].get(k)) for k in ("weight", "bias"))
        params["head"] = {"weight": place(weight[0], Spec(weight.shape[1:], (None,)), mesh, rules)}
        params["head"]["bias"] = place(own[0] if "head/bias" in arch.score else np.asarray(bias, weight.dtype), Spec((), ()), mesh, rules)
    return made, params


def place(host: np.ndarray, spec: Spec, mesh, rules) -> jax.Array:
    """A host array in its shards."""
    if mesh is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, shard.partition(spec, mesh, rules)), lambda i: host[i])


# -- writing --------------------------------------------------------------------------------------------------------


def save(directory, model: FamilyModel, params: Tree, *, tokenizer=None, dtype: str | None = None, drop_bias: bool = False, generation: dict | None = None, shard_bytes: int = SHARD_BYTES) -> int:
    """Write config.json (spelling of transformers 5), generation_config.json and model.safetensors, in shards with an
    index above `shard_bytes`. In a multi-process run every process must call it; process 0 writes. Returns the bytes of
    the weights' files. Host memory beside the params: a few blocks (see `weights`). config.json of an earlier export goes
    first and the new one comes last, so that what was cut short does not look like a model.

    dtype: of the file; None keeps the params'. tokenizer: its bos_id, eos_id and pad_id go into the configs, its files beside.
    generation: fields of generation_config.json (eos_token_id may be a list, temperature, top_p ...) over those ids.
    params {"trunk", "head"} are written as ``*ForSequenceClassification`` with one label. Its score layer has no bias in
    transformers. A constant shifts all scores alike and orders nothing, but it is never dropped silently: a nonzero bias
    raises UserError unless `drop_bias`, which writes it to config.json as jaxalign_score_bias, where `load` finds it.
    transformers scores the last token that is not pad_token_id: give it texts padded on the right with another token.
    """
    model, reward = getattr(model, "trunk", model), set(params) == {"trunk", "head"}  # of heads.Scalar
    arch = architecture(model)
    if held := [p for p, w in tree.flat(params, is_leaf=is_weight).items() if isinstance(w, dict)]:
        raise UserError(f"{listing(held, 5)}: adapted or quantised, which {arch.causal} has no tensors for; merge first (lora.merge), or write the adapters alone (peft.save)")
    model = model.scored() if reward else model
    cfg = model.config
    if reward and arch.classifier is None:
        raise UserError(f"a reward model with the trunk of {arch.causal} cannot be exported: {arch.why_not_scored}")
    config = {**arch.write(cfg), **{k: v[0] for k, v in arch.fixed.items()}, "use_cache": True}
    config["model_type"] = next(k for k, a in model.family.HF.items() if a is arch)
    _expressed(model, arch, config, reward)
    config["architectures"] = [arch.classifier if reward else arch.causal]
    specs = model.specs()
    if reward:
        bias = float(shard.to_host(params["head"]["bias"]))
        held = "head/bias" in arch.score
        if bias and not drop_bias and not held:
            raise UserError(f"the reward head has bias {bias:g}, and {config['architectures'][0]} has none; pass drop_bias=True to leave it out (scores shift, their order stays)")
        config |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} | ({"jaxalign_score_bias": bias} if bias and not held else {})
        specs = {"trunk": specs, "head": _head(cfg.dim, arch)}
        head = {k: params["head"][k][None] for k in specs["head"]}
        params = {"trunk": {k: v for k, v in params["trunk"].items() if k in specs["trunk"]}, "head": head}
    if getattr(tokenizer, "vocab_size", 0) > cfg.vocab:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids but the model only {cfg.vocab} embedding rows; give the model's own tokenizer, or resize its vocabulary")
    flat, leaves = tree.flat(specs, is_leaf=is_spec), tree.flat(params)
    if wrong := [f"missing {p}" for p in flat if p not in leaves] + [f"unexpected {p}" for p in leaves if p not in flat]:
        raise UserError(f"these params are not those of the model: {listing(wrong)}")
    if wrong := [f"{p} is {leaves[p].shape}, not {s.shape}" for p, s in flat.items() if leaves[p].shape != s.shape]:
        raise UserError(f"these params are not those of the model: {listing(wrong)}")
    kinds = {p: jnp.dtype(dtype or leaves[p].dtype) for p in flat}
    if odd := sorted({k.name for k in kinds.values()} - set(DTYPES.values())):
        raise UserError(f"cannot write {', '.join(odd)}; merge or dequantise the params first, or give dtype")
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_id", None) for k in ("bos", "eos", "pad")}
    # Written even where there is none: transformers would fill in ids of its own, which the vocabulary may not have.
    config |= {"dtype": max((k.name for k in kinds.values()), key=[k.name for k in kinds.values()].count), **ids}

    # Files are planned from the shapes alone.
    table = names(model, reward)
    plan, room = [[]], shard_bytes
    for path, spec in flat.items():
        for part in table[path]:
            size = math.prod(spec.shape[len(part[1]) :]) * kinds[path].itemsize
            if size > room and plan[-1]:
                plan.append([])
                room = shard_bytes
            plan[-1].append((path, Part(*part), size))
            room -= size
    directory, first = Path(directory), jax.process_index() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
        for old in (directory / "config.json", *directory.glob("model*.safetensors*")):  # a stale shard would be read with the new ones
            old.unlink(missing_ok=True)
    files = ["model.safetensors"] if len(plan) == 1 else [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    written = 0
    with weights.threads() as pool:
        for file, entries in zip(files, plan):
            written += weights.write(directory / file, [kinds[p] for p, *_ in entries], [leaves[p] for p, *_ in entries], [e[1] for e in entries], pool)
    if not first:
        return written
    if len(plan) > 1:
        total = sum(e[-1] for entries in plan for e in entries)
        _dump(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": {e[1].tensor: f for f, entries in zip(files, plan) for e in entries}})
    if not reward:
        # transformers derives the file anew from config.json where it says _from_model_config.
        start = {} if model.start is None else {"decoder_start_token_id": model.start}
        _dump(directory / "generation_config.json", {**({} if generation else {"_from_model_config": True}), **ids, **start, **(generation or {})})
    if tokenizer is not None:
        tokenizer.save(str(directory))
    _dump(directory / "config.json", config)
    return written


def _expressed(model: FamilyModel, arch: Architecture, config: dict, reward: bool) -> None:
    """Reading back what is about to be written must give this model, or transformers would load another one."""
    fields = {k: v for k, v in config.items() if k not in arch.fixed}
    again = FamilyModel(model.family, model.family.Config(**arch.read(fields)))
    again, ours = dataclasses.asdict((again.scored() if reward else again).config), dataclasses.asdict(model.config)
    # How activations are computed is not in config.json.
    odd = [k for k, v in ours.items() if k not in ("dtype", "scan", "remat") and v != again[k]]
    if odd:
        raise UserError(f"{arch.causal} cannot say {', '.join(f'{k} = {ours[k]!r}' for k in odd)}; set model.arch to an architecture that can, or change the model")


def _dump(path: Path, content: dict):
    weights.write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
