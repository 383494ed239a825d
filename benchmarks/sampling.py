"""When slots and drafts pay: their cost beside plain `generate`, on this machine.

    python benchmarks/sampling.py --size small --rows 1 16
    python benchmarks/sampling.py --size tiny --rows 1 16 --slots 16

Drafts: the cost of one round (k drafted, one forward over k + 1 tokens) in plain decoding steps is how many tokens a round
must give for the draft to pay. It depends on size and rows, not on the text; what a text gives is the acceptance that
`rl.speculative` reports. Slots: the same queue of prompts whose completions differ in length, through slots and in batches
of as many rows. CPU seconds of this process (of the GPU: seconds), the least of --repeat.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np
from work import SIZES

from jaxalign.models import decoder
from jaxalign.ops import nn
from jaxalign.rl import engine, rollout, speculative
from jaxalign.rl.rollout import Sampling
from jaxalign.types import Prompts


def make_prompts(rows: int, length: int, vocab: int, seed: int = 0) -> Prompts:
    ids = np.random.default_rng(seed).integers(4, vocab, (rows, length)).astype(np.int32)
    return Prompts(ids, np.ones_like(ids), np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape), np.arange(rows, dtype=np.int32))


def seconds(f, repeat: int) -> float:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(f())
    taken = []
    for _ in range(repeat):
        start = clock()
        jax.block_until_ready(f())
        taken.append(clock() - start)
    return min(taken)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="small")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    p.add_argument("--draft_tokens", type=int, nargs="+", default=[2, 4])
    p.add_argument("--slots", type=int, default=0, help="0: do not measure slots")
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--repeat", type=int, default=3)
    a = p.parse_args()
    dim, layers, heads, kv, hidden, vocab = SIZES[a.size]
    model = decoder.model(vocab=vocab, dim=dim, layers=layers, heads=heads, kv_heads=kv, hidden=hidden, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    params = jax.jit(lambda k: nn.init(model.specs(), k, model.config.dtype))(jax.random.key(0))
    key = jax.random.key(1)
    print(f"{a.size}, prompts of {a.prompt}, {a.new} new tokens, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for rows in a.rows:
        given = make_prompts(rows, a.prompt, vocab)
        first = seconds(lambda: rollout.generate(model, Sampling(1), params, given, key), a.repeat)
        step = (seconds(lambda: rollout.generate(model, Sampling(a.new), params, given, key), a.repeat) - first) / (a.new - 1)
        print(f"rows {rows}: a step {step * 1e3:.2f} ms")
        for k in a.draft_tokens:
            how = Sampling(a.new, draft="ngram", draft_tokens=k)
            run = lambda how=how: speculative.generate(model, how, params, given, key)
            calls = a.new / float(run()[1]["speculative/tokens_per_call"])
            cost = (seconds(run, a.repeat) - first) / calls / step
            print(f"rows {rows}: n-grams, {k} drafted: pays from {cost:.2f} tokens per call on")
    if a.slots:
        # A stop list of a twentieth of the vocabulary: completions of a random model end after 20 tokens, some at once, some never.
        stop = tuple(range(4, vocab, 20))
        given = make_prompts(8 * a.slots, a.prompt, vocab)
        how = Sampling(a.new, stop, slots=a.slots)
        cut = [Prompts(*(x[i : i + a.slots] for x in given[:4])) for i in range(0, 8 * a.slots, a.slots)]
        queue = seconds(lambda: engine.generate(model, how, params, given, key), a.repeat)
        batches = seconds(lambda: [rollout.generate(model, Sampling(a.new, stop), params, b, key) for b in cut], a.repeat)
        print(f"{8 * a.slots} prompts, {a.slots} slots: batches {batches:.2f} s, slots {queue:.2f} s, {batches / queue:.2f} x")


if __name__ == "__main__":
    main()
