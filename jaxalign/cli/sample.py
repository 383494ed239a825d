"""Continue prompts with a trained stage, an HF directory, or whatever --run names."""

from __future__ import annotations

import dataclasses
import json
import sys

from absl import flags

from jaxalign.cli import speak
from jaxalign.cli.main import common
from jaxalign.types import UserError


def define(fv):
    common(fv, config=False)
    speak.define(fv, max_new=128)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be given several times", flag_values=fv)
    flags.DEFINE_string("prompts", None, "a JSONL file of prompts", flag_values=fv)
    flags.DEFINE_integer("n", 1, "completions per prompt", lower_bound=1, flag_values=fv)
    flags.DEFINE_integer("best_of", 0, "answer with the best of so many completions, by --reward", lower_bound=0, flag_values=fv)
    flags.DEFINE_string("reward", "", "of --best_of: a reward model's directory, or package.module:function (prompt, completion, record) -> float", flag_values=fv)
    flags.DEFINE_integer("slots", 0, "of many prompts, so many at a time, the next one as soon as one is done; 0: batches of 64", lower_bound=0, flag_values=fv)
    flags.DEFINE_string("draft", "", "speculative decoding: ngram, or a run or directory with a smaller model of the same tokenizer", flag_values=fv)
    flags.DEFINE_integer("draft_tokens", 4, "drafted at a time", lower_bound=1, flag_values=fv)
    flags.DEFINE_bool("json", False, "one JSON object per line, with the reason why it stopped: stop, length or string", flag_values=fv)
    flags.DEFINE_bool("stream", None, "show the text as it comes; default: for a single prompt on a terminal", flag_values=fv)


def main(fv, rest):
    import jax

    from jaxalign import build
    from jaxalign.data import detokenize, rows
    from jaxalign.evals import policy

    speaker = speak.opened(fv, "sample")
    w = speaker.w
    given = [*fv.prompt, *rest]
    if not all(p.strip() for p in given):
        raise UserError("a prompt is empty: there is nothing to continue; give it some text")
    records = [{"prompt": p} for p in given]
    if fv.prompts:
        records += [r for r, _ in rows.read(fv.prompts)]
    if not records:
        raise UserError("no prompt: give --prompt='...' or --prompts=FILE.jsonl")
    if bool(fv.best_of) != bool(fv.reward) or fv.best_of and (fv.n > 1 or fv.stop):
        raise UserError("--best_of=N and --reward go together, and neither with --n nor with --stop (the reward reads whole answers)")
    records = [r for r in records for _ in range(fv.n)]
    asked = [_with_system(r, fv.system) for r in records] if fv.system is not None else records
    one = len(records) == 1 and not (fv.json or fv.draft or fv.best_of) and jax.process_count() == 1
    if fv.stream and not one:
        raise UserError("--stream shows one prompt as text, in one process: leave out the other prompts, --n, --best_of, --json and --draft")
    if jax.process_index() == 0:
        for text in speaker.notes:
            speak.note(text)
    how = dataclasses.replace(speaker.how, slots=fv.slots, draft=fv.draft, draft_tokens=fv.draft_tokens)
    batch = min(max((32 * fv.slots or 64) // max(fv.best_of, 1), 1), len(records))
    source = build.prompt_rows(w, asked, batch)
    if one and (sys.stdout.isatty() if fv.stream is None else fv.stream):
        return _stream(speaker, source, build.shown(records[0]), fv.seed)
    if fv.best_of:
        return _best(speaker, source, how, fv, records)
    got = policy.sample(w.model, speaker.params, how, source, speaker.decode, jax.random.key(fv.seed), w.mesh, score=False, draft=build.drafter(w, how))
    if jax.process_index():  # every process has all samples; one prints them
        return
    for r, text, length, cut in zip(records, got.completions, got.length, got.truncated):
        prompt = build.shown(r)
        text, found = detokenize.cut_at(text, speaker.stops)
        cut = bool(cut) and found is None
        if fv.json:
            why = "string" if found is not None else "length" if cut else "stop"
            print(json.dumps({"prompt": prompt, "completion": text, "tokens": int(length), "truncated": cut, "reason": why}, ensure_ascii=False))
        else:
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
            print(f"{prompt}{bold}{text}{plain}{' ...' if cut else ''}\n")


def _best(speaker: speak.Speaker, source, how, fv, records: list[dict]) -> None:
    """Of --best_of completions the one that --reward likes most, and what choosing so means, in nats and in reward."""
    import jax

    from jaxalign import build
    from jaxalign.evals import best

    w = speaker.w
    scorer = build.scorer(w, fv.reward, speaker.decode)
    got = best.best_of(w.model, speaker.params, how, source, speaker.decode, scorer, jax.random.key(fv.seed), w.mesh, fv.best_of, draft=build.drafter(w, how))
    if jax.process_index():
        return
    for i, (r, b) in enumerate(zip(records, got.best)):
        text, cut, score = got.completions[i][b], bool(got.truncated[i, b]), float(got.scores[i, b])
        if fv.json:
            print(json.dumps({"prompt": build.shown(r), "completion": text, "tokens": int(got.length[i, b]), "truncated": cut, "reason": "length" if cut else "stop", "score": score}, ensure_ascii=False))
        else:
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
            print(f"{build.shown(r)}{bold}{text}{plain}{' ...' if cut else ''}\n")
    speak.note("best of n: mean reward, and KL to sampling once (log n - (n-1)/n; an upper bound where answers tie)")
    for row in got.curve():
        speak.note(f"  n {row['n']:4}   reward {row['score']:8.4g}   KL {row['kl']:.3f} nats")


def _with_system(record: dict, system: str) -> dict:
    """The record with a system turn before its prompt."""
    key = "messages" if "messages" in record else "prompt"
    said = record.get(key)
    turns = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if not isinstance(turns, list) or any(isinstance(m, dict) and m.get("role") == "system" for m in turns):
        raise UserError(f"--system: this prompt has a system turn of its own, or is none to put one before: {json.dumps(record, ensure_ascii=False)[:200]}")
    return {**record, key: [{"role": "system", "content": system}, *turns]}


def _stream(speaker: speak.Speaker, source, prompt: str, seed: int) -> None:
    import jax

    from jaxalign.data.sources import eval_batches
    from jaxalign.rl.rollout import check_length
    from jaxalign.rl.stream import Stream

    w, how = speaker.w, speaker.how
    check_length(w.model, source.report()["max_length"] + how.max_new, "the longest prompt with max_new")
    batch = next(iter(eval_batches(source)))
    ids = batch.tokens[0][batch.segments[0] > 0]
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    speak.shown(prompt + bold)
    got = speak.answer(speaker, Stream(w.model, speaker.params, w.mesh), ids, how, jax.random.key(seed), 0, speak.shown)
    speak.shown(f"{plain}{' ...' if got.reason in ('length', 'interrupted') else ''}\n\n")
