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


# How the scores f32[M,B] of M models become one (Coste et al. 2023, 2310.02743, section 3): mean; worst case; mean less
# `uncertainty` times the variance between models.
COMBINE: dict[str, Callable] = {
    "mean": lambda s, uncertainty: s.mean(0),
    "min": lambda s, uncertainty: s.min(0),
    "mean_less_variance": lambda s, uncertainty: s.mean(0) - uncertainty * s.var(0),
}


def ensemble(scorers: Sequence[Callable], combine: str = "mean", uncertainty: float = 0.1) -> Callable:
    """Scores by several models (or functions) as one. Where they disagree none of them knows, and a policy that seeks such
    texts out is held back by "min" and "mean_less_variance"."""
    if len(scorers) == 1:
        return scorers[0]
    together = jax.jit(lambda scores: COMBINE[combine](jnp.stack(scores), uncertainty))
    alike = {getattr(s, "where", "") for s in scorers} == {"device"}
    return _where("device" if alike else "", lambda rollout, prompts: together([s(rollout, prompts) for s in scorers]))


def none(rollout: Rollout, prompts: Prompts) -> jax.Array:
    """f32[B]: 0, where nobody scores."""
    return jnp.zeros_like(rollout.truncated)


none.where = "device"


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


def adjust(scores, truncated, *, missing_eos_penalty: float = 0.0, clip: float | None = None):
    """methods.md 4.2: a completion without a stop token loses `missing_eos_penalty`; then clip to [-clip, clip]."""
    scores = scores - missing_eos_penalty * truncated
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
