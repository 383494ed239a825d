"""What compiled programs hold: never the logits of a batch, and each is compiled once."""

import functools
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from jaxalign.models import decoder, heads
from jaxalign.objectives import grpo, lm, ppo, preference, reward
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.train import step
from jaxalign.train.log import RunLog
from jaxalign.types import Prompts

# As many logits as two chunks of `ops.logprob` on a CPU.
B, T, V = 4, 256, 2**15
MODEL = decoder.model(vocab=V, dim=8, layers=1, heads=2, hidden=8)
SCALAR = heads.Scalar(MODEL)


def text(f, *args) -> str:
    shape = lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype)
    return jax.jit(f).lower(*jax.tree.map(shape, args)).compile().as_text()


def logits_of_a_batch(program: str) -> list:
    """Arrays that are as large as [B,T,V] and end in the vocabulary, or hold it first (a transposed product)."""
    return [s for s in hlo.shapes(program) if math.prod(s) >= B * T * V and V in s]


def rows(n=B, **kw):
    return tiny.rows(np.random.default_rng(0), n, T, **kw)


def gradient(objective, specs, batch):
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), specs, is_leaf=lambda x: hasattr(x, "axes"))
    return text(lambda p, b: step.gradient(objective, p, {}, (), b, jax.random.key(0)), params, batch)


R = np.random.default_rng(0)
VALUE = {"policy": MODEL.specs(), "value": heads.specs(MODEL.config.dim)}
PROGRAMS = {
    "lm": lambda: gradient(lm.lm(MODEL, smoothing=0.1), MODEL.specs(), rows()),
    "dpo": lambda: gradient(preference.dpo(MODEL), MODEL.specs(), tiny.pairs(R, B // 2, T)),
    "ppo": lambda: gradient(ppo.ppo(MODEL, entropy_coef=0.1), VALUE, tiny.experience(R, B, T)),
    "dpo, prompts shared": lambda: gradient(preference.dpo(MODEL), MODEL.specs(), tiny.shared_pairs(R, B, T)),
    "grpo": lambda: gradient(grpo.grpo(MODEL, beta=0.1), {"policy": MODEL.specs()}, tiny.grouped(R, B, T)),
    "reward": lambda: gradient(reward.pairs(SCALAR), SCALAR.specs(), tiny.pairs(R, B // 2, T)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_holds_the_logits_of_a_batch(name):
    assert not logits_of_a_batch(PROGRAMS[name]())


def test_generation_holds_the_logits_of_one_position():
    x = rows()
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), MODEL.specs(), is_leaf=lambda x: hasattr(x, "axes"))
    prompts = Prompts(x.tokens, x.segments, x.positions, np.arange(B, dtype=np.int32))
    held = hlo.shapes(text(functools.partial(generate, MODEL, Sampling(4)), params, prompts, jax.random.key(0)))
    assert max(math.prod(s) for s in held if V in s and B in s) == B * V


def test_the_test_itself():
    """The plain loss does hold them."""
    plain = lambda x, w, t: -jnp.take_along_axis(jax.nn.log_softmax(x @ w.T), t[..., None], -1).sum()
    assert logits_of_a_batch(text(plain, np.zeros((B, T, 8), np.float32), np.zeros((V, 8), np.float32), np.zeros((B, T), np.int32)))


# -- one compilation ------------------------------------------------------------------------------------------------

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None)


@pytest.mark.parametrize("kind, epoch", [("lm", 6), ("dpo", 5), ("ppo", 8), ("grpo", 8)])
def test_nothing_is_compiled_after_the_first_epoch(kind, epoch, tmp_path, monkeypatch):
    """Three epochs of the real loop. `epoch`: its steps, at most (PPO: two batches of 16 of 24 prompts, each in 2 x 2 steps).
    Counted: what XLA compiled, and the entries of the step's own cache (two: the dispatcher's first state has no history)."""
    made, seen, metrics, make = [], {}, RunLog.metrics, step.make_step
    monkeypatch.setattr(RunLog, "metrics", lambda self, at, values: (seen.__setitem__(at, (len(COMPILED), made[0]._cache_size())), metrics(self, at, values)))
    monkeypatch.setattr(step, "make_step", lambda *a, **kw: made.append(make(*a, **kw)) or made[-1])
    data = runs.prepared(tmp_path / "data")
    with runs.devices(2):
        runs.train(runs.config(kind, data, **{"train.steps": 3 * epoch, "train.save_every": 0, "train.log_every": 1}), tmp_path / "run")
    assert sorted(seen) == list(range(1, 3 * epoch + 1)) and seen[1][0] > 0
    assert seen[epoch] == seen[3 * epoch], f"after the first epoch {seen[epoch]}, after the third {seen[3 * epoch]}"
    assert len(made) == 1 and seen[epoch][1] <= 2
