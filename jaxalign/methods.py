"""The table of methods: what an objective's name in a config stands for. Whoever adds one adds a line here; neither the step nor
the loop learns of it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any, Callable, NamedTuple

from jaxalign.objectives import a2c, answers, distill, dpo_variants, grpo, ilql, kto, lm, nlpo, odds, offline, online, ppo, preference, ranked, reward, span, trpo
from jaxalign.rl import experience, masking, reinforce, rivals, selection
from jaxalign.types import Duels, Experience, GroupExperience, Objective, Pairs, RivalPairs, Tokens, UserError


class Method(NamedTuple):
    """What a config's objective name stands for."""

    maker: Callable[..., Objective]
    kind: str  # of its data, a key of KINDS
    reference: bool = True  # of pairs, labels and prompts: its loss compares with a reference model (where beta is not 0)
    # Of prompts, where there is no critic: what is made of rollouts, into which batches, from how many answers to a prompt.
    experience: Callable = experience.group_experience
    batch: type = GroupExperience
    group: int = 8
    rival: Callable | None = None  # who writes one more answer to each prompt (`rl.online.OnlineSource`); keyword-only arguments are fields of rl
    rows: str = "group"  # the field of rl that says how many rows of a batch come of a prompt; "": one
    rl: dict = {}  # defaults of its rl section that are not those of `experience`
    twins: int | None = None  # so many Q heads, and a value head, stand on the trunk (`models.heads.Guided`); None: neither
    actor: Callable | None = None  # (model, options of the objective) -> the model that samples, who reads the objective's aux too (`rl.masking`)
    plain: bool = False  # of tokens: reads texts as they are, whatever the template makes of conversations


# A config may name any other maker by import path, "package.module:function".
OBJECTIVES: dict[str, Method] = {
    "lm": Method(lm.lm, "tokens"),
    "masked_lm": Method(lm.masked, "tokens"),
    "dft": Method(lm.dft, "tokens"),
    "span_corruption": Method(span.span_corruption, "tokens", plain=True),
    "distill": Method(distill.distill, "tokens"),
    "on_policy_distill": Method(distill.on_policy_distill, "prompts", False, experience.answers, Tokens, 1, rl={"on_policy": 1.0}),
    "reward": Method(reward.rankings, "rankings"),
    "reward_pairs": Method(reward.pairs, "pairs"),
    "reward_best": Method(reward.best, "rankings"),
    "reward_regression": Method(reward.scores, "labelled"),
    "reward_steps": Method(reward.steps, "steps"),
    "dpo": Method(preference.dpo, "pairs"),
    "cdpo": Method(preference.cdpo, "pairs"),
    "ipo": Method(preference.ipo, "pairs"),
    "hinge": Method(preference.hinge, "pairs"),
    "robust": Method(preference.robust, "pairs"),
    "ipo_sum": Method(preference.ipo_sum, "pairs"),
    "dpo_norm": Method(preference.dpo_norm, "pairs"),
    "r_dpo": Method(preference.r_dpo, "pairs"),
    "exo": Method(preference.exo, "pairs"),
    "nca": Method(preference.nca, "pairs"),
    "sppo": Method(preference.sppo, "pairs"),
    "apo_zero": Method(preference.apo_zero, "pairs"),
    "apo_down": Method(preference.apo_down, "pairs"),
    "discopop": Method(preference.discopop, "pairs"),
    "f_dpo": Method(preference.f_dpo, "pairs"),
    "aot": Method(dpo_variants.aot, "pairs"),
    "aot_unpaired": Method(dpo_variants.aot_unpaired, "pairs"),
    "bco_pair": Method(dpo_variants.bco_pair, "pairs"),
    "mpo": Method(dpo_variants.mpo, "pairs"),
    "rpo": Method(dpo_variants.rpo, "pairs"),
    "wpo": Method(dpo_variants.wpo, "pairs"),
    "ld_dpo": Method(dpo_variants.ld_dpo, "pairs"),
    "tr_dpo": Method(dpo_variants.tr_dpo, "pairs", reference=False),  # its own moves with the policy
    "dpo_free": Method(preference.dpo, "pairs", reference=False),
    "orpo": Method(odds.orpo, "pairs", reference=False),
    "cpo": Method(odds.cpo, "pairs", reference=False),
    "cpo_hinge": Method(odds.cpo_hinge, "pairs", reference=False),
    "cpo_ipo": Method(odds.cpo_ipo, "pairs", reference=False),
    "simpo": Method(odds.simpo, "pairs", reference=False),
    "alphapo": Method(odds.alphapo, "pairs", reference=False),
    "slic": Method(odds.slic, "pairs", reference=False),
    "kto": Method(kto.kto, "labelled"),
    "bco": Method(kto.bco, "labelled"),
    "bco_matched": Method(kto.bco_matched, "labelled"),
    "apo_zero_unpaired": Method(kto.apo_zero_unpaired, "labelled"),
    "pl_dpo": Method(ranked.pl_dpo, "rankings"),
    "rrhf": Method(ranked.rrhf, "rankings", reference=False),
    "ppo": Method(ppo.ppo, "prompts"),
    "grpo": Method(grpo.grpo, "prompts"),
    "token_grpo": Method(grpo.token_grpo, "prompts"),
    "dr_grpo": Method(grpo.dr_grpo, "prompts", rl={"scale_rewards": "none"}),
    "dapo": Method(grpo.dapo, "prompts", group=16, rl={"mask_truncated": True, "dynamic_rounds": 10}),
    "cispo": Method(grpo.cispo, "prompts"),
    "sapo": Method(grpo.sapo, "prompts"),
    "gspo": Method(answers.gspo, "prompts"),
    "gspo_token": Method(answers.gspo_token, "prompts"),
    "gmpo": Method(answers.gmpo, "prompts"),
    "vespo": Method(answers.vespo, "prompts"),
    "rloo": Method(answers.rloo, "prompts", group=4, rl={"scale_rewards": "rloo", "beta": 0.05}),
    "reinforce_pp": Method(grpo.reinforce_pp, "prompts", experience=reinforce.reinforce_experience, group=1),
    "reinforce_pp_baseline": Method(grpo.reinforce_pp, "prompts", experience=reinforce.reinforce_experience, rl={"baseline": "group"}),
    "remax": Method(grpo.remax, "prompts", experience=reinforce.remax_experience, group=1, rival=reinforce.greedy),
    "a2c": Method(a2c.a2c, "prompts", rl={"epochs": 1, "whiten_advantages": False}),
    "trpo": Method(trpo.trpo, "prompts"),
    "online_dpo": Method(online.online_dpo, "prompts", experience=selection.pair_experience, batch=Pairs, group=2, rows=""),
    "xpo": Method(online.xpo, "prompts", experience=selection.rival_pairs, batch=RivalPairs, group=1, rival=rivals.reference, rows=""),
    "nash_md": Method(online.nash_md, "prompts", experience=selection.duels, batch=Duels, group=1, rival=rivals.mixture),
    "nash_md_token": Method(online.nash_md_token, "prompts", experience=selection.duels, batch=Duels, group=1, rival=rivals.mixture),
    "raft": Method(online.raft, "prompts", reference=False, experience=selection.best_experience, batch=Tokens, rows="keep"),
    "nlpo": Method(nlpo.nlpo, "prompts", experience=masking.nlpo_experience, batch=Experience, actor=masking.actor),
    "ilql": Method(ilql.ilql, "trajectories", twins=2),
    "ilql_original": Method(ilql.ilql_original, "trajectories", twins=2),
    "mc_returns": Method(offline.mc_returns, "trajectories", twins=1),
    "advantage_weighted_bc": Method(offline.advantage_weighted_bc, "trajectories", twins=0),
    "filtered_bc": Method(lm.lm, "trajectories"),
}
REWARDS = ("reward", "reward_pairs", "reward_best", "reward_regression", "reward_steps")  # trained on a trunk with a scalar head
COMPARED = ("reward", "reward_pairs", "reward_best")  # of these: from comparisons, which fix neither the scores' origin nor their scale


def method(name: str, kind: str = "tokens") -> Method:
    """What an objective's name, or the import path of a maker, stands for; `kind` says what the latter's data is.

    "online_NAME" is any loss of pairs, NAME, on pairs that the policy samples itself: online_ipo, online_hinge, ...
    """
    offline = OBJECTIVES.get(name.removeprefix("online_"))
    if name not in OBJECTIVES and offline is not None and offline.kind == "pairs" and name.removeprefix("online_") not in REWARDS:
        return OBJECTIVES["online_dpo"]._replace(maker=online.on_policy(offline.maker), reference=offline.reference)
    return OBJECTIVES[name] if name in OBJECTIVES else Method(imported(name), kind)


def has_critic(maker: Callable) -> bool:
    """Whether an objective's maker takes a value network, as PPO's does: else its batches are what `Method.experience` makes."""
    return "value" in inspect.signature(maker).parameters


def experience_of(m: Method) -> Callable:
    """What makes of rollouts what a method reads."""
    return experience.make_experience if has_critic(m.maker) and m.experience is experience.group_experience else m.experience


def has_teacher(maker: Callable) -> bool:
    """Whether an objective's maker takes a second model, whose frozen weights it learns from."""
    return "teacher" in inspect.signature(maker).parameters


def nearest(key: str, known: list[str]) -> str:
    """' did you mean ...? There are ...' for error messages."""
    close = difflib.get_close_matches(key, known, 1)
    return (f" did you mean {close[0]!r}?" if close else "") + f" There are {', '.join(sorted(known))}"


def imported(path: str) -> Any:
    """The thing that "package.module:name" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"cannot import {path!r}: {e}; write it as package.module:name") from None
