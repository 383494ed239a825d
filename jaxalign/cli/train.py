"""One stage of a config, trained to its end or onwards from where it was."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from jaxalign.cli.main import common, needed
from jaxalign.types import UserError


def define(fv):
    common(fv)
    flags.DEFINE_string("stage", None, "which stage, where the config has several", flag_values=fv)
    flags.DEFINE_string("profile", "", "write a trace of a few steps of a stage under this directory, for xprof or TensorBoard; DIR:FIRST-LAST chooses them (3-5)", flag_values=fv)


def main(fv, rest):
    needed(fv, "config", "workdir")
    import jax

    from jaxalign import build
    from jaxalign.train import checkpoint

    config = fv.config
    stages = build.stages(config)
    if fv.stage is None and len(stages) > 1:
        raise UserError(f"this config has the stages {', '.join(stages)}: say which with --stage, or run jaxalign pipeline")
    name = fv.stage or next(iter(stages))
    if name not in stages:
        raise UserError(f"no stage {name!r};{build.nearest(name, list(stages))}")
    w = build.world(config, fv.workdir)
    with checkpoint.lock(fv.workdir, jax.process_index()):
        directory = Path(fv.workdir) / name if "stages" in config else Path(fv.workdir)
        s = build.make_stage(w, name, stages[name], directory)
        s.save(s.finish(s.go(fv.profile)))
        if jax.process_index() == 0:
            w.tokenizer.save(str(directory / "tokenizer"))
            print(f"{name}: done, weights in {directory / 'params'}")
