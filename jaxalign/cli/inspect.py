"""How data becomes tokens and masks, and how weights are laid out, before anything is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_string("stage", None, "which stage (default: all)", flag_values=fv)
    flags.DEFINE_integer("rows", 2, "rows of data to show", flag_values=fv)
    flags.DEFINE_bool("weights", True, "list weights with their shardings", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    from jaxalign import build, shard
    from jaxalign.ops import nn

    config, w = fv.config, build.world(fv.config, fv.workdir)
    specs = w.model.specs()
    print(f"model: {nn.count(specs):,} parameters, {w.model.config}")
    print(f"mesh: {dict(w.mesh.shape)}; tokenizer: {w.tokenizer.vocab_size} ids; template: {w.template.name}")
    if fv.weights:
        for name, shape, part in shard.describe(specs, w.mesh, w.rules):
            print(f"  {name:24} {str(shape):20} {tuple(part)}")
    stages = build.stages(config)
    if fv.stage and fv.stage not in stages:
        raise UserError(f"no stage {fv.stage!r};{build.nearest(fv.stage, list(stages))}")
    for name, c in stages.items():
        if fv.stage in (None, name):
            print(f"\n{name}: {c.objective.name}, {c.data.kind} from {c.data.path}")
            if "world" in config and not Path(w.find(c.data.path)).exists():
                print("  (not written yet: an earlier part of the pipeline makes it)")
                continue
            source = build.data_source(w, c.data, c.data.path, c.data.batch_size, config.seed)
            print("  " + json.dumps(source.report()))
            for row in rows_of(source.next(None))[: fv.rows]:
                print("  " + coloured(w, *row))


def rows_of(batch) -> list[tuple]:
    """(tokens, mask, segments) rows of any batch."""
    if hasattr(batch, "chosen"):
        sides = [rows_of(batch.chosen), rows_of(batch.rejected)]
        return [r for pair in zip(*sides) for r in pair]
    if hasattr(batch, "candidates"):
        c = batch.candidates
        return [r for i in range(c.tokens.shape[0]) for r in zip(c.tokens[i], c.mask[i], c.segments[i])]
    mask = getattr(batch, "mask", batch.segments * 0)
    return list(zip(batch.tokens, mask, batch.segments))


def coloured(w, tokens, mask, segments) -> str:
    """One row, token by token: trained ones in green (or in [brackets] where there is no terminal), documents apart."""
    tty, out, document = sys.stdout.isatty(), [], 0
    names = {w.tokenizer.bos_id: "<bos>", w.tokenizer.eos_id: "<eos>"}
    for t, m, s in zip(tokens, mask, segments):
        if s == 0:
            break
        if s != document and document:
            out.append(" || ")
        document = s
        text = names.get(int(t)) or w.tokenizer.decode([int(t)]).replace("\n", "\\n")
        out.append((f"\033[32m{text}\033[0m·" if m else f"\033[2m{text}\033[0m·") if tty else (f"[{text}]" if m else text))
    return "".join(out)
