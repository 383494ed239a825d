"""A stage without weights or data: shapes in the place of arrays, and the programs that one iteration of it runs.

`build.make_stage` makes the stage, as it does for training; an `Imagined` stands where weights and data would be read.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxalign import build, shard, tree
from jaxalign.data import tokenizers as toks
from jaxalign.data.templates import PLAIN
from jaxalign.models import heads, lora
from jaxalign.rl import experience, reference, rewards
from jaxalign.rl.rollout import generate
from jaxalign.types import Experience, Pairs, Prompts, Rankings, Rollout, Tokens, Tree, UserError
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

    def source(self, w: World, c: ConfigDict, kind: str, batch: int) -> Source:
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
        T = needed("max_prompt_len")
        return Source(Prompts(of((batch, T)), of((batch, T)), of((batch, T)), of((batch,))), T)


def world(config: ConfigDict, devices: list) -> World:
    """A world on these devices that reads no weights, data or templates; a tokenizer only where the vocabulary needs one."""
    build.check_finite(config)
    mesh = shard.make_mesh({k: int(v) for k, v in config.mesh.items()}, devices)
    path = config.tokenizer.path or config.model.path
    tokenizer = toks.Bytes()
    if not config.model.path and not config.model.vocab and path:
        if not os.path.exists(path):
            raise UserError(f"model.vocab is 0, which is the tokenizer's size, and there is no {path}: set model.vocab")
        tokenizer = toks.load(path)
    return World(config, Path("."), mesh, dict(config.rules), tokenizer, PLAIN, model_of(config.model, tokenizer), Imagined())


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
    w, c, model = s.world, s.config, s.world.model
    state, step = s.begin()
    resident = {"params": state.params, "optimizer": state.opt_state, "frozen": s.frozen}
    flops = getattr(model, "flops_per_token", lambda length: 0.0)
    if isinstance(s.source, experience.PPOSource):
        return _ppo(s, state, step, resident, flops)
    programs, batch = [], s.source.next(None) if isinstance(s.source, Source) else None
    if isinstance(s.source, reference.WithReference):
        batch = s.source.source.next(None)
        resident["reference"] = s.source.params
        programs.append(Program("reference", reference.add_reference, (model, s.source.params, batch), {}, 1))
    if batch is None:
        raise UserError(f"{s.name}: plan does not know the programs of {type(s.source).__name__}")
    programs.append(Program("step", step, (state, s.frozen, batch), {}, 1))
    shapes = [x.shape for k, x in tree.flat(batch).items() if k.split("/")[-1] == "tokens"]
    tokens = sum(int(np.prod(x)) for x in shapes)
    once = flops(shapes[0][-1]) * tokens
    return Iteration(programs, resident, tokens, "tokens", once * (4 / 3 if len(programs) > 1 else 1), 0.0)


def _ppo(s: build.Stage, state, step, resident: dict, flops: Callable) -> Iteration:
    w, c, src = s.world, s.config, s.source
    model, mesh, how = src.model, w.mesh, src.sampling
    prompts = src.prompts.next(None)
    B, T = prompts.tokens.shape[0], prompts.tokens.shape[1] + how.max_new
    rows = shard.batch_sharding(mesh)
    place = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else shard.replicated(mesh)), t)
    key = jax.ShapeDtypeStruct((), state.key.dtype, sharding=shard.replicated(mesh))
    full = tree.merge(state.params, s.frozen["base"]) if "base" in s.frozen else state.params
    programs = [Program("generate", generate, (model, how, full["policy"], prompts._replace(records=()), key, state.step), {}, 1, how.max_new - 1)]
    with jax.set_mesh(mesh):
        rollout: Rollout = place(jax.eval_shape(generate, *programs[0].args))
    scalar = heads.Scalar(model)
    mine = {id(x) for x in jax.tree.leaves(full)}
    judges = [p for what, p in w.imagined.held if what.endswith("rl.reward") and "head" in p and id(p["head"]["weight"]) not in mine]
    resident["reference"] = src.reference
    for i, p in enumerate(judges):
        resident["reward" if len(judges) == 1 else f"reward {i + 1}"] = p
        programs.append(Program("score" if len(judges) == 1 else f"score {i + 1}", rewards.model_scores, (scalar, p, rollout), {}, 1))
    scores = jax.ShapeDtypeStruct((B,), jnp.float32, sharding=rows)
    args = (model, src.value, full, src.reference, rollout, scores, jax.ShapeDtypeStruct((), jnp.float32, sharding=shard.replicated(mesh)))
    options = {"temperature": how.temperature or 1.0, **src.options}
    programs.append(Program("make_experience", experience.make_experience, args, options, 1))
    n = src.epochs * src.minibatches
    exp = Experience(*(jax.ShapeDtypeStruct((B // src.minibatches, T), jnp.int32 if f in ("tokens", "segments", "positions") else jnp.float32, sharding=rows) for f in Experience._fields))
    batch = exp if src.mix is None else {"ppo": exp, "ptx": src.mix.next(None)}
    programs.append(Program("step", step, (state, s.frozen, batch), {}, n))
    resident["experience"] = place(Experience(*(jax.ShapeDtypeStruct((B, T), x.dtype) for x in exp)))
    # A third of a training step's FLOPs is a forward pass: generation, and one for each of policy, reference, value and reward.
    critics = 1 if src.value is not None else 0
    forwards = 1 + 2 + critics + len(judges)
    model_flops = flops(T) * B * T * (forwards / 3 + src.epochs * (1 + critics))
    cache = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(B, T))))
    return Iteration(programs, resident, B * how.max_new, "sampled tokens", model_flops, float(cache))


# -- bytes of what is held ------------------------------------------------------------------------------------------


def per_device(leaves: Iterable) -> float:
    """Bytes that each device holds of these arrays, by their shardings."""
    total = 0.0
    for x in leaves:
        if not hasattr(x, "shape"):
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
