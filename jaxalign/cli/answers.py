"""`jaxalign eval --prompts=FILE`: answers that are right or wrong, by exact match or a reward function; pass@k and maj@k."""

from __future__ import annotations

import json

import numpy as np
from absl import flags

from jaxalign.types import UserError

REFERENCES = ("answer", "answers", "reference", "references", "target", "completion", "solution")  # the first of these that a row has


def define(fv):
    flags.DEFINE_string("prompts", "", "rows with a prompt and its answer: how often does a policy find it?", flag_values=fv)
    flags.DEFINE_string("policy", "", "with --prompts: the stage that answers (default: the last finished one that writes)", flag_values=fv)
    flags.DEFINE_string("reward", "", "package.module:function (prompt, completion, record) -> float, above --correct where the answer is right (default: exact match)", flag_values=fv)
    flags.DEFINE_float("correct", 0.5, "rewards above this are right answers", flag_values=fv)
    flags.DEFINE_string("extract", "", "package.module:function completion -> the answer in it, or None; for exact match and votes (default: all of it)", flag_values=fv)
    flags.DEFINE_list("k", [], "pass@k and maj@k for these (default: 1 and --samples)", flag_values=fv)
    flags.DEFINE_integer("max_new", 256, "tokens of an answer, at most", flag_values=fv)
    flags.DEFINE_float("temperature", None, "0: greedy (default: 0 for one sample, else 1)", flag_values=fv)


def main(fv, w) -> None:
    import jax

    from jaxalign import build

    samples = max(fv.samples, 1)
    try:
        ks = sorted({int(k) for k in fv.k} or {1, samples})
    except ValueError:
        raise UserError(f"--k={','.join(fv.k)}: whole numbers, with commas between them") from None
    if not 1 <= ks[0] or ks[-1] > samples:
        raise UserError(f"--k={','.join(map(str, ks))} needs --samples={ks[-1]} or more, and k from 1 on")
    name = fv.policy or _last(w)
    temperature = fv.temperature if fv.temperature is not None else 1.0 if samples > 1 else 0.0
    reward, extract = (build.imported(x) if x else None for x in (fv.reward, fv.extract))
    out = evaluate(w, name, w.find(fv.prompts), samples=samples, ks=ks, max_new=fv.max_new, temperature=temperature, reward=reward, threshold=fv.correct, extract=extract)
    if jax.process_index() == 0:
        print(json.dumps(out, indent=1))


def evaluate(w, name: str, path: str, *, samples: int, ks, max_new: int, temperature: float, reward=None, threshold: float = 0.5, extract=None) -> dict:
    """{"policy", "problems", "samples", "accuracy", "interval", "pass@k", "maj@k", "examples"} of a stage or directory."""
    import jax

    from jaxalign import build
    from jaxalign.data import rows
    from jaxalign.evals import passes, policy, stats
    from jaxalign.ops import nn

    records = [r for r, _ in rows.read(path)]
    where = name if name not in build.stages(w.config) else str(w.stage_dir(name).absolute())
    params = build.load_params(w, where, w.model.specs(), "--policy")
    how = build.sampling(w, build.ConfigDict({"max_new": max_new, "temperature": temperature}))
    repeated = [r for r in records for _ in range(samples)]
    got = policy.sample(w.model, params, how, build.prompt_rows(w, repeated, 256), w.decode, nn.fold(jax.random.key(w.config.seed), "answers", name), w.mesh, score=False)
    if len(got.completions) != len(repeated):
        raise UserError(f"{path}: {len(repeated) - len(got.completions)} prompts became no tokens; mend those rows")
    said = [extract(c) if extract else c for c in got.completions]
    votes = [None if a is None else passes.normalised(str(a)) for a in said]
    if reward is not None:
        right = [reward(build.shown(r), c, r) > threshold for r, c in zip(repeated, got.completions)]
    else:
        right = [a is not None and passes.exact_match(str(a), _reference(r, path)) for r, a in zip(repeated, said)]
    correct, votes = np.array(right, float).reshape(-1, samples), [votes[i : i + samples] for i in range(0, len(votes), samples)]
    each = correct.mean(1)

    def rate(values: np.ndarray) -> dict:
        return {"value": float(values.mean()), "interval": list(stats.win_interval(values, np.full(len(values), 0.5)) if np.isin(values, (0, 1)).all() else stats.bootstrap(values))}

    return {
        "policy": name,
        "problems": len(records),
        "samples": samples,
        "accuracy": float(each.mean()),
        "interval": rate(each)["interval"],
        "truncated": float(got.truncated.mean()),
        "pass@k": {str(k): rate(passes.each_pass_at_k(correct, k)) for k in ks},
        "maj@k": {str(k): rate(passes.each_maj_at_k(votes, correct, k)) for k in ks},
        "examples": [{"prompt": build.shown(r), "completion": c, "correct": bool(x)} for r, c, x in list(zip(repeated, got.completions, right))[: 4 * samples : samples]],
    }


def _reference(record: dict, path: str):
    written = lambda x: np.format_float_positional(x, trim="-") if isinstance(x, float) else str(x)  # 1234567.0 as 1234567
    found = next((record[k] for k in REFERENCES if record.get(k) is not None), None)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        found = written(found)
    if isinstance(found, list):
        found = [written(x) for x in found]
    if not isinstance(found, (str, list)):
        raise UserError(f"{path}: a row has no answer to compare with ({', '.join(REFERENCES)}); its keys are {sorted(record)}. Add one, or say --reward=package.module:function")
    return found


def _last(w) -> str:
    from jaxalign import build

    writes = [n for n, c in build.stages(w.config).items() if c.objective.name not in build.REWARDS and (w.stage_dir(n) / "params" / "manifest.json").exists()]
    if not writes:
        raise UserError(f"{w.workdir} holds no finished stage that writes; say --policy=STAGE or a directory")
    return writes[-1]
