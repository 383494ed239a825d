"""Hugging Face directories (config.json and safetensors) <-> a model and its params, strict both ways.

With `models.peft` the only file that imports safetensors; there is no pickle path. A family says how transformers spells it with
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
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxalign import shard, tree
from jaxalign.models import Architecture, FamilyModel, bert, decoder, gpt2, neox, t5
from jaxalign.ops.nn import Spec, is_spec
from jaxalign.types import Tree, UserError

FAMILIES = (decoder, gpt2, neox, t5, bert)
ARCHITECTURES = {kind: (family, a) for family in FAMILIES for kind, a in family.HF.items()}

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Fields that do not change the function: token ids (the tokenizer knows them), dropout, bookkeeping, generation.
HARMLESS = re.compile(
    r"(architectures|model_type|name_or_path|_name_or_path|transformers_version|dtype|torch_dtype|use_cache|initializer_range|initializer_factor"
    r"|(bos|eos|pad|sep|cls|unk|mask|decoder_start)_token(_id)?|\w*dropout\w*|[a-z]+_pdrop|task_specific_params|id2label|label2id"
    r"|problem_type|num_labels|return_dict|output_\w+|tokenizer_class|chunk_size_feed_forward|n_ctx|summary_\w+"
    r"|reorder_and_upcast_attn|jaxalign_\w+"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p"
    r"|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|num_return_sequences|remove_invalid_values)"
)

MANY_LAYERS = 10_000  # more than anybody's model; a hostile config.json may ask for any number

SHARD_BYTES = 5 * 10**9  # transformers' own limit per file


# -- reading --------------------------------------------------------------------------------------------------------


def _inside(directory: Path, name: str) -> Path:
    """The regular file `name` of `directory`: a plain name, not a link that leads out of it.

    The Hub's cache is the one exception: snapshots/REVISION/name may link to ../../blobs/HASH.
    """
    root, path = directory.resolve(), directory / name
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise UserError(f"{directory}: {name!r} is not a plain file name; a checkpoint may only name files of its own directory")
    real = path.resolve()
    if real.parent != root and not (root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"):
        raise UserError(f"{path} leads out of its directory, to {real}; copy the file in place of the link")
    if not real.is_file():
        raise UserError(f"{path} does not exist or is not a regular file")
    return real


def _json(directory: Path, name: str) -> dict:
    path = _inside(directory, name)
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as e:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(out, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(out).__name__}")
    return out


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
    return type(value) in ((int,) if kind == "int" else (int, float)) and math.isfinite(value) and (value > 0 or (value == 0 and field.default == 0))


def read_config(directory, **overrides) -> FamilyModel:
    """The model that a directory's config.json describes, without its weights.

    overrides: fields of the Config that config.json does not have (scan, remat; here also dtype, of activations).
    """
    directory = Path(directory)
    made, arch, _ = _model(directory / "config.json", _json(directory, "config.json"), overrides)
    if not arch.tied_by_file:
        return made
    with contextlib.ExitStack() as stack:
        return _settled(made, arch, _tensors(directory, stack))


def _settled(model: FamilyModel, arch: Architecture, tensors: dict) -> FamilyModel:
    """The model, tied if its file holds no unembedding, where config.json does not say."""
    if not arch.tied_by_file:
        return model
    return FamilyModel(model.family, dataclasses.replace(model.config, tied=arch.names(model.config)["unembed"][0] not in tensors))


def _tensors(directory: Path, stack: contextlib.ExitStack) -> dict:
    """{tensor name: (file name, open file)}; every header has been parsed and checked by then."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    if os.path.lexists(directory / single):
        wanted = {single: None}
    elif os.path.lexists(directory / index):
        wanted = {}
        weight_map = _json(directory, index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise UserError(f"{directory / index}: weight_map must map tensor names to file names")
        for name, file in weight_map.items():
            wanted.setdefault(file, set()).add(name)
    else:
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {pickled[0]} is a pickle, which can run code and is never opened: convert it to safetensors where you trust it" if pickled else ""
        raise UserError(f"{directory} holds neither {single} nor {index}{hint}")
    out, wrong = {}, []
    for file, names in wanted.items():
        f = stack.enter_context(_open(_inside(directory, file)))
        found = set(f.keys())
        if names is not None and found != names:
            wrong += [f"{file} lacks {n}" for n in sorted(names - found)] + [f"{file} holds {n}, which the index does not list there" for n in sorted(found - names)]
        out.update({n: (file, f) for n in found})
    if wrong:
        raise UserError(f"{directory / index} does not match its files: {_list(wrong)}")
    return out


def _open(path: Path):
    try:
        return safe_open(path, framework="np")
    except Exception as e:  # SafetensorError has no stable base class
        raise UserError(f"{path} is not a valid safetensors file: {e}") from e


def _list(lines: list[str], limit: int = 50) -> str:
    return "; ".join(lines[:limit]) + (f"; and {len(lines) - limit} more" if len(lines) > limit else "")


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
        file, f, spelled = tensors[name]
        if name in want:
            view = f.get_slice(spelled)
            if tuple(view.get_shape()) != want[name]:
                wrong.append(f"{name} has shape {list(view.get_shape())}, the config needs {list(want[name])}")
            elif view.get_dtype() not in DTYPES:
                wrong.append(f"{name} is {view.get_dtype()}, jaxalign reads {', '.join(DTYPES)}")
        elif re.search(arch.buffers, name):
            continue
        elif name == unembed and not reward:  # here the config says tied, or the name would be wanted
            embed = names["embed"][0][0]
            if embed in tensors and not _same(tensors[embed][1], tensors[embed][2], f, spelled):
                wrong.append(f"{name} differs from the embedding although the config ties them; set tie_word_embeddings to false")
        else:
            wrong.append(f"unexpected {name} in {file}")
    if wrong:
        raise UserError(f"{where} does not fit its config.json: {_list(wrong)}")


def _renamed(name: str, arch: Architecture) -> str:
    """Today's name of a tensor that an older file may spell otherwise."""
    end = next((old for old in arch.renamed if name.endswith(old)), "")
    return name.removesuffix(end) + arch.renamed.get(end, "")


def _read(f, name: str) -> np.ndarray:
    try:
        return f.get_tensor(name)
    except Exception as e:
        raise UserError(f"cannot read tensor {name}: {e}") from e


def _same(f, a: str, g, b: str) -> bool:
    a, b = _read(f, a), _read(g, b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def load(directory, *, dtype: str | None = "float32", mesh=None, rules: dict | None = None, **overrides) -> tuple[FamilyModel, Tree]:
    """A Hugging Face directory -> (model, params).

    dtype: of the params; None keeps the file's. With a mesh each leaf goes straight to its shards; one leaf at a time is
    held in host memory. overrides: scan, remat. A reward model (``*ForSequenceClassification`` with one label) gives
    params {"trunk": ..., "head": {"weight" [D], "bias" []}}; its trunk is tied, since it has no lm_head.

    Raises UserError, before reading any weight, with everything that is missing, unexpected or misshaped, and for config
    fields that we do not implement. Sources: safetensors format 0.x; config.json of transformers 4 and 5.
    """
    directory = Path(directory)
    config = _json(directory, "config.json")
    made, arch, reward = _model(directory / "config.json", config, overrides)
    with contextlib.ExitStack() as stack:
        tensors = _tensors(directory, stack)
        tensors = {_renamed(n, arch): (*v, n) for n, v in tensors.items()}
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
            kinds = {DTYPES[tensors[n][1].get_slice(tensors[n][2]).get_dtype()] for n, *_ in table[path]}
            if dtype is None and len(kinds) > 1:
                raise UserError(f"{directory}: the layers of {path} have several dtypes ({', '.join(sorted(kinds))}); give one dtype to load them in")
            host = np.empty(spec.shape, jnp.dtype(dtype or kinds.pop()))
            for name, index, transposed in table[path]:
                value = _read(tensors[name][1], tensors[name][2])
                host[index] = value.T if transposed else value
            out[path] = _place(host, spec, mesh, rules)
    params = tree.unflat(out)
    if reward:
        bias = config.get("jaxalign_score_bias", 0.0)
        if type(bias) not in (int, float) or not math.isfinite(bias):
            raise UserError(f"{directory}/config.json: jaxalign_score_bias {bias!r} is not a number")
        weight, own = (np.asarray(params["head"].get(k)) for k in ("weight", "bias"))
        params["head"] = {"weight": _place(weight[0], Spec(weight.shape[1:], (None,)), mesh, rules)}
        params["head"]["bias"] = _place(own[0] if "head/bias" in arch.score else np.asarray(bias, weight.dtype), Spec((), ()), mesh, rules)
    return made, params


def _place(host: np.ndarray, spec: Spec, mesh, rules):
    if mesh is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, shard.partition(spec, mesh, rules)), lambda i: host[i])


# -- writing --------------------------------------------------------------------------------------------------------


def save(directory, model: FamilyModel, params: Tree, *, tokenizer=None, dtype: str | None = None, drop_bias: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json (spelling of transformers 5), generation_config.json and model.safetensors, in shards with an
    index above `shard_bytes`. In a multi-process run every process must call it; process 0 writes.

    dtype: of the file; None keeps the params'. tokenizer: its bos_id, eos_id and pad_id go into the configs, its files beside.
    params {"trunk", "head"} are written as ``*ForSequenceClassification`` with one label. Its score layer has no bias in
    transformers. A constant shifts all scores alike and orders nothing, but it is never dropped silently: a nonzero bias
    raises UserError unless `drop_bias`, which writes it to config.json as jaxalign_score_bias, where `load` finds it.
    transformers scores the last token that is not pad_token_id: give it texts padded on the right with another token.
    """
    model = getattr(model, "trunk", model)  # of heads.Scalar
    arch = architecture(model)
    reward = set(params) == {"trunk", "head"}
    model = model.scored() if reward else model
    cfg = model.config
    if reward and arch.classifier is None:
        raise UserError(f"transformers has no {arch.causal.split('For')[0]}ForSequenceClassification: a reward model of this family cannot be exported")
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
        specs = {"trunk": model.specs(), "head": _head(cfg.dim, arch)}
        head = {k: params["head"][k][None] for k in specs["head"]}
        params = {"trunk": {k: v for k, v in params["trunk"].items() if k in specs["trunk"]}, "head": head}
    flat, leaves = tree.flat(specs, is_leaf=is_spec), tree.flat(params)
    if wrong := [f"missing {p}" for p in flat if p not in leaves] + [f"unexpected {p}" for p in leaves if p not in flat]:
        raise UserError(f"these params are not those of the model: {_list(wrong)}")
    if wrong := [f"{p} is {leaves[p].shape}, not {s.shape}" for p, s in flat.items() if leaves[p].shape != s.shape]:
        raise UserError(f"these params are not those of the model: {_list(wrong)}")
    kinds = {p: jnp.dtype(dtype or leaves[p].dtype) for p in flat}
    if odd := sorted({k.name for k in kinds.values()} - set(DTYPES.values())):
        raise UserError(f"cannot write {', '.join(odd)}; merge or dequantise the params first, or give dtype")
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_id", None) for k in ("bos", "eos", "pad")}
    # Written even where there is none: transformers would fill in ids of its own, which the vocabulary may not have.
    config |= {"dtype": max((k.name for k in kinds.values()), key=[k.name for k in kinds.values()].count), **ids}

    # Files are planned from the shapes, so that only one of them is ever held in host memory.
    table = names(model, reward)
    plan, room = [[]], shard_bytes
    for path, spec in flat.items():
        for name, index, transposed in table[path]:
            size = math.prod(spec.shape[len(index) :]) * kinds[path].itemsize
            if size > room and plan[-1]:
                plan.append([])
                room = shard_bytes
            plan[-1].append((path, name, index, transposed, size))
            room -= size
    directory, first = Path(directory), jax.process_index() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.glob("model*.safetensors*"):  # else a stale shard would be read with the new ones
            old.unlink()
    files = ["model.safetensors"] if len(plan) == 1 else [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    for file, entries in zip(files, plan):
        tensors, host = {}, (None, None)
        for path, name, index, transposed, _ in entries:
            if host[0] != path:
                host = (path, shard.to_host(leaves[path]).astype(kinds[path]))
            value = host[1][index]
            tensors[name] = np.ascontiguousarray(value.T if transposed else value)  # safetensors writes the raw buffer
        if first:
            save_file(tensors, directory / file, metadata={"format": "pt"})
    if not first:
        return
    if len(plan) > 1:
        total = sum(e[-1] for entries in plan for e in entries)
        _dump(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": {e[1]: f for f, entries in zip(files, plan) for e in entries}})
    if not reward:
        _dump(directory / "generation_config.json", {"_from_model_config": True, **ids})
    if tokenizer is not None:
        tokenizer.save(str(directory))
    _dump(directory / "config.json", config)


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
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
