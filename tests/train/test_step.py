"""The one step: exact accumulation, masks, skipped steps, clipping, donation. Toy problems where no model is needed."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign import tree
from jaxalign.objectives import lm
from jaxalign.train import optim, run, state, step
from jaxalign.train.log import RunLog
from jaxalign.types import Loss, Objective, Term, Tokens, UserError

CASES = ["lm_smooth", "lm_gpt2", "pairs", "rankings", "dpo", "orpo", "kto", "pl_dpo", "rrhf", "grpo", "ppo"]


@functools.cache
def compiled(name, n=1):
    return tiny.gradient(tiny.CASES[name][0], n)


def batch_of(name, seed=0, B=8, T=8):
    return tiny.CASES[name][2](np.random.default_rng(seed), B, T)


def check_accumulation(name, splits, bound):
    """Row i goes to micro-batch i mod n: shuffling the rows gives any split. Masks are uneven, so a mean of means fails."""
    params, batch = tiny.CASES[name][1](), batch_of(name)
    loss, metrics, grads = compiled(name)(params, batch)
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(grads))
    for n in splits:
        for seed in (1, 2):
            order = np.random.default_rng(seed).permutation(8)
            loss2, metrics2, grads2 = compiled(name, n)(params, jax.tree.map(lambda x: x[order], batch))
            assert tiny.far(grads2, grads) <= bound, (name, n)
            np.testing.assert_allclose(loss2, loss, rtol=bound, atol=bound)
            for k in metrics:
                np.testing.assert_allclose(metrics2[k], metrics[k], rtol=10 * bound, atol=10 * bound, err_msg=k)


@pytest.mark.parametrize("name", CASES)
def test_accumulation_in_f32(name):
    check_accumulation(name, (2, 4, 8) if name == "lm_smooth" else (8,), 1e-6)


F64 = """
import sys
sys.path[:0] = [{tests!r}, {train!r}]
import conftest
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
import numpy as np
import tiny, test_step
from jaxalign.models import decoder, heads
from jaxalign.objectives import lm, ppo, preference, reward
from jaxalign.ops import nn
M = decoder.model(vocab=16, dim=16, layers=1, heads=4, kv_heads=2, hidden=24, dtype="float64")
S = heads.Scalar(M)
def init(specs):
    return lambda: tiny.loud(jax.jit(lambda k: nn.init(specs, k, "float64"))(jax.random.key(0)))
wide = lambda f: lambda *a: jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, f(*a))
tiny.CASES = {{
    "lm": (lm.lm(M, smoothing=0.1, z_loss=1e-2), init(M.specs()), wide(tiny.rows)),
    "rankings": (reward.rankings(S, centre=0.01), init(S.specs()), wide(tiny.rankings)),
    "dpo": (preference.dpo(M), init(M.specs()), wide(tiny.pairs)),
    "ppo": (ppo.ppo(M, entropy_coef=0.02, value_coef=0.3, ptx_coef=0.7), init({{"policy": M.specs(), "value": heads.specs(16)}}), wide(tiny.mixed)),
}}
for name in tiny.CASES:
    assert test_step.compiled(name)(tiny.CASES[name][1](), test_step.batch_of(name))[0].dtype == np.float64
    test_step.check_accumulation(name, (4,), 1e-10)
print("exact")
"""


def test_accumulation_in_f64():
    here = Path(__file__).parent
    code = F64.format(tests=str(here.parent), train=str(here))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert out.stdout.strip() == "exact", out.stdout + out.stderr


def junk_in_padding(rows, r):
    pad = rows.segments == 0
    assert pad.any()
    noise = lambda high: r.integers(0, high, pad.shape).astype(np.int32)
    return rows._replace(tokens=np.where(pad, noise(tiny.V), rows.tokens), positions=np.where(pad, noise(30), rows.positions))


def dirty(name, batch, r):
    """The same batch with garbage wherever a mask is 0."""
    if name.startswith("lm"):
        return junk_in_padding(batch, r)
    if name == "kto":
        return batch._replace(rows=junk_in_padding(batch.rows, r), mismatched=junk_in_padding(batch.mismatched, r))
    if name in ("rankings", "pl_dpo", "rrhf"):
        rows, void = junk_in_padding(batch.candidates, r), (batch.valid == 0)[..., None]
        other = tiny.rows(r, *rows.tokens.shape[:1], rows.tokens.shape[2], rows.tokens.shape[1])
        return batch._replace(candidates=jax.tree.map(lambda a, b: np.where(void, b, a), rows, other), rank=np.where(void[..., 0], -7, batch.rank))
    if name == "ppo":
        exp, off = junk_in_padding(batch["ppo"], r), batch["ppo"].mask == 0
        exp = exp._replace(**{k: np.where(off, np.nan, getattr(exp, k)).astype(np.float32) for k in ("logp", "values", "advantages", "returns")})
        return {"ppo": exp, "ptx": junk_in_padding(batch["ptx"], r)}
    if name == "grpo":
        exp, off = junk_in_padding(batch, r), batch.mask == 0
        return exp._replace(**{k: np.where(off, np.nan, getattr(exp, k)).astype(np.float32) for k in ("logp", "sampled", "ref_logp", "advantages")})
    return batch._replace(chosen=junk_in_padding(batch.chosen, r), rejected=junk_in_padding(batch.rejected, r))


@pytest.mark.parametrize("name", CASES)
def test_garbage_under_the_mask_changes_nothing(name):
    params, batch = tiny.CASES[name][1](), batch_of(name)
    clean = compiled(name)(params, batch)
    other = compiled(name)(params, dirty(name, batch, np.random.default_rng(9)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8), other, clean)
    assert float(clean[0]) != float(compiled(name)(params, batch_of(name, seed=1))[0])


@pytest.mark.parametrize("name", CASES)
def test_empty_masks_give_zero(name):
    """Nothing to learn from: loss 0 and gradient 0, not 0/0. Rows may also be padding from end to end."""
    params, batch = tiny.CASES[name][1](), batch_of(name)
    empty = tree.map_named(lambda n, x: np.zeros_like(x) if n.split("/")[-1] in ("mask", "valid") else x, batch)
    for b in (empty, jax.tree.map(np.zeros_like, batch)):
        loss, metrics, grads = compiled(name)(params, b)
        assert loss == 0
        assert all(np.isfinite(v) for v in metrics.values())
        assert not any(np.asarray(g).any() or np.isnan(g).any() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["pairs", "dpo"])
def test_an_empty_pair_weighs_nothing(name):
    """Six pairs, or six pairs and two without a completion (one side suffices) whose numbers are garbage: the same."""
    params, batch = tiny.CASES[name][1](), batch_of(name)
    void = np.arange(8) >= 6
    blank = lambda rows, which: rows._replace(mask=np.where(which[:, None], 0, rows.mask).astype(np.float32))
    noise = {k: np.where(void, np.nan, getattr(batch, k)).astype(np.float32) for k in ("ref_chosen", "ref_rejected", "margin")}
    eight = batch._replace(chosen=blank(batch.chosen, void), rejected=blank(batch.rejected, np.arange(8) >= 7), **noise)
    want = tiny.gradient(tiny.CASES[name][0])(params, jax.tree.map(lambda x: x[:6], batch))
    got = compiled(name)(params, eight)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert tiny.far(got[2], want[2]) < 1e-6
    assert got[1]["accuracy" if name == "pairs" else "rewards/accuracies"] == want[1]["accuracy" if name == "pairs" else "rewards/accuracies"]


def test_the_weights_cost_no_flops():
    """The pass that sums weights runs `loss` too; the compiler must drop the model from it: as many matrix products in
    the program of four micro-batches as in a plain gradient of one."""
    params, batch = tiny.init(tiny.LLAMA), batch_of("lm_smooth")
    one = jax.tree.map(lambda x: x[:2], batch)

    def products(f, b):
        return len(re.findall(r"= \S+ (?:dot|custom-call)\(|__cpu\$.*matmul|\bdot\(", jax.jit(f).lower(params, b).compile().as_text()))

    objective = lm.lm(tiny.LLAMA)
    plain = products(jax.value_and_grad(lambda p, b: objective.loss(p, {}, (), b, None, {}).terms["lm"].total), one)
    assert plain > 10
    assert products(lambda p, b: step.gradient(objective, p, {}, (), b, None, 4), batch) == plain
    assert products(lambda p, b: step.gradient(objective, p, {}, (), b, None, 1), batch) == plain


# -- toy problems ---------------------------------------------------------------------------------------------------


def squares(params, frozen, aux, batch, key, stats):
    """sum of (w . x - y)^2 over rows."""
    error = batch["x"] @ params["w"] - batch["y"]
    n = jnp.float32(error.shape[0])
    return Loss({"mse": Term((error**2).sum(), n)}, {"error": (jax.lax.stop_gradient(jnp.abs(error).sum()), n)})


TOY = Objective(squares, init_aux=lambda p: {"seen": jnp.zeros(())}, update_aux=lambda aux, p, m, s: {"seen": aux["seen"] + 1})


def toy_batch(seed, bad=None):
    r = np.random.default_rng(seed)
    x = r.standard_normal((8, 3)).astype(np.float32)
    return {"x": x, "y": (x @ np.array([1, -2, 0.5]) + (0 if bad is None else bad)).astype(np.float32)}


def toy(o=optim.Optim(lr=0.1, schedule="linear", end=0.0, b2=0.9), steps=10, objective=TOY, **more):
    params = {"w": jnp.zeros(3)}
    tx, schedule = optim.make(o, steps, params)
    return state.create(params, tx, objective, 0), step.make_step(objective, tx, schedule=schedule, **{"max_grad_norm": None, **more})


def numbers(x):
    return jax.tree.map(np.asarray, [x.params, x.opt_state, x.aux, jax.random.key_data(x.key)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    """1e30 squared overflows the loss alone. The schedule (0.1 falling to 0 over 10 updates) stays where it was."""
    s, fn = toy()
    s, m = fn(s, {}, toy_batch(0))
    assert m["skipped"] == 0 and m["learning_rate"] == np.float32(0.1) and s.aux["seen"] == 1
    before = numbers(s)
    s, m = fn(s, {}, toy_batch(1, bad))
    assert m["skipped"] == 1 and s.step == 2
    jax.tree.map(np.testing.assert_array_equal, numbers(s), before)
    s, m = fn(s, {}, toy_batch(2))
    np.testing.assert_allclose(m["learning_rate"], 0.09, rtol=1e-6)  # the second update, on the third batch
    assert m["skipped"] == 0 and s.aux["seen"] == 2 and s.step == 3
    # and the run is the one that never saw that batch
    other, fn = toy()
    for seed in (0, 2):
        other, _ = fn(other, {}, toy_batch(seed))
    jax.tree.map(np.testing.assert_array_equal, numbers(s), numbers(other))


class Batches:
    """A source of toy batches; `bad` says which."""

    def __init__(self, bad):
        self.at, self.bad = 0, bad

    def next(self, _):
        self.at += 1
        return toy_batch(self.at, np.nan if self.at in self.bad else None)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, d):
        self.at = d["at"]


def test_the_run_gives_up_after_max_skipped(tmp_path):
    """Two bad batches, a good one, three bad ones: with max_skipped = 3 it ends at step 7, not at step 4."""
    from jaxalign import shard

    mesh = shard.make_mesh({}, jax.devices()[:1])
    s, fn = toy()
    with RunLog(tmp_path) as log, pytest.raises(UserError, match="3 steps in a row had a loss or gradient that is not finite, the last at step 7"):
        run.train(s, fn, Batches({2, 3, 5, 6, 7}), {}, run.Loop(steps=20, max_skipped=3), mesh=mesh, log=log)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    events = [e for e in (tmp_path / "events.jsonl").read_text().splitlines() if "skipped_step" in e]
    assert len(lines) == 7 and len(events) == 5 and '"in_a_row": 3' in events[-1]
    s, fn = toy()
    with RunLog(tmp_path / "b") as log:
        assert run.train(s, fn, Batches({2, 3}), {}, run.Loop(steps=4, max_skipped=3), mesh=mesh, log=log).step == 4


def test_clipping_by_the_global_norm():
    """sgd at rate 1 moves by the clipped gradient: length max_grad_norm if longer, untouched if shorter; the metric is
    the norm before it."""
    o = optim.Optim(name="sgd", lr=1.0, schedule="constant")
    b = toy_batch(0)
    want = 2 * b["x"].T @ -b["y"] / 8  # d/dw of mean (w.x - y)^2 at w = 0
    norm = np.linalg.norm(want)
    for limit in (norm / 3, norm * 3, None):
        s, fn = toy(o, max_grad_norm=None if limit is None else float(limit))
        s, m = fn(s, {}, b)
        np.testing.assert_allclose(m["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(-s.params["w"], want * min(1, (limit or np.inf) / norm), rtol=1e-5)


def test_one_compilation_and_donated_buffers():
    s, fn = toy(accumulate=2)
    for i in range(3):
        old, old_moments = s.params["w"], jax.tree.leaves(s.opt_state)
        s, _ = fn(s, {}, toy_batch(i))
        assert old.is_deleted() and all(x.is_deleted() for x in old_moments)
    assert fn._cache_size() == 1


def test_a_loss_that_is_no_sum_refuses_accumulation():
    sort = Objective(squares, whole_batch=True)
    with pytest.raises(UserError, match="accumulate = 1"):
        toy(objective=sort, accumulate=2)
    toy(objective=sort)


def test_statistics_are_of_the_global_batch():
    """`stats` sums over all micro-batches before `loss` sees it: mean y of 8 rows, not of each 2."""

    def loss(params, frozen, aux, batch, key, stats):
        return Loss({"a": Term((params["w"].sum() * (batch["y"] - stats["mean"])).sum(), jnp.float32(len(batch["y"])))}, {"mean": (stats["mean"], 1.0)})

    objective = Objective(loss, stats=lambda p, f, a, b: {"mean": (b["y"].sum(), jnp.float32(len(b["y"])))})
    b = toy_batch(0)
    got = tiny.gradient(objective, 4)({"w": jnp.ones(3)}, b)
    np.testing.assert_allclose(got[2]["w"], 0, atol=1e-6)  # sum (y - mean y) = 0
    np.testing.assert_allclose(got[1]["mean"], 4 * b["y"].mean() / 4, rtol=1e-5)


def test_frozen_leaves_get_no_gradient_and_are_read():
    """params {"w"} are trained, frozen["base"] holds the rest of the same tree."""

    def loss(params, frozen, aux, batch, key, stats):
        return Loss({"a": Term((params["w"] * params["fixed"]).sum(), jnp.float32(1))}, {})

    grads = jax.jit(lambda p, f: step.gradient(Objective(loss), p, f, (), toy_batch(0), None)[2])({"w": jnp.ones(3)}, {"base": {"fixed": jnp.array([1.0, 2.0, 3.0])}})
    assert list(grads) == ["w"]
    np.testing.assert_array_equal(grads["w"], [1, 2, 3])


@pytest.mark.parametrize("rows, length, n", [(8, 256, 2), (16, 256, 4), (6, 1024, 6), (7, 256, 1), (4, 64, 1), (9, 400, 3)])
def test_a_cpu_takes_micro_batches_that_its_caches_hold(rows, length, n):
    """The most that divide the rows and leave 1024 tokens each; of a mixed batch, that divide the rows of both."""
    x = np.zeros((rows, length), np.int32)
    t = Tokens(x, x, x, x)
    assert step.suited(t) == n
    assert step.suited({"a": t, "b": Tokens(*(x[:1],) * 4)}) == 1
