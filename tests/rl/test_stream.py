"""Streamed sampling: the tokens of `rollout.generate`, whatever the chunk, and whatever the cache held before."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jaxalign import shard
from jaxalign.models import decoder, t5
from jaxalign.rl import stream as streaming
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.rl.stream import Stream, stream
from jaxalign.types import Prompts, UserError

WINDOW = decoder.model(vocab=tiny.V, dim=16, layers=2, heads=4, kv_heads=2, hidden=24, window=4, windowed=(True, False))
LONG = decoder.model(vocab=tiny.V, dim=16, layers=1, heads=4, hidden=24, max_len=8, rope_scaling=(("rope_type", "dynamic"), ("factor", 4.0)))
MODELS = {"llama": tiny.LLAMA, "gpt2": tiny.GPT2, "window": WINDOW, "dynamic": LONG}
KEY = jax.random.key(7)
N = 11
WAYS = {"greedy": {"temperature": 0.0}, "sampled": {}, "cool": {"temperature": 0.7, "top_k": 6, "top_p": 0.8}}


@pytest.fixture(autouse=True)
def forgotten():
    """Every program that XLA compiled for the CPU holds dozens of memory maps, and a process may have 65,530: hundreds of
    small programs end in a segmentation fault."""
    yield
    jax.clear_caches()


@functools.cache
def sharp(model):
    return tiny.loud(tiny.init(model, seed=3), 2.0)


def text(n, seed=0):
    return [int(i) for i in np.random.default_rng([seed, n]).integers(0, tiny.V, n)]


def rolled(model, how, tokens, row=0, key=KEY):
    """What `rollout.generate` says after `tokens`."""
    t = np.array([tokens], np.int32)
    out = generate(model, how, sharp(model), Prompts(t, np.ones_like(t), np.arange(len(tokens), dtype=np.int32)[None], np.array([row], np.int32)), key)
    return [int(i) for i in np.asarray(out.tokens)[0][np.asarray(out.mask)[0] > 0]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_of_a_rollout(name, way):
    """For prompts shorter and longer than a bucket of 16; chunks of one, of some, of more than there are."""
    model = MODELS[name]
    for n, row in ((1, 0), (17, 3)):
        how = Sampling(N, (), **WAYS[way])
        free = rolled(model, how, text(n), row)
        assert len(free) == N
        for chunk in (1, 4, 64):
            assert list(stream(model, how, sharp(model), text(n), KEY, row=row, chunk=chunk)) == free, (n, chunk)
        how = Sampling(N, (free[4], 99), **WAYS[way])  # stops in the middle of a chunk
        want = rolled(model, how, text(n), row)
        assert want[-1] == free[4] and len(want) <= 5
        assert list(stream(model, how, sharp(model), text(n), KEY, row=row, chunk=4)) == want


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_goes_on_is_a_cache_made_anew(name):
    """Prompts that extend the last sequence, go back in it, or have nothing in common; reads left off half-way."""
    model, r = MODELS[name], np.random.default_rng(0)
    how = Sampling(N, (), temperature=0.8)
    s, tokens = Stream(model, sharp(model)), text(3)
    for turn in range(6):
        some = r.integers(1, N + 1)
        it = s.generate(tokens, how, KEY, row=turn, chunk=3)
        got = [next(it) for _ in range(some)]
        it.close()
        assert got == rolled(model, how, tokens, turn)[:some], turn
        both = tokens + got
        if len(both) + N + 3 > 32:  # the positions of gpt2
            both = both[:4]
        tokens = [both + [1, 2], both[:-1], both[: len(both) // 2] + [5], text(4, turn), both + [3], [7]][turn]


def test_an_encoder_decoder():
    """Prompts end with the start token; a longer one is read anew, since the encoder reads both ways."""
    model, how = t5.model(vocab=tiny.V, dim=16, layers=1, encoder_layers=1, heads=2, head_dim=8, hidden=24), Sampling(N, (), temperature=0.8)
    s = Stream(model, sharp(model))
    for prompt in ([3, 4, 5], [3, 4, 5, 6, 7]):
        prompt = [*prompt, model.start]
        got = list(s.generate(prompt, how, KEY, chunk=4))
        assert got == rolled(model, how, prompt) and len(set(got)) > 1


def test_only_what_is_new_is_read():
    s, how = Stream(tiny.LLAMA, sharp(tiny.LLAMA)), Sampling(5, (), temperature=0)
    got = list(s.generate(text(9), how, KEY))
    assert s.read == 9 and s.ids == text(9) + got[:-1]
    list(s.generate(text(9) + got + [1, 2], how, KEY))
    assert s.read == 9 + 3  # the last token was drawn and never read
    list(s.generate(text(9), how, KEY))
    assert s.read == 9 + 3 + 1  # all is there but what follows it


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    how = Sampling(4, (), temperature=0)
    want = rolled(tiny.LLAMA, how, text(40))
    monkeypatch.setattr(streaming, "PIECE", 16)
    assert list(stream(tiny.LLAMA, how, sharp(tiny.LLAMA), text(40), KEY)) == want


def test_a_growing_conversation_compiles_when_it_doubles():
    """Forty turns of eleven tokens each, 1 + 10 new: 3 sizes of the cache (128, 256, 512) and one of the piece that is read."""
    model = decoder.model(vocab=tiny.V, dim=8, layers=1, heads=2, hidden=8)
    params, tokens = tiny.init(model), []
    s, how = Stream(model, params), Sampling(10, (), temperature=0)
    before = streaming._read._cache_size(), streaming._decode._cache_size()
    for turn in range(40):
        tokens = tokens + [turn % tiny.V]
        tokens += list(s.generate(tokens, Sampling(10 if turn % 2 else 9, (), temperature=0), KEY))
    sizes = [streaming._read._cache_size() - before[0], streaming._decode._cache_size() - before[1]]
    assert len(tokens) == 420 and sizes == [6, 6], sizes  # 16, 32, 64, 128, 256, 512
    assert how.max_new == 10


def test_interrupted_it_starts_afresh(monkeypatch):
    """A Ctrl-C inside a call takes the cache with it, and nothing else."""
    s, how = Stream(tiny.LLAMA, sharp(tiny.LLAMA)), Sampling(N, (), temperature=0)
    it, run = s.generate(text(5), how, KEY, chunk=2), streaming._decode
    got = [next(it)]

    def interrupted(*args):
        run(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(it)
    monkeypatch.undo()
    assert s.ids == [] and list(s.generate(text(5) + got, how, KEY)) == rolled(tiny.LLAMA, how, text(5) + got)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_on_a_mesh(sizes):
    mesh, how = shard.make_mesh(sizes), Sampling(N, (), temperature=0.8)
    params = jax.device_put(sharp(tiny.LLAMA), shard.shardings(tiny.LLAMA.specs(), mesh))
    s = Stream(tiny.LLAMA, params, mesh)
    got = list(s.generate(text(5), how, KEY))
    assert got == rolled(tiny.LLAMA, how, text(5))
    assert list(s.generate(text(5) + got + [3], how, KEY)) == rolled(tiny.LLAMA, how, text(5) + got + [3])


def test_refused():
    how = Sampling(8, ())
    for tokens, chunk, said in ([], 8, "empty"), (text(25), 8, "33 tokens, and the model has 32 positions"), (text(3), 0, "chunk 0"):
        with pytest.raises(UserError, match=said):
            stream(tiny.GPT2, how, sharp(tiny.GPT2), tokens, KEY, chunk=chunk)
