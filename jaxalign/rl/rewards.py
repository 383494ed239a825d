"""Scores of rollouts: from a learned model on the device, or from any Python function on the host.

A scorer is called as ``scorer(rollout, prompts) -> f32[B]`` (a global array). Its attribute `where`, if it has one, says
what it needs: "device" (a rollout alone; prompts may be None) or "host" (no device: it may run in a thread).
"""

from __future__ import annotations

import functools
import math
import traceback
from typing import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard
from jaxalign.objectives.reward import AGGREGATE, step_ends
from jaxalign.types import Prompts, Rollout, ScalarModel, Tree, UserError


@functools.partial(jax.jit, static_argnums=0)
def model_scores(model: ScalarModel, params: Tree, rows) -> jax.Array:
    """f32[B]: a reward model's score of anything with tokens, segments and positions."""
    return model.reward(params, rows.tokens, rows.segments, rows.positions)


def learned(model: ScalarModel, params: Tree) -> Callable:
    """Scores by a reward model that shares the policy's tokenizer."""
    return _where("device", lambda rollout, prompts: model_scores(model, params, rollout))


def _where(what: str, scorer: Callable) -> Callable:
    scorer.where = what
    return scorer


@functools.partial(jax.jit, static_argnums=(0, 4))
def step_scores(model: ScalarModel, params: Tree, rows, breaks, aggregate: str = "min") -> jax.Array:
    """f32[B]: a process reward model's probability that an answer is right, from those of its steps (`objectives.reward.AGGREGATE`).
    rows: anything with tokens, mask (1 on the answer), segments and positions; breaks bool[V]: see `objectives.reward.step_ends`."""
    scores = model.scores(params, rows.tokens, rows.segments, rows.positions)
    return AGGREGATE[aggregate](scores, step_ends(rows.tokens, rows.mask, breaks))


def process(model: ScalarModel, params: Tree, breaks, aggregate: str = "min") -> Callable:
    """Scores whole answers by the steps that a process reward model sees in them."""
    return _where("device", lambda rollout, prompts: step_scores(model, params, rollout, breaks, aggregate))


@functools.partial(jax.jit, static_argnums=0)
def step_rewards(model: ScalarModel, params: Tree, rows, breaks) -> jax.Array:
    """f32[B,T]: at the end of each step the probability that it is right, 0 elsewhere: rewards token by token, for who makes an
    experience of them (Lightman et al. 2305.20050; Uesato et al. 2211.14275)."""
    scores = model.scores(params, rows.tokens, rows.segments, rows.positions)
    return jax.nn.sigmoid(scores) * step_ends(rows.tokens, rows.mask, breaks)


def line_breaks(decode: Callable, vocab: int, size: int) -> np.ndarray:
    """bool[size]: the ids, of `vocab` that a tokenizer has, whose text holds a line break."""
    return np.array([i < vocab and "\n" in decode([i]) for i in range(size)])


def averaged(members: Sequence[Tree]) -> Tree:
    """The mean of the weights of models fine-tuned from one start, heads included (WARM, Rame et al. 2401.12187, eq. 2): one
    forward, where an ensemble takes as many as it has members."""
    return jax.tree.map(lambda *x: (sum(a.astype(jnp.float32) for a in x) / len(x)).astype(x[0].dtype), *members)


# How the scores f32[M,B] of M models become one: mean, worst case, mean less `uncertainty` times the variance between models (Coste
# et al. 2023, 2310.02743, section 3); median; mean less `uncertainty` times the standard deviation, a lower confidence bound
# (Eisenstein et al. 2312.09244). Each model's scores should have mean 0 and std 1 on the same samples: see `normalise`.
COMBINE: dict[str, Callable] = {
    "mean": lambda s, uncertainty: s.mean(0),
    "min": lambda s, uncertainty: s.min(0),
    "apart": lambda s, uncertainty: s.T,  # f32[B,M]: rewards that are no ensemble, for advantages of several (`rl.experience.group_experience`)
    "median": lambda s, uncertainty: jnp.median(s, 0),
    "mean_less_variance": lambda s, uncertainty: s.mean(0) - uncertainty * s.var(0),
    "mean_less_std": lambda s, uncertainty: s.mean(0) - uncertainty * s.std(0),
}


def ensemble(scorers: Sequence[Callable], combine: str = "mean", uncertainty: float = 0.1) -> Callable:
    """Scores by several models (or functions) as one. Where they disagree none of them knows, and a policy that seeks such
    texts out is held back by "min" and "mean_less_variance"."""
    if len(scorers) == 1:
        return scorers[0]
    together = jax.jit(lambda scores: COMBINE[combine](jnp.stack(scores), uncertainty))
    alike = {getattr(s, "where", "") for s in scorers} == {"device"}
    return _where("device" if alike else "", lambda rollout, prompts: together([s(rollout, prompts) for s in scorers]))


def python(fn: Callable[[str, str, dict], float], decode: Callable, mesh) -> Callable:
    """Scores by ``fn(prompt, completion, record) -> float``; each process scores its own rows.

    The completion is decoded without its stop token (`decode` drops special ids). A result that is not a finite number
    raises UserError naming the function and the row; so does an exception.
    """

    name = getattr(fn, "__qualname__", repr(fn))

    def scorer(rollout: Rollout, prompts: Prompts):
        local = {f: shard.to_local(getattr(rollout, f)) for f in ("tokens", "mask", "segments", "row")}
        out = np.zeros(len(local["row"]), np.float32)
        for i, (tokens, mask, segments) in enumerate(zip(local["tokens"], local["mask"], local["segments"])):
            prompt, completion = decode(tokens[(mask == 0) & (segments != 0)]), decode(tokens[mask > 0])
            case = f"for row {local['row'][i]} (prompt {prompt[:80]!r})"
            try:
                value = fn(prompt, completion, prompts.records[i] if prompts.records else {})
            except Exception as e:
                at = traceback.extract_tb(e.__traceback__)[-1]
                raise UserError(f"reward function {name} raised {type(e).__name__}: {e} {case}, at {at.filename}:{at.lineno}; it must return a finite number") from e
            if not isinstance(value, (int, float, np.floating, np.integer)) or not math.isfinite(value):
                raise UserError(f"reward function {name} returned {value!r} {case}; it must return a finite number")
            out[i] = value
        return shard.place(out, mesh)

    return _where("host", scorer)


def adjust(scores, truncated, *, missing_eos_penalty: float = 0.0, missing_eos_value: float | None = None, clip: float | None = None):
    """A completion without a stop token loses `missing_eos_penalty`, or is given `missing_eos_value` whatever its score
    (lm-human-preferences' penalty_reward_value); then clip to [-clip, clip]."""
    scores = scores - missing_eos_penalty * truncated
    if missing_eos_value is not None:
        scores = jnp.where(truncated > 0, missing_eos_value, scores)
    return scores if clip is None else jnp.clip(scores, -clip, clip)


def normalise(params: Tree, scores: np.ndarray, *, scale: bool = True) -> Tree:
    """Fold gain and bias into the head so that `scores` (of reference samples) get mean 0 and, with scale, std 1.

    r' = (r - mean) / std (lm-human-preferences; without scale InstructGPT's bias, section 3.5). Scores must be finite
    and not all equal.
    """
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if not math.isfinite(mean) or (scale and not std > 0):
        raise UserError(f"cannot normalise a reward model on {len(scores)} samples with mean {mean} and std {std}: it gives all of them the same score; train it longer")
    gain = 1 / std if scale else 1.0
    head = params["head"]
    return {**params, "head": {"weight": head["weight"] * gain, "bias": (head["bias"] - mean) * gain}}
