"""Random walks on a small graph: the benchmark of trlX (examples/randomwalks), which trlX solves with PPO, ILQL and RFT.

    b -> k -> c -> a        "bkca": from the start b the goal a was reached in four nodes; three would have done

A language model sees walks as words over 21 letters. Walks wander at random; the task is to continue a start letter with the
shortest way to the goal. Everything is known exactly: the graph, the shortest way from each start, and what a walker of
given transition probabilities reaches, so a policy can be placed between the data it saw and the best there is.

The graph and the walks are those of numpy's legacy generator at seed 1000, which trlX's scripts pass (not the function's own
default, 1002, whose graph is trivial). They are the benchmark: `World.seed` does not change them.
Host only: numpy and the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxalign.tasks.characters import write_tokenizer
from jaxalign.tasks.reviews import write_jsonl

NODES, GOAL, LENGTH, EDGE = 21, 0, 10, 0.1  # of trlX: nodes, the goal, nodes of the longest walk, probability of an edge
LETTERS = "abcdefghijklmnopqrstu"
STARTS = LETTERS[1:]
SEED = 1000


@dataclasses.dataclass(frozen=True)
class Graph:
    """edges bool[N,N], the goal absorbing; walks: the data; shortest i[N]: nodes on the shortest way to the goal, both ends
    counted, at most LENGTH (also where there is none)."""

    edges: np.ndarray
    walks: tuple[str, ...]
    shortest: np.ndarray


@functools.cache
def graph(seed: int = SEED, walks: int = 1000) -> Graph:
    """Draws in trlX's order: an adjacency matrix until every row has an edge, then one walk after another."""
    rng = np.random.RandomState(seed)
    while True:
        edges = rng.rand(NODES, NODES) > 1 - EDGE
        np.fill_diagonal(edges, False)
        if edges.any(1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    drawn = tuple(_walk(edges, rng) for _ in range(walks))
    shortest = np.full(NODES, LENGTH)
    shortest[GOAL] = 1
    for _ in range(LENGTH):
        shortest = np.minimum(shortest, 1 + np.where(edges, shortest[None, :], LENGTH).min(1))
    return Graph(edges, drawn, np.minimum(shortest, LENGTH))


def _walk(edges: np.ndarray, rng: np.random.RandomState) -> str:
    node = GOAL
    while node == GOAL:
        node = rng.randint(NODES)
    walk = [node]
    while len(walk) < LENGTH and node != GOAL:
        node = rng.choice(np.nonzero(edges[node])[0])
        walk.append(node)
    return "".join(LETTERS[i] for i in walk)


def optimality(walk: str, g: Graph | None = None) -> float:
    """(LENGTH - nodes up to and with the first goal) / (LENGTH - nodes of the shortest way), of the walk's own start: 1 is best.
    0 where the goal is not reached, after an edge that is not there, and for anything that is no letter of a node."""
    g = g or graph()
    nodes = [LETTERS.find(c) for c in walk]
    if GOAL not in nodes or nodes[0] == GOAL:
        return 0.0
    way = nodes[: nodes.index(GOAL) + 1]
    if -1 in way or len(way) > LENGTH or not all(g.edges[a, b] for a, b in zip(way, way[1:])):
        return 0.0
    return float((LENGTH - len(way)) / (LENGTH - g.shortest[way[0]]))


def gold(prompt: str, completion: str, record: Mapping | None = None) -> float:
    """The optimality of prompt + completion: a reward for configs."""
    return optimality(prompt + completion)


def value(policy: np.ndarray, g: Graph | None = None) -> float:
    """Exact optimality of a walker with transition probabilities f[N,N], mean over the 20 starts, within LENGTH nodes."""
    g = g or graph()
    reach = np.zeros(NODES)
    step = np.asarray(policy, float).copy()
    step[GOAL] = 0.0  # who has arrived arrives no more
    arrives, at = np.eye(NODES)[GOAL], 1  # probability of arriving with exactly `at` nodes
    while at < LENGTH:
        arrives, at = step @ arrives, at + 1
        reach += (LENGTH - at) * arrives
    starts = np.arange(NODES) != GOAL
    return float((reach / (LENGTH - np.minimum(g.shortest, LENGTH - 1)))[starts].mean())


def uniform(g: Graph | None = None) -> np.ndarray:
    """f[N,N]: the walker who wrote the data."""
    g = g or graph()
    return g.edges / g.edges.sum(1, keepdims=True)


def counted(walks: Sequence[str]) -> np.ndarray:
    """f[N,N]: behaviour cloning without a network, each transition as often as these walks take it; uniform where they never were."""
    counts = np.zeros((NODES, NODES))
    for w in walks:
        for a, b in zip(w, w[1:]):
            counts[LETTERS.index(a), LETTERS.index(b)] += 1
    return np.where(counts.any(1, keepdims=True), counts / np.maximum(counts.sum(1, keepdims=True), 1), uniform())


def best(share: float, g: Graph | None = None) -> tuple[str, ...]:
    """The walks in the top `share` by optimality, and all that tie with the last of them: what filtered cloning is fed."""
    g = g or graph()
    scores = np.array([optimality(w, g) for w in g.walks])
    return tuple(w for w, s in zip(g.walks, scores) if s >= np.quantile(scores, 1 - share))


def pairs(n: int, seed: int, g: Graph | None = None) -> list[dict]:
    """n of {"prompt", "chosen", "rejected"}: two of the data's walks from one start, ranked by optimality. Starts uniform."""
    g, rng = g or graph(), np.random.default_rng([SEED, seed])
    by_start: dict[str, list[tuple[str, float]]] = {s: [] for s in STARTS}
    for w in g.walks:
        by_start[w[0]].append((w, optimality(w, g)))
    by_start = {s: ws for s, ws in by_start.items() if len({o for _, o in ws}) > 1}
    out: list[dict] = []
    while len(out) < n:
        walks = by_start[list(by_start)[rng.integers(len(by_start))]]
        (a, x), (b, y) = (walks[i] for i in rng.integers(len(walks), size=2))
        if x != y:
            chosen, rejected = (a, b) if x > y else (b, a)
            out.append({"prompt": a[0], "chosen": chosen[1:], "rejected": rejected[1:]})
    return out


@dataclasses.dataclass(frozen=True)
class World:
    """What `jaxalign pipeline` asks of a world. `seed` is that of training: it changes no walk."""

    seed: int = 0

    def gold_rewards(self, prompts: Sequence[str], completions: Sequence[str], records: Sequence | None = None) -> np.ndarray:
        return np.array([gold(p, c) for p, c in zip(prompts, completions, strict=True)])

    def demonstration_log_prob(self, prompt: str, completion: str) -> float:
        """Exact ln p(completion, then its end | start) of the walker who wrote the data: the end is never a choice."""
        nodes = [LETTERS.find(c) for c in prompt + completion]
        if -1 in nodes or len(nodes) > LENGTH or GOAL in nodes[:-1] or (len(nodes) < LENGTH and nodes[-1] != GOAL):
            return -math.inf
        p = uniform()
        with np.errstate(divide="ignore"):
            return float(sum(np.log(p[a, b]) for a, b in zip(nodes, nodes[1:])))

    def log_prob(self, text: str) -> float:
        """The same of a whole walk, its start drawn from the 20."""
        return self.demonstration_log_prob(text[:1], text[1:]) - math.log(len(STARTS)) if text[:1] in set(STARTS) else -math.inf

    def write_all(self, directory: str | Path, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Path]:
        """Writes JSON Lines, and the tokenizer of 23 ids. sizes: rows of sft (the 1000 walks first; a larger number draws on),
        sft_eval (walks of another draw), scored (as sft, with "reward": the walk's optimality), pairs (`pairs`), prompts and
        prompts_eval (the 20 starts, again and again)."""
        g = graph()
        more = graph(walks=max(sizes.get("sft", 0), sizes.get("scored", 0), 1000)).walks  # trlX's 1000, and after them others
        row = lambda w: {"prompt": w[0], "completion": w[1:]}
        fresh = lambda n: [_walk(g.edges, rng) for rng in [np.random.RandomState(SEED + 1)] for _ in range(n)]
        starts = lambda n: [{"prompt": STARTS[i % len(STARTS)]} for i in range(n)]
        makers = {
            "sft": lambda n: [row(w) for w in more[:n]],
            "sft_eval": lambda n: [row(w) for w in fresh(n)],
            "scored": lambda n: [{**row(w), "reward": optimality(w, g)} for w in more[:n]],
            "pairs": lambda n: pairs(n, seed, g),
            "prompts": starts,
            "prompts_eval": starts,
        }
        if unknown := set(sizes) - set(makers):
            raise ValueError(f"no file is called {sorted(unknown)}; there are {sorted(makers)}")
        write_tokenizer(directory, LETTERS)
        return {name: write_jsonl(Path(directory) / f"{name}.jsonl", makers[name](n)) for name, n in sizes.items()}
