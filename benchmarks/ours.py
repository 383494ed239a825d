"""jaxalign's side of the benchmarks, from the library's public pieces as any program would use them."""

from __future__ import annotations

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from pairing import Child
from work import SIZES, Work, pairs, prompts, rows
from work import reward as reward_of

from jaxalign import shard
from jaxalign.models import decoder, heads, hf
from jaxalign.objectives import grpo, lm, ppo, preference, reward
from jaxalign.ops import branches, nn
from jaxalign.rl import experience, online, reference, rewards
from jaxalign.rl.control import KL
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import optim, state, step
from jaxalign.types import Experience, Pairs, Prompts, SharedPairs, Tokens


def make_model(w: Work):
    dim, layers, n, kv, hidden, vocab = SIZES[w.size]
    return decoder.model(vocab=vocab, dim=dim, layers=layers, heads=n, kv_heads=kv, hidden=hidden, dtype="bfloat16" if w.gpu else "float32", remat=w.remat)


def load(w: Work, name: str, mesh, dtype: str = "float32"):
    return hf.load(os.path.join(w.weights, name), mesh=mesh, dtype=dtype)[1]


def tokens(ids: np.ndarray, mask_from: int = 0) -> Tokens:
    """Rows of one document each; targets from `mask_from` on (the first token is never one)."""
    mask = np.ones(ids.shape, np.float32)
    mask[:, :mask_from] = 0
    return Tokens(ids, mask, np.ones_like(ids), np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))


def make_prompts(w: Work, ids: np.ndarray, i: int) -> Prompts:
    t = tokens(ids)
    return Prompts(t.tokens, t.segments, t.positions, np.arange(len(ids), dtype=np.int32) + i * len(ids))


def pair_batches(w: Work):
    for prompt, chosen, rejected in zip(*pairs(w)):
        p, zero = prompt.shape[1], np.zeros(len(prompt), np.float32)
        rows = [tokens(np.concatenate([prompt, c], 1), p) for c in (chosen, rejected)]
        yield Pairs(*rows, zero, zero, zero)


class Batches:
    """A `Source` over a list."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def next(self, _):
        return next(self.batches)


def trainer(w: Work, objective, params, mesh):
    """(state, step): AdamW as torch has it by default, without decay; the norm of the gradient clipped at 1."""
    tx, schedule = optim.make(optim.Optim(name=w.optimizer, lr=w.lr, schedule="constant", b2=0.999), w.total, params)
    s = state.create(params, tx, objective, 0, mesh)
    return s, step.make_step(objective, tx, accumulate=0, schedule=schedule, shardings=jax.tree.map(lambda x: x.sharding, s))


def train(w: Work, child: Child, objective, params, source, mesh, *, updates: int = 1, show=("loss",)):
    s, fn = trainer(w, objective, params, mesh)
    while True:
        for _ in range(updates):
            s, metrics = fn(s, {}, shard.place(source.next(s), mesh))
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        child.done(**{k: metrics[k] for k in show})


def run_sft(w, child, mesh):
    train(w, child, lm.lm(make_model(w)), load(w, "policy", mesh), Batches(map(tokens, rows(w))), mesh)


def shared_batches(w: Work):
    """The same pairs, the prompt once: what `data.share_prompt` makes of them where that costs less."""
    for prompt, chosen, rejected in zip(*pairs(w)):
        P, C, zero = prompt.shape[1], chosen.shape[1], np.zeros(len(prompt), np.float32)
        branch = np.repeat([0, 1, 2], [P, C, C]).astype(np.uint32)
        ids = np.concatenate([prompt, chosen, rejected], 1)
        wide = lambda x: np.broadcast_to(x, ids.shape)
        at = np.concatenate([np.arange(P), P + np.arange(C), P + np.arange(C)]).astype(np.int32)
        yield SharedPairs(Tokens(ids, wide(branch > 0).astype(np.float32), wide(branches.pack(np.ones_like(branch), branch)), wide(at)), zero, zero, zero)


def run_dpo(w, child, mesh):
    """Against TRL's online reference ours is online too; against its precomputed one, ours is computed before the steps."""
    model = make_model(w)
    width, apart, together = model.config.dim, w.seq, 2 * w.seq - w.seq // 4
    batches = shared_batches(w) if branches.cost(width, together) < branches.cost(width, apart, apart) else pair_batches(w)
    source = reference.WithReference(Batches(batches), model, load(w, "policy", mesh), mesh)
    if w.peer == "precompute":
        source = Batches([source.next(None) for _ in range(w.total + 1)])
    train(w, child, preference.dpo(model, beta=0.1), load(w, "policy", mesh), source, mesh)


def run_reward(w, child, mesh):
    train(w, child, reward.pairs(heads.Scalar(make_model(w))), load(w, "reward", mesh), Batches(pair_batches(w)), mesh)


def run_sample(w, child, mesh):
    model, how = make_model(w), Sampling(max_new=w.new)
    params = load(w, "policy", mesh, "bfloat16" if w.gpu else "float32")
    batches = [make_prompts(w, ids, i) for i, ids in enumerate(prompts(w))]
    key = jax.random.key(0)
    for i, batch in enumerate(batches):
        out = jax.block_until_ready(generate(model, how, params, shard.place(batch, mesh), nn.fold(key, "rollout", i)))
        if i == 0:
            greedy = generate(model, Sampling(max_new=16, temperature=0.0), params, shard.place(batch, mesh), key).tokens
            child.done(greedy=np.asarray(greedy)[:, w.prompt :].tolist())
        else:
            assert out.tokens.shape == (w.samples, w.prompt + w.new)
            child.done()


def run_ppo(w, child, mesh):
    """One iteration: sample, score with a reward model, values and reference log-probs, then `epochs` updates. Four
    models, as TRL has them: the policy, its reference, a value network and a reward model."""
    model, scalar = make_model(w), heads.Scalar(make_model(w))
    params = {"policy": load(w, "policy", mesh), "value": load(w, "reward", mesh)}
    base = load(w, "policy", mesh)
    source = online.OnlineSource(
        Batches(make_prompts(w, ids, i) for i, ids in enumerate(prompts(w))), model, rewards.learned(scalar, load(w, "reward", mesh)), Sampling(max_new=w.new), mesh,
        lambda p, base, *x: experience.make_experience(model, scalar, p, base, *x), reference=base, epochs=w.epochs, kl=KL(0.05), kind=Experience,
    )  # fmt: skip
    train(w, child, ppo.ppo(model, scalar), params, source, mesh, updates=w.epochs, show=())


def run_grpo(w, child, mesh):
    """One iteration: `group` samples of each prompt, a Python reward, reference log-probs, one update."""
    model, base = make_model(w), load(w, "policy", mesh)
    k = experience.answers_per_row(w.group, w.prompt, w.new, model.config.dim, w.samples, 1)
    how = dict(group=w.group, max_new=w.new, old_logp="current", answers_per_row=k)
    source = online.OnlineSource(
        Batches(make_prompts(w, ids[: w.samples // w.group], i) for i, ids in enumerate(prompts(w))), model,
        rewards.python(lambda prompt, completion, record: reward_of(completion), lambda ids: " ".join(f"t{i}" for i in ids), mesh), Sampling(max_new=w.new), mesh,
        lambda p, base, rollout, scores, beta: experience.group_experience(model, p, base, rollout, scores, **how), reference=base, group=w.group,
    )  # fmt: skip
    train(w, child, grpo.grpo(model, beta=w.beta), {"policy": load(w, "policy", mesh)}, source, mesh, show=())


def compile_seconds() -> list[float]:
    """Seconds of tracing, lowering and compiling (or reading from the cache), one entry each, as they come."""
    seen: list[float] = []
    wanted = ("jaxpr_trace", "jaxpr_to_mlir", "backend_compile")
    jax.monitoring.register_event_duration_secs_listener(lambda name, s, **_: seen.append(s) if any(x in name for x in wanted) else None)
    return seen


def matmul_peak(gpu: bool) -> float:
    """FLOP/s of a large matrix product on this machine: NumPy's in f32 on a CPU, ours in bf16 on a GPU. The best of many."""
    n = 8192 if gpu else 1024
    if gpu:
        x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
        f = jax.jit(lambda a, b: a @ b)
        go = lambda: f(x, x).block_until_ready()
    else:
        x = np.random.default_rng(0).standard_normal((n, n), np.float32)
        go = lambda: x @ x
    go()
    times = []
    for _ in range(20):
        t = time.perf_counter()
        go()
        times.append(time.perf_counter() - t)
    return 2 * n**3 / min(times)


def export(w: Work):
    """The weights that both sides start from."""
    mesh, model = shard.make_mesh(), make_model(w)
    policy = shard.init(model.specs(), jax.random.key(0), mesh)
    hf.save(os.path.join(w.weights, "policy"), model, policy)
    head = nn.init(heads.specs(model.config.dim), jax.random.key(1))
    hf.save(os.path.join(w.weights, "reward"), heads.Scalar(model), {"trunk": policy, "head": head})


def main():
    verb, w = sys.argv[1], Work(**json.loads(sys.argv[2]))
    if verb == "export":
        return export(w)
    if verb == "peak":
        return print(matmul_peak(w.gpu))
    if verb == "versions":
        import jaxlib

        return print(json.dumps({"jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": jax.devices()[0].device_kind}))
    stats = jax.devices()[0].memory_stats
    mesh = shard.make_mesh(devices=jax.devices()[:1])
    compiling = compile_seconds()
    child = Child((lambda: stats()["peak_bytes_in_use"]) if w.gpu else None, lambda: sum(compiling))
    with jax.set_mesh(mesh):
        globals()[f"run_{w.task}"](w, child, mesh)


if __name__ == "__main__":
    main()
