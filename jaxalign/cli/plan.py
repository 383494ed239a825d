"""A config compiled for devices that need not be there: memory, FLOPs, collectives, seconds at best, and what would fit. Or,
before there is a config, what to train with so many FLOPs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_string("stage", None, "which stage, where the config has several", flag_values=fv)
    flags.DEFINE_string("topology", "local", "a TPU slice as v5e:4x4, v5p:4x4x4 or v6e:16x16; cpu:8; or local, the devices at hand", flag_values=fv)
    flags.DEFINE_bool("search", False, "propose mesh, model.remat and data.accumulate: many by formulas, the best few compiled", flag_values=fv)
    flags.DEFINE_integer("top", 3, "how many of them are compiled", lower_bound=1, flag_values=fv)
    flags.DEFINE_float("flops", None, "no config: how large a model to pretrain with so many FLOPs, on how many tokens, how (1e18)", lower_bound=1e9, flag_values=fv)
    flags.DEFINE_integer("vocab", 32000, "of --flops: ids of the tokenizer", lower_bound=2, flag_values=fv)
    flags.DEFINE_integer("seq_len", 2048, "of --flops: tokens of a row", lower_bound=2, flag_values=fv)
    flags.DEFINE_string("text", None, "write the text of the compiled programs into this directory", flag_values=fv)
    flags.DEFINE_string("json", None, "write the numbers to this file, too", flag_values=fv)


def main(fv, rest):
    if fv.flops is not None:
        from jaxalign.evals import scaling

        return print("\n".join(scaling.lines(fv.flops, fv.vocab, fv.seq_len)))
    needed(fv, "config")
    from jaxalign import build, chips
    from jaxalign.plan import programs, roofline, search

    config = fv.config
    name = roofline.chosen(config, fv.stage)
    devices, chip = chips.topology(fv.topology)
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if fv.search:
        found = search.search(config, name, devices, chip, fv.top, say)
        print("\n".join(search.lines(found, f"stages.{name}" if "stages" in config else "stage")))
        numbers = [{"candidate": str(f.candidate), **f.plan.json()} for f in found if f.plan]
    else:
        c = build.stages(config)[name]
        s = programs.stage(config, name, c, devices)
        p = roofline.plan(name, programs.iteration(s), s.world.mesh, chip, say, Path(fv.text) if fv.text else None)
        print("\n".join(roofline.lines(p, c)))
        numbers = p.json()
    if fv.json:
        try:
            with open(fv.json, "w", encoding="utf-8") as f:
                json.dump(numbers, f, indent=1)
        except OSError as e:
            raise UserError(f"--json={fv.json}: {e.strerror}; name a file in a directory that is there") from None
