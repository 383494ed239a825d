"""jaxalign's side of the benchmarks, from the library's public pieces as any program would use them."""

from __future__ import annotations

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from pairing import Child
from work import SIZES, Work, pairs, prompts, rows

from jaxalign import shard
from jaxalign.models import decoder, heads, hf
from jaxalign.objectives import lm, ppo, preference, reward
from jaxalign.ops import nn
from jaxalign.rl import experience, reference, rewards
from jaxalign.rl.control import KL
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import optim, state, step
from jaxalign.types import Pairs, Prompts, Tokens


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
    return s, step.make_step(objective, tx, schedule=schedule, shardings=jax.tree.map(lambda x: x.sharding, s))


def train(w: Work, child: Child, objective, params, source, mesh, *, updates: int = 1, show=("loss",)):
    s, fn = trainer(w, objective, params, mesh)
    while True:
        for _ in range(updates):
            s, metrics = fn(s, {}, shard.place(source.next(s), mesh))
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        child.done(**{k: metrics[k] for k in show})


def run_sft(w, child, mesh):
    train(w, child, lm.lm(make_model(w)), load(w, "policy", mesh), Batches(map(tokens, rows(w))), mesh)


def run_dpo(w, child, mesh):
    model = make_model(w)
    source = reference.WithReference(Batches(pair_batches(w)), model, load(w, "policy", mesh), mesh)
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
    source = experience.PPOSource(
        Batches(make_prompts(w, ids, i) for i, ids in enumerate(prompts(w))), model, scalar, load(w, "policy", mesh),
        rewards.learned(scalar, load(w, "reward", mesh)), Sampling(max_new=w.new), mesh, epochs=w.epochs, kl=KL(0.05),
    )  # fmt: skip
    train(w, child, ppo.ppo(model, scalar), params, source, mesh, updates=w.epochs, show=())


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
    if verb == "versions":
        import jaxlib

        return print(json.dumps({"jax": jax.__version__, "jaxlib": jaxlib.__version__, "device": jax.devices()[0].device_kind}))
    stats = jax.devices()[0].memory_stats
    mesh = shard.make_mesh(devices=jax.devices()[:1])
    child = Child((lambda: stats()["peak_bytes_in_use"]) if w.gpu else None)
    with jax.set_mesh(mesh):
        globals()[f"run_{w.task}"](w, child, mesh)


if __name__ == "__main__":
    main()
