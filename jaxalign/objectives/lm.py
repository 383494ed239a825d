"""Cross entropy: pretraining and supervised fine-tuning differ only in the mask of their batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.ops import moe, nn
from jaxalign.ops.logprob import before, linear_ce, targets, token_loss
from jaxalign.ops.masked import segment_sums
from jaxalign.types import Loss, Model, Objective, Term, Tokens, UserError


def cross_entropy(model: Model, params, batch: Tokens, *, smoothing: float = 0.0, z_loss: float = 0.0):
    """(CrossEntropy sums, number of targets, what else the model reports). Shared by `lm` and PPO-ptx."""
    h = model.hidden(params, batch.tokens, batch.segments, batch.positions)
    mask = targets(batch.mask, batch.segments)
    ce = linear_ce(before(h.x, batch.segments), model.unembed(params), batch.tokens, mask, smoothing=smoothing, z_loss=z_loss)
    return ce, mask.sum(), h.aux


def masked(model: Model, *, mask_id: int = -1, rate: float = 0.15) -> Objective:
    """Masked language modelling (BERT, 1810.04805, section 3.1): of the trained tokens a share `rate` is to be told from what
    stands around it; of those 80 % read mask_id, 10 % a random token, 10 % themselves.

    Draws are folded from the step's key and what a row holds, so neither batch, accumulation nor devices matter. Raises
    UserError where mask_id is no id of the model or rate not between 0 and 1.
    """
    V = model.config.vocab
    if not 0 <= mask_id < V or not 0 < rate < 1:
        raise UserError(f"masked_lm needs mask_id (the vocabulary's [MASK], 0 to {V - 1}, got {mask_id}) and 0 < rate < 1, got {rate}")

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        chosen, corrupted = corrupt(batch, key, mask_id, rate, V)
        x = model.hidden(params, corrupted, batch.segments, batch.positions).x
        ce, n = linear_ce(x, model.unembed(params), batch.tokens, chosen), chosen.sum()
        ce_, n_ = jax.lax.stop_gradient((ce, n))
        return Loss({"lm": Term(ce.total, n)}, {"nll": (ce_.nll, n_), "entropy": (ce_.entropy, n_), "mean_token_accuracy": (ce_.correct, n_)})

    return Objective(loss)


def row_keys(tokens, key) -> jax.Array:
    """A key for each row i32[B,T], folded from the step's key and what the row holds: whatever rows stand beside it."""
    odd = 2 * jax.random.randint(jax.random.key(0), (tokens.shape[1],), 0, 2**30).astype(jnp.uint32) + 1
    content = ((tokens.astype(jnp.uint32) + 1) * odd).sum(1)  # a hash that the order of tokens matters to
    return jax.vmap(jax.random.fold_in, (None, 0))(key, content)


def noisy(params, batch: Tokens, key, alpha: float):
    """The params with noise on their embeddings (NEFTune, Jain et al. 2023, 2310.05914, algorithm 1): U(-1, 1) alpha / sqrt(L D)
    for each entry of a token's embedding, L the true length of its document. transformers takes the padded length instead,
    which makes the noise depend on its neighbours' lengths."""
    if not isinstance(params, dict) or "embed" not in params:
        raise UserError('objective.neftune adds noise to params["embed"], and this model keeps its embeddings elsewhere')
    D = nn.weight(params["embed"]).shape[-1]
    T = batch.tokens.shape[1]
    real = (batch.segments != 0).astype(jnp.float32)
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 2), (T, D), minval=-1.0, maxval=1.0))(row_keys(batch.tokens, key))
    scale = real * alpha / jnp.sqrt(jnp.maximum(segment_sums(real, batch.segments), 1) * D)
    return {**params, "embed": nn.Noisy(params["embed"], u * scale[..., None])}


def corrupt(batch: Tokens, key, mask_id: int, rate: float, vocab: int) -> tuple[jax.Array, jax.Array]:
    """(chosen f32[B,T], what the model reads i32[B,T])."""
    T = batch.tokens.shape[1]
    keys = row_keys(batch.tokens, key)
    u, how = jnp.moveaxis(jax.vmap(lambda k: jax.random.uniform(k, (2, T)))(keys), 1, 0)
    other = jax.vmap(lambda k: jax.random.randint(jax.random.fold_in(k, 1), (T,), 0, vocab))(keys)
    chosen = (batch.mask > 0) & (batch.segments != 0) & (u < rate)
    return chosen.astype(jnp.float32), jnp.where(chosen & (how < 0.8), mask_id, jnp.where(chosen & (how < 0.9), other, batch.tokens))


def dft_tokens(logp, entropy, extra):
    """sg[p] (-log p): dynamic fine-tuning's token loss (2508.05629, equation 9; TRL's loss_type "dft"). The gradient is that of -p: a
    token that the model finds impossible no longer pulls hardest."""
    return -jax.lax.stop_gradient(jnp.exp(logp)) * logp


def dft(model: Model) -> Objective:
    """Dynamic fine-tuning: `dft_tokens` summed over the targets of the step / their number."""

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        h = model.hidden(params, batch.tokens, batch.segments, batch.positions)
        mask = targets(batch.mask, batch.segments)
        total, out = token_loss(before(h.x, batch.segments), model.unembed(params), batch.tokens, mask, (), dft_tokens)
        n = jax.lax.stop_gradient(mask.sum())
        return Loss({"dft": Term(total, n)}, {"nll": (-out.logp.sum(), n), "entropy": (out.entropy.sum(), n)})

    return Objective(loss)


def lm(model: Model, *, smoothing: float = 0.0, z_loss: float = 0.0, neftune: float = 0.0) -> Objective:
    """Token-global negative log-likelihood: sum over the targets of the whole step / their number (methods.md 1.1, 2).
    neftune > 0 (the paper's 5 to 15): noise on the embeddings while training, see `noisy`.

    A mixture of experts adds its load-balancing loss, scaled by the config's `router_aux` (`ops.moe.balance`); `stats`
    looks up the experts' load over the whole step first, so that accumulation gives the same gradient.
    """
    router = getattr(getattr(model, "config", None), "router_aux", 0.0)

    def stats(params, frozen, aux, batch: Tokens):
        load = model.hidden(params, batch.tokens, batch.segments, batch.positions).aux["load"]
        return {"expert_share": (load.chosen, load.tokens)}

    def quiet(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        ce, n, extra = cross_entropy(model, params, batch, smoothing=smoothing, z_loss=z_loss)
        ce_, n_ = jax.lax.stop_gradient((ce, n))
        metrics = {"nll": (ce_.nll, n_), "entropy": (ce_.entropy, n_), "mean_token_accuracy": (ce_.correct, n_)}
        terms = {"lm": Term(ce.total, n)}
        if router:
            balance = moe.balance(extra["load"], stats["expert_share"])
            terms["router"] = Term(balance, extra["load"].tokens, router)
            metrics["aux_loss"] = jax.lax.stop_gradient((balance, extra["load"].tokens))
        return Loss(terms, metrics)

    def loss(params, frozen, aux, batch: Tokens, key, stats) -> Loss:
        return quiet(noisy(params, batch, key, neftune) if neftune else params, frozen, aux, batch, key, stats)

    return Objective(loss, stats=stats if router else None, held_out=quiet)
