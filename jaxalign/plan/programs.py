"""A stage without weights or data: shapes in the place of arrays, and the programs that one iteration of it runs.

`build.make_stage` makes the stage, as it does for training; an `Imagined` stands where weights and data would be read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
from pathlib import Path
from typing import Any, Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxalign import build, shard, tree
from jaxalign.data import tokenizers as toks
from jaxalign.data.templates import PLAIN
from jaxalign.models import lora
from jaxalign.rl import reference, rewards
from jaxalign.rl.online import OnlineSource
from jaxalign.rl.rollout import generate
from jaxalign.types import Labelled, Pairs, Prompts, Rankings, Rollout, Steps, Tokens, Trajectories, Tree, UserError
from jaxalign.world import World, model_of


@dataclasses.dataclass
class Source:
    """Stands for a source: one batch of shapes, all full."""

    batch: Any
    length: int

    def next(self, state) -> Any:
        return self.batch

    def report(self) -> dict:
        return {"max_length": self.length}


class Imagined:
    """What `World.imagined` asks for. `held` collects what stays on the devices besides the stage's own params."""

    def __init__(self):
        self.held: list[tuple[str, Tree]] = []
        self.judges: list[Tree] = []  # learned rewards, as they are held

    def weights(self, w: World, specs: Tree, what: str, dtype: str | None = "float32") -> Tree:
        params = shard.abstract(specs, w.mesh, w.rules, dtype or "float32")
        self.held.append((what, params))
        return params

    def adapted(self, w: World, c: ConfigDict, params: Tree, head: Tree | None) -> tuple[Tree, Tree | None]:
        how = build.adapter(c)
        if how is None:
            raise UserError(f"adapter.path {c.adapter.path!r} is not read by plan, and only it knows its ranks: set adapter.path to '' and adapter.rank to the rank")
        quantised = ((lora.MATRICES, c.adapter.quantise),) if c.adapter.quantise else ()
        new = shard.abstract(lora.specs(w.model.specs(), how, quantised), w.mesh, w.rules)
        held = tree.flat(params)
        return tree.unflat({k: held.get(k.removesuffix("/base"), x) if not quantised else x for k, x in tree.flat(new).items()}), head

    def source(self, w: World, c: ConfigDict, kind: str, batch: int, mismatched: bool = False) -> Source:
        def of(shape, dtype=np.int32):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=shard.batch_sharding(w.mesh))

        def rows(*shape):
            return Tokens(of(shape), of(shape, np.float32), of(shape), of(shape))

        def needed(name):
            if not c.get(name):
                raise UserError(f"data.{name} is not set, and plan reads no data: say how long rows become, --config.stage.data.{name}=...")
            return int(c[name])

        one = of((batch,), np.float32)
        if kind == "tokens":
            return Source(rows(batch, needed("seq_len")), c.seq_len)
        if kind == "pairs":
            T = needed("max_len")
            return Source(Pairs(rows(batch, T), rows(batch, T), one, one, one), T)
        if kind == "rankings":
            T, K = needed("max_len"), needed("max_k")
            return Source(Rankings(rows(batch, K, T), of((batch, K)), of((batch, K), np.float32)), T)
        if kind == "labelled":
            T = needed("max_len")
            return Source(Labelled(rows(batch, T), one, one, *((rows(batch, T), one) if mismatched else ())), T)
        if kind == "trajectories":
            T = needed("max_len")
            return Source(Trajectories(*rows(batch, T), of((batch, T), np.float32), one), T)
        if kind == "steps":
            T = needed("max_len")
            return Source(Steps(rows(batch, T), of((batch, T), np.float32)), T)
        T = needed("max_prompt_len")
        return Source(Prompts(of((batch, T)), of((batch, T)), of((batch, T)), of((batch,))), T)


def world(config: ConfigDict, devices: list) -> World:
    """A world on these devices that reads no weights, data or templates; a tokenizer only where the vocabulary needs one."""
    build.check_finite(config)
    mesh = shard.make_mesh({k: int(v) for k, v in config.mesh.items()}, devices)
    path = config.tokenizer.path or config.model.path
    tokenizer = toks.Bytes()
    if config.model.path or config.model.vocab:
        model = model_of(config.model, types.SimpleNamespace(vocab_size=0))  # nobody asks whether the tokenizer fits
    elif path and not os.path.exists(path):
        raise UserError(f"model.vocab is 0, which is the tokenizer's size, and there is no {path}: set model.vocab")
    else:
        tokenizer = toks.load(path) if path else tokenizer
        model = model_of(config.model, tokenizer)
    return World(config, Path("."), mesh, dict(config.rules), tokenizer, PLAIN, model, imagined=Imagined())


def stage(config: ConfigDict, name: str, c: ConfigDict, devices: list) -> build.Stage:
    """The stage as `build.make_stage` makes it, of shapes."""
    return build.make_stage(world(config, devices), name, c, Path("."))


# -- programs -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Program:
    """One jitted function of an iteration, with the shapes it is called with."""

    name: str
    fn: Callable  # jitted
    args: tuple
    kwargs: dict
    times: int  # per iteration
    unknown: int = 1  # how often a loop runs whose end is computed: decoding, to the last token

    def lower(self, mesh):
        with jax.set_mesh(mesh):
            return self.fn.lower(*self.args, **self.kwargs)

    def shapes(self, mesh) -> Any:
        """Of what it returns."""
        with jax.set_mesh(mesh):
            return self.fn.eval_shape(*self.args, **self.kwargs)


@dataclasses.dataclass
class Iteration:
    """What one iteration runs, and what lies on the devices all the time. An iteration of an offline stage is one step."""

    programs: list[Program]
    resident: dict[str, Tree]  # part -> its arrays; an array that two parts share is counted once, in the first
    tokens: int  # that are read in one iteration (PPO: written, if every completion runs to its end)
    what: str  # tokens of what
    model_flops: float  # without recomputation, of all devices; 0: the family does not say
    cache: float  # bytes of the key/value cache, of all devices


def iteration(s: build.Stage) -> Iteration:
    """Of a stage of shapes. Raises UserError for an online source that this file does not know."""
    model = s.world.model
    state, step = s.begin()
    resident = {"params": state.params, "optimizer": state.opt_state, "frozen": s.frozen, "aux": state.aux}
    flops = getattr(model, "flops_per_token", lambda length: 0.0)
    if isinstance(s.source, OnlineSource):
        return _online(s, state, step, resident, flops)
    programs, batch = [], s.source.next(None) if isinstance(s.source, Source) else None
    if isinstance(s.source, reference.WithReference):
        batch = s.source.source.next(None)
        resident["reference"] = s.source.params
        programs.append(Program("reference", reference.add_reference, (model, s.source.params, batch, s.source.of_pairs), {}, 1))
    if batch is None:
        raise UserError(f"{s.name}: plan does not know the programs of {type(s.source).__name__}")
    programs.append(Program("step", step, (state, s.frozen, batch), {}, 1))
    shapes = [x.shape for k, x in tree.flat(batch).items() if k.split("/")[-1] == "tokens"]
    tokens = sum(int(np.prod(x)) for x in shapes)
    third = flops(shapes[0][-1]) * tokens / 3  # a forward pass; frozen weights want no gradient of their own
    return Iteration(programs, resident, tokens, "tokens", third * ((2 if "base" in s.frozen else 3) + len(programs) - 1), 0.0)


def _online(s: build.Stage, state, step, resident: dict, flops: Callable) -> Iteration:
    src, mesh = s.source, s.world.mesh
    model, how = src.model, src.sampling
    if how.slots or how.draft:
        raise UserError(f"{s.name}: plan knows sampling of all rows at once, without a draft; set sampling.slots to 0 and sampling.draft to ''")
    prompts = src.prompts.next(None)
    group = src.group
    B, T = prompts.tokens.shape[0] * group, prompts.tokens.shape[1] + how.max_new
    whole, rows = shard.replicated(mesh), shard.batch_sharding(mesh)
    place = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else whole), t)
    key = jax.ShapeDtypeStruct((), state.key.dtype, sharding=whole)
    full = tree.merge(state.params, s.frozen["base"]) if "base" in s.frozen else state.params
    full = src.lagging(full, state.aux) if src.lagging else full
    programs = [Program("generate", generate, (model, how, full["policy"], prompts._replace(records=()), key, state.step), {"group": group}, 1, how.max_new - 1)]
    rollout: Rollout = place(programs[0].shapes(mesh))
    if src.rival is not None:  # one more answer to each prompt
        rival = jax.jit(functools.partial(src.rival, model, how))
        programs.append(Program("rival", rival, (full["policy"], src.reference, prompts._replace(records=()), key, state.step), {}, 1, how.max_new - 1))
        B = B // src.group * (src.group + 1)
        rollout = jax.tree.map(lambda x: jax.ShapeDtypeStruct((B, *x.shape[1:]), x.dtype, sharding=x.sharding) if x.ndim else x, rollout)
    mine = {id(x) for x in jax.tree.leaves(full)}
    loaded = [(what, p) for what, p in s.world.imagined.held if not mine & {id(x) for x in jax.tree.leaves(p)}]
    judges = s.world.imagined.judges
    for i, (net, p) in enumerate(judges):
        many = f" {i + 1}" if len(judges) > 1 else ""
        resident[f"reward{many}"] = p
        programs.append(Program(f"score{many}", rewards.model_scores, (net, p, rollout), {}, 1))
    fn, args, options = src.experience_of(full, src.reference, rollout, jax.ShapeDtypeStruct((B, *((len(judges),) if src.apart else ())), jnp.float32, sharding=rows), jax.ShapeDtypeStruct((), jnp.float32, sharding=whole), call=lambda f, *a, **k: (f, a, k))
    program = Program("experience", fn, args, options, 1)
    programs.append(program)
    exp = place(program.shapes(mesh)[0])
    resident["reference"] = [p for what, p in loaded if what.endswith("rl.reference")]
    resident["experience"] = exp
    part = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // src.minibatches, *x.shape[1:]), x.dtype, sharding=x.sharding), exp)
    batch = part if src.mix is None else {"ppo": part, "ptx": src.mix.next(None)}
    programs.append(Program("step", step, (state, s.frozen, batch), {}, src.epochs * src.minibatches))
    # A third of a training step is a forward pass: of the policy that samples, of every judge, of old log-probs and values,
    # and of the reference.
    critic = isinstance(s.params.get("value"), dict) and "trunk" in s.params["value"]
    old = getattr(exp, "logp", None) is not None
    forwards = 1 + len(judges) + old + critic + bool(resident["reference"] or getattr(exp, "ref_logp", None) is not None)
    model_flops = flops(T) * B * T * (forwards / 3 + src.epochs * (1 + critic) * (2 / 3 if "base" in s.frozen else 1))
    cache = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(B, T))))
    return Iteration(programs, resident, B * how.max_new, "sampled tokens", model_flops, float(cache))


# -- bytes of what is held ------------------------------------------------------------------------------------------


def per_device(leaves: Iterable) -> float:
    """Bytes that each device holds of these arrays, by their shardings; what is kept on the host is none of its."""
    total = 0.0
    for x in leaves:
        if not hasattr(x, "shape") or getattr(getattr(x, "sharding", None), "memory_kind", None) == "pinned_host":
            continue
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        size = 4 * 2 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        total += float(np.prod(shape, dtype=np.float64)) * size
    return total


def shares(resident: dict[str, Tree]) -> dict[str, float]:
    """{part: bytes a device}; an array that is in two parts (a reference that is the frozen base) counts in the first."""
    seen: set[int] = set()
    out = {}
    for part, t in resident.items():
        new = [x for x in jax.tree.leaves(t) if id(x) not in seen]
        seen.update(id(x) for x in new)
        out[part] = per_device(new)
    return {k: v for k, v in out.items() if v}
