"""What a policy does while it trains: fresh samples of held-out prompts, and what the world's own reward says of them."""

from __future__ import annotations

from typing import Callable, Sequence

import jax

from jaxalign.data.sources import Offline
from jaxalign.evals import policy
from jaxalign.ops import nn
from jaxalign.rl.rollout import Sampling
from jaxalign.types import Model, Tree


def watch(
    model: Model, how: Sampling, prompts: Offline, records: Sequence[dict], gold: Callable, decode: Callable, mesh, *, reference: Tree | None = None
) -> Callable[[Tree, jax.Array, int], dict[str, float]]:
    """(policy, root key, step) -> {"gold", "gold_std", "length"}, and "kl" to the reference (nats per answer: at every token
    sampled, exact over the vocabulary) if there is one. `prompts` holds `records` in their order, each as often as it is to be answered.

    gold(prompts, completions, records) -> f[N]. Other samples at every step, the same in every run of a seed.
    """

    def look(params: Tree, key: jax.Array, step: int) -> dict[str, float]:
        got = policy.sample(model, params, how, prompts, decode, nn.fold(key, "watch", step), mesh, reference=reference, score=reference is not None)
        scores = gold([r["prompt"] for r in records], got.completions, records)
        kl = {} if reference is None else {"kl": got.kl}
        return {"gold": float(scores.mean()), "gold_std": float(scores.std()), "length": float(got.length.mean()), **kl}

    return look
