"""Adapters in PEFT's form: a directory with adapter_config.json and adapter_model.safetensors <-> `models.lora` nodes.

PEFT names a module where we name a weight: "layers/q" is base_model.model.model.layers.{0, 1, ...}.self_attn.q_proj, with
lora_A.weight [R,D], lora_B.weight [O,R] and, for DoRA, lora_magnitude_vector [O] for each layer. The names come from the
family's own table, through `hf.names`. adapter_model.bin is a pickle and is never opened.

Which modules are adapted, and with which rank and alpha, is decided from the config as peft decides it; then the file must
hold exactly those tensors. Layers of one stacked weight may differ: a smaller rank is filled up with zeros and a layer
without an adapter is all zeros, both of which compute the same and get no gradient.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import jax
import numpy as np

from jaxalign import shard, tree
from jaxalign.models import FamilyModel, hf, lora, peft_config, weights
from jaxalign.ops.nn import Spec, is_adapted, is_spec
from jaxalign.types import Tree, UserError

CONFIG, WEIGHTS = peft_config.CONFIG, "adapter_model.safetensors"
PREFIX = "base_model.model."

EMBEDDINGS = ("embed", "positions")  # looked up, not multiplied: our last name component
CLASSIFIERS = {"classifier", "score"}  # what PEFT trains whole beside the adapters of a classifier


@dataclasses.dataclass(frozen=True)
class _Module:
    """One HF module that a weight of ours comes from."""

    name: str  # model.layers.0.self_attn.q_proj
    leaf: str  # layers/q
    index: tuple[int, ...]  # into the leaf's stacked dimensions
    spec: Spec  # of the whole leaf

    @property
    def kind(self) -> str:
        last = self.leaf.split("/")[-1]
        return "embedding" if last in EMBEDDINGS else "unembedding" if last == "unembed" else "linear"

    def tensors(self, rank: int, dora: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """{part: (tensor name, shape)} as PEFT writes them."""
        D, O = self.spec.shape[len(self.index) :]
        if self.kind == "unembedding":  # ours is [V,D], so its "a" is their B
            return {"b": (f"{PREFIX}{self.name}.lora_A.weight", (rank, O)), "a": (f"{PREFIX}{self.name}.lora_B.weight", (D, rank))}
        form = ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        out = {"a": (f"{PREFIX}{self.name}.{form[0]}", (rank, D)), "b": (f"{PREFIX}{self.name}.{form[1]}", (O, rank))}
        return out | ({"magnitude": (f"{PREFIX}{self.name}.lora_magnitude_vector", (O,))} if dora else {})

    def turned(self, part: str, value: np.ndarray) -> np.ndarray:
        """Between their layout and ours, either way."""
        return value if part == "magnitude" or self.kind == "unembedding" else value.T


def whole(model) -> dict[str, str]:
    """{our part of the trunk: HF's module} that a classifier trains and saves whole beside its head."""
    return getattr(model.family, "whole", {})


def _kept(model, saved: set[str]) -> dict[str, tuple[str, bool]]:
    """{leaf of {"trunk", "head"}: (tensor, whether it lies the other way round there)} of the modules that are saved whole."""
    parts = {"head", *(f"trunk/{k}" for k, v in whole(model).items() if v in saved)}
    return {k: (f"{PREFIX}{e[0][0]}", e[0][2]) for k, e in hf.names(model, True).items() if k.rsplit("/", 1)[0] in parts}


def modules(model, reward: bool = False) -> dict[str, _Module]:
    """{HF module name: where its weight lies in our params} of every matrix that comes from one whole module."""
    specs = {f"trunk/{k}" if reward else k: s for k, s in tree.flat(model.specs(), is_leaf=is_spec).items()}
    out = {}
    for path, entries in hf.names(model, reward).items():
        for name, index, _ in entries:
            if name.endswith(".weight") and path in specs and len(specs[path].shape) - len(index) == 2:
                leaf = path.removeprefix("trunk/") if reward else path
                module = name.removesuffix(".weight")
                out[module] = _Module(module, leaf, index, specs[path])
    return out


def begin(model, params: Tree, head: Tree | None, how: lora.Lora | None, key, *, quantised: str = "", path=None, mesh=None, rules: dict | None = None) -> tuple[Tree, Tree | None]:
    """(params, head) a stage starts to train: the matrices of the layers quantised if it says so, then the adapters of the
    directory `path`, or fresh ones as `how` says. Raises UserError where the adapters could not be written afterwards."""
    if not isinstance(model, FamilyModel):
        raise UserError(f"adapter: {type(model).__name__} multiplies by its own weights; adapters need a family whose matrices go through ops.nn.linear")
    specs = model.specs()
    if quantised:
        params = lora.quantise(params, ((lora.MATRICES, quantised),), specs=specs, mesh=mesh, shard_rules=rules)
    if path is not None:
        got = load(path, model, params, head=head, mesh=mesh, rules=rules)
        params, head = got if head is not None else (got, None)
    else:
        params = lora.attach(params, how, key, specs=specs, mesh=mesh, rules=rules)
    if hasattr(model.family, "HF"):  # now, not after training
        check(model, params, head is not None)
    return params, head


# -- reading --------------------------------------------------------------------------------------------------------


def load(directory, model, params: Tree, *, head: Tree | None = None, mesh=None, rules: dict | None = None) -> Tree:
    """`params` of `model` with the adapters of a PEFT directory attached (f32, whatever the file's dtype).

    head: the scalar head {"weight", "bias"} of a reward model whose trunk `params` are; then (params, head) is returned, the head
    and, where it was saved, BERT's pooler from the directory. With a mesh, adapters go straight to their shards. Raises UserError, before reading any tensor, with
    everything missing, unexpected or misshaped; for config fields that we do not implement; for a pickle in its place.
    Source: peft 0.21 (LoraConfig, and `check_target_module_exists` for what matches).
    """
    directory = Path(directory)
    c = peft_config.read(directory)
    if not os.path.lexists(directory / WEIGHTS):
        pickled = (directory / "adapter_model.bin").exists()
        raise UserError(f"{directory} holds no {WEIGHTS}" + ("; adapter_model.bin is a pickle, which can run code and is never opened: convert it to safetensors where you trust it" if pickled else ""))
    reward = head is not None
    known = modules(model, reward)
    saved = set([c["modules_to_save"]] if isinstance(c.get("modules_to_save"), str) else c.get("modules_to_save") or ())
    top = hf.architecture(model).score["head/weight"].removesuffix(".weight")
    perhaps = (CLASSIFIERS | set(whole(model).values())) - {top}
    if (saved - perhaps != {top}) if reward else saved:
        want = f"{top!r} (and perhaps {', '.join(map(repr, sorted(perhaps)))})" if reward else "nothing"
        raise UserError(f"{directory / CONFIG}: modules_to_save {sorted(saved)}: this model's adapter saves {want} as a whole")
    # As peft: what is saved whole is no target.
    known = {k: m for k, m in known.items() if not saved & set(k.split("."))}
    given = peft_config.adapted(c, directory / CONFIG, known)
    chosen = [known[name] for name in given]
    if not chosen:
        raise UserError(f"{directory / CONFIG}: target_modules {c.get('target_modules')!r} names no module of this model; they are {_some(known)}")
    _refuse_kinds(directory / CONFIG, chosen, model, c.get("use_dora", False))
    rank, alpha = ({name: pair[i] for name, pair in given.items()} for i in (0, 1))
    maker = lora.Lora(((".", 1, 1.0),), rs=c.get("use_rslora", False), dora=c.get("use_dora", False))
    tensors, meta = weights.small(weights.inside(directory, WEIGHTS))
    want = {name: shape for m in chosen for name, shape in m.tensors(rank[m.name], maker.dora).values()}
    kept = _kept(model, saved) if reward else {}
    D = model.config.dim
    specs = {f"trunk/{k}": x for k, x in tree.flat(model.scored().specs(), is_leaf=is_spec).items()} | {"head/weight": Spec((D,), (None,)), "head/bias": Spec((), ())}
    for k, (name, turned) in kept.items():
        shape = (1,) * k.startswith("head/") + specs[k].shape  # one label
        want[name] = shape[::-1] if turned else shape
    _drop_copies(directory, tensors, chosen, params)
    _check(directory, tensors, want)
    nodes = {}
    for leaf, group in _grouped(chosen).items():
        *lead, D, O = group[0].spec.shape
        if maker.dora and len(group) < math.prod(lead):
            raise UserError(f"{directory}: DoRA adapts {len(group)} of the {math.prod(lead)} layers of {leaf}; jaxalign stacks them, so it must be all or none")
        R = max(rank[m.name] for m in group)
        shapes = {"a": (*lead, D, R), "b": (*lead, R, O), "scale": tuple(lead)} | ({"magnitude": (*lead, O)} if maker.dora else {})
        host = {k: np.zeros(s, np.float32) for k, s in shapes.items()}
        for m in group:
            r = rank[m.name]
            host["scale"][m.index] = maker.scale(r, alpha[m.name])
            for part, (name, _) in m.tensors(r, maker.dora).items():
                value = m.turned(part, tensors[name].astype(np.float32))
                room = {"a": (slice(None), slice(r)), "b": (slice(r),), "magnitude": ()}[part]
                host[part][(*m.index, *room)] = value
        made = lora.adapter_specs(group[0].spec, R, 1.0, maker.dora)
        nodes[leaf] = {k: hf.place(v, made[k], mesh, rules) for k, v in host.items()}
    out = lora.join(params, nodes)
    if not reward:
        return out
    read = {k: tensors[name].astype(np.float32) for k, (name, _) in kept.items()}
    read = {k: (x.T if kept[k][1] else x).reshape(specs[k].shape) for k, x in read.items()}
    if "head/bias" not in read:
        read["head/bias"] = np.asarray(_bias(directory, meta.get("jaxalign_score_bias", "0")), np.float32)
    got = tree.unflat({k: hf.place(x, specs[k], mesh, rules) for k, x in read.items()})
    return {**out, **got.get("trunk", {})}, got["head"]


def _drop_copies(directory: Path, tensors: dict, chosen: list[_Module], params: Tree) -> None:
    """peft writes the base's own weight beside an adapted embedding or unembedding. Equal, it says nothing; otherwise the adapter
    belongs to another base."""
    flat, odd = lora.weights(lora.base(params)), []
    for m in chosen:
        name = f"{PREFIX}{m.name}.base_layer.weight"
        if m.kind != "linear" and name in tensors:
            x, ours = tensors.pop(name), flat[m.leaf]
            ours = None if isinstance(ours, dict) else np.asarray(shard.to_host(ours))
            kind = x.dtype if ours is None else min(x.dtype, ours.dtype, key=lambda d: d.itemsize)  # either may be the other, rounded
            if ours is None or not np.array_equal(x.astype(kind), ours.astype(kind)):
                odd.append(name)
    if odd:
        raise UserError(f"{directory / WEIGHTS}: {', '.join(odd)}: not the base's own weight, so the adapter was trained on another (or resized) model; load it onto that one")


def _bias(directory: Path, text: str) -> float:
    try:
        if math.isfinite(bias := float(text)):
            return bias
    except ValueError:
        pass
    raise UserError(f"{directory / WEIGHTS}: jaxalign_score_bias {text!r} is not a number")


def _grouped(chosen: list[_Module]) -> dict[str, list[_Module]]:
    out = collections.defaultdict(list)
    for m in chosen:
        out[m.leaf].append(m)
    return out


def _some(names) -> str:
    return weights.listing(sorted({re.sub(r"\.\d+\.", ".*.", n) for n in names}), 20)


def _refuse_kinds(where, chosen: list[_Module], model, dora: bool) -> None:
    tied = "unembed" not in model.specs()
    for m in chosen:
        if m.leaf == "embed" and tied:
            raise UserError(f"{where}: {m.name} is tied to the unembedding, which peft leaves as it was and jaxalign would adapt too; adapt the layers only, or untie the model")
        if m.kind == "unembedding" and dora:
            raise UserError(f"{where}: DoRA on {m.name} is not supported: its magnitudes are per token in peft and per feature here; leave it out of the targets")


def _check(directory: Path, tensors: dict, want: dict[str, tuple]) -> None:
    found = set(tensors)
    wrong = [f"missing {n} {list(s)}" for n, s in want.items() if n not in found] + [f"unexpected {n}" for n in sorted(found - set(want))]
    for name in sorted(found & set(want)):
        x = tensors[name]
        if x.shape != want[name]:
            wrong.append(f"{name} has shape {list(x.shape)}, the model and {CONFIG} need {list(want[name])}")
        elif x.dtype.name not in weights.DTYPES.values():
            wrong.append(f"{name} is {x.dtype.name}, jaxalign reads {', '.join(weights.DTYPES.values())}")
    if wrong:
        raise UserError(f"{directory / WEIGHTS} does not fit the model and its {CONFIG}: {weights.listing(wrong)}")


# -- writing --------------------------------------------------------------------------------------------------------


def check(model, params: Tree, reward: bool = False) -> tuple[dict[str, _Module], dict[str, dict], list[_Module], bool]:
    """What `save` would write: (all modules, the adapters, the adapted modules, whether DoRA), or its UserError, before any training."""
    adapters = {k: w for k, w in lora.weights(params).items() if is_adapted(w)}
    if not adapters:
        raise UserError("these params have no adapters to write; lora.attach makes them")
    known = modules(model, reward)
    chosen = [m for m in known.values() if m.leaf in adapters]
    if reward and (both := sorted(k for k in adapters if k.split("/")[0] in whole(model))):
        raise UserError(f"{', '.join(both)} trains whole in a classifier and is saved so; leave it out of the targets")
    if lost := sorted(set(adapters) - {m.leaf for m in chosen}):
        raise UserError(f"peft has no module of its own for {', '.join(lost)}; leave it out of the targets, or merge the adapters and export the whole model")
    dora = {"magnitude" in a for a in adapters.values()}
    if len(dora) > 1:
        raise UserError("some adapters have DoRA's magnitude and some have not; adapter_config.json can only say all or none")
    _refuse_kinds("adapters for peft", chosen, model, True in dora)
    return known, adapters, chosen, True in dora


def save(directory, model, params: Tree, *, base: str | None = None, head: Tree | None = None, rs: bool = False) -> None:
    """Write the adapters of `params` for `peft.PeftModel.from_pretrained(base_model, directory)`.

    base: base_model_name_or_path, what peft would load them onto. head: a reward model's, written as the modules that peft saves
    whole: transformers' classifier and, for BERT, the pooler. A bias that the classifier has no room for goes into the file's
    metadata, where `load` finds it.
    rs: say alpha in rsLoRA's way (alpha / sqrt(rank)); the function is the same. In a multi-process run every process calls it.
    Raises UserError where there is nothing to write, or a form that peft does not have.
    """
    reward = head is not None
    known, adapters, chosen, dora = check(model, params, reward)
    tensors, rank, alpha = {}, {}, {}
    for leaf, group in _grouped(chosen).items():
        host = {k: np.asarray(shard.to_host(v), np.float32) for k, v in adapters[leaf].items() if k != "base"}
        R = host["b"].shape[-2]
        for m in group:
            if not host["scale"][m.index]:  # a layer that had no adapter where this was read from
                continue
            rank[m.name] = R
            value = float(host["scale"][m.index]) * (math.sqrt(R) if rs else R)
            near = round(value)
            alpha[m.name] = near if abs(value - near) < 1e-5 * max(value, 1) else value
            for part, (name, _) in m.tensors(R, dora).items():
                tensors[name] = np.ascontiguousarray(m.turned(part, host[part][m.index]))
    common = lambda values: collections.Counter(values.values()).most_common(1)[0][0]
    targets = _short(set(rank), set(known))
    r, most = common(rank), common(alpha)
    meta = {"format": "pt"}
    if reward:
        kept = _kept(model, set(whole(model).values()))
        flat = tree.flat({"trunk": {k: params[k] for k in whole(model)}, "head": {k: v[None] for k, v in head.items()}})
        for leaf, (name, turned) in kept.items():
            x = np.asarray(shard.to_host(flat[leaf]), np.float32)
            tensors[name] = x.T if turned else x
        if "head/bias" not in kept:
            meta["jaxalign_score_bias"] = repr(float(shard.to_host(head["bias"])))
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "SEQ_2_SEQ_LM" if model.start is not None else "CAUSAL_LM" if model.causal else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": most,
        "target_modules": targets,
        "rank_pattern": _pattern(rank, r, known),
        "alpha_pattern": _pattern(alpha, most, known),
        "use_rslora": rs,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": any(not t for p, entries in hf.names(model).items() for _, _, t in entries if p in adapters and p.split("/")[-1] not in (*EMBEDDINGS, "unembed")),
        "modules_to_save": sorted(CLASSIFIERS | set(whole(model).values())) if reward else None,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    if jax.process_index() == 0:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights.write_small(directory / WEIGHTS, tensors, meta)
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _short(names: set[str], known: set[str]) -> list[str]:
    """The shortest endings that name exactly these modules among all: "q_proj", or "attn.c_proj" where mlp.c_proj is another."""
    out = set()
    for name in names:
        parts = name.split(".")
        endings = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        out.add(next(e for e in endings if {k for k in known if k == e or k.endswith(f".{e}")} <= names))
    return sorted(out)


def _pattern(values: dict, default, known) -> dict:
    """rank_pattern or alpha_pattern: what is not the default, by the shortest endings for each value."""
    odd = collections.defaultdict(set)
    for name, v in values.items():
        if v != default:
            odd[v].add(name)
    return {ending: v for v, names in odd.items() for ending in _short(names, set(known))}
