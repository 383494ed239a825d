"""The online source: all that reinforcement learning adds to training. The loop and the step are those of pretraining.

Prompts -> G samples of each -> scores -> an experience -> epochs x minibatches of it, then the next prompts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import typing
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import shard, tree
from jaxalign.ops import nn
from jaxalign.ops.advantage import constant_groups, summed_rewards
from jaxalign.rl import rewards
from jaxalign.rl.control import KL, ScoreScale
from jaxalign.rl.engine import generate
from jaxalign.rl.rollout import Sampling
from jaxalign.types import GroupExperience, Model, Prompts, Rollout, Source, UserError


def repeated(prompts: Prompts, group: int) -> Prompts:
    """Each prompt `group` times in a row, each with a stable id of its own."""
    if group == 1:
        return prompts
    tokens, segments, positions = (np.repeat(x, group, axis=0) for x in prompts[:3])
    row = (prompts.row[:, None] * group + np.arange(group, dtype=np.int32)).reshape(-1)
    return Prompts(tokens, segments, positions, row, tuple(r for r in prompts.records for _ in range(group)))


@functools.partial(jax.jit, static_argnames="group")
def interleaved(rollout: Rollout, other: Rollout, *, group: int) -> Rollout:
    """`group` rows of the one, then one of the other, for each prompt."""

    def rows(a, b):
        if not a.ndim:
            return a
        whole = jnp.concatenate([a.reshape(-1, group, *a.shape[1:]), b[:, None]], 1)
        return shard.constrain(whole.reshape(-1, *a.shape[1:]), "batch", *(None,) * (a.ndim - 1))

    return jax.tree.map(rows, rollout, other)


@jax.jit
def _picked(ours, theirs, rows):
    """Of two trees of rows, one behind the other, `rows` i32[B]; numbers that are no rows stay ours."""
    pick = lambda a, b: shard.constrain(jnp.concatenate([a, b])[rows], "batch", *(None,) * (a.ndim - 1)) if a.ndim else a
    return jax.tree.map(pick, ours, theirs)


@jax.jit
def _unanswered(rollout: Rollout, scores, n):
    """All but the first n rows without an answer and without a score, so that they weigh nothing."""
    real = jnp.arange(rollout.mask.shape[0]) < n
    return rollout._replace(mask=rollout.mask * real[:, None]), jnp.where(real if scores.ndim == 1 else real[:, None], scores, jnp.nan)


def as_dict(batch: Any) -> Any:
    """Nested NamedTuples as nested dicts, without what is None: for a checkpoint."""
    return {k: as_dict(x) for k, x in batch._asdict().items() if x is not None and not (isinstance(x, dict) and not x)} if hasattr(batch, "_asdict") else batch


def from_dict(kind: type, d: dict) -> Any:
    """What `as_dict` was made of."""
    hints = typing.get_type_hints(kind)
    return kind(**{k: from_dict(hints[k], x) if isinstance(x, dict) else x for k, x in d.items()})


class OnlineSource:
    """`experience(params, reference, rollout, scores, beta) -> (experience, metrics)` makes of a rollout what the objective reads
    (`rl.experience`): a `kind` of NamedTuple, whose rows are cut into minibatches.

    staleness S: iteration i trains on what was sampled with the params of iteration i - S (of the first, in the first S), so
    that S rollouts are always under way. A host-side scorer then works in a thread while the step runs. On devices of its own
    (`rollout_mesh`) sampling overlaps with training too: the policy is copied there once an iteration.

    rival(model, sampling, policy, reference, prompts, key, version) -> Rollout: one more answer to each prompt, by somebody else
    (the greedy policy, the reference). It is scored with the others and stands last in its group, which then has G + 1 rows.

    play(params, prompts, key, version) -> (Rollout, scores f32[B] or, for each token, f32[B,T]): in place of sampling and scoring,
    for those who take turns with something (an environment).

    rounds N: dynamic sampling (DAPO, 2503.14476, section 3.2). Groups whose rewards are all equal teach nothing; they are thrown
    away and more prompts are drawn, at most N times for one batch, until it is full of groups that say something; what is left
    over of them is dropped. After N rounds a batch that is not full is trained on as it is: the missing groups are rows without
    an answer, which weigh nothing. One with no group at all raises UserError.

    score_scale: what scores are divided by, handed to `experience` as one more argument. stop(state) -> bool: asked after each
    update whether the rest of the rollout is to be skipped (PPO's early stop), in which case the next one is collected.

    lagging(params, aux) -> params: what samples and what makes the experience sees these, where it reads the objective's own
    state too (a policy that lags behind).

    Its state is the prompt source's position, the rollouts under way with their scores, how much of the experience in flight
    is used, that experience itself and the KL coefficient: a run killed in the middle of an epoch goes on with the very same
    minibatch.
    """

    def __init__(
        self,
        prompts: Source,
        model: Model,
        scorer: Callable,
        sampling: Sampling,
        mesh,
        experience: Callable,
        *,
        reference=None,
        group: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        kl: KL = KL(),
        seed: int = 0,
        mix: Source | None = None,
        decode: Callable | None = None,
        frozen: dict | None = None,
        staleness: int = 0,
        rollout_mesh=None,
        kind: type = GroupExperience,
        draft: tuple | None = None,
        rival: Callable | None = None,
        play: Callable | None = None,
        rounds: int = 0,
        score_scale: ScoreScale | None = None,
        stop: Callable | None = None,
        lagging: Callable | None = None,
        apart: bool = False,
    ):
        self.prompts, self.model, self.scorer, self.sampling, self.mesh, self.experience_of, self.reference = prompts, model, scorer, sampling, mesh, experience, reference
        self.group, self.epochs, self.minibatches, self.kl, self.seed = group, epochs, minibatches, kl, seed
        self.mix, self.decode, self.staleness, self.rollout_mesh, self.kind = mix, decode, staleness, rollout_mesh, kind
        self.rival, self.play, self.lagging, self.apart = rival, play, lagging, apart
        self.rounds, self.score_scale, self.stop = rounds, score_scale, stop
        if rounds and (play is not None or group + (rival is not None) < 2):
            raise UserError(f"rl.dynamic_rounds {rounds} compares the answers of a group, so there must be two or more of them, and no environment")
        self.draft = draft  # a smaller model and its weights, where sampling.draft names one
        self.frozen = {} if frozen is None else frozen  # "base": what the state's params lack (frozen leaves, under adapters)
        self.beta, self.iteration, self.used, self.experience = kl.beta, 0, 0, None
        self._queue: list[dict[str, Any]] = []  # rollouts under way: {"born": iteration, "rollout": ..., "scores": array or Future, if it has begun}
        self.phase = lambda name: contextlib.nullcontext()  # who measures time puts a context manager here
        self._metrics, self._samples, self._events = {}, [], []
        self.collected = False  # whether the last batch was the first of a new rollout: the loop logs such a step, whatever log_every is
        self._take = jax.jit(lambda e, i: jax.tree.map(lambda x: jnp.take(x, i, axis=0), e), out_shardings=shard.batch_sharding(mesh))
        self._thread = concurrent.futures.ThreadPoolExecutor(1) if staleness else None
        self._done = (lambda x: x) if staleness else jax.block_until_ready  # nothing overlaps: each phase ends where it ends

    # -- sampling ---------------------------------------------------------------------------------------------------

    def _sample(self, policy, prompts: Prompts, key, version) -> Rollout:
        """The one place that samples: `group` rows for each prompt, which is read once where prompts divide among the devices."""
        mesh = self.rollout_mesh or self.mesh
        whole = len(prompts.tokens) * jax.process_count() % shard.batch_shards(mesh) == 0
        prompts, group = (prompts, self.group) if whole else (repeated(prompts, self.group), 1)
        go = functools.partial(generate, self.model, self.sampling, group=group)
        if self.rollout_mesh is None:
            return go(policy, shard.place(prompts, mesh), key, version, draft=self.draft)
        policy, key, version, draft = jax.device_put((policy, key, version, self.draft and self.draft[1]), shard.replicated(mesh))
        with jax.set_mesh(mesh):
            return go(policy, shard.place(prompts, mesh), key, version, draft=self.draft and (self.draft[0], draft))

    def _launch(self, params, state):
        batch = self.prompts.next(state)
        key = nn.fold(state.key, "rollout", self.iteration + len(self._queue))
        with self.phase("rollout"):
            if self.play is not None:
                rollout, scores = self._done(self.play(params, repeated(batch, self.group), key, state.step))
                self._queue.append({"born": self.iteration, "rollout": rollout, "scores": scores})
                return
            bare = batch._replace(records=())
            rollout = self._sample(params["policy"], bare, key, state.step)
            if self.rival is not None:
                other = self.rival(self.model, self.sampling, params["policy"], self.reference, shard.place(bare, self.mesh), nn.fold(key, "rival"), state.step)
                rollout = interleaved(self._here(rollout), other, group=self.group)
            rollout = self._done(rollout)
        batch = repeated(batch, self.group + (self.rival is not None))
        entry = {"born": self.iteration, "rollout": rollout}
        where = getattr(self.scorer, "where", "")
        if self.staleness and where == "host":
            entry["scores"] = self._thread.submit(rewards.halves(self.scorer)[0], rollout, batch)
        elif not (self.staleness and where == "device"):  # those can wait for their turn: nothing of them is on the host
            entry["rollout"] = rollout = self._here(rollout)
            with self.phase("score"):
                entry["scores"] = self._done(self.scorer(rollout, batch))
        self._queue.append(entry)

    def _here(self, rollout: Rollout) -> Rollout:
        """On the devices that train."""
        if self.rollout_mesh is None:
            return rollout
        rows, whole = shard.batch_sharding(self.mesh), shard.replicated(self.mesh)
        return jax.device_put(rollout, jax.tree.map(lambda x: rows if x.ndim else whole, rollout))

    def _collect(self, state):
        params = tree.merge(state.params, self.frozen["base"]) if "base" in self.frozen else state.params
        params = self.lagging(params, state.aux) if self.lagging else params
        rollout, scores, born, counts = (self._informative if self.rounds else self._scored)(params, state)
        scale = () if self.score_scale is None else (self.score_scale(self._whole(scores), rollout.truncated),)
        with self.phase("experience"):
            self.experience, metrics = self.experience_of(params, self.reference, rollout, scores, self.beta, *scale)
            self._metrics = {k: float(v) for k, v in jax.device_get(metrics).items()} | counts
        if scale:
            self._metrics["objective/score_scale"] = float(scale[0])
        if self.staleness:
            self._metrics["staleness"] = float(self.iteration - born)
        self.beta = self.kl.update(self.beta, self.kl.observed(self._metrics), rollout.tokens.shape[0])
        self._samples = self._show(rollout, scores) if self.decode else []
        self.iteration, self.used, self.collected = self.iteration + 1, 0, True

    def _scored(self, params, state) -> tuple[Rollout, Any, int, dict[str, float]]:
        """The rollout whose turn it is, its scores, the iteration that launched it, and what the metrics say of the scores."""
        while len(self._queue) <= self.staleness:
            self._launch(params, state)
        entry = self._queue.pop(0)
        rollout = self._here(entry["rollout"])
        with self.phase("score"):
            scored = rewards.scored(self._result(entry) if "scores" in entry else self.scorer(rollout, None))
        counts = {k: float(v) for k, v in jax.device_get(rewards.summary(scored._replace(scores=None))).items()}
        return rollout, scored.scores, entry["born"], counts

    def _result(self, entry: dict):
        """The scores of a rollout; of those that a thread has made the rest, here in the main one."""
        if isinstance(entry["scores"], concurrent.futures.Future):
            entry["scores"] = rewards.halves(self.scorer)[1](entry["rollout"], entry["scores"].result())
        return entry["scores"]

    def _informative(self, params, state) -> tuple[Rollout, Any, int, dict[str, float]]:
        """As `_scored`, of groups that say something, and how many there were of which kind."""
        size, held, constant, counts = self.group + (self.rival is not None), 0, 0, {}
        for rounds in range(1, self.rounds + 1):
            rollout, scores, was, found = self._scored(params, state)
            counts = {k: counts.get(k, 0.0) + (v - counts.get(k, 0.0)) / rounds for k, v in found.items()}  # their mean over the rounds
            says = ~shard.to_host(self._constant(scores, size))
            n, constant = len(says), constant + int((~says).sum())
            order = np.argsort(~says, kind="stable")  # those that say something first, each kind in the order it came
            if rounds == 1:
                both, born = (rollout, scores), was
            if rounds > 1 or not says.all():
                groups = np.concatenate([np.arange(held), n + order])[:n]
                both = _picked(both, (rollout, scores), (groups[:, None] * size + np.arange(size)).reshape(-1))
            held += int(says.sum())
            if held >= n:
                break
        if not held:
            raise UserError(f"rl.dynamic_rounds {self.rounds}: of {constant} prompts none had answers of different reward; they are too easy or too hard for this policy. Take other prompts, a larger rl.group, a finer reward, or end the training here")
        if held < n:
            self._events.append({"kind": "short_batch", "groups": held, "wanted": n, "prompts": rounds * n})
        rollout, scores = both if held >= n else _unanswered(*both, held * size)
        name = "dynamic_sampling/"
        return rollout, scores, born, counts | {f"{name}rounds": float(rounds), f"{name}discarded_groups": float(constant), f"{name}left_over_groups": float(max(held - n, 0)), f"{name}missing_groups": float(max(n - held, 0))}

    def _whole(self, scores):
        """f32[B]: of each answer one score; NaN stays, for it has none."""
        return scores if scores.ndim == 1 else summed_rewards(scores) if self.apart else scores.sum(1)

    def _constant(self, scores, size: int):
        """bool[B / size]: groups without a difference, in any of their rewards."""
        if not self.apart:
            return constant_groups(self._whole(scores), size)
        return jnp.stack([constant_groups(x, size) for x in scores.T]).all(0)

    def _show(self, rollout, scores, n: int = 2):
        scores = self._whole(scores)
        r = [shard.to_local(x)[:n] for x in (rollout.tokens, rollout.mask, rollout.segments, scores)]
        return [{"prompt": self.decode(t[(m == 0) & (s != 0)]), "completion": self.decode(t[m > 0]), "score": float(c)} for t, m, s, c in zip(*r)]

    # -- the source -------------------------------------------------------------------------------------------------

    def next(self, state):
        self._metrics, self._samples, self.collected = {}, [], False
        over = self.experience is None or self.used == self.epochs * self.minibatches
        if over or (self.stop is not None and self.used and self.stop(state)):
            self._collect(state)
        epoch, part = divmod(self.used, self.minibatches)
        self.used += 1
        batch = self.experience
        if self.minibatches > 1:
            rows = jax.tree.leaves(batch)[0].shape[0]
            order = np.random.default_rng([self.seed, self.iteration, epoch]).permutation(rows)
            batch = self._take(batch, order.reshape(self.minibatches, -1)[part])
        return batch if self.mix is None else {"ppo": batch, "ptx": shard.place(self.mix.next(state), self.mesh)}

    def metrics(self) -> dict[str, float]:
        """Of the rollout, in the step that collected it; {} in the others."""
        return self._metrics

    def samples(self) -> list[dict]:
        """A few rollouts of this process, in the step that collected them."""
        return self._samples

    def events(self) -> list[dict]:
        """What happened since last time that a reader of the run should know: rewards that failed."""
        own, self._events = self._events, []
        return own + [e for x in (self.scorer, self.play) for e in getattr(x, "events", list)()]

    def state_dict(self) -> dict:
        d = {"prompts": self.prompts.state_dict(), "iteration": self.iteration, "used": self.used, "beta": self.beta}
        if self.mix is not None:
            d["mix"] = self.mix.state_dict()
        if self.score_scale is not None:
            d["score_scale"] = self.score_scale.state_dict()
        arrays: dict[str, Any] = {}
        if self.experience is not None and self.used < self.epochs * self.minibatches:
            arrays["experience"] = as_dict(self.experience)
        if self._queue:
            d["born"] = [e["born"] for e in self._queue]
            for i, e in enumerate(self._queue):
                scores = {"scores": as_dict(self._result(e))} if "scores" in e else {}
                arrays[f"rollout_{i}"] = {**self._here(e["rollout"])._asdict(), **scores}
        return {**d, "arrays": arrays} if arrays else d

    def load_state_dict(self, d: dict) -> None:
        self.prompts.load_state_dict(d["prompts"])
        if self.mix is not None:
            self.mix.load_state_dict(d["mix"])
        if self.score_scale is not None:
            self.score_scale.load_state_dict(d["score_scale"])
        self.iteration, self.used, self.beta = d["iteration"], d["used"], d["beta"]
        arrays = d.get("arrays") or {}
        self.experience = from_dict(self.kind, arrays["experience"]) if "experience" in arrays else None
        self._queue = []
        for i, born in enumerate(d.get("born", ())):
            fields = dict(arrays[f"rollout_{i}"])
            scores = fields.pop("scores", None)
            scores = rewards.Scored(**scores) if isinstance(scores, dict) else scores
            self._queue.append({"born": born, "rollout": Rollout(**fields), **({} if scores is None else {"scores": scores})})
