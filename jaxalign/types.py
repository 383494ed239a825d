"""The batches and protocols that cross rooms. Imports neither jax nor flax.

Letters, the same everywhere: B batch, T time, S keys, D model, N query heads, K key/value heads (or candidates in a
ranking), H head width, F hidden, V vocabulary, L layers.

Index t speaks of token t: ``mask[:, t] = 1`` makes token t a target, ``logp[:, t] = log p(token_t | tokens_<t)``.
Masks are by position, never by token id, so PAD may equal EOS. The first token of a segment is never a target.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple, Protocol

Array = Any  # numpy on the host, jax.Array on the device
Tree = Any  # any pytree
BRANCH = 16  # bits to the left of a segment's number stands that of its branch, in rows that have branches (`ops.branches`)
Metrics = dict[str, tuple[Array, Array]]  # name -> (total, weight); the reader divides


# -- batches: arrays only, host or device ---------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Rows of tokens, one or several documents (segments) each."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]; 1 = token t is a target
    segments: Array  # i32[B,T]; 1, 2, ... per document, 0 = padding
    positions: Array  # i32[B,T]; restart at 0 in every segment


class Inputs(NamedTuple):
    """What the encoder of an encoder-decoder reads, row by row beside the decoder's tokens."""

    tokens: Array  # i32[B,S]
    segments: Array  # i32[B,S]; the decoder's segment of the same number sees it, 0 = padding
    positions: Array  # i32[B,S]


class Pairs(NamedTuple):
    """One preference per row. ``mask`` marks the completion. A pair whose completion mask is empty weighs 0."""

    chosen: Tokens
    rejected: Tokens
    ref_chosen: Array  # f32[B]; reference log-prob summed over the completion (0 until `rl.reference` fills it)
    ref_rejected: Array  # f32[B]
    margin: Array  # f32[B]; how much better (Llama 2); 0 when the data says nothing
    probability: Array | None = None  # f32[B]; that the chosen one is the better one. None: it is, in every pair


class SharedPairs(NamedTuple):
    """One preference per row, its prompt once: prompt, chosen and rejected completion, the last two in branches 1 and 2."""

    rows: Tokens  # segments u32 (`ops.branches`)
    ref_chosen: Array  # f32[B]; as in `Pairs`
    ref_rejected: Array  # f32[B]
    margin: Array  # f32[B]


class Rankings(NamedTuple):
    """All candidates of one prompt in one batch element."""

    candidates: Tokens  # leaves [B,K,T]
    rank: Array  # i32[B,K]; smaller is better, equal is a tie
    valid: Array  # f32[B,K]; 0 = this slot holds no candidate (K varies within a batch)
    ref: Array | None = None  # f32[B,K]; reference log-prob summed over the completion (None until `rl.reference` fills it)


class Labelled(NamedTuple):
    """One answer per row with what somebody said of it. A row whose completion mask is empty weighs 0."""

    rows: Tokens
    label: Array  # f32[B]; a score, or of good and bad answers 1 and 0
    ref: Array  # f32[B]; reference log-prob summed over the completion (0 until `rl.reference` fills it)
    # KTO's: the prompt of each row with the answer to another prompt. None where no objective asks for it.
    mismatched: Tokens | None = None  # leaves [B,T'], T' may differ from T
    ref_mismatched: Array | None = None  # f32[B]; as ref
    weight: Array | None = None  # f32[B]; of each row's loss. None: 1


class Trajectories(NamedTuple):
    """One episode per row: what was said, and what it earned. ``mask`` marks the actions: the tokens of the policy's turns."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]
    segments: Array  # i32[B,T]
    positions: Array  # i32[B,T]
    rewards: Array  # f32[B,T]; at the action that earns it, 0 elsewhere
    terminal: Array  # f32[B]; 0 = cut off: the episode would have gone on after its last token


class Steps(NamedTuple):
    """One answer per row, and what somebody said of its steps. ``rows.mask`` marks the last token of each step that was judged."""

    rows: Tokens
    label: Array  # f32[B,T]; at those tokens: 1 = right, 0 = wrong, or between


class Prompts(NamedTuple):
    """What an online source asks the policy to continue. ``records`` stays on the host."""

    tokens: Array  # i32[B,P], padded on the right
    segments: Array  # i32[B,P]; 1 on the prompt, 0 = padding
    positions: Array  # i32[B,P]
    row: Array  # i32[B]; stable id of the draw: random streams are folded from it, never from the batch slot
    records: tuple[dict, ...] = ()  # the source records, handed to reward functions


class Rollout(NamedTuple):
    """Prompts with their completions, padded on the right."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]; 1 on the completion, its stop token included
    segments: Array  # i32[B,T]
    positions: Array  # i32[B,T]
    logp: Array  # f32[B,T]; under the behaviour policy at the sampling temperature, 0 outside mask
    row: Array  # i32[B]
    version: Array  # i32[]; step of the params that sampled
    truncated: Array  # f32[B]; 1 = ran out of room before a stop token


class Experience(NamedTuple):
    """A rollout with everything PPO's loss reads. All f32[B,T] are 0 outside mask."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]
    segments: Array  # i32[B,T]
    positions: Array  # i32[B,T]
    logp: Array  # f32[B,T]; old policy, by the training forward
    values: Array  # f32[B,T]; old value before token t is emitted
    advantages: Array  # f32[B,T]
    returns: Array  # f32[B,T]


class GroupExperience(NamedTuple):
    """Rollouts of several answers to each prompt, with what a policy gradient without a critic reads. All f32[B,T] are 0
    outside mask. None where there is nothing to read: fields that are None cost neither memory nor a forward pass."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]
    segments: Array  # i32[B,T], or u32 where one row holds several answers to its prompt (`ops.branches`)
    positions: Array  # i32[B,T]
    advantages: Array  # f32[B,T]; its answer's advantage at each token (times its importance weight, off policy)
    sampled: Array  # f32[B,T]; log-probs as the sampler had them
    logp: Array | None = None  # f32[B,T]; old policy. None: one update a rollout, so it is the policy that trains
    ref_logp: Array | None = None  # f32[B,T]; None: no KL penalty


class RivalPairs(NamedTuple):
    """Pairs of which the policy wrote one side and a rival the other."""

    chosen: Tokens
    rejected: Tokens
    ref_chosen: Array  # f32[B]; as in `Pairs`
    ref_rejected: Array  # f32[B]
    margin: Array  # f32[B]
    rival_won: Array  # f32[B]; 1 = the chosen side is the rival's


class Duels(NamedTuple):
    """Answers of the policy, each of which was compared with a rival's to the same prompt. A row with an empty mask weighs 0."""

    tokens: Array  # i32[B,T]
    mask: Array  # f32[B,T]
    segments: Array  # i32[B,T]
    positions: Array  # i32[B,T]
    preferred: Array  # f32[B]; the probability that it is better than the rival's
    ref_logp: Array  # f32[B,T]; 0 outside mask


# -- losses ---------------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """One summand of a loss: ``scale * total / weight``, where only `train.step` divides, globally."""

    total: Array  # f32[]; a sum
    weight: Array  # f32[]; what to divide it by; must not depend on params
    scale: Array | float = 1.0


class Loss(NamedTuple):
    terms: dict[str, Term]
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class Objective:
    """What to minimise, made like an optax transformation: ``dpo(model, beta=0.1) -> Objective``.

    loss(params, frozen, aux, batch, key, stats) -> Loss. ``key`` is folded from the root key and the step; ``stats`` is
    what `stats` returned, summed over the global batch, each already divided by its weight.
    """

    loss: Callable[..., Loss]
    stats: Callable[..., Metrics] | None = None
    init_aux: Callable[[Tree], Tree] | None = None
    update_aux: Callable[..., Tree] | None = None  # (aux, params, metrics, step) -> aux, once after each update
    finish: Callable[..., Tree] | None = None  # (params, aux) -> what is kept of a finished run; None: the params
    whole_batch: bool = False  # not a sum over examples: accumulation > 1 is refused
    held_out: Callable[..., Loss] | None = None  # the loss where nothing is trained: without the noise of training
    shared: bool = False  # reads `SharedPairs` as well as `Pairs`
    mismatched: bool = False  # reads `Labelled.mismatched`
    weights: Callable | None = None  # of `Labelled`: (embeddings of prompts f32[n,D], good bool[n]) -> (embeddings f32[m,D] -> f32[m]), the weights of bad rows
    reference: Callable | None = None  # (model, params, batch) -> (chosen, rejected, ...): a reference's log-probs of pairs, where they are not plain sums


# -- models and sources ---------------------------------------------------------------------------------------------


class Model(Protocol):
    """A config and its family's pure functions. Compares and hashes by config, so rebuilding never recompiles."""

    config: Any

    def specs(self) -> Tree:
        """A nested dict whose leaves are `ops.nn.Spec`."""

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None) -> Any:
        """i32[B,T] -> `ops.nn.Hidden`: x f[B,T,D] after the last norm, the cache written, auxiliary terms."""

    def unembed(self, params) -> Any:
        """`ops.nn.Unembed`: how hidden states become logits, applied in `ops.logprob`."""

    def init_cache(self, batch: int, size: int) -> Tree:
        """Empty key/value cache of `size` slots, segments 0."""


class ScalarModel(Protocol):
    """A network with one number per position: reward or value. params {"trunk": ..., "head": ...}."""

    def specs(self) -> Tree: ...

    def scores(self, params, tokens, segments, positions) -> Array:
        """i32[B,T] -> f32[B,T]; at t it has read tokens up to and with t."""

    def reward(self, params, tokens, segments, positions) -> Array:
        """f32[B]: the score at each row's last token."""


class Source(Protocol):
    """Yields batches. Offline sources read files; online ones roll out with ``state.params``. The loop cannot tell.

    A batch holds numpy leaves (this process's rows of the global batch) or jax.Arrays (already global).
    """

    def next(self, state: Any) -> Any: ...

    def state_dict(self) -> dict:
        """Where we are: JSON values, and under the key "arrays" optionally a pytree of arrays."""

    def load_state_dict(self, d: dict) -> None: ...


class UserError(Exception):
    """Something the user can mend: bad input, config or file. Printed without a traceback; exit code 2.

    The message says where (file, line), what, and how to mend it.
    """
