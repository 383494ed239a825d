"""Slots refilled from a queue, and groups that share their prompt: the rows of `generate`, whatever the slot."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from test_rollout import KEY, N, forward, prompts, sharp
from jaxalign.rl import engine
from jaxalign.rl.rollout import Sampling, generate, grouped
from jaxalign.types import UserError

QUEUE = [0, 1, 2, 3, 4, 5, 2, 3, 1, 0, 5]  # prompts of six lengths


def queue(left=False):
    return prompts(left, rows=QUEUE)._replace(row=np.arange(len(QUEUE), dtype=np.int32))


def same(a, b):
    for name, x, y in zip(a._fields, a, b):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name, temperature", [("llama", 0.0), ("llama", 1.0), ("gpt2", 1.0)])
def test_the_queue_gives_the_rows_of_generate(name, temperature):
    """Eleven prompts in four slots, left- and right-padded; some stop after one token, others run out of room."""
    model = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2}[name]
    how = Sampling(N, (3, 5), temperature=temperature, pad=11)
    want = generate(model, how, sharp(model), queue(), KEY, 5)
    assert len(set(np.asarray(want.mask).sum(1))) > 2, "all rows of one length: no slot would be refilled before the others"
    for left in (False, True):
        same(engine.generate(model, dataclasses.replace(how, slots=4), sharp(model), queue(left), KEY, 5), want)


def test_greedy_is_the_argmax_of_the_full_forward():
    out = jax.tree.map(np.asarray, engine.generate(tiny.LLAMA, Sampling(N, (3, 5), temperature=0, slots=4), sharp(tiny.LLAMA), queue(), KEY))
    z = np.asarray(forward(tiny.LLAMA, sharp(tiny.LLAMA), out.tokens, out.segments.sum(1)))
    for b, t in np.argwhere(out.mask > 0):
        assert out.tokens[b, t] == z[b, t - 1].argmax(), (b, t)


def test_nothing_compiles_for_a_second_queue():
    how = Sampling(N, (3, 5), temperature=1.0, slots=4)
    programs = (engine._start, engine._admit, engine._steps, engine._finish)
    run = lambda key: engine.generate(tiny.LLAMA, how, sharp(tiny.LLAMA), queue(), key)
    run(KEY)
    before = [p._cache_size() for p in programs]
    run(jax.random.key(1))
    assert [p._cache_size() for p in programs] == before


def test_a_group_is_its_prompt_repeated():
    how = Sampling(N, (3,), temperature=1.0)
    out = generate(tiny.LLAMA, how, sharp(tiny.LLAMA), prompts(), KEY, group=3)
    assert list(np.asarray(out.row)[:4]) == [0, 1, 2, 3]
    same(generate(tiny.LLAMA, how, sharp(tiny.LLAMA), grouped(prompts(), 3), KEY), out)
    drawn = np.asarray(out.tokens).reshape(-1, 3, out.tokens.shape[1])
    assert (drawn[:, 0] != drawn[:, 1]).any()
    same(engine.generate(tiny.LLAMA, dataclasses.replace(how, slots=4), sharp(tiny.LLAMA), prompts(), KEY, group=3), out)


def test_what_it_refuses():
    with pytest.raises(UserError, match="sampling.slots -1"):
        Sampling(1, slots=-1)
    with pytest.raises(UserError, match="choose one"):
        Sampling(1, slots=2, draft="ngram")
    with pytest.raises(UserError, match="not loaded"):
        engine.generate(tiny.LLAMA, Sampling(1, draft="runs/small"), None, prompts(), KEY)
