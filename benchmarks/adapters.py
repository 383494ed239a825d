"""Memory of fine-tuning with and without adapters, printed as the table of docs/adapters.md: python benchmarks/adapters.py

Nothing is allocated: held bytes are those of the shapes, temporaries are what the compiler reports for one step on this
machine (`memory_analysis` of the gradient, one device). The default shape is that of Llama-3.2-1B.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import optax

from jaxalign import tree
from jaxalign.models import decoder, lora
from jaxalign.ops import nn
from jaxalign.ops.logprob import before, linear_ce, targets

GIB = 2**30


def row(model, base: str, rank: int, batch: int, length: int) -> dict[str, float]:
    """GiB of one setting. rank 0: every weight is trained."""

    def make(key):
        params = nn.init(model.specs(), key)
        if base != "float32":
            params = lora.quantise(params, ((lora.MATRICES, base),))
        return lora.attach(params, lora.Lora(((lora.MATRICES, rank, 2.0 * rank),)), key) if rank else params

    params = jax.eval_shape(make, jax.random.key(0))
    trained, frozen = tree.split(params, lora.trainable(params)) if rank else (params, {})
    held = lora.memory(trained, frozen, optax.adamw(1e-4))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def loss(trained, frozen, ids):
        ones, positions = jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(length), ids.shape)
        full = tree.merge(trained, frozen)
        x = model.hidden(full, ids, ones, positions).x
        return linear_ce(before(x, ones), model.unembed(full), ids, targets(ones.astype(jnp.float32), ones)).nll

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, ids).compile().memory_analysis()
    out = {**held, "gradient": held["trained"], "temporaries": compiled.temp_size_in_bytes}
    return {k: v / GIB for k, v in {**out, "sum": sum(out.values())}.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--dim", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=8192)
    p.add_argument("--vocab", type=int, default=128256)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--length", type=int, default=512)
    a = p.parse_args()
    model = decoder.model(
        vocab=a.vocab, dim=a.dim, layers=a.layers, heads=a.dim // 64, kv_heads=max(a.dim // 256, 1), hidden=a.hidden, scan=True, remat="full", dtype="float32",
    )  # fmt: skip
    print(f"{nn.count(model.specs()) / 1e9:.2f} G weights, batch {a.batch} x {a.length}, rank {a.rank}, f32 activations, scanned with full remat, {jax.default_backend()}; GiB\n")
    names = ("frozen", "trained", "gradient", "optimizer", "temporaries", "sum")
    print("| matrices of the layers | trained | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for base, rank in (("float32", 0), ("float32", a.rank), ("bfloat16", a.rank), ("int8", a.rank), ("nf4", a.rank)):
        got = row(model, base, rank, a.batch, a.length)
        print(f"| {base} | {'LoRA' if rank else 'all'} | " + " | ".join(f"{got[k]:.2f}" for k in names) + " |", flush=True)


if __name__ == "__main__":
    main()
