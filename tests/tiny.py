"""Small models, batches with uneven masks, and stub networks that replay recorded numbers. Shared by the tests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxalign import tree
from jaxalign.data import packing
from jaxalign.models import decoder, gpt2, heads
from jaxalign.objectives import dpo_variants, grpo, kto, lm, odds, ppo, preference, ranked, reward
from jaxalign.ops import nn
from jaxalign.train import step
from jaxalign.types import Experience, GroupExperience, Labelled, Pairs, Rankings, SharedPairs, Tokens

V = 16
LLAMA = decoder.model(vocab=V, dim=16, layers=1, heads=4, kv_heads=2, hidden=24)
GPT2 = gpt2.model(vocab=V, dim=16, layers=1, heads=2, hidden=32, max_len=32)
EXPERTS = decoder.model(vocab=V, dim=16, layers=2, heads=2, hidden=12, experts=4, experts_per_token=2, shared_hidden=8, router_aux=0.3, arch="qwen2_moe", qkv_bias=True)
SCALAR = heads.Scalar(LLAMA)


def loud(params, factor=3.0):
    """Matrices of std 0.02 say almost the same about every token; these do not."""
    return tree.map_named(lambda _, x: x * factor if x.ndim >= 2 else x, params)


@functools.cache
def init(model, seed=0, value=False):
    """Parameters of a model (or of a policy with a value head on it), loud."""
    specs = {"policy": model.specs(), "value": heads.specs(model.config.dim)} if value else model.specs()
    return loud(jax.jit(lambda k: nn.init(specs, k))(jax.random.key(seed)))


# -- batches --------------------------------------------------------------------------------------------------------


def rows(r, B, T, K=None):
    """Tokens [B,T] (or [B,K,T]) padded on the right, prompts and completions of every length."""
    shape = (B,) if K is None else (B, K)
    length = r.integers(3, T + 1, shape)[..., None]
    start = 1 + (r.random((*shape, 1)) * (length - 1)).astype(int)
    t = np.arange(T)
    real = t < length
    tokens = np.where(real, r.integers(1, V, (*shape, T)), 0)
    return Tokens(tokens.astype(np.int32), (real & (t >= start)).astype(np.float32), real.astype(np.int32), np.where(real, t, 0).astype(np.int32))


def pairs(r, B, T):
    """The eighth has no completion: it weighs 0, so that micro-batches differ in weight."""
    noise = lambda scale: (scale * r.standard_normal(B)).astype(np.float32)
    chosen = rows(r, B, T)
    chosen.mask[7:8] = 0
    return Pairs(chosen, rows(r, B, T), -8 + noise(1), -8 + noise(1), np.abs(noise(0.3)))


def shared_pairs(r, B, T):
    """Pairs whose two answers stand behind their prompt in one row."""
    documents = []
    for _ in range(B):
        prompt = list(r.integers(1, V, r.integers(1, T // 4 + 1)))
        answers = [list(r.integers(1, V, r.integers(1, 3 * T // 8 + 1))) for _ in range(2)]
        documents += [(prompt + a, [0] * len(prompt) + [1] * len(a)) for a in answers]
    ids, mask = (np.concatenate([d[k] for d in documents]) for k in (0, 1))
    docs = packing.Ragged(ids.astype(np.int32), mask.astype(np.uint8), np.cumsum([0] + [len(d[0]) for d in documents]))
    one = 2 * np.arange(B)
    layout = packing.share(docs, one, one + 1, T)
    noise = lambda: (-8 + r.standard_normal(B)).astype(np.float32)
    return SharedPairs(packing.fill_shared(docs, layout, np.arange(B), 0), noise(), noise(), noise())


def rankings(r, B, T, K=4):
    """Ties, and slots without a candidate."""
    valid = (np.arange(K) < r.integers(2, K + 1, (B, 1))).astype(np.float32)
    return Rankings(rows(r, B, T, K), r.integers(0, K - 1, (B, K)).astype(np.int32), valid)


def labelled(r, B, T):
    """Good and bad answers; the eighth is empty, and so is the mismatched one of the third."""
    own, other = rows(r, B, T), rows(r, B, T)
    own.mask[7:8] = 0
    other.mask[2:3] = 0
    near = lambda: (-8 + r.standard_normal(B)).astype(np.float32)
    return Labelled(own, (np.arange(B) % 3 > 0).astype(np.float32), near(), other, near())


def experience(r, B, T):
    """Not a real one, but of the right size: log-probs near those of a uniform policy."""
    x = rows(r, B, T)
    noise = lambda: (r.standard_normal((B, T)) * x.mask).astype(np.float32)
    return Experience(*x, (-np.log(V) + 0.5 * noise()) * x.mask, noise(), noise(), noise())


def grouped(r, B, T):
    """As `experience`, without a critic: answers of uneven length, so that means over answers and over tokens differ."""
    x = rows(r, B, T)
    noise = lambda: (r.standard_normal((B, T)) * x.mask).astype(np.float32)
    near = lambda: (-np.log(V) + 0.3 * noise()) * x.mask
    return GroupExperience(*x, noise(), near(), near(), near())


def mixed(r, B, T):
    return {"ppo": experience(r, B, T), "ptx": rows(r, B, T)}


# name -> (objective, parameters, batch(rng, B, T))
CASES = {
    "lm": (lm.lm(LLAMA), lambda: init(LLAMA), rows),
    "lm_smooth": (lm.lm(LLAMA, smoothing=0.1, z_loss=1e-2), lambda: init(LLAMA), rows),
    "lm_gpt2": (lm.lm(GPT2), lambda: init(GPT2), rows),
    "lm_experts": (lm.lm(EXPERTS), lambda: init(EXPERTS), rows),
    # Bradley-Terry alone does not move the head's bias: centring gives it a gradient.
    "pairs": (reward.pairs(SCALAR, centre=0.5), lambda: init(SCALAR), pairs),
    "rankings": (reward.rankings(SCALAR, centre=0.5), lambda: init(SCALAR), rankings),
    "dpo": (preference.dpo(LLAMA, beta=0.1), lambda: init(LLAMA), pairs),
    "dpo_shared": (preference.dpo(LLAMA, beta=0.1), lambda: init(LLAMA), shared_pairs),
    "cdpo": (preference.cdpo(LLAMA, beta=0.3, smoothing=0.2), lambda: init(LLAMA), pairs),
    "ipo": (preference.ipo(LLAMA, beta=0.5), lambda: init(LLAMA), pairs),
    "hinge": (preference.hinge(LLAMA, beta=0.1), lambda: init(LLAMA), pairs),
    "wpo": (dpo_variants.wpo(LLAMA, beta=0.1), lambda: init(LLAMA), shared_pairs),
    "orpo": (odds.orpo(LLAMA, beta=0.3), lambda: init(LLAMA), pairs),
    "kto": (kto.kto(LLAMA, beta=0.1, undesirable=1.5), lambda: init(LLAMA), labelled),
    "pl_dpo": (ranked.pl_dpo(LLAMA), lambda: init(LLAMA), rankings),
    "rrhf": (ranked.rrhf(LLAMA), lambda: init(LLAMA), rankings),
    # Three weights that differ: completion tokens (policy, value, entropy), and the targets of the pretraining rows.
    "grpo": (grpo.grpo(LLAMA, beta=0.3), lambda: {"policy": init(LLAMA)}, grouped),
    "ppo": (ppo.ppo(LLAMA, entropy_coef=0.02, value_coef=0.3, ptx_coef=0.7), lambda: init(LLAMA, value=True), mixed),
}


def gradient(objective, accumulate=1):
    """jitted (params, batch) -> (loss, metrics, gradient): the function that `step` uses."""
    return jax.jit(lambda p, b: step.gradient(objective, p, {}, (), b, jax.random.key(0), accumulate))


def far(a, b):
    """The largest ||a - b|| / ||b|| over the leaves. In f32 a single number (a head's bias, a difference of large sums) is
    measured by the whole gradient."""
    norm = lambda *xs: float(np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in xs)))
    scale = lambda y: norm(*jax.tree.leaves(b)) if y.size == 1 and y.dtype == np.float32 else norm(y)
    gap = lambda x, y: norm(np.asarray(x, np.float64) - np.asarray(y, np.float64)) / max(scale(y), 1e-30)
    return max(jax.tree.leaves(jax.tree.map(gap, a, b)))


# -- networks that replay numbers -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Replay:
    """A `Model` whose log-prob of row b, token t+1 is params["logps"][b, t], whatever it reads (the shifted form of the
    vectors, T columns for T+1 tokens). params["values"], if there, is a third feature: the value before token t+1.

    Over two tokens: logits (log(1 - p), log p), so that lse is 0 and the gradient in log p is exactly 1. The row is the
    first token's id; all the others are token 1.
    """

    config: Any = None

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        logp = params["logps"]
        values = params.get("values", jnp.zeros_like(logp))
        x = jnp.stack([jnp.log(-jnp.expm1(logp)), logp, values], -1)[tokens[:, 0]]
        return nn.Hidden(jnp.pad(x, ((0, 0), (0, 1), (0, 0))))

    def unembed(self, params):
        return nn.Unembed(jnp.eye(2, 3))


VALUE_HEAD = {"weight": jnp.array([0.0, 0.0, 1.0]), "bias": jnp.zeros(())}


def replay_rows(mask, first=0):
    """Tokens for `Replay`: completion mask [B,T] -> rows of T+1 tokens, the first of which nothing predicts."""
    B, T = mask.shape
    tokens = np.ones((B, T + 1), np.int32)
    tokens[:, 0] = first + np.arange(B)
    wide = np.concatenate([np.zeros((B, 1)), mask], 1).astype(np.float32)
    return Tokens(tokens, wide, np.ones((B, T + 1), np.int32), np.tile(np.arange(T + 1, dtype=np.int32), (B, 1)))


def shifted(x):
    """The vectors' T columns -> our T+1, index t speaking of token t."""
    return np.pad(np.asarray(x, np.float32), ((0, 0), (1, 0)))


@dataclasses.dataclass(frozen=True)
class ReplayLogits:
    """A `Model` with params["logits"] as hidden states and the identity as unembedding."""

    vocab: int

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        return nn.Hidden(params["logits"])

    def unembed(self, params):
        return nn.Unembed(jnp.eye(self.vocab))


@dataclasses.dataclass(frozen=True)
class ReplayReward:
    """A `ScalarModel` that gives row b the reward params[first token of b]."""

    def reward(self, params, tokens, segments, positions):
        return params[tokens[:, 0]]
