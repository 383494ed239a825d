"""A family is a module (Config, specs, hidden, unembed, init_cache); a model is a family at a config."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

from jaxalign.ops import nn


@dataclasses.dataclass(frozen=True)
class FamilyModel:
    """`types.Model` made of a family module and its config. Equal configs are equal models: no recompilation."""

    family: Any
    config: Any

    @property
    def positions(self) -> int | None:
        """How many positions it knows; None where they are not learned."""
        return getattr(self.family, "positions", lambda config: None)(self.config)

    @property
    def start(self) -> int | None:
        """The token that opens the decoder's part of a row, with which prompts must end; None: not an encoder-decoder."""
        return getattr(self.family, "start", lambda config: None)(self.config)

    @property
    def causal(self) -> bool:
        """Whether it can generate: what it says at t has read no token after t."""
        return getattr(self.family, "causal", True)

    @property
    def branches(self) -> bool:
        """Whether several continuations of one text may stand in one row (`ops.branches`)."""
        return getattr(self.family, "branches", lambda config: False)(self.config)

    def scored(self) -> FamilyModel:
        """The same trunk under a scalar head, without what only an unembedding needs."""
        if hasattr(self.family, "scored"):
            return FamilyModel(self.family, self.family.scored(self.config))
        return FamilyModel(self.family, dataclasses.replace(self.config, tied=True)) if hasattr(self.config, "tied") else self

    def specs(self):
        return self.family.specs(self.config)

    def hidden(self, params, tokens, segments, positions, *, inputs=None, cache=None, key=None):
        return self.family.hidden(self.config, params, tokens, segments, positions, inputs=inputs, cache=cache, key=key)

    def unembed(self, params):
        """An adapted or quantised unembedding is made dense here: `ops.logprob` reads its rows many times."""
        u = self.family.unembed(self.config, params)
        return u.replace(weight=nn.weight(u.weight))

    def init_cache(self, batch, size):
        return self.family.init_cache(self.config, batch, size)

    def flops_per_token(self, length):
        return self.family.flops_per_token(self.config, length)


def norm_names(ours: str, theirs: str) -> dict[str, tuple[str, bool]]:
    """Entries of `Architecture.names` for a LayerNorm {"scale", "bias"}."""
    return {f"{ours}/scale": (f"{theirs}.weight", False), f"{ours}/bias": (f"{theirs}.bias", False)}


def dense_names(ours: str, theirs: str) -> dict[str, tuple[str, bool]]:
    """Entries of `Architecture.names` for a torch Linear {"w", "b"}, which stores (out, in)."""
    return {f"{ours}/w": (f"{theirs}.weight", True), f"{ours}/b": (f"{theirs}.bias", False)}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How transformers spells a family: the class names, the fields of config.json, the names of the tensors.

    A family module has HF = {model_type: Architecture}. `models.hf` reads all of it, `models.peft` only how the classifier's head is called.
    """

    causal: str  # the class with an unembedding
    classifier: str | None  # the class with one label; None: there is none that a scalar head could leave as
    read: Callable[[dict], dict]  # takes what it knows out of config.json, returns fields of Config
    write: Callable[[Any], dict]  # Config -> fields of config.json, in the spelling of transformers 5
    names: Callable[[Any], dict[str, tuple[str, bool]]]  # Config -> {our leaf: (tensor, transposed)}; one {} per stacked dimension
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # field -> values this code implements, HF's default first
    prefix: str = "model."  # of every tensor but the head's; a trunk saved alone has names without it
    buffers: str = r"$^"  # regex of tensors that older exports carry and nobody needs
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tensors that repeat another one: they must be equal to it
    why_not_scored: str = "transformers has no classifier of this family"  # where there is no `classifier`
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # how older files end a tensor's name -> how it ends now
    tied_by_file: bool = False  # config.json does not say whether the unembedding is the embedding; the file does
    score: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"head/weight": "score.weight"})  # the classifier's own tensors
