"""One prompt, several continuations, one row: the same numbers as rows apart, and who sees whom, by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxalign.data import packing
from jaxalign.models import decoder, neox
from jaxalign.objectives import grpo, preference
from jaxalign.ops import attention, branches
from jaxalign.ops.logprob import before, targets
from jaxalign.rl.experience import answers_per_row, group_experience
from jaxalign.rl.reference import add_reference
from jaxalign.types import Pairs, Rollout, SharedPairs

NEOX = neox.model(vocab=tiny.V, dim=16, layers=1, heads=2, hidden=32)
EXPERTS = decoder.model(vocab=tiny.V, dim=16, layers=1, heads=2, hidden=12, experts=4, experts_per_token=2)
MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2, "neox": NEOX, "experts": EXPERTS}


def test_who_sees_whom_and_what_comes_before():
    """Trunk a a, branches b and c, padding, then another trunk d with a branch e, then a lone f. Slots 0..9."""
    segment = np.array([[1, 1, 1, 1, 1, 0, 2, 2, 2, 3]], np.int32)
    branch = np.array([[0, 0, 1, 1, 2, 0, 0, 1, 1, 0]], np.int32)
    s = branches.pack(segment, branch)
    assert s.dtype == np.uint32 and branches.branched(s) and not branches.branched(segment)
    sees = {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [], 6: [6], 7: [6, 7], 8: [6, 7, 8], 9: [9]}
    slots = jnp.arange(10)
    ok = np.asarray(attention.visible(jnp.asarray(s), jnp.asarray(s), slots, slots, causal=True))[0]
    assert {t: list(np.flatnonzero(ok[t])) for t in range(10)} == sees
    np.testing.assert_array_equal(branches.predecessors(jnp.asarray(s)), [[-1, 0, 1, 2, 1, -1, -1, 6, 7, -1]])
    x = jnp.arange(1.0, 11)[None]
    np.testing.assert_array_equal(before(x, jnp.asarray(s)), [[0, 1, 2, 3, 2, 0, 0, 7, 8, 0]])
    np.testing.assert_array_equal(targets(jnp.ones((1, 10)), jnp.asarray(s)), [[0, 1, 1, 1, 1, 0, 0, 1, 1, 0]])
    # without a trunk nothing predicts a branch's first token
    alone = branches.pack(np.ones((1, 4), np.int32), np.array([[1, 1, 2, 2]]))
    np.testing.assert_array_equal(branches.predecessors(jnp.asarray(alone)), [[-1, 0, -1, 2]])


def documents(r, n, prompt=9, answer=6):
    """n pairs: (ids, mask) of a prompt with each of two answers; one pair has no prompt in common, one a late parting."""
    docs = []
    for i in range(n):
        p = list(r.integers(1, tiny.V, r.integers(1, prompt)))
        for side in range(2):
            p = [side + 1, *p[1:]] if i == 1 else p
            a = list(r.integers(1, tiny.V, r.integers(1, answer)))
            docs.append((p + a, [0] * len(p) + [1] * len(a)))
    ids, mask = (np.concatenate([d[k] for d in docs]) for k in (0, 1))
    offsets = np.cumsum([0] + [len(d[0]) for d in docs])
    return packing.Ragged(ids.astype(np.int32), mask.astype(np.uint8), offsets)


def test_rows_of_pairs():
    docs = documents(np.random.default_rng(0), 5)
    one = 2 * np.arange(5)
    rows = packing.fill_shared(docs, packing.share(docs, one, one + 1), [2, -1, 0, 1], 0)
    assert rows.tokens.shape[1] % 8 == 0 and not rows.segments[1].any()
    for row, pair in ((0, 2), (2, 0), (3, 1)):
        for side in (1, 2):
            own = (rows.segments[row] == 1) | (rows.segments[row] == 1 + side * 2**16)
            a, b = docs.offsets[2 * pair + side - 1], docs.offsets[2 * pair + side]
            np.testing.assert_array_equal(rows.tokens[row][own], docs.ids[a:b])
            np.testing.assert_array_equal(rows.positions[row][own], np.arange(b - a))
            np.testing.assert_array_equal(rows.mask[row][own], docs.mask[a:b])
    assert not (rows.segments[3] == 1).any()  # pair 1 has nothing in common


@functools.cache
def pairs_both_ways():
    """(Pairs, SharedPairs) of the same documents, an empty row among them."""
    docs, n = documents(np.random.default_rng(1), 7), 7
    one, rows = 2 * np.arange(n), np.array([0, 1, 2, 3, 4, 5, 6, -1])
    side = lambda k: packing.fill(docs, packing.pack(docs.lengths, 16, "pad"), np.where(rows < 0, -1, 2 * rows + k), 0)
    rest = [np.zeros(8, np.float32)] * 3
    return Pairs(side(0), side(1), *rest), SharedPairs(packing.fill_shared(docs, packing.share(docs, one, one + 1), rows, 0), *rest)


@pytest.mark.parametrize("name", MODELS)
def test_pairs_that_share_their_prompt(name):
    """Loss, metrics and gradient of DPO, references by the same road: to 1e-5."""
    model = MODELS[name]
    assert model.branches
    params, reference = tiny.init(model), tiny.init(model, 1)
    objective = preference.dpo(model, beta=0.3)
    apart, together = (tiny.gradient(objective)(params, add_reference(model, reference, b)) for b in pairs_both_ways())
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
    for k in apart[1]:
        np.testing.assert_allclose(together[1][k], apart[1][k], rtol=1e-5, atol=1e-6, err_msg=k)
    assert tiny.far(together[2], apart[2]) < 1e-5


def test_who_cannot_share():
    assert not decoder.model(vocab=16, dim=16, layers=1, heads=2, hidden=24, window=4).branches
    assert not decoder.model(vocab=16, dim=16, layers=1, heads=2, hidden=24, rope_scaling=(("rope_type", "dynamic"), ("factor", 2.0))).branches


def rollouts(B=8, P=5, N=4, group=4):
    """Prompts of uneven length, each `group` times, with answers of uneven length."""
    r = np.random.default_rng(0)
    length = np.repeat(r.integers(1, P + 1, B // group), group)[:, None]
    end = length + r.integers(1, N + 1, (B, 1))
    t = np.arange(P + N)
    prompt = np.repeat(r.integers(1, tiny.V, (B // group, P + N)), group, 0)
    tokens = np.where(t < length, prompt, r.integers(1, tiny.V, (B, P + N)))
    real = t < end
    mask = (real & (t >= length)).astype(np.float32)
    where = lambda x: np.where(real, x, 0).astype(np.int32)
    return Rollout(where(tokens), mask, where(1), where(t), (-2 + 0.3 * r.standard_normal(mask.shape)).astype(np.float32) * mask, np.arange(B), np.int32(0), np.zeros(B, np.float32))


@pytest.mark.parametrize("make", [grpo.grpo, grpo.token_grpo, functools.partial(grpo.dr_grpo, max_new=4)])
def test_groups_that_share_their_prompt(make):
    """Two groups of four: in rows of one, two and four answers the same loss, metrics and gradient."""
    model, scores = tiny.LLAMA, np.random.default_rng(3).standard_normal(8).astype(np.float32)
    params, reference = {"policy": tiny.init(model)}, tiny.init(model, 1)
    out = []
    for k in (1, 2, 4):
        exp, m = group_experience(model, params, reference, rollouts(), scores, group=4, max_new=4, answers_per_row=k)
        assert exp.tokens.shape == (8 // k, 5 + 4 * k)
        moved = {"policy": tiny.init(model, 2)}
        out.append((*tiny.gradient(make(model, beta=0.1))(moved, exp), m))
    for other in out[1:]:
        np.testing.assert_allclose(other[0], out[0][0], rtol=1e-5)
        for i in (1, 3):
            for k in out[0][i]:
                np.testing.assert_allclose(other[i][k], out[0][i][k], rtol=1e-5, atol=1e-6, err_msg=k)
        assert tiny.far(other[2], out[0][2]) < 1e-5


def test_how_many_share_a_row():
    assert branches.cost(1024, 1200) < branches.cost(1024, 1100, 1100) and branches.cost(16, 520) > branches.cost(16, 260, 260)
    assert answers_per_row(8, prompt=1000, new=50, dim=1024, rows=64, parts=1) == 8  # a long prompt, read once
    assert answers_per_row(8, prompt=4, new=500, dim=64, rows=64, parts=1) == 1  # nothing to save
    assert answers_per_row(8, prompt=1000, new=50, dim=1024, rows=64, parts=16) == 4  # 64 / 8 rows would not divide into 16
