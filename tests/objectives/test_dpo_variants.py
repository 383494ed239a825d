"""What `test_preference` can not see: shared rows, a shift that runs, a reference that moves, quantiles with empty pairs."""

import jax
import numpy as np
import optax
import pytest
import runs
import test_branches
import tiny
from jaxalign import shard, tree
from jaxalign.models import lora
from jaxalign.objectives import dpo_variants, odds, preference
from jaxalign.ops import nn
from jaxalign.ops.logprob import before, log_sum_squares, targets
from jaxalign.rl.reference import add_reference
from jaxalign.train import state, step
from jaxalign.types import UserError


def test_one_row_or_two():
    """The losses that look at tokens: the same on pairs apart and on pairs that share their prompt in a row."""
    params, reference = tiny.init(tiny.LLAMA), tiny.init(tiny.LLAMA, 3)
    makers = {"wpo": dpo_variants.wpo, "ld": dpo_variants.ld_dpo, "orpo": lambda m: odds.orpo(m, nll_on="all")}

    @jax.jit
    def losses(batch):
        out = {}
        for k, make in makers.items():
            o = make(tiny.LLAMA)
            terms = o.loss(params, {}, (), add_reference(tiny.LLAMA, reference, batch, o.reference or preference.pair_logps), None, {}).terms
            out[k] = {n: t.total / t.weight for n, t in terms.items()}
        return out

    apart, together = (losses(b) for b in test_branches.pairs_both_ways())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart, together)


def test_log_sum_squares():
    """Against softmax written out, in chunks and in one, on one device and on eight."""
    params, rows = tiny.init(tiny.LLAMA), tiny.rows(np.random.default_rng(0), 8, 12)
    mask = targets(rows.mask, rows.segments)
    x = before(tiny.LLAMA.hidden(params, rows.tokens, rows.segments, rows.positions).x, rows.segments)
    p = np.asarray(jax.nn.softmax(x @ tiny.LLAMA.unembed(params).weight.T, -1), np.float64)
    want = np.where(mask > 0, np.log((p * p).sum(-1)), 0)
    u = tiny.LLAMA.unembed(params)
    for cap in (None, 8 * tiny.V):
        np.testing.assert_allclose(log_sum_squares(x, u, mask, chunk=cap), want, rtol=1e-5, atol=1e-6)
    with jax.set_mesh(shard.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})):
        np.testing.assert_allclose(jax.jit(log_sum_squares)(x, u, mask), want, rtol=1e-5, atol=1e-6)


def test_quantiles_leave_empty_pairs_out():
    """x sorted 1 2 3 against y sorted 0 5 6; the fourth pair is not real, whatever it says."""
    gap, weight = dpo_variants.quantile_gap(np.float32([3, 1, 2, -50]), np.float32([6, 5, 0, 99]), np.float32([1, 1, 1, 0]))
    np.testing.assert_array_equal(gap, [1, -3, -3, 0])
    np.testing.assert_array_equal(weight, [1, 1, 1, 0])
    with pytest.raises(UserError, match="accumulat"):
        step.make_step(dpo_variants.aot(tiny.LLAMA), optax.sgd(0.1), accumulate=2)


def moved(objective, params, frozen, batch, n):
    """[state after each of n updates]"""
    tx = optax.sgd(1.0)
    now, fn, out = state.create(params, tx, objective, 0), step.make_step(objective, tx), []
    for _ in range(n):
        now, metrics = fn(now, frozen, batch)
        out.append((jax.tree.map(np.asarray, (now.params, now.aux)), metrics))
    return out


def test_a_soft_reference_goes_a_part_of_the_way():
    """alpha 1/4, every third update: from 0 towards 8, at the updates counted 3 and 6."""
    objective, aux = dpo_variants.tr_dpo(tiny.LLAMA, alpha=0.25, every=3), {"w": np.zeros(2, np.float32)}
    seen = []
    for i in range(6):
        aux = objective.update_aux(aux, {"w": np.full(2, 8.0, np.float32)}, {}, i)
        seen.append(float(aux["w"][0]))
    assert seen == [0, 0, 2, 2, 2, 3.5]


def test_a_hard_reference_is_the_policy_after_every_second_update():
    alpha = 1.0
    params, batch = tiny.init(tiny.LLAMA), tiny.pairs(np.random.default_rng(1), 4, 8)
    start = jax.tree.map(np.asarray, params)
    run = moved(dpo_variants.tr_dpo(tiny.LLAMA, alpha=alpha, every=2), jax.tree.map(lambda x: x + 0, params), {}, batch, 4)
    for i, ((policy, reference), metrics) in enumerate(run):
        if i % 2 == 0:
            jax.tree.map(np.testing.assert_array_equal, reference, run[i - 1][0][1] if i else start)
        else:
            jax.tree.map(lambda r, p, old: np.testing.assert_allclose(r, alpha * p + (1 - alpha) * old, rtol=1e-6, atol=1e-7), reference, policy, run[i - 1][0][1])
    np.testing.assert_allclose(run[0][1]["loss"], np.log(2), rtol=1e-6)
    assert run[1][1]["rewards/margins"] > 0 and (abs(run[2][1]["rewards/margins"]) < 1e-6) == (alpha == 1)  # hard: policy and reference are one again


def test_a_moving_reference_under_adapters():
    """aux holds adapters alone; the frozen base is merged into both."""
    model, key = tiny.LLAMA, jax.random.key(0)
    full = jax.jit(lambda: lora.attach(nn.init(model.specs(), key), lora.Lora(((lora.MATRICES, 2, 4.0),)), key))()
    trained, base = tree.split(full, lora.trainable(full))
    run = moved(dpo_variants.tr_dpo(model, alpha=1.0, every=1), trained, {"base": base}, tiny.pairs(np.random.default_rng(1), 4, 8), 2)
    for (policy, reference), metrics in run:
        assert set(tree.flat(reference)) == set(tree.flat(policy)) and not set(tree.flat(reference)) & set(tree.flat(base))
        jax.tree.map(np.testing.assert_array_equal, reference, policy)
        np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-5)  # every update moves the reference to the policy


def test_the_running_shift_counts_batches():
    """Rewards of -2 and 4, then of 0 and 8: the mean of 1 and 4, and it leaves the batch itself out."""
    objective = dpo_variants.bco_pair(tiny.LLAMA)
    aux = objective.init_aux({})
    for i, (chosen, rejected) in enumerate([(-2.0, 4.0), (0.0, 8.0)]):
        aux = objective.update_aux(aux, {}, {"rewards/chosen": chosen, "rewards/rejected": rejected}, i)
    assert (aux["mean"], aux["count"]) == (2.5, 2)
    with pytest.raises(UserError, match="running, none"):
        dpo_variants.mpo(tiny.LLAMA, shift="mean")


def test_a_finished_stage_with_a_shift_is_evaluated(tmp_path):
    """Its running mean is not among the weights: it begins anew."""
    from jaxalign import build
    from jaxalign.cli import eval as evaluation

    data = runs.prepared(tmp_path / "data")
    c = build.base("x", vocab=0, dim=16, layers=1, heads=2, hidden=32, max_len=64)
    c.stage = build.stage("bco_pair", init=str(data / "start"), data=dict(path=f"{data}/pairs.jsonl", eval_path=f"{data}/pairs.jsonl", batch_size=8), train=dict(steps=1), optim=dict(lr=0.0))
    with runs.devices(1):
        s, _ = runs.train(c, tmp_path / "run")
        found = evaluation._objective(build.world(c, tmp_path / "run"), c.stage, "x")
    np.testing.assert_allclose(found["loss/preference"], 2 * np.log(2), rtol=1e-6)
