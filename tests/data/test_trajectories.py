"""Episodes: rows with rewards, which token earns them, the best of them, their standardised returns."""

import json

import numpy as np
import pytest
from jaxalign.data import formats, sources, trajectories
from jaxalign.data.templates import CHATML, PLAIN, TEMPLATES
from jaxalign.data.tokenizers import Bytes
from jaxalign.types import UserError


def talk(*turns, **more):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} if isinstance(c, str) else {"role": roles[i % 2], **c} for i, c in enumerate(turns)], **more}


def source(records, template=PLAIN, **how):
    return trajectories.trajectories_source(records, Bytes(), template=template, **{"max_len": None, "batch_size": len(records), "seed": 0, "shuffle": False, **how})


@pytest.mark.parametrize(
    "record, rewards",
    [
        ({"prompt": "a", "completion": "b", "reward": 2}, (2.0,)),
        ({"prompt": "a", "completion": "b", "rewards": [0.5]}, (0.5,)),
        (talk("a", "b", "c", "d", reward=1.5), (0.0, 1.5)),
        (talk("a", "b", "c", "d", rewards=[-1, 0.25]), (-1.0, 0.25)),
        (talk("a", {"content": "b", "reward": 3}, "c", "d"), (3.0, 0.0)),
        (talk("a", {"content": "b", "loss_weight": 0}, "c", "d", rewards=[0, 4]), (4.0,)),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "reward": -1.0}, (-1.0,)),
    ],
)
def test_detected(record, rewards):
    assert formats.detect(record) == "trajectory"
    got = formats.canonical(record)
    assert got.rewards == rewards and got.terminal
    assert formats.canonical({**record, "terminal": False}).terminal is False


@pytest.mark.parametrize(
    "record, why",
    [
        (talk("a", "b", rewards=[1, 2]), "2 rewards for 1 turns"),
        (talk("a", "b", reward=1, rewards=[1]), "found reward and rewards"),
        (talk("a", {"content": "b", "loss_weight": 0}, "c", "d", rewards=[1, 0]), "not trained earns"),
        (talk("a", "b", reward=1, terminal="yes"), "'terminal' must be"),
        ({"prompt": "a", "completion": "b", "reward": float("inf")}, "trajectory needs|finite"),
    ],
)
def test_refused(record, why):
    with pytest.raises(UserError, match=why):
        formats.canonical(record, format="trajectory")


def test_what_other_sources_make_of_them():
    """Their words without their rewards, as before there were trajectories."""
    records = [{"prompt": "a", "completion": "b", "reward": 2}, talk("a", "b", reward="good", rewards=["x"])]
    assert formats.detect(records[1]) == "chat"
    plain = [{k: v for k, v in r.items() if "reward" not in k} for r in records]
    make = lambda rows: sources.tokens_source(rows, Bytes(), seq_len=64, batch_size=1, seed=0, template=CHATML).next()
    for x, y in zip(make(records), make(plain)):
        np.testing.assert_array_equal(x, y)
    prompts = sources.prompts_source(records, Bytes(), max_prompt_len=None, batch_size=2, seed=0, template=CHATML, shuffle=False).next()
    assert prompts.records[0]["reward"] == 2


@pytest.mark.parametrize("template", ["chatml", "human_assistant"])
def test_a_turn_earns_at_its_last_token(template):
    rewards = [1.0, -2.0, 0.5]
    b = source([talk("a", "bcd", "e", "f", "g", "hi", rewards=rewards), {"prompt": "x", "completion": "yz", "reward": 7.0, "terminal": False}], TEMPLATES[template]).next()
    ends = np.flatnonzero((b.mask[0] > 0) & (np.append(b.mask[0][1:], 0) == 0))
    assert len(ends) == 3 and (b.tokens[0][ends] == b.tokens[0][ends[0]]).all()  # the stop token
    np.testing.assert_array_equal(b.rewards[0][ends], rewards)
    assert np.count_nonzero(b.rewards) == 4 and b.rewards.dtype == np.float32
    np.testing.assert_array_equal(b.terminal, [1, 0])


def test_the_best_share_and_standardised_returns():
    r = np.random.default_rng(0)
    returns = np.round(r.standard_normal(10), 3)
    records = [talk("a", "b", "c", str(i), rewards=[0.25, float(x) - 0.25]) for i, x in enumerate(returns)]
    got = source(records, CHATML, top=0.35, batch_size=4).next()
    best = sorted(np.argsort(-returns)[:4])  # 3.5 of 10, rounded up
    np.testing.assert_allclose(got.rewards.sum(1), returns[best], rtol=1e-5)
    got = source(records, CHATML, standardise=True).next().rewards
    np.testing.assert_allclose(got.sum(1), (returns - returns.mean()) / returns.std(ddof=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([row[row != 0][0] for row in got], 0.25 / returns.std(ddof=1), rtol=1e-5)  # only the last reward takes the mean off
    told = source(records[:3], CHATML, standardise=(returns.mean(), returns.std(ddof=1))).next().rewards
    np.testing.assert_array_equal(told, got[:3, : told.shape[1]])  # held out, by the mean and std of others
    alike = source([{"prompt": "a", "completion": str(i), "reward": 3.0} for i in range(4)], standardise=True, top=0.5, batch_size=2)
    assert not alike.next().rewards.any() and alike.report()["below_top"] == 2 and alike.report()["return_mean"] == 3.0


@pytest.mark.parametrize("rewards", [[[-1, -1, 0]] * 4, [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]], [[0.1, 0.2, -0.3], [-0.3, 0.2, 0.1], [0.2, -0.3, 0.1]], [[2, 3, 4]]], ids=["equal", "rounded", "rounded to zero", "one"])
def test_equal_returns_become_zero_and_their_turns_stay_small(rewards):
    """As trlX: mean off, divided by nothing. Sums of the same numbers in another order are equal."""
    records = [talk("a", "b", "c", "d", "e", "f", rewards=r) for r in rewards]
    s = source(records, CHATML, standardise=True)
    got, report = s.next().rewards, s.report()
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-6)
    np.testing.assert_allclose([row[row != 0][:2] for row in got], [r[:2] for r in rewards], rtol=1e-6)
    held_out = source(records, CHATML, standardise=(report["return_mean"], report["return_std"])).next().rewards
    np.testing.assert_array_equal(held_out, got)


def test_resumes_and_is_told_apart():
    records = [{"prompt": "p", "completion": "c" * i, "reward": i} for i in range(1, 8)]
    a, b = (source(records, batch_size=3, shuffle=True) for _ in range(2))
    a.next()
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    for x, y in zip(a.next(), b.next()):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(UserError, match="top"):
        source(records, batch_size=3, shuffle=True, top=0.5).load_state_dict(a.state_dict())
    with pytest.raises(UserError, match="data.top"):
        source(records, top=0.0)
    assert source(records, max_len=6, max_drop=0.9).report()["dropped"] == {"too_long": 4}
    last = list(sources.eval_batches(source(records, batch_size=4)))[-1]
    assert last.mask[-1].sum() == 0 and last.rewards[-1].sum() == 0 and last.terminal[-1] == 1
