"""The KL of a policy to its reference, exact at every token: against whole logits, and against the mean of log-ratios."""

import jax
import numpy as np
import tiny
from jaxalign.evals import policy
from jaxalign.ops.logprob import logits
from jaxalign.rl.experience import token_logps
from jaxalign.rl.rollout import Sampling, generate
from jaxalign.types import Prompts


def test_summed_kl():
    B, P, N = 1024, 3, 6
    r = np.random.default_rng(0)
    tokens = r.integers(1, tiny.V, (B, P)).astype(np.int32)
    prompts = Prompts(tokens, np.ones_like(tokens), np.tile(np.arange(P, dtype=np.int32), (B, 1)), np.arange(B, dtype=np.int32))
    model, params, reference = tiny.LLAMA, tiny.init(tiny.LLAMA, 0), tiny.init(tiny.LLAMA, 1)
    rollout = generate(model, Sampling(N, stop=(0,)), params, prompts, jax.random.key(0))
    rows = (np.arange(B) % 3 != 0).astype(np.float32)
    got = float(policy.summed_kl(model, params, reference, rollout, rows)) / rows.sum()

    @jax.jit
    def whole(p):
        h = model.hidden(p, rollout.tokens, rollout.segments, rollout.positions)
        return jax.nn.log_softmax(logits(h.x, model.unembed(p)))

    a, b = (np.asarray(whole(p), np.float64)[:, :-1] for p in (params, reference))
    mask = np.asarray(rollout.mask)[:, 1:] * rows[:, None]
    np.testing.assert_allclose(got, (mask * (np.exp(a) * (a - b)).sum(-1)).sum() / rows.sum(), rtol=1e-5)
    ratio = np.asarray((token_logps(model, params, rollout).logp - token_logps(model, reference, rollout).logp).sum(1), np.float64)[rows > 0]
    assert abs(got - ratio.mean()) < 4 * ratio.std() / rows.sum() ** 0.5  # both have the same mean
