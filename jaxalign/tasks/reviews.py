"""An embedded world with a known truth: short reviews written by a probabilistic grammar.

    Review the noodle soup. Mention the taste and the price.
      The noodle soup was very good! The taste was fresh. But the price was not fair. I would surely order it again.

What is known exactly: the probability of every text (so the floor of the pretraining loss), the gold reward of every
string (`review_labels`), and the noise of the labellers (so the best accuracy of any reward model).

A writer draws a hidden sentiment and style once, then makes one choice after another; `World._review` is that story,
told once. Who makes the choices differs: `_Draw` samples them, `_Read` looks them up in a parsed text and adds up
their log-probabilities. With a sentiment and a style fixed, a text fixes every other choice, hence

    p(text) = sum over sentiment z and style e of p(z) p(e) prod over choices p(choice | scene so far, z, e).

Host only: numpy and the standard library. Everything is a function of `World.seed` and the seed of the call.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxalign.tasks import review_grammar as g
from jaxalign.tasks import review_labels as labels
from jaxalign.tasks.review_labels import gold_accuracy, gold_reward, gold_rewards, pairs_of, request_of

__all__ = ["World", "gold_accuracy", "gold_reward", "gold_rewards", "pairs_of", "write_jsonl"]

EVAL_SHARE = 8  # one prompt in eight is held out, chosen by its CRC-32: never demonstrated, ranked or trained on


class Writer(NamedTuple):
    """How well a writer follows the request: `heed` multiplies the odds of an aspect that was asked for, `drift` is
    the probability of reviewing another item of the same category."""

    heed: float
    drift: float


CASUAL, CAREFUL = Writer(heed=2.0, drift=0.1), Writer(heed=10.0, drift=0.0)


class Table(NamedTuple):
    """A distribution over words."""

    words: tuple
    cumulative: list[float]
    log: dict  # word -> ln p

    def draw(self, u: float):
        """The word at quantile u in [0, 1)."""
        return self.words[bisect.bisect_right(self.cumulative, u, 0, len(self.words) - 1)]


def _table(weights: Mapping) -> Table:
    """Normalised; words of weight 0 are left out."""
    kept = {word: weight for word, weight in weights.items() if weight > 0}
    total = math.fsum(kept.values())
    cumulative = [below / total for below in itertools.accumulate(kept.values())]
    return Table(tuple(kept), cumulative, {word: math.log(weight / total) for word, weight in kept.items()})


class _Draw:
    """Chooses at random. One block of uniforms per document keeps this fast."""

    def __init__(self, rng: np.random.Generator):
        self.uniforms = itertools.chain.from_iterable(rng.random(128).tolist() for _ in itertools.count())

    def __call__(self, slot: str, table: Table):
        return table.draw(next(self.uniforms))


class _Impossible(Exception):
    """The text makes a choice of probability 0."""


class _Read:
    """Chooses what a parsed text chose, and adds up `log_prob`."""

    def __init__(self, text: Sequence[g.Sentence], hidden: Mapping):
        self.text, self.log_prob = iter(text), 0.0
        stages = [g.FORMS[s.form].stage for s in text]
        genre = {"request": "answer", "diary": "diary"}.get(stages[0], "review") if stages else None
        counts = {"middle": stages.count("middle"), "close": stages.count("verdict"), "diary": stages.count("diary")}
        self.facts = {**hidden, **counts, "genre": genre}

    def __call__(self, slot: str, table: Table):
        if slot == "form":  # every sentence begins with the choice of its form
            sentence = next(self.text, None)
            if sentence is None:
                raise _Impossible
            sign = 0 if sentence.value is None else math.copysign(1, sentence.value)
            self.facts |= sentence.words | {"form": sentence.form, "polarity": sign}
        word = self.facts[slot]
        if word not in table.log:
            raise _Impossible
        self.log_prob += table.log[word]
        return word


@dataclasses.dataclass(frozen=True)
class World:
    """One world per `seed`: the grammar is fixed, the seed decides which words are common and which rare.

    `label_temperature` T: labellers order candidates by reward / T + Gumbel noise (Plackett-Luce).
    """

    seed: int = 0
    label_temperature: float = 1.0

    # -- the distributions ------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tables(self) -> dict[tuple[str, object], Table]:
        """(slot, the part of the scene it depends on) -> distribution, for every slot but item and aspect."""

        def zipf(words: Sequence[str], name: str) -> dict[str, float]:
            order = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).permutation(len(words))
            return {word: 1 / (3 + int(k)) for word, k in zip(words, order)}

        weights: dict[tuple[str, object], dict] = {}
        for slot, words in g.WORDS.items():
            for key, listed in words.items() if isinstance(words, dict) else [(None, words)]:
                weights[slot, key] = zipf(g.listed(listed), f"{slot} {key}")
        for slot, opposites in g.OPINIONS.items():
            for sign, words in zip((1, -1), opposites):
                weights[slot, sign] = zipf(g.listed(words), f"{slot} {sign}")
        for sign in (1, -1):
            general = weights["quality", ("overall", sign)] = weights.pop(("quality", sign))
            for aspect, opposites in g.ASPECT_WORDS.items():  # one time in two, a word of the aspect's own
                own = zipf(g.listed(opposites[0 if sign > 0 else 1]), f"{aspect} {sign}")
                weights["quality", (aspect, sign)] = general | own
        for category, named in g.ASPECTS.items():
            weights["aspects", category] = zipf(list(named), category)
        weights["items", None] = zipf(list(g.CATEGORY), "items")
        weights |= {("lead", turn): w for turn, w in g.LEAD.items()} | {("degree", k): w for k, w in g.DEGREE.items()}
        weights |= {("mark", style): w for style, w in g.MARK.items()} | {("not", None): g.NOT}
        weights |= {("be", plural): {"were" if plural else "was": 1.0} for plural in (False, True)}
        weights |= {("polarity", s): {1: p, -1: 1 - p} for s, p in g.PRAISE.items()}
        for slot in ("sentiment", "style", "genre", "middle", "close", "diary"):
            weights[slot, None] = {"close": g.VERDICT}.get(slot) or getattr(g, slot.upper())
        for stage in ("request", "opening", "middle", "verdict", "diary"):
            weights["form", stage] = {name: form.weight for name, form in g.FORMS.items() if form.stage == stage}
        return {key: _table(w) for key, w in weights.items()}

    @functools.cached_property
    def _memo(self) -> dict:
        return {}

    def _item(self, scene: dict) -> Table:
        """Any item at first; then the same one, except that the review may drift from the request."""
        item, drift = scene.get("item"), scene["drift"] if scene["stage"] == "opening" else 0.0
        if item is None:
            return self._tables["items", None]
        if (item, drift) not in self._memo:
            others = [other for other in g.ITEMS[g.CATEGORY[item]] if other != item]
            self._memo[item, drift] = _table({item: 1 - drift} | {other: drift / len(others) for other in others})
        return self._memo[item, drift]

    def _aspect(self, scene: dict) -> Table:
        """An aspect of the item's category not spoken of yet; `heed` raises the odds of the requested ones."""
        key = (g.CATEGORY[scene["item"]], scene["asked"], scene["told"], scene["heed"])
        if key not in self._memo:
            category, asked, told, heed = key
            base = self._tables["aspects", category].log
            odds = {aspect: math.exp(x) * (heed if aspect in asked else 1.0) for aspect, x in base.items()}
            self._memo[key] = _table({aspect: x for aspect, x in odds.items() if aspect not in told})
        return self._memo[key]

    def _choices(self, slot: str, scene: dict) -> Table:
        if slot in ("aspect", "first", "second"):
            return self._aspect(scene)
        if slot == "item":
            return self._item(scene)
        return self._tables[slot, _KEY[slot](scene) if slot in _KEY else None]

    # -- the story, told once ---------------------------------------------------------------------------------------

    def _sentence(self, stage: str, scene: dict, pick) -> str:
        scene["stage"] = stage
        form = g.FORMS[pick("form", self._tables["form", stage])]
        scene |= {"aspect": form.about, "not": ""}
        if form.about:
            scene["polarity"] = pick("polarity", self._tables["polarity", scene["sentiment"]])
        for slot in form.slots:
            scene[slot] = pick(slot, self._choices(slot, scene))
            if slot in ("aspect", "first"):
                scene["told"] |= {scene[slot]}
        if form.about:
            scene["before"] = scene["polarity"]
        return form.template.format_map(scene)

    def _request(self, scene: dict, pick) -> str:
        scene |= {"asked": (), "told": frozenset(), "heed": 1.0}
        text = self._sentence("request", scene, pick)
        scene["asked"] = tuple(scene[slot] for slot in ("first", "second") if slot in scene)
        return text

    def _review(self, scene: dict, writer: Writer, pick) -> str:
        for slot in ("sentiment", "style"):
            scene[slot] = pick(slot, self._tables[slot, None])
        scene |= {"told": frozenset(), "before": 0} | writer._asdict()
        stages = ["opening"] + ["middle"] * pick("middle", self._tables["middle", None])
        stages += ["verdict"] * pick("close", self._tables["close", None])
        return " ".join(self._sentence(stage, scene, pick) for stage in stages)

    def _document(self, pick) -> str:
        scene = {"asked": ()}
        genre = pick("genre", self._tables["genre", None])
        if genre == "diary":
            lines = pick("diary", self._tables["diary", None])
            return " ".join(self._sentence("diary", scene, pick) for _ in range(lines))
        request = [self._request(scene, pick)] if genre == "answer" else []
        return " ".join([*request, self._review(scene, CASUAL, pick)])

    # -- pretraining text and its exact probability -----------------------------------------------------------------

    def sample_text(self, rng: np.random.Generator) -> str:
        """One pretraining document: a request with its review, a review alone, or a page of a diary."""
        return self._document(_Draw(rng))

    def texts(self, n: int, seed: int) -> list[str]:
        """n pretraining documents. Texts of different seeds are independent draws; a document carries about 40 nats,
        so they do not meet."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"texts"), seed])
        return [self.sample_text(rng) for _ in range(n)]

    def log_prob(self, text: str) -> float:
        """Exact ln p(text as a whole document) of the pretraining distribution; -inf if the grammar cannot make it."""
        return self._log_prob(text, self._document)

    def floor(self, texts: Sequence[str], tokens: int) -> float:
        """The floor of the loss on these texts, in nats per token: - sum ln p(text) / number of predicted tokens. Every
        token of a document but its BOS is predicted, its EOS too."""
        return -math.fsum(map(self.log_prob, texts)) / tokens

    def demonstration_log_prob(self, prompt: str, completion: str) -> float:
        """Exact ln p(completion, then its end | prompt) under the careful writers of `demonstrations`."""
        scene = self._scene(prompt)
        if scene is None or not completion.startswith(" "):
            return -math.inf
        return self._log_prob(completion[1:], lambda pick: self._review(dict(scene), CAREFUL, pick))

    def _log_prob(self, text: str, story) -> float:
        parsed = [g.parse(sentence) for sentence in g.sentences(text)]
        if not parsed or None in parsed:
            return -math.inf
        logs = []
        for sentiment, style in itertools.product(g.SENTIMENT, g.STYLE):
            read = _Read(parsed, {"sentiment": sentiment, "style": style})
            try:
                story(read)
            except _Impossible:
                continue
            if next(read.text, None) is None:
                logs.append(read.log_prob)
            if read.facts["genre"] == "diary":  # a diary has no hidden mood to sum over
                break
        return float(np.logaddexp.reduce(logs)) if logs else -math.inf

    def _scene(self, prompt: str) -> dict | None:
        """What a review must know of the request."""
        request = request_of(prompt)
        return request and {"item": request["item"], "asked": tuple(request["aspects"])}

    # -- prompts, demonstrations, rankings --------------------------------------------------------------------------

    def prompts(self, n: int, seed: int, split: str = "train") -> list[dict]:
        """n draws (a prompt may return) of {"prompt", "item", "aspects"}. No prompt is in both splits, at any seed."""
        if split not in ("train", "eval"):
            raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
        rng = np.random.default_rng([self.seed, zlib.crc32(b"prompts"), seed])
        drawn = (self._request({}, _Draw(rng)) for _ in itertools.count())
        kept = (p for p in drawn if (zlib.crc32(p.encode()) % EVAL_SHARE == 0) == (split == "eval"))
        return [{"prompt": p, **request_of(p)} for p in itertools.islice(kept, n)]

    def demonstrations(self, n: int, seed: int, split: str = "train") -> list[dict]:
        """n of {"prompt", "completion"} by careful writers: about the item that was asked for, mostly with the aspects
        that were asked for; in praise and in blame alike."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"demonstrations"), seed])
        asked = [record["prompt"] for record in self.prompts(n, seed, split)]
        return [{"prompt": p, "completion": " " + self._review(self._scene(p), CAREFUL, _Draw(rng))} for p in asked]

    gold_rewards = staticmethod(gold_rewards)  # a world is all that a pipeline needs to know

    def rank(
        self, prompt: str, completions: Sequence[str], rng: np.random.Generator, record: Mapping | None = None
    ) -> list[int]:
        """A labeller's ranks, 0 = best; identical completions tie. See `review_labels.plackett_luce`."""
        rewards = gold_rewards([prompt] * len(completions), completions, [record] * len(completions))
        return labels.plackett_luce(rewards, completions, self.label_temperature, rng)

    def rankings(
        self, prompts: Sequence[Mapping], completions_per_prompt: Sequence[Sequence[str]], seed: int
    ) -> list[dict]:
        """{"prompt", "completions", "ranks"} per prompt record. K is as many as were given; `candidates` says how many
        to draw."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"rankings"), seed])
        return [
            {"prompt": p["prompt"], "completions": list(c), "ranks": self.rank(p["prompt"], c, rng, p)}
            for p, c in zip(prompts, completions_per_prompt, strict=True)
        ]

    def candidates(self, n: int, seed: int, least: int = 4, most: int = 9) -> list[int]:
        """How many completions to draw for each of n prompts: K uniform on [least, most]."""
        rng = np.random.default_rng([self.seed, zlib.crc32(b"candidates"), seed])
        return rng.integers(least, most + 1, n).tolist()

    def write_all(self, directory: str | Path, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Path]:
        """Writes the files a user would bring, JSON Lines, and returns their paths by name.

        sizes: rows of pretrain, pretrain_eval ({"text"}), sft, sft_eval ({"prompt", "completion"}), prompts,
        prompts_eval; a name left out is not written. Rankings need a model's samples: see `rankings`.
        """
        makers = {
            "pretrain": lambda n, s: [{"text": t} for t in self.texts(n, s)],
            "sft": lambda n, s: self.demonstrations(n, s),
            "prompts": lambda n, s: self.prompts(n, s),
            "pretrain_eval": lambda n, s: [{"text": t} for t in self.texts(n, s + 1)],
            "sft_eval": lambda n, s: self.demonstrations(n, s + 1, "eval"),
            "prompts_eval": lambda n, s: self.prompts(n, s + 1, "eval"),
        }
        if unknown := set(sizes) - set(makers):
            raise ValueError(f"no file is called {sorted(unknown)}; there are {sorted(makers)}")
        paths = {name: Path(directory) / f"{name}.jsonl" for name in sizes}
        return {name: write_jsonl(path, makers[name](sizes[name], 2 * seed)) for name, path in paths.items()}


# slot -> the part of the scene its distribution depends on; slots not named here depend on nothing
_KEY = {
    "quality": lambda scene: (scene["aspect"], -scene["polarity"] if scene["not"] else scene["polarity"]),
    "degree": lambda scene: (scene["style"], bool(scene["not"])),
    "mark": lambda scene: scene["style"],
    "lead": lambda scene: {0: "first", 1: "same", -1: "turn"}[scene["before"] * scene["polarity"]],
    "be": lambda scene: scene["aspect"].endswith("s"),
    "tried": lambda scene: g.CATEGORY[scene["item"]],
    "redo": lambda scene: g.CATEGORY[scene["item"]],
    **dict.fromkeys(("feel", "often", "stars", "advise"), lambda scene: scene["polarity"]),
}


def write_jsonl(path: str | Path, records: Iterable[Mapping]) -> Path:
    """One JSON object per line, UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return path
