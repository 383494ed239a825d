"""Resizing a vocabulary: old ids keep their numbers, new ones are bounded, used ones are never dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxalign import shard, tree
from jaxalign.models import decoder, gpt2, hf, vocab
from jaxalign.ops import logprob, nn
from jaxalign.types import UserError

MODELS = [decoder.model(vocab=40, dim=16, layers=2, heads=2, hidden=24, tied=tied) for tied in (True, False)] + [gpt2.model(vocab=40, dim=16, layers=2, heads=2)]


@pytest.mark.parametrize("model", MODELS, ids=["tied", "untied", "gpt2"])
def test_new_ids_take_little_and_old_ids_keep_their_logits(model):
    # Far from 0, so that rows at random would take nearly all of the probability.
    params = jax.tree.map(lambda x: 3 * x, nn.init(model.specs(), jax.random.key(1)))
    bigger, more = vocab.resize(model, params, 48, used=40)
    assert bigger.config.vocab == 48 and tree.flat(more)["embed"].shape == (48, 16)
    np.testing.assert_array_equal(more["embed"][:40], params["embed"])
    np.testing.assert_allclose(more["embed"][45], np.mean(params["embed"], 0), rtol=1e-5, atol=1e-7)
    tokens = np.arange(12, dtype=np.int32)[None]
    logits = lambda m, p: np.asarray(logprob.logits(m.hidden(p, tokens, np.ones_like(tokens), tokens).x, m.unembed(p)))
    a, b = logits(model, params), logits(bigger, more)
    np.testing.assert_allclose(b[..., :40], a, rtol=1e-5, atol=1e-6)
    fall = jax.nn.log_softmax(a) - jax.nn.log_softmax(b)[..., :40]
    assert (fall > 0).all() and (fall < np.log(1 + 8 / 40) + 1e-5).all()
    back, fewer = vocab.resize(bigger, more, 40, used=40)
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, fewer, params)


def test_used_ids_are_not_dropped():
    params = nn.init(MODELS[0].specs(), jax.random.key(0))
    with pytest.raises(UserError, match="to 36: the tokenizer uses 37 ids; give at least 37"):
        vocab.resize(MODELS[0], params, 36, used=37)
    with pytest.raises(UserError, match="no tokenizer to say which of the 40 ids"):
        vocab.resize(MODELS[0], params, 39, used=None)
    with pytest.raises(UserError, match="positive whole number"):
        vocab.resize(MODELS[0], params, 0, used=0)
    assert vocab.resize(MODELS[0], params, 37, used=37)[1]["embed"].shape == (37, 16)


def test_on_a_mesh_as_a_reward_model_in_bf16_and_through_hugging_face(tmp_path):
    model, mesh = MODELS[1], shard.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    trunk = shard.init(model.specs(), jax.random.key(0), mesh, dtype="bfloat16")
    params = {"trunk": trunk, "head": {"weight": jnp.ones(16), "bias": jnp.zeros(())}}
    bigger, more = vocab.resize(model, params, 44, used=40, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, more["trunk"]) == shard.shardings(bigger.specs(), mesh)
    assert more["trunk"]["unembed"].dtype == jnp.bfloat16 and more["trunk"]["unembed"].shape == (44, 16)
    hf.save(tmp_path, bigger, more["trunk"])
    again, loaded = hf.load(tmp_path, dtype=None)
    assert again == bigger
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(more["trunk"]))
