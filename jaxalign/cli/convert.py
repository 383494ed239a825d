"""Weights between jaxalign and Hugging Face: --run=STAGE --to=DIR writes safetensors; --hf=DIR --to=RUN reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common
from jaxalign.types import UserError


def define(fv):
    common(fv, config=False)
    flags.DEFINE_string("run", None, "a stage's directory to export", flag_values=fv)
    flags.DEFINE_string("hf", None, "an HF directory to import", flag_values=fv)
    flags.DEFINE_string("to", None, "the directory to write", flag_values=fv)
    flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; default: as it is", flag_values=fv)
    flags.DEFINE_bool("drop_bias", False, "export a reward model without its constant, which HF's score layer cannot hold", flag_values=fv)


def main(fv, rest):
    from jaxalign import build
    from jaxalign.data import tokenizers
    from jaxalign.models import hf
    from jaxalign.train import checkpoint

    if bool(fv.run) == bool(fv.hf) or not fv.to:
        raise UserError("say what to convert: --run=STAGE --to=HF_DIRECTORY, or --hf=HF_DIRECTORY --to=RUN_DIRECTORY")
    to = Path(fv.to)
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty; choose another directory")
    if fv.run:
        w, _, params = build.trained(fv.run)
        hf.save(to, w.model, params, tokenizer=w.tokenizer, dtype=fv.dtype, drop_bias=fv.drop_bias)
    else:
        model, params = hf.load(fv.hf, dtype=fv.dtype)
        checkpoint.save_tree(to / "params", params, {"stage": to.name, "from": str(fv.hf)})
        (to / "config.json").write_text(json.dumps(build.imported_config(to.name, fv.hf, model), indent=2) + "\n")
        for d in tokenizers.differences(fv.hf):
            print(f"warning: tokenizer.model and tokenizer.json of {fv.hf} part at {d.text!r}: {d.first} and {d.second}", file=sys.stderr)
    print(f"wrote {to}")
