"""Weights between jaxalign and Hugging Face: --run=STAGE --to=DIR writes safetensors; --hf=DIR --to=RUN reads them.

Adapters: --run=STAGE --adapter --to=DIR takes a stage's out, --adapter=PEFT_DIR merges one into what is written.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import sys
import time
from pathlib import Path

from absl import flags

from jaxalign.cli.main import common
from jaxalign.types import UserError


WAYS = """say what to convert:
  --hf=HF_DIR --to=RUN_DIR                                     import
  --run=STAGE --to=HF_DIR                                      export
  --hf=HF_DIR --adapter=PEFT_DIR --to=RUN_DIR                  import with an adapter merged
  --hf=HF_DIR --adapter=PEFT_DIR --merge --to=HF_DIR           the merged model in Hugging Face form
  --run=STAGE --adapter=PEFT_DIR --merge --to=HF_DIR           the same of a stage
  --run=STAGE --adapter --to=PEFT_DIR                          the adapter that a stage was trained with"""


def define(fv):
    common(fv, config=False)
    flags.DEFINE_string("run", None, "a stage's directory to export", flag_values=fv)
    flags.DEFINE_string("hf", None, "an HF directory to import", flag_values=fv)
    flags.DEFINE_string("to", None, "the directory to write", flag_values=fv)
    # A value that may be left out: absl knows that of booleans alone.
    adapter = flags.Flag(flags.ArgumentParser(), flags.ArgumentSerializer(), "adapter", None, "a PEFT directory to merge; without a value, with --run: the stage's own, to take out", boolean=True)
    flags.DEFINE_flag(adapter, flag_values=fv)
    flags.DEFINE_bool("merge", False, "with --adapter=PEFT_DIR: write the merged model in Hugging Face form", flag_values=fv)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the weights written; default: as they are", flag_values=fv)
    flags.DEFINE_integer("resize_vocab", None, "give the embedding this many rows; new ones are the mean of the old", flag_values=fv)
    flags.DEFINE_bool("drop_bias", False, "export a reward model without its constant, which HF's score layer cannot hold", flag_values=fv)


def main(fv, rest):
    import jax

    from jaxalign import build, shard
    from jaxalign.data import tokenizers
    from jaxalign.models import hf, vocab
    from jaxalign.train import checkpoint

    own = fv.adapter == "true"
    if bool(fv.run) == bool(fv.hf) or not fv.to or fv.adapter in ("", "false") or (own and (fv.hf or fv.merge)) or (fv.merge and not fv.adapter) or (fv.run and fv.adapter and not own and not fv.merge):
        raise UserError(WAYS)
    to, start = Path(fv.to), time.perf_counter()
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to} is not empty; choose another directory")
    build.barrier("convert")  # a fast process must not fill it before a slow one has looked
    if own:
        return _adapter(fv.run, to)
    if fv.run or fv.merge:
        w, name, params = build.trained(fv.run or fv.hf, dtype=None)
        if hasattr(w.model, "twins"):
            print("the policy alone is written: Hugging Face has no form for its Q and value heads", file=sys.stderr)
            w, params = dataclasses.replace(w, model=w.model.trunk), params["trunk"]
        params = _merged(w, params, fv.adapter) if fv.adapter else params
        model, source = w.model, Path(fv.run) / "params" if fv.run else Path(fv.hf)
        if fv.resize_vocab is not None:
            model, params = vocab.resize(model, params, fv.resize_vocab, used=w.tokenizer.vocab_size, mesh=w.mesh, rules=w.rules)
        hf.save(to, model, params, tokenizer=w.tokenizer, dtype=fv.dtype, drop_bias=fv.drop_bias, generation=_generation(w, name))
    else:
        # A model may be larger than one device.
        mesh = shard.make_mesh({"data": 1, "fsdp": -1}) if jax.device_count() > 1 else None
        model, params = hf.load(fv.hf, dtype=fv.dtype, mesh=mesh)
        params = _merged(build.world(build.ConfigDict(build.imported_config(to.name, fv.hf, model)), fv.hf), params, fv.adapter) if fv.adapter else params
        source = Path(fv.hf)
        if fv.resize_vocab is not None:
            model, params = vocab.resize(model, params, fv.resize_vocab, used=_ids(fv.hf), mesh=mesh)
        checkpoint.save_tree(to / "params", params, {"stage": to.name, "from": str(fv.hf)})
        if jax.process_index() == 0:
            (to / "config.json").write_text(json.dumps(build.imported_config(to.name, fv.hf, model, "reward" if "head" in params else "lm"), indent=2) + "\n")
        for d in tokenizers.differences(fv.hf) if jax.process_index() == 0 else ():
            print(f"warning: tokenizer.model and tokenizer.json of {fv.hf} part at {d.text!r}: {d.first} and {d.second}", file=sys.stderr)
    if jax.process_index() == 0:
        seconds = time.perf_counter() - start
        read, written = _bytes(source, "*.safetensors" if fv.hf else "*"), _bytes(to, "*")
        print(f"wrote {to}: {read / 1e9:.3f} GB read, {written / 1e9:.3f} GB written in {seconds:.1f} s ({(read + written) / seconds / 1e9:.2f} GB/s), {_peak() / 1e9:.2f} GB of host memory at most")


def _merged(w, params, adapter: str):
    """The weights with the adapter in them, each of the dtype it had."""
    import jax

    from jaxalign import build
    from jaxalign.models import lora

    dense = lora.merge(build.adapted_by(w, params, adapter))
    return jax.tree.map(lambda new, old: new.astype(old.dtype), dense, params)


def _adapter(run: str, to: Path) -> None:
    """STAGE/adapter as it is, once it has proved to fit the stage's weights."""
    import jax

    from jaxalign import build
    from jaxalign.models import peft

    own = Path(run) / "adapter"
    if not (own / peft.CONFIG).exists():
        raise UserError(f"{run} holds no adapter/{peft.CONFIG}: the stage trained its weights whole; --run={run} --to=HF_DIR exports them")
    w, _, params = build.trained(run, dtype=None)
    build.adapted_by(w, params, str(own.absolute()))
    if jax.process_index() == 0:
        to.mkdir(parents=True, exist_ok=True)
        for name in (peft.CONFIG, peft.WEIGHTS):
            shutil.copy(own / name, to / name)
        said = json.loads((own / peft.CONFIG).read_text()).get("base_model_name_or_path")
        print(f"wrote {to}; peft loads it onto the model that the stage began from ({said or 'not said'}), in Hugging Face form")


def _generation(w, name: str) -> dict:
    """What generation_config.json says: every id that ends an answer, and how the stage sampled."""
    from jaxalign.data.templates import stop_ids

    ids = stop_ids(w.tokenizer, w.template)
    out = {"eos_token_id": ids[0] if len(ids) == 1 else list(ids)}
    stage = w.config.get("section") or w.config.get("stages", {}).get(name) or {}  # weights that were imported have no stage
    c = stage.get("sampling")
    if c and c.temperature > 0:  # transformers warns of sampling fields that greedy decoding does not read
        out |= {"do_sample": True, **{k: c[k] for k in ("temperature", "top_k", "top_p")}}
    return out


def _ids(directory: str) -> int | None:
    """How many ids the directory's tokenizer has; None where we can read none."""
    from jaxalign.data import tokenizers

    try:
        return tokenizers.load(directory).vocab_size
    except UserError:
        return None


def _bytes(directory: Path, pattern: str) -> int:
    return sum(f.stat().st_size for f in directory.rglob(pattern) if f.is_file())


def _peak() -> int:
    """Bytes; of this process."""
    try:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
