"""Rollout + scores + reference -> Experience, and the online source that yields it in minibatches.

The source is all that reinforcement learning adds to training: the loop and the step are those of pretraining.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard, tree
from jaxalign.objectives.ppo import states_and_values
from jaxalign.ops import advantage, nn
from jaxalign.ops.logprob import before, logprob, targets
from jaxalign.ops.masked import masked_mean, masked_whiten
from jaxalign.rl import rewards
from jaxalign.rl.control import KL
from jaxalign.rl.engine import generate
from jaxalign.rl.rollout import Sampling
from jaxalign.types import Experience, Model, Rollout, ScalarModel, Source


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("temperature",))
def token_logps(model: Model, params, rows, *, temperature=1.0):
    """LogProbs of anything with tokens, mask, segments and positions: the reference's side of the KL."""
    h = model.hidden(params, rows.tokens, rows.segments, rows.positions)
    mask = targets(rows.mask, rows.segments)
    return logprob(before(h.x, rows.segments), model.unembed(params), rows.tokens, mask, temperature=temperature)


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=("temperature", "gamma", "lam", "kl_estimator", "whiten_rewards", "whiten_advantages", "missing_eos_penalty", "clip_score"),
)
def make_experience(
    model: Model,
    value: ScalarModel | None,
    params,
    reference,
    rollout: Rollout,
    scores,
    beta,
    *,
    temperature: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    missing_eos_penalty: float = 0.0,
    clip_score: float | None = None,
):
    """(Experience, metrics f32[] each, TRL's names) (methods.md 4.2 to 4.6).

    Old log-probs and values come from the training forward, not from the sampler; `logprob_gap` says how far the two
    are apart (nats, largest over the batch).
    """
    mask = targets(rollout.mask, rollout.segments)
    x, values = states_and_values(model, value, params, rollout)
    old = logprob(x, model.unembed(params["policy"]), rollout.tokens, mask, temperature=temperature)
    ref = token_logps(model, reference, rollout, temperature=temperature)
    score = rewards.adjust(scores, rollout.truncated, missing_eos_penalty=missing_eos_penalty, clip=clip_score)
    kl_t = advantage.kl_tokens(old.logp, ref.logp, kl_estimator)
    r = advantage.token_rewards(score, kl_t, mask, beta)
    if whiten_rewards:
        r = masked_whiten(r, mask, shift_mean=False)
    adv, returns = advantage.gae(r, values, mask, gamma, lam)
    explained = 1 - ((mask * (returns - values)) ** 2).sum() / jnp.maximum((mask * (returns - masked_mean(returns, mask)) ** 2).sum(), 1e-8)
    d = mask * (old.logp - ref.logp)
    metrics = {
        "objective/kl": d.sum(1).mean(),
        "objective/kl_k3": (mask * advantage.kl_tokens(old.logp, ref.logp, "k3")).sum(1).mean(),
        "objective/entropy": old.entropy.sum(1).mean(),
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/non_score_reward": -beta * (mask * kl_t).sum(1).mean(),
        "objective/rlhf_reward": r.sum(1).mean(),
        "objective/beta": jnp.asarray(beta, jnp.float32),
        "completions/mean_length": mask.sum(1).mean(),
        "completions/truncated_frac": rollout.truncated.mean(),
        "val/explained_variance": explained,
        "logprob_gap": jnp.abs(jnp.where(mask > 0, old.logp - rollout.logp, 0.0)).max(),
    }
    if whiten_advantages:
        adv = masked_whiten(adv, mask)
    return Experience(rollout.tokens, mask, rollout.segments, rollout.positions, old.logp, values, adv, returns), metrics


class PPOSource:
    """Prompts -> rollout -> scores -> Experience -> epochs x minibatches of it, then the next prompts.

    Its state is the prompt source's position, how much of the experience in flight is used, that experience itself and
    the KL coefficient: a run killed in the middle of an epoch goes on with the very same minibatch.
    """

    def __init__(
        self,
        prompts: Source,
        model: Model,
        value: ScalarModel | None,
        reference,
        scorer: Callable,
        sampling: Sampling,
        mesh,
        *,
        epochs: int = 4,
        minibatches: int = 1,
        kl: KL = KL(),
        seed: int = 0,
        mix: Source | None = None,
        decode: Callable | None = None,
        frozen: dict | None = None,
        draft: tuple | None = None,
        **options,
    ):
        self.prompts, self.model, self.value, self.reference, self.scorer = prompts, model, value, reference, scorer
        self.sampling, self.mesh, self.epochs, self.minibatches = sampling, mesh, epochs, minibatches
        self.kl, self.seed, self.mix, self.decode, self.options = kl, seed, mix, decode, options
        self.draft = draft  # a smaller model and its weights, where sampling.draft names one
        self.frozen = {} if frozen is None else frozen  # "base": what the state's params lack (frozen leaves, under adapters)
        self.beta, self.iteration, self.used, self.experience = kl.beta, 0, 0, None
        self._metrics, self._samples = {}, []
        self._take = jax.jit(lambda e, i: jax.tree.map(lambda x: jnp.take(x, i, axis=0), e), out_shardings=shard.batch_sharding(mesh))

    def _collect(self, state):
        batch = self.prompts.next(state)
        prompts = shard.place(batch._replace(records=()), self.mesh)
        key = nn.fold(state.key, "rollout", self.iteration)
        params = tree.merge(state.params, self.frozen["base"]) if "base" in self.frozen else state.params
        rollout = generate(self.model, self.sampling, params["policy"], prompts, key, state.step, draft=self.draft)
        scores = self.scorer(rollout, batch)
        self.experience, metrics = make_experience(
            self.model, self.value, params, self.reference, rollout, scores, self.beta, temperature=self.sampling.temperature or 1.0, **self.options
        )
        self._metrics = {k: float(v) for k, v in metrics.items()}
        self.beta = self.kl.update(self.beta, self._metrics["objective/kl"], prompts.tokens.shape[0])
        self._samples = self._show(rollout, scores) if self.decode else []
        self.iteration, self.used = self.iteration + 1, 0

    def _show(self, rollout, scores, n: int = 2):
        r = [shard.to_local(x)[:n] for x in (rollout.tokens, rollout.mask, rollout.segments, scores)]
        return [{"prompt": self.decode(t[(m == 0) & (s != 0)]), "completion": self.decode(t[m > 0]), "score": float(c)} for t, m, s, c in zip(*r)]

    def next(self, state):
        self._metrics, self._samples = {}, []
        if self.experience is None or self.used == self.epochs * self.minibatches:
            self._collect(state)
        epoch, part = divmod(self.used, self.minibatches)
        self.used += 1
        batch = self.experience
        if self.minibatches > 1:
            rows = batch.tokens.shape[0]
            order = np.random.default_rng([self.seed, self.iteration, epoch]).permutation(rows)
            batch = self._take(batch, order.reshape(self.minibatches, -1)[part])
        return batch if self.mix is None else {"ppo": batch, "ptx": shard.place(self.mix.next(state), self.mesh)}

    def metrics(self) -> dict[str, float]:
        """Of the rollout, in the step that collected it; {} in the others."""
        return self._metrics

    def samples(self) -> list[dict]:
        """A few rollouts of this process, in the step that collected them."""
        return self._samples

    def state_dict(self) -> dict:
        d = {"prompts": self.prompts.state_dict(), "iteration": self.iteration, "used": self.used, "beta": self.beta}
        if self.mix is not None:
            d["mix"] = self.mix.state_dict()
        spent = self.experience is None or self.used == self.epochs * self.minibatches
        return d if spent else {**d, "arrays": self.experience._asdict()}

    def load_state_dict(self, d: dict) -> None:
        self.prompts.load_state_dict(d["prompts"])
        if self.mix is not None:
            self.mix.load_state_dict(d["mix"])
        self.iteration, self.used, self.beta = d["iteration"], d["used"], d["beta"]
        self.experience = Experience(**d["arrays"]) if d.get("arrays") else None
