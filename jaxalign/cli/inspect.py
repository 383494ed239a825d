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
    flags.DEFINE_string("html", None, "write the rows as a page, too", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    from jaxalign import build, shard
    from jaxalign.ops import nn
    from jaxalign.report import tokens

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
    sections = []
    for name, c in stages.items():
        if fv.stage in (None, name):
            print(f"\n{name}: {c.objective.name}, {c.data.kind} from {c.data.path}")
            if "world" in config and not Path(w.find(c.data.path)).exists():
                print("  (not written yet: an earlier part of the pipeline makes it)")
                continue
            source = build.data_source(w, c.data, c.data.path, c.data.batch_size, config.seed)
            account = json.dumps(source.report())
            shown = [tokens.pieces(w.tokenizer, *row) for row in tokens.rows(source.next(None))[: fv.rows]]
            print("  " + account)
            for row in shown:
                print("  " + tokens.terminal(row, sys.stdout.isatty()))
            sections.append((name, f"{c.objective.name}, {c.data.kind} from {c.data.path}: {account}", shown))
    if fv.html:
        try:
            Path(fv.html).write_text(tokens.page(config.name, sections), encoding="utf-8", errors="replace")
        except OSError as e:
            raise UserError(f"--html={fv.html}: {e.strerror}; name a file in a directory that is there") from None
        print(f"\nwrote {fv.html}")
