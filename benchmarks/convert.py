"""Reading and writing Hugging Face checkpoints: peak host memory and GB/s, beside safetensors and transformers.

    python benchmarks/convert.py --write docs/checkpoints.md
    python benchmarks/convert.py --layers 4 --repeats 3          # a small one, to try it

Makes a llama-shaped checkpoint of random weights (bf16, several files, written one after the other), then:

memory: import (bf16 to bf16, bf16 to f32) and export (bf16) each in a fresh process. Peak is the process's high-water mark
of resident memory (VmHWM; ru_maxrss would start from its parent's, which exec hands on); base is what it was once jax was imported and had run its first operation. Both "peak / size" and "(peak - base) / size" are of
the size in the target dtype. Export holds the params it writes, so its size is theirs.

speed: GB/s (10^9 bytes of files per second) with files in the page cache, sides in turn, the order reversed every round,
medians of all rounds; a ratio is their seconds over ours, round by round: wall is what you wait, cpu (seconds of all cores
together, also of the kernel) is steadier on a machine that others use. Ours reads the bytes and transposes the
matrices, which theirs stay mapped files: load_file and, in the file's dtype, from_pretrained return before a byte of data
is read. "and touched" reads one number of each page of what they returned, the least that makes the bytes arrive. Ours
syncs what it exports, theirs does not, so ours is also timed without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 1.15  # of the size in the target dtype
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip  TinyLlama's shape (Zhang et al. 2024, 2401.02385): 1.1 B parameters


# -- the synthetic checkpoint -----------------------------------------------------------------------------------------


def make(directory: Path, layers: int, per_file: int = 6) -> int:
    """Writes it file by file, by safetensors itself. Returns the number of parameters."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    c, r = {**CONFIG, "num_hidden_layers": layers}, np.random.default_rng(0)
    D, F, V, K = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["hidden_size"] // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D)}
    layer |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    files = [{"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}]
    for a in range(0, layers, per_file):
        files.append({f"model.layers.{i}.{k}.weight": s for i in range(a, min(a + per_file, layers)) for k, s in layer.items()})
    weight_map, count = {}, 0
    for i, shapes in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        draw = lambda s: (r.standard_normal(s, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        save_file({k: draw(s) for k, s in shapes.items()}, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
        count += sum(int(np.prod(s)) for s in shapes.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 2 * count}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(c))
    return count


# -- memory: each in a process of its own -------------------------------------------------------------------------------


def peak() -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def child(what: str, source: str, target: str) -> None:
    """Runs in the fresh process; prints {size, peak, base} in bytes."""
    import jax
    import jax.numpy as jnp
    from jaxalign.models import hf

    jax.block_until_ready(jnp.zeros(8) + 1)
    base = peak()
    if what.startswith("import"):
        _, params = hf.load(source, dtype=what.split()[-1])
    else:
        model = hf.read_config(source)
        from jaxalign.ops import nn

        params = jax.tree.map(lambda s: jnp.full(s.shape, 0.02, jnp.bfloat16), model.specs(), is_leaf=nn.is_spec)
        hf.save(target, model, params)
    print(json.dumps({"size": sum(x.nbytes for x in jax.tree.leaves(params)), "peak": peak(), "base": base}))


def measured(what: str, source: Path, target: Path) -> dict:
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, __file__, "--child", what, str(source), str(target)], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(target, ignore_errors=True)
    return json.loads(out.splitlines()[-1])


# -- speed: in one process, in turn ---------------------------------------------------------------------------------------


def sides(source: Path, target: Path) -> dict:
    """{group: {side: function}}; the first side is ours. Functions of one group do the same work, as far as it can be the same."""
    import jax
    import safetensors.torch
    import torch
    import transformers
    from jaxalign.models import hf, weights

    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    files = sorted(source.glob("*.safetensors"))
    ours = lambda dtype: lambda: jax.block_until_ready(hf.load(source, dtype=dtype)[1])
    touch = lambda tensors: sum(int(t.detach().reshape(-1).view(torch.int16)[::2048].sum()) for t in tensors)
    yield "import bf16 to bf16", {
        "jaxalign": ours("bfloat16"),
        "transformers from_pretrained": lambda: load(source, dtype=torch.bfloat16),
        "transformers from_pretrained, and touched": lambda: touch(load(source, dtype=torch.bfloat16).parameters()),
        "safetensors load_file": lambda: [safetensors.torch.load_file(f) for f in files],
        "safetensors load_file, and touched": lambda: [touch(safetensors.torch.load_file(f).values()) for f in files],
        "safetensors load_file(backend=\"pread\")": lambda: [safetensors.torch.load_file(f, backend="pread") for f in files],
    }
    yield "import bf16 to f32", {"jaxalign": ours("float32"), "transformers from_pretrained": lambda: load(source, dtype=torch.float32)}
    model, params = hf.load(source, dtype="bfloat16")
    theirs = load(source, dtype=torch.bfloat16)
    state = theirs.state_dict()

    def synced(sync: bool):
        def run():
            real, weights.os.fsync = weights.os.fsync, weights.os.fsync if sync else lambda fd: None
            try:
                hf.save(target, model, params)
            finally:
                weights.os.fsync = real

        return run

    def save_file():
        target.mkdir(exist_ok=True)
        safetensors.torch.save_file(state, target / "model.safetensors")

    yield "export bf16", {
        "jaxalign, not synced": synced(False),
        "jaxalign": synced(True),
        "transformers save_pretrained": lambda: theirs.save_pretrained(target),
        "safetensors save_file": save_file,
    }


def timed(group: dict, size: int, repeats: int, target: Path) -> list[tuple[str, float, float, float]]:
    """[(side, GB/s, median of their seconds over ours: wall, cpu)]"""
    seconds = {k: [] for k in group}
    for i in range(repeats + 1):  # the first round warms caches
        for k in list(group)[:: 1 if i % 2 else -1]:
            shutil.rmtree(target, ignore_errors=True)
            start, spent = time.perf_counter(), time.process_time()
            out = group[k]()
            seconds[k].append((time.perf_counter() - start, time.process_time() - spent))
            del out
    first = seconds[next(iter(group))][1:]
    ratio = lambda s, j: statistics.median(a[j] / b[j] for a, b in zip(s[1:], first))
    return [(k, size / statistics.median(w for w, _ in s[1:]) / 1e9, ratio(s, 0), ratio(s, 1)) for k, s in seconds.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--only", choices=("memory", "speed"))
    p.add_argument("--write", type=Path, help="put the tables into this page, between their markers")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        return child(*a.child)
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(HERE.parent))
    text = []
    with tempfile.TemporaryDirectory(prefix="jaxalign-convert-") as d:
        source, target = Path(d) / "in", Path(d) / "out"
        source.mkdir()
        count = make(source, a.layers)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        if a.only != "speed":
            rows = ["| | size GB | peak GB | base GB | peak / size | (peak - base) / size |", "|---|---|---|---|---|---|"]
            for what in ("import bfloat16", "import float32", "export bfloat16"):
                m = measured(what, source, target)
                share = m["peak"] / m["size"], (m["peak"] - m["base"]) / m["size"]
                rows.append(f"| {what} | {m['size'] / 1e9:.3f} | {m['peak'] / 1e9:.3f} | {m['base'] / 1e9:.3f} | {share[0]:.3f} | {share[1]:.3f} |")
                print(rows[-1], file=sys.stderr, flush=True)
            text.append("\n".join(rows) + f"\n\nThe limit is {LIMIT}.")
        if a.only != "memory":
            rows = ["| | side | GB/s | their wall / ours | their cpu / ours |", "|---|---|---|---|---|"]
            for name, group in sides(source, target):
                for side, speed, wall, cpu in timed(group, size, a.repeats, target):
                    rows.append(f"| {name} | {side} | {speed:.2f} | {wall:.2f} | {cpu:.2f} |")
                    print(rows[-1], file=sys.stderr, flush=True)
            text.append("\n".join(rows))
    from speed import write

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    about = f"{count / 1e9:.3f} B parameters, {size / 1e9:.3f} GB of bf16; {os.cpu_count()} x {cpu}; medians of {a.repeats} rounds in turn. `python benchmarks/convert.py`"
    text = "\n\n".join([about, *text])
    print(text)
    if a.write:
        write(a.write, text, by="convert.py")


if __name__ == "__main__":
    main()
