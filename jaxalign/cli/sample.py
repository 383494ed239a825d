"""Continue prompts with a trained stage, an HF directory, or whatever --run names."""

from __future__ import annotations

import json
import sys

from absl import flags

from jaxalign.cli.main import common
from jaxalign.types import UserError


def define(fv):
    common(fv, config=False)
    flags.DEFINE_string("run", None, "a stage's directory (runs/quickstart/ppo)", flag_values=fv)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be given several times", flag_values=fv)
    flags.DEFINE_string("prompts", None, "a JSONL file of prompts", flag_values=fv)
    flags.DEFINE_integer("n", 1, "completions per prompt", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("max_new", 128, "tokens at most", lower_bound=1, flag_values=fv)
    flags.DEFINE_float("temperature", 1.0, "0 is greedy", lower_bound=0.0, flag_values=fv)
    flags.DEFINE_integer("top_k", 0, "0: all", lower_bound=0, flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "1: all", lower_bound=0.0, upper_bound=1.0, flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the random draws", flag_values=fv)
    flags.DEFINE_bool("json", False, "one JSON object per line", flag_values=fv)


def main(fv, rest):
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy

    if not fv.run:
        raise UserError("--run is missing: jaxalign sample --run=runs/quickstart/ppo --prompt='Review the noodle soup.'")
    w, name, params = build.trained(fv.run)
    if "trunk" in params:
        raise UserError(f"{fv.run} holds a reward model: it scores texts and writes none; name a policy's directory")
    records = [{"prompt": p} for p in [*fv.prompt, *rest]]
    if fv.prompts:
        records += [r for r, _ in rows.read(fv.prompts)]
    if not records:
        raise UserError("no prompt: give --prompt='...' or --prompts=FILE.jsonl")
    records = [r for r in records for _ in range(fv.n)]
    how = build.sampling(w, {}, **{k: fv[k].value for k in ("max_new", "temperature", "top_k", "top_p")})
    batch = min(64, len(records))
    got = policy.sample(w.model, params, how, build.prompt_rows(w, records, batch), w.decode, jax.random.key(fv.seed), w.mesh, score=False)
    if jax.process_index():  # every process has all samples; one prints them
        return
    for r, text, length, cut in zip(records, got.completions, got.length, got.truncated):
        prompt = build.shown(r)
        if fv.json:
            print(json.dumps({"prompt": prompt, "completion": text, "tokens": int(length), "truncated": bool(cut)}, ensure_ascii=False))
        else:
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
            print(f"{prompt}{bold}{text}{plain}{' ...' if cut else ''}\n")
