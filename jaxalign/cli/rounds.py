"""Rounds of a pipeline: what the policy of now answers, who says which answer is better, and the files that the round trains on.

    data/samples_2.jsonl     prompts with answers of the policy that round 2 begins with
    data/rankings_2.jsonl    the same with ranks, 0 the best (a labeller's; people's, see below)
    data/pairs_2.jsonl       disjoint pairs of these answers (DPO)
    data/best_2.jsonl        the best against the worst (iterative DPO, 2312.16682)
    data/held_2.jsonl        answers to prompts that are in no rankings_ file, ranked the same way: what its reward model is judged on
    data/kept_2_1.jsonl      the good ones as demonstrations (RAFT, ReST, RFT, STaR), a file for every quantile

A file is made when a stage reads it and it is not there, and written under a temporary name first; so a pipeline may stop anywhere.
With `rounds.labeller` "people" it stops with the names of the files to fill, all that the stage needs, and goes on once they are there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from jaxalign.cli import lineage
from jaxalign.types import UserError

FILE = re.compile(r"(rankings|held|pairs|best|kept)_(\d+)(?:_(\d+))?\.jsonl")


class _Waits(UserError):
    """For people's labels of one file."""


def _files(config, c) -> list[tuple[str, str, int, int]]:
    """(path, kind, round, which quantile) of the files of rounds that a stage reads."""
    names = [(p, FILE.fullmatch(Path(p).name)) for p in f"{c.data.path or ''},{c.data.get('eval_path') or ''}".split(",")] if "rounds" in config else []
    return [(p, m[1], int(m[2]), int(m[3] or 1)) for p, m in names if m]


def missing(w, config, c) -> bool:
    """Whether the stage reads a file of a round that is not there yet."""
    return not all([_there(w.workdir / p) for p, *_ in _files(config, c)])


def _there(path: Path) -> bool:
    """The same answer on every process: all have looked before any of them writes."""
    from jaxalign import build

    found = path.exists()
    build.barrier(f"looked for {path.name}")
    return found


def write(w, world, config, c) -> None:
    """Makes what is missing of the files that a stage reads. All processes call it; one writes."""
    from jaxalign import build

    waits: list[str] = []
    for path, kind, k, i in _files(config, c):
        if _there(w.workdir / path):
            continue
        try:
            if kind in ("rankings", "held", "pairs"):
                ranked = _rankings(w, world, config, k, kind == "held")
                if kind == "pairs":
                    from jaxalign.cli.pipeline import disjoint_pairs

                    _save(w, path, disjoint_pairs(ranked, np.random.default_rng([config.seed, k, 2])), "no two answers differ in rank")
            else:
                _chosen(w, world, config, k, path, kind, i)
        except _Waits as e:  # people label all that a stage needs at one stop
            waits.append(str(e))
            continue
        build.barrier(f"round {k} {kind}")
    if waits:
        raise UserError(
            "\n".join(waits) + '\nwrite their rows, each with its "ranks" (one number for each answer, 0 the best, equal numbers tie), leave out those that nobody can judge, and give the same command again'
        )


def note(w, config, c) -> None:
    """A line of lineage for every such file: whose answers, whose judgement."""
    from jaxalign import build

    for path, kind, k, _ in _files(config, c):
        name = Path(path).stem
        if name in lineage.read(w.workdir):
            continue
        r = config.rounds
        who = r.labeller if kind in ("rankings", "held", "pairs") else r.scorer or r.labeller
        parents = {"policy": lineage.origin(w, build.policy_of(config, k))}
        if who and who != "people":
            parents["labeller"] = lineage.origin(w, _of_round(who, k))
        files = {p: lineage.file_hash(w.workdir / p) for p in ((f"data/held_samples_{k}.jsonl",) if kind == "held" else (f"data/samples_{k}.jsonl", f"data/rankings_{k}.jsonl")) + (path,)}
        lineage.write(w.workdir, {"name": name, "kind": "data", "round": k, "labeller": who or "world", "parents": parents, "data": {p: h for p, h in files.items() if h}})


# -- answers --------------------------------------------------------------------------------------------------------


def _samples(w, config, k: int, held: bool = False) -> list[dict]:
    """Records of round k with "completions": the answers of its policy that a person could judge. From the file, if it is there.
    held: of the prompts that read like none of those that any round asks for its rankings, the last ones of the file. (Its policy, where
    that is trained on prompts and not on labels, may have them all.)"""
    import jax

    from jaxalign import build
    from jaxalign.data import rows

    path, r = w.workdir / "data" / f"{'held_' if held else ''}samples_{k}.jsonl", config.rounds
    if not _there(path):
        every = [record for record, _ in rows.read(w.find(r.prompts))]
        asked = {build.shown(p) for p in every[: r.count * r.each]}  # a file may say the same twice
        fresh = [p for p in reversed(every) if build.shown(p) not in asked]
        if held and r.count * r.held_out > len(fresh):
            raise UserError(f"{r.prompts}: {len(fresh)} of {len(every)} prompts are none that {r.count} rounds of {r.each} ask, and {r.held_out} to judge each of them by need {r.count * r.held_out}: lower rounds.each or rounds.held_out, or leave data.eval_path empty")
        records = fresh[(k - 1) * r.held_out : k * r.held_out] if held else [every[((k - 1) * r.each + i) % len(every)] for i in range(r.each)]
        groups = _answers(w, config, k, records, jax.random.key(config.seed), "held" if held else "round")
        _save(w, path, [{**p, "completions": g} for p, g in zip(records, groups) if g], f"{build.policy_of(config, k)} answered nothing that could be read; train it longer")
        build.barrier(path.stem)
    return [record for record, _ in rows.read(str(path))]


def _answers(w, config, k: int, records: list[dict], key, what: str = "round") -> list[list[str]]:
    """`rounds.candidates` answers to each record; those that are empty or hold control characters are left out."""
    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import policy
    from jaxalign.ops import nn

    r, name = config.rounds, build.policy_of(config, k)
    params = build.load_params(w, name, w.model.specs(), f"round {k}")
    repeated = [p for p in records for _ in range(r.candidates)]
    got = policy.sample(w.model, params, build.sampling(w, r.sampling), build.prompt_rows(w, repeated, 256), w.decode, nn.fold(key, what, k), w.mesh, score=False)
    if len(got.completions) != len(repeated):
        raise UserError(f"{r.prompts}: some of the prompts cannot be asked (jaxalign inspect says which)")
    texts = iter(got.completions)
    return [[t for t in (next(texts) for _ in range(r.candidates)) if t.strip() and not rows.unclean(t)] for _ in records]


# -- labels ---------------------------------------------------------------------------------------------------------


def _rankings(w, world, config, k: int, held: bool = False) -> list[dict]:
    """{"prompt", "completions", "ranks"} of round k by its labeller, from the file if it is there."""
    from jaxalign import build
    from jaxalign.data import rows

    path, who = w.workdir / "data" / f"{'held' if held else 'rankings'}_{k}.jsonl", config.rounds.labeller
    rankable = [s for s in _samples(w, config, k, held) if len(set(s["completions"])) > 1]
    if _there(path):
        ranked = [record for record, _ in rows.read(str(path))]
        if who == "people":
            _asked(path, ranked, rankable)
        return ranked
    bare = [{"prompt": s["prompt"], "completions": s["completions"]} for s in rankable]
    if who == "people":
        todo = _save(w, _asking(path), bare, "no prompt has two answers that differ")
        raise _Waits(f"round {k} waits for labels: {todo} holds {len(bare)} prompts with their answers, to be ranked in {path}")
    if not who:
        if world is None:
            raise UserError('rounds.labeller is empty and there is no world whose labellers would rank; set it to "people", to a function as package.module:function, or to a reward model')
        ranked = world.rankings(rankable, [s["completions"] for s in rankable], config.seed + 1000 * k + 500 * held)
    else:
        scores = _scores(w, _of_round(who, k), rankable)
        ranked = [{**b, "ranks": [sum(x > own for x in set(s)) for own in s]} for b, s in zip(bare, scores)]
    ranked = [r for r in ranked if len(set(r["ranks"])) > 1]
    _save(w, path, ranked, "the answers to every prompt tie")
    build.barrier(path.stem)
    return ranked


def _asking(path: Path) -> Path:
    return path.with_name(path.name.replace("rankings_", "to_rank_").replace("held_", "to_rank_held_"))


def _asked(path: Path, ranked: list[dict], asked: list[dict]) -> None:
    """People's labels must be of what the policy of this round said."""
    row = lambda r: json.dumps([r.get("prompt"), sorted(map(str, r.get("completions") or []))])
    known = {row(s) for s in asked}
    for n, r in enumerate(ranked, 1):
        if row(r) not in known or len(r.get("ranks") or []) != len(r["completions"]):
            raise UserError(f"{path}:{n}: this is no row of {_asking(path)} with ranks for all of its answers; copy the rows and add ranks, nothing else")


def _of_round(who: str, k: int) -> str:
    return who.replace("{round}", str(k))


def _scores(w, who: str, samples: list[dict]) -> list[list[float]]:
    """A score for each answer, higher is better: of a function, or of a reward model."""
    from jaxalign import build

    if ":" in who:
        fn, out = build.imported(who), []
        for s in samples:
            record = {k: v for k, v in s.items() if k != "completions"}
            try:
                out.append([float(fn(build.shown(s), t, record)) for t in s["completions"]])
            except Exception as e:
                raise UserError(f"labeller {who} raised {type(e).__name__}: {e} for prompt {build.shown(s)[:80]!r}; it must return a number") from e
            if not np.isfinite(out[-1]).all():
                raise UserError(f"labeller {who} returned {out[-1]} for prompt {build.shown(s)[:80]!r}; it must return finite numbers")
        return out
    from jaxalign.data import sources
    from jaxalign.evals import policy
    from jaxalign.models import heads

    w = w.scored
    scalar = heads.Scalar(w.model)
    params = build.load_params(w, who, scalar.specs(), f"labeller {who}")
    # A ranking has two candidates or more; ranks are not looked at.
    rows = [{"prompt": s["prompt"], "completions": (s["completions"] * 2)[: max(2, len(s["completions"]))], "ranks": list(range(max(2, len(s["completions"]))))} for s in samples]
    batch = -(-32 // w.mesh.size) * w.mesh.size
    source = sources.rankings_source(rows, w.tokenizer, max_len=None, batch_size=batch, seed=0, template=w.template, shuffle=False, shard=w.shard_of(batch), vocab_size=w.model.config.vocab)
    got = policy.candidate_scores(scalar, params, source, w.mesh)
    if len(got) != len(samples):
        raise UserError(f"labeller {who}: {len(samples) - len(got)} of {len(samples)} prompts cannot be read (jaxalign inspect says which)")
    return [[float(x) for x in scores[: len(s["completions"])]] for s, (scores, _) in zip(samples, got)]


# -- what is chosen -------------------------------------------------------------------------------------------------


def _chosen(w, world, config, k: int, path: str, kind: str, i: int) -> None:
    """best_ and kept_ files, by the scorer."""
    import jax

    from jaxalign import build

    r = config.rounds
    who = r.scorer or r.labeller
    if who in ("", "people"):  # all that ranks say is an order
        samples = _rankings(w, world, config, k)
        scores = [[-float(x) for x in s["ranks"]] for s in samples]
    else:
        samples = _samples(w, config, k)
        scores = _scores(w, _of_round(who, k), samples)
    if kind == "best":
        _save(w, path, best_pairs(samples, scores), "all answers of every prompt tie")
        return
    if not 1 <= i <= len(r.keep.quantiles):
        raise UserError(f"{path}: rounds.keep.quantiles has {len(r.keep.quantiles)} entries, kept_{k}_1 to kept_{k}_{len(r.keep.quantiles)}")
    keep = dict(quantile=r.keep.quantiles[i - 1], of=r.keep.of, threshold=r.keep.threshold, cap=r.keep.cap)
    rows = kept(samples, scores, **keep)
    if r.hint:
        if r.keep.threshold is None or ":" not in who:
            raise UserError("rounds.hint asks again where an answer was wrong: set rounds.keep.threshold to what a right one scores, and rounds.scorer to a function")
        hint, solved = build.imported(r.hint), {build.shown(x) for x in rows}
        lost = [{k: v for k, v in s.items() if k != "completions"} for s in samples if build.shown(s) not in solved]
        if lost:
            groups = _answers(w, config, k, [{**s, "prompt": hint(s)} for s in lost], jax.random.key(config.seed), "hint")
            again = [{**s, "completions": g} for s, g in zip(lost, groups) if g]
            rows += kept(again, _scores(w, _of_round(who, k), again), **keep)
    _save(w, path, rows, f"no answer is kept (rounds.keep {build.plain(r.keep)}; the best score is {max(max(s) for s in scores):g})")


def best_pairs(samples: list[dict], scores: list[list[float]]) -> list[dict]:
    """The best answer of each prompt against its worst; where they tie there is nothing to prefer."""
    out = []
    for s, x in zip(samples, scores):
        best, worst = int(np.argmax(x)), int(np.argmin(x))
        if x[best] > x[worst]:
            out.append({"prompt": s["prompt"], "chosen": s["completions"][best], "rejected": s["completions"][worst]})
    return out


def kept(samples: list[dict], scores: list[list[float]], *, quantile: float = 0.0, of: str = "prompt", threshold: float | None = None, cap: int = 1) -> list[dict]:
    """Demonstrations {"prompt", "completion"}: answers whose score reaches `quantile` of the scores of their prompt, or of the whole
    round, and `threshold`; each text once, of a prompt the `cap` best (0: all). Above quantile 0 what scores lowest of the whole round
    is never kept, however many scores are equal (trlX's RFT has the same care for scores of few values)."""
    if of not in ("prompt", "round") or not 0 <= quantile < 1:
        raise UserError(f"rounds.keep: of {of!r} is 'prompt' or 'round', and quantiles ({quantile}) lie in [0, 1)")
    every = np.array([x for s in scores for x in s], float)
    out = []
    for s, x in zip(samples, scores):
        floor = np.quantile(x if of == "prompt" else every, quantile)
        seen: set[str] = set()
        few = []
        for j in sorted(range(len(x)), key=lambda j: -x[j]):
            text = s["completions"][j]
            if x[j] >= floor and (threshold is None or x[j] >= threshold) and (not quantile or x[j] > every.min()) and text.strip() not in seen:
                seen.add(text.strip())
                few.append({"prompt": s["prompt"], "completion": text})
        out += few[: cap or None]
    return out


def _save(w, path, rows: list[dict], why_empty: str) -> Path:
    import jax

    path = w.workdir / path
    if not rows:
        raise UserError(f"{path} would be empty: {why_empty}")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temp.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        os.replace(temp, path)
    return path
