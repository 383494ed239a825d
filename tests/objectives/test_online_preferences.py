"""XPO, Nash-MD and losses on one's own samples, against torch's autograd on the papers' sums, written out row by row."""

import jax
import numpy as np
import pytest
import tiny
from jaxalign import config, methods, tree
from jaxalign.objectives import dpo_variants, lm, online, preference
from jaxalign.types import Duels, RivalPairs

torch = pytest.importorskip("torch")
R = np.random.default_rng(0)
B, T = 6, 9
MASK = (np.arange(T) < R.integers(1, T + 1, (B, 1))).astype(np.float32)
LOGP, REF = (-R.exponential(1.0, (B, T)).astype(np.float32) * MASK for _ in range(2))


def leaf(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def agree(loss, grads, want, *leaves):
    want.backward()
    np.testing.assert_allclose(loss, want.item(), rtol=1e-5)
    for g, x in zip(grads, leaves):
        np.testing.assert_allclose(g, x.grad.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("equation", [online.nash_md_loss, online.nash_md_token_loss])
def test_nash_md_pulls_as_the_sources_say(equation, beta):
    """What the two have to share is the gradient in log pi: the score-function one of the paper, or TRL's token by token."""
    p = R.random(B).astype(np.float32)
    f = lambda x: equation(x, REF, p, beta, MASK).mean()
    loss, grad = jax.value_and_grad(f)(LOGP)
    x = leaf(LOGP)
    rows = []
    for i in range(B):
        total = sum(x[i, t] for t in range(T) if MASK[i, t])
        ratios = [(LOGP[i, t] - REF[i, t]) if MASK[i, t] else 0.0 for t in range(T)]
        if equation is online.nash_md_loss:
            rows.append(-(p[i] - 0.5 - beta * sum(ratios)) * total)
        else:
            rows.append(beta * sum(ratios[t] * x[i, t] for t in range(T)) - (p[i] - 0.5) * total)
    agree(loss, [grad], sum(rows) / B, x)


def replay(a, b):
    """Params and rows of `tiny.Replay` for pairs: chosen rows first, as one forward reads them."""
    return {"logps": np.concatenate([a, b])}, tiny.replay_rows(MASK), tiny.replay_rows(MASK, first=B)


def test_xpo_is_dpo_and_a_walk_away_from_the_reference():
    """The objective as a whole, with one pair that tells nothing."""
    w, l = LOGP - 0.01, REF - 0.01
    params, chosen, rejected = replay(w, l)
    told = np.ones(B, np.float32)
    told[2] = 0
    won = (R.random(B) < 0.5).astype(np.float32)
    ref_w, ref_l = (-5 * R.random(B).astype(np.float32) for _ in range(2))
    batch = RivalPairs(chosen._replace(mask=chosen.mask * told[:, None]), rejected, ref_w, ref_l, told, won)
    objective = online.xpo(tiny.Replay(), beta=0.3, alpha=0.05)
    loss, metrics, grads = tiny.gradient(objective)({"policy": params}, batch)
    x, y = leaf(w), leaf(l)
    rows = []
    for i in np.flatnonzero(told):
        a, b = (sum(z[i, t] for t in range(T) if MASK[i, t]) for z in (x, y))
        h = 0.3 * ((a - ref_w[i]) - (b - ref_l[i]))
        rows.append(-torch.nn.functional.logsigmoid(h) + 0.05 * (a if won[i] else b))
    g = np.asarray(grads["policy"]["logps"])
    agree(loss, [g[:B], g[B:]], sum(rows) / len(rows), x, y)
    assert {"loss/preference", "loss/exploration", "logps/rival", "rewards/margins"} <= set(metrics)
    assert not g[2].any() and not g[B + 2].any()


@pytest.mark.parametrize("name", ["nash_md", "nash_md_token"])
def test_nash_md_over_whole_rows(name):
    p = np.array([0.9, 0.5, 0.1, 0.3, 1.0, 0.0], np.float32)
    rows = tiny.replay_rows(MASK)
    batch = Duels(*rows, p, tiny.shifted(REF))
    batch.mask[3] = 0  # nobody could say
    objective = getattr(online, name)(tiny.Replay(), beta=0.2)
    params = {"policy": {"logps": LOGP - 0.01}}
    loss, metrics, _ = tiny.gradient(objective)(params, batch)
    real = [i for i in range(B) if i != 3]
    want = getattr(online, f"{name}_loss")(LOGP - 0.01, REF, p, 0.2, MASK)
    np.testing.assert_allclose(loss, np.mean([want[i] for i in real]), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/kl"], np.mean([((LOGP - 0.01 - REF) * MASK)[i].sum() for i in real]), rtol=1e-4)
    np.testing.assert_allclose(metrics["rewards/probabilities"], p[real].mean(), rtol=1e-5)


def test_a_loss_of_pairs_is_the_same_on_ones_own():
    """`on_policy` changes where params are looked up and nothing else; every loss of pairs has an online form, with its own fields."""
    batch, params = tiny.pairs(np.random.default_rng(1), 8, 12), tiny.init(tiny.LLAMA)
    for name, options in (("ipo", {"beta": 0.4}), ("cdpo", {"smoothing": 0.2})):
        m = methods.method(f"online_{name}")
        assert (m.batch.__name__, m.kind, m.rows) == ("Pairs", "prompts", "")
        assert set(config.fields(m.maker)) == set(config.fields(getattr(preference, name)))
        ours = tiny.gradient(m.maker(tiny.LLAMA, **options))({"policy": params}, batch)
        theirs = tiny.gradient(getattr(preference, name)(tiny.LLAMA, **options))(params, batch)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert tiny.far(ours[2]["policy"], theirs[2]) == 0
    # State of its own (a running shift), and a reference that moves: where the policy's adapters have a frozen base, beside that
    shift = methods.method("online_bco_pair").maker(tiny.LLAMA)
    aux = shift.init_aux({"policy": params})
    np.testing.assert_array_equal(jax.tree.leaves(aux), jax.tree.leaves(dpo_variants.bco_pair(tiny.LLAMA).init_aux(params)))
    moving, alone = methods.method("online_tr_dpo").maker(tiny.LLAMA), dpo_variants.tr_dpo(tiny.LLAMA)
    keys = sorted(tree.flat(params))
    trained, base = (tree.unflat({k: tree.flat(params)[k] for k in keys[i::2]}) for i in range(2))
    wrapped = lambda t: {"policy": t}  # noqa: E731
    ours = moving.loss(wrapped(params), {"base": wrapped(base)}, moving.init_aux(wrapped(trained)), batch, None, {})
    theirs = alone.loss(params, {"base": base}, alone.init_aux(trained), batch, None, {})
    np.testing.assert_array_equal(jax.tree.leaves(ours.terms), jax.tree.leaves(theirs.terms))
    rows = tiny.rows(np.random.default_rng(2), 8, 12)
    routed = online.raft(tiny.EXPERTS)  # with `stats`: the load of experts over the whole batch
    ours = tiny.gradient(routed)({"policy": tiny.init(tiny.EXPERTS)}, rows)[0]
    np.testing.assert_array_equal(ours, tiny.gradient(lm.lm(tiny.EXPERTS))(tiny.init(tiny.EXPERTS), rows)[0])
    with pytest.raises(config.UserError, match="way of its own"):
        methods.method("online_ld_dpo").maker(tiny.LLAMA)
    with pytest.raises(config.UserError, match="package.module:name"):
        methods.method("online_reward_pairs")
